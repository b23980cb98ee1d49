"""What the student is taught: clean features of a frozen backbone, and its class token and registers as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.denoiser import Denoiser, FoundDenoiser, GivenDenoiser, find_denoiser, load_denoiser, source_name
from denoising_vit.distilled.photos import Batch
from denoising_vit.errors import DenoiserError


class Lesson(NamedTuple):
    """What is taught of a batch; float32.

    Attributes:
        features: clean ones (B, h, w, C) of each layer that is taught.
        prefixes: class token and registers (B, P, C) of each, of the frozen backbone.
        raw: features of each layer before they were cleaned.
    """

    features: tuple[Tensor, ...]
    prefixes: tuple[Tensor, ...]
    raw: tuple[Tensor, ...]


@dataclass(frozen=True)
class DenoiserTeacher:
    """A frozen backbone with a denoiser for each layer that is taught.

    Attributes:
        backbone: frozen; its own layer is the first.
        layers: the other layers that are taught.
        denoisers: of its own layer, then of the others.
    """

    backbone: Backbone
    layers: tuple[int, ...]
    denoisers: tuple[FoundDenoiser, ...]

    @classmethod
    def of(
        cls, backbone: Backbone, denoiser: GivenDenoiser | None, also: Sequence[GivenDenoiser] = ()
    ) -> DenoiserTeacher:
        """With a denoiser of the backbone's own layer, and some of other layers, which they name themselves.

        Raises:
            DenoiserError: if one is for another backbone, or does not say which layer it is for.
            FormatError: if a file is damaged.
        """
        found = [find_denoiser(denoiser, backbone)]
        layers: list[int] = []
        for given in also:
            layer = _layer_of(given, backbone)
            if layer in (backbone.layer, *layers):
                raise DenoiserError(f"{source_name(given)}: a second denoiser of layer {layer}; expected one each")
            found.append(find_denoiser(given, backbone.at_layer(layer)))
            layers.append(layer)
        return cls(backbone, tuple(layers), tuple(found))

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the lessons besides the backbone; JSON values."""
        return {"denoisers": [found.digest for found in self.denoisers], "layers": list(self.layers)}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Lesson:
        """The lesson of a batch."""
        raw, prefixes = features_of(self.backbone, batch.images, self.layers)
        clean = [found.denoiser(features) for found, features in zip(self.denoisers, raw, strict=True)]
        return Lesson(tuple(clean), prefixes, raw)


@dataclass(frozen=True)
class FieldTeacher:
    """The semantic fields of stage 1, sampled at the patches of a view.

    Attributes:
        backbone: frozen; of its class token and registers.
    """

    backbone: Backbone
    layers: tuple[int, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """Fields are recorded with the photos."""
        return {"fields": True}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Lesson:
        """The lesson of a batch."""
        assert batch.fields is not None
        raw, prefixes = features_of(self.backbone, batch.images, ())
        return Lesson((batch.fields.to(raw[0].device),), prefixes, raw)


Teacher = DenoiserTeacher | FieldTeacher


def features_of(
    backbone: Backbone, images: Tensor, layers: Sequence[int]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Features (B, h, w, C) and prefix tokens (B, P, C) of a backbone's own layer, then of others, in one pass."""
    if not layers:
        features, prefix = backbone.forward_with_prefix(images)
        return (features,), (prefix,)
    found = backbone.forward_intermediates(images, layers)
    return (found.features, *found.layers), (found.prefix, *found.layer_prefixes)


def _layer_of(given: GivenDenoiser, backbone: Backbone) -> int:
    denoiser = given.denoiser if isinstance(given, FoundDenoiser) else given
    if not isinstance(denoiser, Denoiser):
        denoiser = load_denoiser(denoiser)
    layer = (denoiser.trained_for or {}).get("layer")
    if not isinstance(layer, int):
        raise DenoiserError(
            f"{source_name(given)}: it does not say which layer of {backbone.name} it is for; expected a denoiser that "
            "was trained with --layer"
        )
    return layer
