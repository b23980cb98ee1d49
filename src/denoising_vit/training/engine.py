"""The processes and devices of a run: accelerate's, so that one command serves a laptop, a GPU and many of them."""

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
from denoising_vit.training.options import Precision

T = TypeVar("T")

#: How long processes wait for each other: one may have to fit photos for hours more than another, or make all pairs of
#: a long run alone; launchers allow for ten minutes or thirty. One that dies is noticed by the launcher, not by this.
_PATIENCE = timedelta(days=7)


def make_accelerator(device: str) -> Any:
    """The accelerator of this process, as `accelerate launch` or torchrun set it up; alone without them.

    Args:
        device: auto, or one that a user names.

    Raises:
        TrainError: if accelerate is not installed, or the device is not there.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError as error:
        raise TrainError("training needs accelerate: pip install 'denoising-vit[train]'") from error
    if not _is_there(device):
        raise TrainError(f"device {device} is not there; expected auto, cpu, or one that this machine has")
    on_cpu = device == "cpu" or (device == "auto" and not _has_accelerator())
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 or "LOCAL_RANK" in os.environ
    if launched and device not in ("auto", "cpu", "cuda"):
        raise TrainError(f"processes of a launcher share the devices; expected --device auto, got {device!r}")
    try:
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # accelerate takes the present one
        # Precision is ours: accelerate would keep that of a process's first run for all later ones.
        patient = InitProcessGroupKwargs(timeout=_PATIENCE)
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[patient])
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


def from_first(accelerator: Any, value: T) -> T:
    """What the first process has, in all of them: one decides, whatever the others read from a shared disk.

    Args:
        accelerator: the processes; all of them must ask.
        value: any that can be pickled; of other processes than the first it is passed over.
    """
    from accelerate.utils import broadcast_object_list

    values = [value]
    broadcast_object_list(values)
    return values[0]


def from_all(accelerator: Any, value: T) -> list[T]:
    """What each process has, in the order of their ranks, in all of them."""
    from accelerate.utils import gather_object

    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def _is_there(device: str) -> bool:
    """Whether this machine has a device; of names that are none, the backbone tells."""
    kind, _, number = device.partition(":")
    if kind == "mps":
        return torch.backends.mps.is_available()
    if kind != "cuda":
        return True
    return torch.cuda.is_available() and (not number or number in map(str, range(torch.cuda.device_count())))


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def shard(model: nn.Module, blocks: nn.ModuleList | nn.Sequential, accelerator: Any) -> None:
    """Leaves each process with its part of the parameters, which are brought together block by block as they are used.

    Args:
        model: its forward pass is the only way in.
        blocks: the parts of it that are brought together one after another.
        accelerator: processes and devices.
    """
    # It warns of outputs that are views, which must not be changed in place; nothing here is.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def gathered(value: Tensor) -> Tensor:
    """A whole tensor of one that is shared out; all processes must ask. Others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def shared_like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor shared out as another of its shape is; as it is where that one is whole."""
    if not isinstance(other, DTensor) or value.shape != other.shape:
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)
