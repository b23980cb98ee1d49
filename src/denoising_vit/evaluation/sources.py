"""Sources of features with one interface, so that tasks do not depend on the kind of features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import describe, weights_key
from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import EvaluationImage
from denoising_vit.extractors import Extractor
from denoising_vit.store import FeatureStore
from denoising_vit.training_free import AveragedViT
from denoising_vit.views.crops import Crop
from denoising_vit.views.rendering import to_image

#: Colour augmentation of a crop (3, H, W) in [0, 1].
Colour = Callable[[Tensor], Tensor]

#: Mean and std of images.
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


def backbone_settings(backbone: Backbone) -> dict[str, Any]:
    """Settings that determine a backbone's features, as JSON values, without the device."""
    described = {key: value for key, value in describe(backbone).items() if key != "device"}
    shown = {"stride": backbone.stride, "mean": list(backbone.mean), "std": list(backbone.std)}
    weights = {"fingerprint": backbone.fingerprint.short, "digest": weights_key(backbone)[:32]}
    return described | weights | shown


class FeatureSource(ABC):
    """Features of any crop of an image.

    Inputs are prepared separately from the forward pass, so that another thread can prepare them ahead.

    Attributes:
        name: name in messages and tables.
        patch_size: side of a patch in pixels.
        stride: distance between patches in pixels.
        patch: patch_size and stride.
        identity: JSON values that determine the features, besides the backbone.
        backbone: JSON values that determine the backbone's features.
        device: device of the forward passes.
        cached: True if features are worth caching on disk.
    """

    def __init__(self, name: str, backbone: Backbone, identity: dict[str, Any], *, cached: bool) -> None:
        self.name, self.identity, self.cached = name, identity, cached
        self.backbone = backbone_settings(backbone)
        self._of = backbone
        self.patch_size, self.stride = backbone.patch_size, backbone.stride
        self.patch = self.patch_size, self.stride
        self.device = backbone.device

    @abstractmethod
    def inputs(self, image: EvaluationImage, crop: Crop, colour: Colour | None = None) -> Tensor:
        """Input of the forward pass for a crop of an image; inputs with the same padded size can be stacked."""

    @abstractmethod
    def features(self, inputs: Tensor) -> Tensor:
        """Features (B, h, w, C), float32, of stacked inputs.

        Raises:
            EvaluationError: if they are not finite or not a grid.
        """

    @property
    def raw(self) -> FeatureSource | None:
        """Source of the raw features that :meth:`cleaned` takes; None if these features need their own forward pass."""
        return None

    def cleaned(self, raw: Tensor) -> Tensor:
        """Clean features (h, w, C), float32 on the CPU, from features of :attr:`raw`."""
        raise NotImplementedError

    def class_tokens(self) -> FeatureSource:
        """Source of the class tokens (B, 1, 1, C) of the same crops, cached like features.

        Cleaning does not change them: they are those of the frozen backbone, or the mean of its features if it has
        none.
        """
        return ClassTokens(self._of)

    @abstractmethod
    def features_and_class(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, h, w, C) and class tokens (B, 1, 1, C) of one forward pass.

        Raises EvaluationError if they are not finite or not a grid, or if there is no forward pass.
        """

    def _checked(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        if features.ndim != 4 or (grid is not None and tuple(features.shape[1:3]) != grid):
            wanted = "(B, h, w, C)" if grid is None else f"(B, {grid[0]}, {grid[1]}, C)"
            raise EvaluationError(f"{self.name}: expected features {wanted}, got {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            count = int((~torch.isfinite(features)).sum())
            raise EvaluationError(
                f"{self.name}: {count} of {features.numel()} feature values are not finite; check the weights, or use "
                "dtype float32"
            )
        return features.float()


class ExtractorSource(FeatureSource):
    """Features of an extractor: raw, minus G, denoised or distilled.

    By default the extractor is the backbone itself, and images have the backbone's own mean and std.
    """

    def __init__(
        self,
        name: str,
        backbone: Backbone,
        extractor: Extractor | None = None,
        identity: dict[str, Any] | None = None,
        normalisation: Normalisation | None = None,
    ) -> None:
        super().__init__(name, backbone, identity or {}, cached=True)
        self._extractor, self._normalisation = extractor or backbone, normalisation
        self._mean, self._std = normalisation or (backbone.mean, backbone.std)

    def inputs(self, image: EvaluationImage, crop: Crop, colour: Colour | None = None) -> Tensor:
        """The rendered crop (3, H, W), normalised, on the CPU."""
        return crop.render(to_image(image.pixels()), self._mean, self._std, colour)

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Tensor:
        """Features (B, h, w, C) of rendered crops (B, 3, H, W)."""
        return self._checked(self._extractor(inputs.to(self.device)), self._of.grid_size(*inputs.shape[2:]))

    @property
    def raw(self) -> FeatureSource | None:
        """Source of the backbone's own features, if the extractor cleans them."""
        if not (isinstance(self._extractor, DenoisedViT) and self._extractor.backbone is self._of):
            return None
        shown = {name: value for name, value in self.identity.items() if name == "normalisation"}
        return ExtractorSource("raw", self._of, identity=shown, normalisation=self._normalisation)

    @torch.no_grad()
    def cleaned(self, raw: Tensor) -> Tensor:
        """Features (h, w, C), float32 on the CPU, from raw features (h, w, C)."""
        assert isinstance(self._extractor, DenoisedViT)
        return self._checked(self._extractor.clean(raw[None].to(self.device)), (raw.shape[0], raw.shape[1]))[0].cpu()

    @torch.no_grad()
    def features_and_class(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, h, w, C) and class tokens (B, 1, 1, C) of rendered crops (B, 3, H, W)."""
        inputs, extractor = inputs.to(self.device), self._extractor
        if isinstance(extractor, Backbone | DenoisedViT | AveragedViT):
            features, prefix = extractor.forward_with_prefix(inputs)
            raw = features if isinstance(extractor, Backbone) or prefix.shape[1] else extractor.backbone(inputs)
        else:  # any function of images; class tokens come from the backbone
            features, (raw, prefix) = extractor(inputs), self._of.forward_with_prefix(inputs)
        features = self._checked(features, self._of.grid_size(*inputs.shape[2:]))
        return features, self._checked(_class_token(raw, prefix))

    def class_tokens(self) -> FeatureSource:
        """Class tokens of the extractor if it is a backbone, else of the frozen backbone."""
        if isinstance(self._extractor, Backbone):
            return ClassTokens(self._extractor, self._normalisation, self.identity)
        return ClassTokens(self._of, self._normalisation)


class ClassTokens(ExtractorSource):
    """Class tokens of a backbone as features of a grid with one patch, (B, 1, 1, C)."""

    def __init__(
        self, backbone: Backbone, normalisation: Normalisation | None = None, identity: Mapping[str, Any] | None = None
    ) -> None:
        own = {"token": "class"} | ({} if normalisation is None else {"normalisation": list(normalisation)})
        super().__init__("class token", backbone, None, own | dict(identity or {}), normalisation)

    def features(self, inputs: Tensor) -> Tensor:
        """Class tokens (B, 1, 1, C) of rendered crops (B, 3, H, W)."""
        return self.features_and_class(inputs)[1]


class FieldSource(FeatureSource):
    """Semantic fields from one store per split, sampled at any crop; colour augmentation has no effect.

    With ``of_crops``, each crop was fitted as an image of its own.
    """

    def __init__(
        self,
        name: str,
        backbone: Backbone,
        stores: Mapping[str, FeatureStore],
        identity: dict[str, Any],
        *,
        of_crops: bool = False,
    ) -> None:
        super().__init__(name, backbone, identity, cached=False)  # the stores are already on disk
        self._stores, self._of_crops = dict(stores), of_crops

    def inputs(self, image: EvaluationImage, crop: Crop, colour: Colour | None = None) -> Tensor:
        """The semantic field at the crop's patches, (h, w, C)."""
        nodes = self._stores[image.split][image.id].field
        crop = Crop.whole(crop.size) if self._of_crops else crop
        return crop.sample(nodes, self.patch_size, self.stride)

    def features(self, inputs: Tensor) -> Tensor:
        """Return the inputs, which are already features."""
        return self._checked(inputs.to(self.device))

    def features_and_class(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Raise EvaluationError: fields have no forward pass."""
        raise no_augmented_fields(self.name)


def no_augmented_fields(name: str) -> EvaluationError:
    """The error for stage 1 fields in a protocol with colour augmentation or rotation."""
    return EvaluationError(
        f"{name}: stage 1 fields match unchanged images, while the published training rotates and recolours them; use "
        f"--preset quick, or remove {name} from --features"
    )


def _class_token(features: Tensor, prefix: Tensor) -> Tensor:
    """(B, 1, 1, C): the first of the prefix tokens (B, P, C), or the mean of features (B, h, w, C) without them."""
    token = prefix[:, 0] if prefix.shape[1] else features.mean((1, 2))
    return token[:, None, None]
