"""Processes and devices of a run (accelerate), and weights sharded between processes (FSDP)."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from denoising_vit.backbones.runtime import fast_dtype
from denoising_vit.errors import TrainError
from denoising_vit.files import extra_hint
from denoising_vit.training.options import Precision

T = TypeVar("T")

#: Timeout of communication between processes. A process may fit photos for hours longer than another, but launchers
#: default to 10 or 30 minutes. The launcher detects processes that die.
_PATIENCE = timedelta(days=7)


def make_accelerator(device: str) -> Any:
    """The accelerator of this process, as configured by `accelerate launch` or torchrun, or for a single process.

    Args:
        device: auto, or the name of a device.

    Raises:
        TrainError: if accelerate is not installed, or the device is not available.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError as error:
        raise TrainError(f"training needs accelerate: install {extra_hint('train')}") from error
    if not _is_available(device):
        raise TrainError(f"device {device} is not available; expected auto, cpu, or a device of this machine")
    has_accelerator = torch.cuda.is_available() or torch.backends.mps.is_available()
    on_cpu = device == "cpu" or (device == "auto" and not has_accelerator)
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 or "LOCAL_RANK" in os.environ
    if launched and device not in ("auto", "cpu", "cuda"):
        raise TrainError(f"with a launcher, the processes share the devices; expected --device auto, got {device!r}")
    try:
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # accelerate uses the current device
        # No mixed precision: accelerate would keep the setting of a process's first run for all later runs.
        patient = InitProcessGroupKwargs(timeout=_PATIENCE)
        return Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[patient])
    except (ValueError, RuntimeError) as error:
        raise TrainError(f"training cannot start on {device}: {error}") from error


def arithmetic(device: torch.device, precision: Precision) -> torch.dtype:
    """The autocast dtype on a device."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return named[precision] if precision in named else fast_dtype(device)


def device_of(accelerator: Any, device: str) -> str:
    """The device of this process's backbone."""
    return str(accelerator.device) if device in ("auto", "cuda") else device


def from_first(accelerator: Any, value: T) -> T:
    """Broadcast the first process's value to all processes, whose own values may differ, for example on a shared disk.

    Args:
        accelerator: the processes; all of them must call this.
        value: any picklable value; ignored in all processes but the first.
    """
    from accelerate.utils import broadcast_object_list

    values = [value]
    broadcast_object_list(values)
    return values[0]


def from_all(accelerator: Any, value: T) -> list[T]:
    """Gather the values of all processes by rank, in all processes."""
    from accelerate.utils import gather_object

    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def _is_available(device: str) -> bool:
    """True if this machine has the device; the backbone checks unknown names."""
    kind, _, number = device.partition(":")
    if kind == "mps":
        return torch.backends.mps.is_available()
    if kind != "cuda":
        return True
    return torch.cuda.is_available() and (not number or number in map(str, range(torch.cuda.device_count())))


def shard(model: nn.Module, blocks: nn.ModuleList | nn.Sequential, accelerator: Any) -> None:
    """Shard the parameters between the processes; blocks are gathered one at a time as needed (FSDP2).

    Args:
        model: the model; use only its forward pass.
        blocks: its transformer blocks.
        accelerator: processes and devices.
    """
    # The warning is about in-place changes of outputs that are views; there are none here.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def gathered(value: Tensor) -> Tensor:
    """Gather a sharded tensor, in all processes; other tensors are returned unchanged."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def shared_like(value: Tensor, other: Tensor) -> Tensor:
    """Shard a whole tensor like another tensor of its shape; unchanged if the other is not sharded."""
    if not isinstance(other, DTensor) or value.shape != other.shape:
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)
