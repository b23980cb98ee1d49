"""The processes and devices of a run: accelerate's, so that one command serves a laptop, a GPU and many of them."""

from __future__ import annotations

import os
from typing import Any

import torch

from denoising_vit.backbones.loading import fast_dtype
from denoising_vit.errors import TrainError
from denoising_vit.training.options import Precision


def make_accelerator(device: str) -> Any:
    """The accelerator of this process, as `accelerate launch` or torchrun set it up; alone without them.

    Args:
        device: auto, or one that a user names.

    Raises:
        TrainError: if accelerate is not installed, or the device is not there.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise TrainError("training needs accelerate: pip install 'denoising-vit[train]'") from error
    kind = device.split(":")[0]
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise TrainError(f"device {device} is not there; expected auto, cpu, or one that this machine has")
    on_cpu = device == "cpu" or (device == "auto" and not _has_accelerator())
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and not (device in ("auto", "cpu") or device == "cuda"):
        raise TrainError(f"several processes share the devices among them; expected --device auto, got {device!r}")
    try:
        # Precision is ours: accelerate would keep that of a process's first run for all later ones.
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no")
    except (ValueError, RuntimeError) as error:
        raise TrainError(f"training cannot start on {device}: {error}") from error
    return accelerator


def arithmetic(device: torch.device, precision: Precision) -> torch.dtype:
    """The type that the block computes in on a device."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return named[precision] if precision in named else fast_dtype(device)


def device_of(accelerator: Any, device: str) -> str:
    """Where the backbone of this process goes."""
    return str(accelerator.device) if device in ("auto", "cuda") else device


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()
