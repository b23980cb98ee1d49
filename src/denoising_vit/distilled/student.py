"""What is trained: the whole ViT."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from denoising_vit.backbones import Backbone
from denoising_vit.distilled.teacher import features_of
from denoising_vit.errors import TrainError
from denoising_vit.views.patch_grid import nearest_sizes

#: Patches along a side of the image that shows which parameters are used.
_PROBED = 4


class Student(nn.Module):
    """A backbone whose one forward pass gives all that the loss takes: what goes around it is never synchronised.

    Args:
        backbone: float32; it is trained itself.
        layers: the layers that are taught besides its own.
    """

    def __init__(self, backbone: Backbone, layers: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.backbone, self.layers = backbone, layers

    def forward(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Features (B, h, w, C) and prefix tokens (B, P, C) of each layer that is taught, float32."""
        return features_of(self.backbone, images, self.layers)

    def require_grad(self, size: tuple[int, int], *, prefix: bool) -> None:
        """Lets the parameters be trained that decide what is taught.

        Others (blocks behind the last layer, heads) get no gradients, which processes would wait for.

        Args:
            size: (H, W) of images that the model takes.
            prefix: whether class token and registers are taught as well.

        Raises:
            TrainError: if no parameter decides anything.
        """
        self.requires_grad_(True)
        if self.backbone.depth is not None:  # of modules it is not known whether they take other sizes
            side = nearest_sizes(_PROBED * self.backbone.patch_size, self.backbone.patch_size, self.backbone.stride)[0]
            size = side, side
        features, prefixes = self(torch.zeros(1, 3, *size))
        outputs = torch.cat([output.flatten() for output in ((*features, *prefixes) if prefix else features)])
        if not outputs.requires_grad:
            raise TrainError(f"{self.backbone.name} has no weights to train; expected a model of torch modules")
        outputs.sum().backward()
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None


class Average:
    """A moving average of the weights that are trained.

    Args:
        model: it begins as its weights are.
        decay: share of the old.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in trained(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the weights as they are now."""
        for name, value in trained(model):
            self.values[name].lerp_(value, 1 - self.decay)


def trained(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Names and values of the parameters that are trained."""
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)


def blocks_of(student: Student) -> nn.ModuleList | nn.Sequential:
    """Transformer blocks, which are shared out one by one.

    Raises:
        TrainError: if the model is none of timm's.
    """
    blocks = getattr(getattr(student.backbone, "model", None), "blocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise TrainError(f"--shard needs a timm model, whose blocks are known; got {student.backbone.name}")
    return blocks


def trained_groups(student: Student, weight_decay: float, layer_decay: float) -> list[Any]:
    """Parameters that are trained, with their share of the learning rate: less the further from the output.

    Raises:
        TrainError: if layers are to differ and the model is none of timm's.
    """
    model: Any = getattr(student.backbone, "model", None)
    if layer_decay == 1:
        return [parameter for _, parameter in trained(student)]
    if not hasattr(model, "group_matcher"):
        raise TrainError(f"--layer-decay needs a timm model, whose blocks are known; got {student.backbone.name}")
    from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]

    return param_groups_layer_decay(model, weight_decay, weight_decay_exclude_1d=False, layer_decay=layer_decay)
