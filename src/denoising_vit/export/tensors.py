"""Tensors in safetensors files, as all exports write them."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from denoising_vit.files import atomic_path


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a file that all may read who may read its folder; safetensors alone makes it private."""
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def float_state(module: nn.Module) -> dict[str, Tensor]:
    """A state dict in float32 on the CPU, in memory of its own, as safetensors wants it."""
    return {key: value.detach().float().cpu().clone().contiguous() for key, value in module.state_dict().items()}
