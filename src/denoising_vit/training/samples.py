"""The views of a training step: a function of seed and step, so that a resumed run needs no sampler state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from denoising_vit.training.options import ViewOptions
from denoising_vit.views.crops import Crop
from denoising_vit.views.plan import areas_and_ratios, random_stream

#: Purposes of random numbers; each has its own stream.
_SPLIT, _ORDER, _STEP, _KEPT, _FRESH, _BLANK = range(6)


@dataclass(frozen=True)
class Sample:
    """One view of one image.

    Attributes:
        image: index in the store or data set.
        size: index of the size among those of the run.
        number: number of the kept view; None for a new view.
        crop: region of the image.
    """

    image: int
    size: int
    number: int | None
    crop: Crop


@dataclass(frozen=True)
class Sampler:
    """Draws the samples of any step: each image once per epoch, one size per step.

    Attributes:
        images: indices of the images to train on.
        sizes: (H, W) of the views, equally likely.
        views: which views.
        seed: seed of the run.
        pairs: number of samples per step, of all processes.
    """

    images: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    views: ViewOptions
    seed: int
    pairs: int

    def step(self, step: int) -> list[Sample]:
        """The samples of a step, over all processes in rank order."""
        stream = random_stream((self.seed, _STEP, step))
        size = int(stream.randint(len(self.sizes)))
        draws = stream.random_sample((self.pairs, 2))
        return [self._sample(step * self.pairs + slot, size, *draw) for slot, draw in enumerate(draws.tolist())]

    def _sample(self, count: int, size: int, kind: float, which: float) -> Sample:
        epoch, place = divmod(count, len(self.images))
        image = self.images[_order(len(self.images), self.seed, epoch)[place]]
        whole = kind < self.views.whole
        if self.views.kept is None:
            mirrored = which < self.views.flip
            crop = fresh_view(self.seed, count, self.sizes[size], self.views)
            return Sample(image, size, None, whole_view(self.sizes[size], mirrored) if whole else crop)
        wholes, crops = self.views.kept
        kept = range(wholes) if whole else range(wholes, wholes + crops)
        number = kept[int(which * len(kept))]
        return Sample(image, size, number, kept_view(self.seed, image, number, self.sizes[size], self.views))


def split(images: Sequence[int], held_out: int, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The images to train on and the held-out images, in their original order."""
    drawn = random_stream((seed, _SPLIT)).permutation(len(images))[:held_out]
    chosen = {images[place] for place in drawn}
    return tuple(i for i in images if i not in chosen), tuple(i for i in images if i in chosen)


def kept_view(seed: int, image: int, number: int, size: tuple[int, int], views: ViewOptions) -> Crop:
    """Kept view of this number: first the whole image, then its mirror image if views are mirrored, then crops."""
    if number < views.wholes:
        return whole_view(size, mirrored=number == 1)
    return _crop(random_stream((seed, _KEPT, image, number, *size)), size, views)


def fresh_view(seed: int, count: int, size: tuple[int, int], views: ViewOptions) -> Crop:
    """A new crop for the sample of this number, counted over the whole run."""
    return _crop(random_stream((seed, _FRESH, count)), size, views)


def blank_numbers(seed: int, step: int, first: int, count: int, most: int) -> list[int]:
    """Numbers below ``most`` of ``count`` content-free images of a step, starting at ``first`` over all processes."""
    return random_stream((seed, _BLANK, step)).randint(most, size=first + count)[first:].tolist()


def whole_view(size: tuple[int, int], mirrored: bool) -> Crop:
    """The whole image."""
    return Crop((0.0, 0.0, 1.0, 1.0), size, flip=mirrored)


def _crop(stream: np.random.RandomState, size: tuple[int, int], views: ViewOptions) -> Crop:
    """A random crop; area and ratio are measured in the input frame, as in stage 1."""
    drawn = stream.random_sample(6)
    area, ratio = (float(value) for value in areas_and_ratios(views.area, views.ratio, drawn[:2]))
    draws = drawn.tolist()
    frame = size[1] / size[0]
    # Not the square root of stage 1, which differs in the last bit: kept crops must not change.
    width, height = min((area * ratio / frame) ** 0.5, 1.0), min((area / ratio * frame) ** 0.5, 1.0)
    left, top = draws[2] * (1 - width), draws[3] * (1 - height)
    box = (left, top, min(left + width, 1.0), min(top + height, 1.0))
    return Crop(box, size, flip=draws[4] < views.flip, inverted=draws[5] < views.inverted)


@lru_cache(maxsize=4)
def _order(images: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(random_stream((seed, _ORDER, epoch)).permutation(images).tolist())
