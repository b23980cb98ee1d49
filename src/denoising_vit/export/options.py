"""Options of an export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from denoising_vit.errors import ExportError

Format = Literal["timm", "huggingface", "onnx", "program", "safetensors"]

#: Formats that store only weights, with the names of another library.
CHECKPOINTS: tuple[Format, ...] = ("timm", "huggingface")

#: Formats that store the computation and run without this package.
GRAPHS: tuple[Format, ...] = ("onnx", "program")


@dataclass(frozen=True)
class ExportOptions:
    """Format and options of an export.

    Attributes:
        format: onnx; program (torch.export, .pt2); timm (safetensors for timm); huggingface (a directory for
            transformers); safetensors (for dv.load_extractor). timm and huggingface support only raw and distilled
            models, safetensors only models with G, a projection or a denoiser.
        pixels: normalise in the graph, which then takes images in [0, 1]; onnx and program.
        prefix: also output class and register tokens; onnx and program.
        int8: write linear layers in int8, and measure the loss; onnx.
        licence: licence of the weights for the model card; defaults to the known one.
    """

    format: Format = "onnx"
    pixels: bool = False
    prefix: bool = False
    int8: bool = False
    licence: str | None = None

    def validate(self) -> None:
        """Raise ExportError if options are inconsistent."""
        if self.format not in get_args(Format):
            raise ExportError(f"format must be one of {', '.join(get_args(Format))}, got {self.format!r}")
        for name in ("pixels", "prefix"):
            if getattr(self, name) and self.format not in GRAPHS:
                raise ExportError(f"--{name} applies to formats with a graph ({', '.join(GRAPHS)}), got {self.format}")
        if self.int8 and self.format != "onnx":
            raise ExportError(f"--int8 applies to onnx only, got {self.format}")
