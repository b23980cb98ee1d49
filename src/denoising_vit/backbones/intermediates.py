"""What a backbone gives besides its own output: which blocks are asked for, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from denoising_vit.errors import BackboneError


class Intermediates(NamedTuple):
    """What decoders that read several layers take, all of one forward pass; float32.

    Attributes:
        features: what the extractor returns for the same image, (B, h, w, C).
        prefix: class token and registers beside them, (B, P, C).
        layers: the backbone's raw features after each block asked for, in the order asked for, (B, h, w, C) each.
        layer_prefixes: the prefix tokens of these blocks, (B, P, C) each.
    """

    features: Tensor
    prefix: Tensor
    layers: tuple[Tensor, ...]
    layer_prefixes: tuple[Tensor, ...]


def block_numbers(layers: Sequence[int], depth: int | None, name: str) -> tuple[int, ...]:
    """Which blocks are meant, counted from 0, in the order asked for.

    Args:
        layers: their indices, negative from the end.
        depth: how many the model has; None where that is not known.
        name: what the model is called.

    Raises:
        BackboneError: if the model's blocks are not known, or these are no indices of its blocks.
    """
    if depth is None:
        raise BackboneError(
            f"{name} is a module of its own: where its blocks are is not known, so it has no intermediate layers to "
            'give. Load a model by its timm name, load_backbone("NAME", weights=FILE), or wrap a module that returns '
            "the layer"
        )
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise BackboneError(
            f"layers must be a list of block indices, got {layers!r}; the last four of {name} are "
            f"layers={list(range(depth))[-4:]}"
        )
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool) or not -depth <= layer < depth:
            raise BackboneError(f"{name} has {depth} blocks: layers must be {-depth} to {depth - 1}, got {layer!r}")
    return tuple(layer % depth for layer in layers)
