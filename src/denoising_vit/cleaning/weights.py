"""Distilled weights inside a model of the caller, and back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.loading import distilled_path, with_weights
from denoising_vit.backbones.timm_vit import TimmBackbone
from denoising_vit.errors import BackboneError

#: Attribute of a model with distilled weights: its weights before, by name, where they differ.
_BEFORE = "_weights_before"


def install(module: nn.Module, backbone: Backbone, given: str | Path | None) -> None:
    """Replace the weights of a model, in place, by distilled ones.

    Args:
        module: the model.
        backbone: a backbone of this model, with the same weights.
        given: the file; None for the package's.

    Raises:
        BackboneError: if the model is not from timm.
        WeightsError: if the file is missing or for another model, or the package has none for these weights.
        FormatError: if the file is a difference that is damaged, or from other weights.
    """
    if not isinstance(backbone, TimmBackbone):
        raise BackboneError(f"distilled weights need a ViT of timm, got {backbone.name}")
    distilled = with_weights(backbone, distilled_path(backbone, given))
    assert isinstance(distilled, TimmBackbone)
    own, other = module.state_dict(), distilled.model.state_dict()
    changed = {name: value for name, value in other.items() if not torch.equal(value, own[name])}
    exchange(module, changed)
    module.__dict__[_BEFORE] = changed


def weights_before(module: nn.Module) -> dict[str, Tensor] | None:
    """The weights of a model before :func:`install`, or None; :func:`exchange` brings them back."""
    return module.__dict__.get(_BEFORE)


def forget(module: nn.Module) -> None:
    """Forget the weights before."""
    del module.__dict__[_BEFORE]


@torch.no_grad()
def exchange(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Exchange weights of a module with those of a dictionary, both in place, so that a second call undoes it."""
    own = module.state_dict()
    for name, value in values.items():
        values[name] = own[name].clone()
        own[name].copy_(value)
