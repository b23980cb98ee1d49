"""Teacher and student of stage 3."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from denoising_vit.backbones import Backbone
from denoising_vit.denoiser import Denoiser, FoundDenoiser, GivenDenoiser, find_denoiser, load_denoiser, source_name
from denoising_vit.errors import DenoiserError, TrainError
from denoising_vit.training.blanks import clean_blanks
from denoising_vit.training.photos import Batch
from denoising_vit.views.patch_grid import nearest_sizes


class Lesson(NamedTuple):
    """Targets of a batch, float32.

    Attributes:
        features: clean features (B, h, w, C) of each layer.
        prefixes: class token and registers (B, P, C) of each layer of the frozen backbone.
        raw: raw features (B, h, w, C) of each layer.
    """

    features: tuple[Tensor, ...]
    prefixes: tuple[Tensor, ...]
    raw: tuple[Tensor, ...]


@dataclass(frozen=True)
class DenoiserTeacher:
    """A frozen backbone with a denoiser for each trained layer.

    Attributes:
        backbone: the frozen backbone.
        layers: further layers to train, besides the backbone's own.
        denoisers: denoisers of the backbone's own layer, then of the other layers.
    """

    backbone: Backbone
    layers: tuple[int, ...]
    denoisers: tuple[FoundDenoiser, ...]

    @classmethod
    def of(
        cls, backbone: Backbone, denoiser: GivenDenoiser | None, also: Sequence[GivenDenoiser] = ()
    ) -> DenoiserTeacher:
        """A teacher with a denoiser of the backbone's own layer, and denoisers that record other layers.

        Raises:
            DenoiserError: if a denoiser belongs to another backbone, or does not record its layer.
            FormatError: if a file is damaged.
        """
        found = [find_denoiser(denoiser, backbone)]
        layers: list[int] = []
        for given in also:
            layer = _layer_of(given, backbone)
            if layer in (backbone.layer, *layers):
                raise DenoiserError(f"{source_name(given)}: duplicate denoiser for layer {layer}; expected one each")
            found.append(find_denoiser(given, backbone.at_layer(layer)))
            layers.append(layer)
        return cls(backbone, tuple(layers), tuple(found))

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that determine the targets, besides the backbone."""
        return {"denoisers": [found.digest for found in self.denoisers], "layers": list(self.layers)}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Lesson:
        """Targets of a batch."""
        raw, prefixes = features_of(self.backbone, batch.images, self.layers)
        clean = [found.denoiser(features) for found, features in zip(self.denoisers, raw, strict=True)]
        return Lesson(tuple(clean), prefixes, raw)


@dataclass(frozen=True)
class FieldTeacher:
    """The semantic fields of stage 1, sampled at the patches of each view.

    Attributes:
        backbone: the frozen backbone, for class token and registers.
    """

    backbone: Backbone
    layers: tuple[int, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """Empty: the photos' identity includes the fields."""
        return {"fields": True}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Lesson:
        """Targets of a batch."""
        assert batch.fields is not None
        raw, prefixes = features_of(self.backbone, batch.images, ())
        return Lesson((batch.fields.to(raw[0].device),), prefixes, raw)


Teacher = DenoiserTeacher | FieldTeacher


@torch.no_grad()
def blank_lesson(teacher: Teacher, images: Tensor) -> Lesson:
    """Targets of content-free images (B, 3, H, W)."""
    raw, prefixes = features_of(teacher.backbone, images, teacher.layers)
    return Lesson(tuple(clean_blanks(one) for one in raw), prefixes, raw)


def features_of(
    backbone: Backbone, images: Tensor, layers: Sequence[int]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Features (B, h, w, C) and prefix tokens (B, P, C) of the backbone's own layer and of others, in one pass."""
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
            f"{source_name(given)} does not record its layer of {backbone.name}; expected a denoiser that was trained "
            "with --layer"
        )
    return layer


#: Patches per side of the image used to find the parameters to train.
_PROBED = 4


class Student(nn.Module):
    """The trained backbone. Its forward pass gives all inputs of the loss, so that gradients are synchronized.

    Args:
        backbone: the backbone, float32.
        layers: further layers to train, besides its own.
    """

    def __init__(self, backbone: Backbone, layers: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.backbone, self.layers = backbone, layers

    def forward(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Features (B, h, w, C) and prefix tokens (B, P, C) of each trained layer, float32."""
        return features_of(self.backbone, images, self.layers)

    def require_grad(self, size: tuple[int, int], *, prefix: bool) -> None:
        """Freeze parameters without gradients (blocks after the last layer, heads); processes would wait for these.

        Args:
            size: (H, W) of an image that the model accepts.
            prefix: whether the loss has a term for class token and registers.

        Raises:
            TrainError: if no parameter has a gradient.
        """
        self.requires_grad_(True)
        if self.backbone.depth is not None:  # a module may accept no other size
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
    """An exponential moving average (EMA) of the trained weights.

    Args:
        model: model with the initial weights.
        decay: weight of the old average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in trained(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the current weights."""
        for name, value in trained(model):
            self.values[name].lerp_(value, 1 - self.decay)


def trained(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Names and values of the trained parameters."""
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)


def blocks_of(student: Student) -> nn.ModuleList | nn.Sequential:
    """The transformer blocks, for sharding.

    Raises:
        TrainError: if the model is not a timm model.
    """
    blocks = getattr(getattr(student.backbone, "model", None), "blocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise TrainError(f"--shard needs a timm model; got {student.backbone.name}")
    return blocks


def trained_groups(student: Student, weight_decay: float, layer_decay: float) -> list[Any]:
    """The trained parameters, in groups with layer-wise learning rate decay unless the decay is 1.

    Raises:
        TrainError: if the decay is not 1 and the model is not a timm model.
    """
    model: Any = getattr(student.backbone, "model", None)
    if layer_decay == 1:
        return [parameter for _, parameter in trained(student)]
    if not hasattr(model, "group_matcher"):
        raise TrainError(f"--layer-decay needs a timm model; got {student.backbone.name}")
    from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]

    return param_groups_layer_decay(model, weight_decay, weight_decay_exclude_1d=False, layer_decay=layer_decay)
