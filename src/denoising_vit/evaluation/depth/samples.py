"""What a depth probe is trained on, step by step: random crops, or features of whole images that are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from denoising_vit.evaluation.data import JudgedSet
from denoising_vit.evaluation.depth.augmentation import Drawn, draw, require_room
from denoising_vit.evaluation.depth.head import DepthProbe
from denoising_vit.evaluation.depth.images import DepthImage
from denoising_vit.evaluation.depth.losses import depth_loss, within
from denoising_vit.evaluation.depth.protocol import DepthProtocol
from denoising_vit.evaluation.features import FeatureCache, see, shown_size
from denoising_vit.evaluation.probing import chosen
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.files import compact
from denoising_vit.views.crops import Crop
from denoising_vit.views.patch_grid import patch_count

#: What a stream of draws is for.
_CROPS = 3

#: Threads that decode and render crops.
_RENDERERS = 4


@dataclass(frozen=True, eq=False)
class KeptDepth:
    """Features of whole images, taken once; a patch's truth is the mean of its known depths.

    Attributes:
        features: (h, w, C) of each image.
        tokens: class tokens (1, 1, C); empty where none are used.
        truths: (h, w) in metres, 0 where no pixel of a patch has a depth.
        protocol: how the probe is trained.
        device: where probes are.
        seed: of the order.
    """

    features: Sequence[Tensor]
    tokens: Sequence[Tensor]
    truths: Sequence[Tensor]
    protocol: DepthProtocol
    device: torch.device
    seed: int = 0

    @classmethod
    def take(
        cls,
        source: FeatureSource,
        images: JudgedSet[DepthImage],
        protocol: DepthProtocol,
        cache: FeatureCache | None,
        progress: Callable[[], None] = lambda: None,
    ) -> Self:
        """Sees each image of a set once."""
        shown = [(image, Crop.whole(shown_size(protocol.size, image, source))) for image in images.images]
        features = [compact(one) for one in see(source, shown, cache, progress)]
        tokens = [compact(one) for one in see(source.class_tokens(), shown, cache)] if protocol.class_token else []
        patch = source.patch_size, source.stride
        truths = [_at_patches(within(image.metres(), protocol.farthest), crop.size, patch) for image, crop in shown]
        return cls(features, tokens, truths, protocol, source.device)

    @property
    def channels(self) -> int:
        """C of features and class token together."""
        return self.features[0].shape[-1] + (self.tokens[0].shape[-1] if self.tokens else 0)

    def of(self, places: Sequence[int]) -> Self:
        """Of some of the images."""
        pick = [
            [values[place] for place in places] for values in (self.features, self.tokens or [], self.truths) if values
        ]
        features, tokens, truths = pick if self.tokens else (pick[0], [], pick[1])
        return type(self)(features, tokens, truths, self.protocol, self.device, self.seed)

    def loss(self, probe: DepthProbe, step: int) -> Tensor:
        """The loss of a step's images, the mean over groups of one grid."""
        batch = min(self.protocol.batch, len(self.features))
        by_grid: dict[tuple[int, ...], list[int]] = {}
        for place in chosen(len(self.features), batch, step, self.seed):
            by_grid.setdefault(tuple(self.features[place].shape), []).append(place)
        total = torch.zeros((), device=self.device)
        for places in by_grid.values():
            features, truth = (
                torch.stack([values[place] for place in places]).to(self.device).float()
                for values in (self.features, self.truths)
            )
            token = None
            if self.tokens:
                token = torch.stack([self.tokens[place] for place in places]).to(self.device).float()
            mean_only = step < self.protocol.mean_first
            loss = depth_loss(probe.at_patches(features, token), truth, self.protocol.gradient, mean_only=mean_only)
            total = total + loss * len(places) / batch
        return total


