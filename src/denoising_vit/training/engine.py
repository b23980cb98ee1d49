"""The processes and devices of a run: accelerate's, so that one command serves a laptop, a GPU and many of them."""

from __future__ import annotations

import os
from typing import Any

import torch

from denoising_vit.backbones.loading import fast_dtype
from denoising_vit.errors import TrainError
from denoising_vit.training.options import Precision


def make_accelerator(device: str, precision: Precision) -> Any:
    """The accelerator of this process, as `accelerate launch` or torchrun set it up; alone without them.

    Args:
        device: auto, or one that a user names.
        precision: of the block's arithmetic.

    Raises:
        TrainError: if accelerate is not installed, the device is not there, or it has no bfloat16.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise TrainError("training needs accelerate: pip install 'denoising-vit[train]'") from error
    on_cpu = device == "cpu" or (device == "auto" and not _has_accelerator())
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and not (device in ("auto", "cpu") or device == "cuda"):
        raise TrainError(f"several processes share the devices among them; expected --device auto, got {device!r}")
    fast = fast_dtype(torch.device("cpu" if on_cpu else "cuda" if torch.cuda.is_available() else "mps"))
    bfloat16 = precision == "bfloat16" or (precision == "auto" and fast == torch.bfloat16)
    try:
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="bf16" if bfloat16 else "no")
    except (ValueError, RuntimeError) as error:
        raise TrainError(f"training cannot start on {device}: {error}") from error
    return accelerator


def device_of(accelerator: Any, device: str) -> str:
    """Where the backbone of this process goes."""
    return str(accelerator.device) if device in ("auto", "cuda") else device


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()
