"""Export of models to timm, Hugging Face, ONNX, ``torch.export`` and extractor files, with a check and a model card."""
