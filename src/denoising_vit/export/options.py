"""What is exported, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from denoising_vit.errors import ExportError

Format = Literal["timm", "huggingface", "onnx", "program", "safetensors"]

#: Formats that hold weights under the names of another library, and nothing after them.
CHECKPOINTS: tuple[Format, ...] = ("timm", "huggingface")

#: Formats that hold what is computed, so that nothing of ours is needed to run them.
GRAPHS: tuple[Format, ...] = ("onnx", "program")


@dataclass(frozen=True)
class ExportOptions:
    """How a model is exported.

    Attributes:
        format: onnx; program (torch.export, .pt2); timm (safetensors that timm loads); huggingface (a directory that
            transformers loads); safetensors (our own, for dv.load_extractor). timm and huggingface hold raw and
            distilled models only, safetensors those with G or a denoiser only.
        pixels: put the normalisation into the graph: it takes images in [0, 1]. onnx and program.
        prefix: give class and register tokens as a second output. onnx and program.
        int8: write linear layers in int8, and measure what that costs. onnx.
        licence: that of the weights, for the model card; where it is known, that is the default.
    """

    format: Format = "onnx"
    pixels: bool = False
    prefix: bool = False
    int8: bool = False
    licence: str | None = None

    def validate(self) -> None:
        """Refuses options that do not go together.

        Raises:
            ExportError: naming the option.
        """
        if self.format not in get_args(Format):
            raise ExportError(f"format must be one of {', '.join(get_args(Format))}, got {self.format!r}")
        for name in ("pixels", "prefix"):
            if getattr(self, name) and self.format not in GRAPHS:
                raise ExportError(
                    f"--{name} is for formats that hold a graph ({', '.join(GRAPHS)}); {self.format} holds weights"
                )
        if self.int8 and self.format != "onnx":
            raise ExportError(f"--int8 is for onnx, got {self.format}")