class DepthCrops:
    """Random crops of images, rendered and passed through the model in every step, as published.

    Args:
        source: of the features.
        images: to train on.
        part: rows and columns that crops come from; None for whole images.
        protocol: sizes, ranges and probabilities.
        seed: of the order, the crops and the colours.

    Raises:
        EvaluationError: if an image is smaller than a crop.
    """

    def __init__(
        self,
        source: FeatureSource,
        images: JudgedSet[DepthImage],
        part: tuple[tuple[int, int], tuple[int, int]] | None,
        protocol: DepthProtocol,
        seed: int,
    ) -> None:
        for image in images.images:  # now, not hours later
            require_room(image, protocol, part)
        self._source, self._images, self._part = source, images.images, part
        self._protocol, self._seed = protocol, seed
        self._pool = ThreadPoolExecutor(_RENDERERS, "render", torch.set_num_threads, (torch.get_num_threads(),))
        self._ahead: dict[int, list[Future[tuple[Tensor, Drawn, Tensor]]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def channels(self) -> int:
        """C of features and class token together."""
        inputs, _, _ = self._draw(0, 0, 0)
        features, token = self._source.features_and_class(inputs[None])
        return features.shape[-1] + (token.shape[-1] if self._protocol.class_token else 0)

    def loss(self, probe: DepthProbe, step: int) -> Tensor:
        """The loss of a step's crops."""
        self._render(step)
        if self._source.device.type != "cpu" and step + 1 < self._protocol.steps:
            self._render(step + 1)  # while the accelerator works on this one
        drawn = [future.result() for future in self._ahead.pop(step)]
        features, token = self._source.features_and_class(torch.stack([inputs for inputs, _, _ in drawn]))
        crop = drawn[0][1].crop
        rows, columns = crop.places_shown(crop.size if self._protocol.pads == "stretched" else None)
        patch = self._source.patch_size, self._source.stride
        depth = probe.at_pixels(features, token if self._protocol.class_token else None, rows, columns, patch)
        truth = torch.stack([truth for _, _, truth in drawn]).to(depth.device)
        mean_only = step < self._protocol.mean_first
        together, gradient = self._protocol.together or len(truth), self._protocol.gradient
        losses = [
            depth_loss(ours, theirs, gradient, mean_only=mean_only)
            for ours, theirs in zip(depth.split(together), truth.split(together), strict=True)
        ]
        return torch.stack(losses).mean()

    def _render(self, step: int) -> None:
        if step not in self._ahead:
            batch = chosen(len(self._images), self._protocol.batch, step, self._seed)
            self._ahead[step] = [self._pool.submit(self._draw, index, step, place) for place, index in enumerate(batch)]

    def _draw(self, index: int, step: int, place: int) -> tuple[Tensor, Drawn, Tensor]:
        """Inputs of the forward pass, the sample, and its depth (H, W)."""
        chance = np.random.default_rng([self._seed, _CROPS, step, place])
        patch = self._source.patch_size, self._source.stride
        drawn = draw(self._images[index], self._protocol, self._part, patch, chance)
        inputs = self._source.inputs(drawn.image, drawn.crop, drawn.colours)
        return inputs, drawn, within(drawn.truth(), self._protocol.farthest)


def _at_patches(metres: Tensor, size: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Means of the known depths (H, W) over the area of each patch (h, w), 0 where there are none.

    Args:
        metres: of all pixels, 0 where depth is not known.
        size: height and width at which the image is shown.
        patch: size and stride of the patches in pixels of what is shown.
    """
    known = (metres > 0).float()
    down, across = (_overlaps(have, side, *patch) for have, side in zip(metres.shape, size, strict=True))
    area, total = (down @ values @ across.T for values in (known, metres * known))
    return torch.where(area > 0, total / area.clamp(min=1e-9), torch.zeros_like(total))


def _overlaps(pixels: int, side: int, patch_size: int, stride: int) -> Tensor:
    """How much of each pixel each patch covers along one side, (patches, pixels); the pixels are shown as ``side``."""
    first = np.arange(patch_count(side, patch_size, stride))[:, None] * stride
    start, stop = first * pixels / side, (first + patch_size) * pixels / side
    edges = np.arange(pixels)
    shared = np.minimum(stop, edges + 1) - np.maximum(start, edges)
    return torch.from_numpy(np.where(shared > 1e-6, shared, 0)).float()  # less is rounding
