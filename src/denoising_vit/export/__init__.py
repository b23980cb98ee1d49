"""Taking models out: to timm, Hugging Face, ONNX, ``torch.export`` and our own files, checked and documented."""
