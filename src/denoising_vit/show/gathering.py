"""From a photo to the features that are shown of it, under their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from denoising_vit.artifact import SHIPPED, load_artifact
from denoising_vit.artifact.known import NONE
from denoising_vit.backbones import Backbone
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.preparing import prepare
from denoising_vit.decomposition.result import Decomposition
from denoising_vit.denoise import denoise_image, work
from denoising_vit.denoiser import find_denoiser
from denoising_vit.extractors import Cleaners, load_distilled

#: Features from which nothing is taken away.
AS_THEY_ARE = ("raw", "distilled")

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
            name: result.raw if name in AS_THEY_ARE else result.semantic if upsample == 1 else result.upsample(upsample)
            for name, result in self.found.items()
        }


class Gatherer:
    """Takes the features of photos, one photo after another.

    Args:
        backbone: whose they are.
        names: of features, of :data:`~denoising_vit.extractors.FEATURES`.
        cleaners: where denoisers, artifacts and distilled weights come from; looked for once, here.
        options: of stage 1; the size counts for all features.

    Attributes:
        backbone: as given.
        names: as given.
        passes: what progress on one photo counts up to.

    Raises:
        ArtifactError, DenoiserError: if a cleaner is that of another backbone, or none comes with the package.
        WeightsError: if weights of stage 3 are missing or those of another model.
        FormatError: if a file is missing, damaged or something else.
        SizeError, PlanError: if size or views do not do.
    """

    def __init__(self, backbone: Backbone, names: Sequence[str], cleaners: Cleaners, options: DenoiseOptions) -> None:
        self.backbone, self.names = backbone, tuple(names)
        self._options = {name: _options_of(name, options) for name in names}
        self._of = dict.fromkeys(names, backbone)
        self._cleaned_by: dict[str, dict[str, Any]] = {name: {} for name in names}
        for name in names:
            if name in AS_THEY_ARE:
                self._cleaned_by[name] = {"artifact": NONE}
            elif name == "denoiser":
                self._cleaned_by[name] = {"denoiser": find_denoiser(cleaners.denoiser, backbone)}
            else:
                wanted = cleaners.artifact or (SHIPPED if name == "subtract" else None)
                known = wanted if wanted in (None, NONE) else load_artifact(wanted, backbone)
                self._cleaned_by[name] = {"artifact": known}
            if name == "distilled":
                self._of[name], _ = load_distilled(cleaners.distilled, backbone)
            prepare(self._of[name], self._options[name])
        # Raw features come with all others but distilled ones: no pass is made for them then.
        self._apart = [name for name in names if name != "raw" or set(names) <= set(AS_THEY_ARE)]
        self.passes = sum(work(self._options[name]) for name in self._apart)

    def __call__(self, pixels: np.ndarray, *, name: str = "photo", progress: Progress = lambda _: None) -> ShownPhoto:
        """The features of a photo.

        Args:
            pixels: (H, W, 3) uint8.
            name: of the photo, for people.
            progress: called as work goes on, with how much of :attr:`passes` is done.

        Raises:
            DenoisingVitError: whatever is wrong with the photo; it says what to do.
        """
        found: dict[str, Decomposition] = {}
        before = 0
        for feature in self._apart:

            def advance(done: int, _total: int, start: int = before) -> None:
                progress(start + done)

            found[feature] = denoise_image(
                self._of[feature],
                pixels,
                progress=advance,
                options=self._options[feature],
                **self._cleaned_by[feature],
            )
            before += work(self._options[feature])
        if "raw" not in found and "raw" in self.names:
            found["raw"] = next(result for name, result in found.items() if name != "distilled")
        return ShownPhoto(name, pixels, {feature: found[feature] for feature in self.names})


def _options_of(feature: str, options: DenoiseOptions) -> DenoiseOptions:
    if feature == "denoiser":
        return replace(options, method="denoiser")
    return options if feature == "exact" else replace(options, method="subtract")
