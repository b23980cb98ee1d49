"""Taking models out: to timm, Hugging Face, ONNX, ``torch.export`` and our own files, checked and documented."""

from denoising_vit.export.comparison import Comparison
from denoising_vit.export.exporting import export_extractor
from denoising_vit.export.extractor_file import load_extractor
from denoising_vit.export.options import ExportOptions, Format
from denoising_vit.export.verifying import Verdict, verify_export

__all__ = [
    "Comparison",
    "ExportOptions",
    "Format",
    "Verdict",
    "export_extractor",
    "load_extractor",
    "verify_export",
]
