"""Weights shared out between processes, where one device cannot hold them: torch's fully sharded data parallel."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


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
