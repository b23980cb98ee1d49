"""Tensors in safetensors files, as all exports write them."""

from __future__ import annotations

from torch import Tensor, nn


def float_state(module: nn.Module) -> dict[str, Tensor]:
    """A state dict in float32 on the CPU, in memory of its own, as safetensors wants it."""
    return {key: value.detach().float().cpu().clone().contiguous() for key, value in module.state_dict().items()}
