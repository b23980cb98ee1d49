"""Install distilled weights in a model in use, and restore its own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.loading import distilled_path, with_weights
from denoising_vit.backbones.timm_vit import TimmBackbone
from denoising_vit.errors import BackboneError

#: Attribute of a model with distilled weights: its own weights, by name, where they differ.
_OWN = "_own_weights"


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
    distilled = with_weights(backbone, distilled_path(backbone, given, how="distilled=FILE"))
    assert isinstance(distilled, TimmBackbone)
    own = module.state_dict()
    changed = {name: value for name, value in distilled.model.state_dict().items() if not torch.equal(value, own[name])}
    # Names may share a tensor, so all values are kept before any is written.
    module.__dict__[_OWN] = {name: own[name].clone() for name in changed}
    write(module, changed)


def restore(module: nn.Module) -> None:
    """Undo :func:`install`; a module without distilled weights is unchanged."""
    if _OWN in module.__dict__:
        write(module, module.__dict__.pop(_OWN))


def installed(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the distilled weights of a module, by name; empty if it has none."""
    present = module.state_dict() if _OWN in module.__dict__ else {}
    return {name: present[name].clone() for name in module.__dict__.get(_OWN, ()) if name in present}


@torch.no_grad()
def write(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Write weights by name, in place; names that the module no longer has in this shape are skipped."""
    present = module.state_dict()
    for name, value in values.items():
        if name in present and present[name].shape == value.shape:
            present[name].copy_(value)
