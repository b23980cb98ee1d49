"""From a photo to the features that are shown of it, under their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from denoising_vit.artifact.known import NONE
from denoising_vit.backbones import Backbone
from denoising_vit.decomposition import Decomposition
from denoising_vit.denoise import denoise_image, work
from denoising_vit.extractors import Cleaners, load_distilled
from denoising_vit.options import DenoiseOptions

#: Features from which nothing is taken away.
AS_THEY_ARE = ("raw", "distilled")

#: ``progress(done)``: called with how much of :func:`passes` is done.
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


def gather(
    backbone: Backbone,
    pixels: np.ndarray,
    names: Sequence[str],
    cleaners: Cleaners,
    options: DenoiseOptions,
    *,
    name: str = "photo",
    progress: Progress = lambda _: None,
) -> ShownPhoto:
    """The features of a photo.

    Args:
        backbone: whose they are.
        pixels: (H, W, 3) uint8.
        names: of features, of :data:`~denoising_vit.showing.FEATURES`.
        cleaners: where denoisers, artifacts and distilled weights come from.
        options: of stage 1; the size counts for all features.
        name: of the photo, for people.
        progress: called as work goes on, with how much of :func:`passes` is done.

    Raises:
        DenoisingVitError: whatever is wrong with the photo or what cleans its features; it says what to do.
    """
    found: dict[str, Decomposition] = {}
    before = 0
    # Raw features come with all others but distilled ones: last, so that no pass is made for them.
    for feature in sorted(names, key=lambda one: one == "raw"):
        others = [result for other, result in found.items() if other != "distilled"]
        if feature == "raw" and others:
            found[feature] = others[0]
        else:
            method = _options_of(feature, options)

            def advance(done: int, _total: int, start: int = before) -> None:
                progress(start + done)

            found[feature] = denoise_image(
                load_distilled(cleaners.distilled, backbone)[0] if feature == "distilled" else backbone,
                pixels,
                artifact=_artifact_of(feature, cleaners),
                denoiser=cleaners.denoiser if feature == "denoiser" else None,
                progress=advance,
                options=method,
            )
            before += work(method)
    progress(passes(names, options))
    return ShownPhoto(name, pixels, {feature: found[feature] for feature in names})


def passes(names: Sequence[str], options: DenoiseOptions) -> int:
    """What progress on one photo counts up to: forward passes."""
    apart = [name for name in names if name != "raw" or set(names) <= set(AS_THEY_ARE)]
    return sum(work(_options_of(name, options)) for name in apart)


def _options_of(feature: str, options: DenoiseOptions) -> DenoiseOptions:
    if feature == "denoiser":
        return replace(options, method="denoiser")
    return options if feature == "exact" else replace(options, method="subtract")


def _artifact_of(feature: str, cleaners: Cleaners) -> str | None:
    """What is taken away before or instead of fitting; of raw and distilled features, nothing."""
    if feature in AS_THEY_ARE:
        return NONE
    return None if feature == "denoiser" else cleaners.artifact
