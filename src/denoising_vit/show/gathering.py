"""Features of a photo, under their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from denoising_vit.artifact.known import NONE
from denoising_vit.backbones import Backbone
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.result import Decomposition
from denoising_vit.denoise import Denoising
from denoising_vit.extractors import KINDS, Cleaners

#: ``progress(done)``: called with how much of :attr:`Gatherer.passes` is done.
Progress = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class ShownPhoto:
    """A photo and its features.

    Attributes:
        name: of the photo, for people.
        pixels: (H, W, 3) uint8.
        found: by the names of features, what their backbone's output was separated into.
    """

    name: str
    pixels: np.ndarray
    found: dict[str, Decomposition]

    @property
    def aspect(self) -> float:
        """Width to height."""
        return self.pixels.shape[1] / self.pixels.shape[0]

    def maps(self, upsample: int = 1) -> dict[str, Tensor]:
        """The features (h, w, C) by their names; those that are a field, sampled so many times finer."""
        return {
            name: result.raw
            if not KINDS[name].cleans
            else result.semantic
            if upsample == 1
            else result.upsample(upsample)
            for name, result in self.found.items()
        }


class Gatherer:
    """Extracts the features of photos, one photo after another.

    Args:
        backbone: the backbone.
        names: names of features, of :data:`~denoising_vit.extractors.KINDS`.
        cleaners: what cleans the features; loaded once, here.
        options: options of stage 1; the size holds for all features.

    Attributes:
        backbone: as given.
        names: as given.
        passes: what progress on one photo counts up to.

    Raises:
        ArtifactError, DenoiserError: if a cleaner is for another backbone, or the package has none.
        WeightsError: if weights of stage 3 are missing or for another model.
        FormatError: if a file is missing, damaged or something else.
        SizeError, PlanError: if size or views do not fit.
    """

    def __init__(self, backbone: Backbone, names: Sequence[str], cleaners: Cleaners, options: DenoiseOptions) -> None:
        self.backbone, self.names = backbone, tuple(names)
        made = {name: _denoising(name, backbone, cleaners, options) for name in names}
        # Raw features come with all others of this backbone: no pass is made for them then.
        sharing = next((name for name in names if name != "raw" and made[name].backbone is backbone), None)
        self._raw_from = sharing or "raw"
        self._made = {name: one for name, one in made.items() if name != "raw" or sharing is None}
        self.passes = sum(one.work for one in self._made.values())

    def __call__(self, pixels: np.ndarray, *, name: str = "photo", progress: Progress = lambda _: None) -> ShownPhoto:
        """The features of a photo.

        Args:
            pixels: (H, W, 3) uint8.
            name: name of the photo, for people.
            progress: called as work goes on, with how much of :attr:`passes` is done.

        Raises:
            DenoisingVitError: if the photo cannot be used; it says what to do.
        """
        found: dict[str, Decomposition] = {}
        before = 0
        for feature, denoising in self._made.items():

            def advance(done: int, _total: int, start: int = before) -> None:
                progress(start + done)

            found[feature] = denoising(pixels, progress=advance)
            before += denoising.work
        return ShownPhoto(name, pixels, {each: found[self._raw_from if each == "raw" else each] for each in self.names})


def _denoising(name: str, backbone: Backbone, cleaners: Cleaners, options: DenoiseOptions) -> Denoising:
    kind = KINDS[name]
    if not kind.cleans:  # the output of a backbone as it is: nothing is subtracted
        extractor, _ = cleaners.extractor(name, backbone)
        assert isinstance(extractor, Backbone)
        return Denoising(extractor, replace(options, method="subtract"), artifact=NONE)
    return Denoising(
        backbone,
        replace(options, method=name),
        artifact=cleaners.artifact if kind.per_image or kind.needs == "artifact" else None,
        denoiser=cleaners.denoiser if kind.needs == "denoiser" else None,
    )
