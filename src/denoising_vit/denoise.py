"""One photo: render views, run the backbone over them, separate what they agree on; or denoise it in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from denoising_vit.artifact import KnownArtifact, artifact_digest
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import describe
from denoising_vit.decomposition.extraction import Photo, load_image
from denoising_vit.decomposition.neural_field.fit import Evaluation
from denoising_vit.decomposition.options import ONE_PASS, DenoiseOptions
from denoising_vit.decomposition.preparing import given_artifact, prepare
from denoising_vit.decomposition.result import Decomposition
from denoising_vit.decomposition.separating import Job, map_to_clean, separate_exactly, separate_neurally, subtract
from denoising_vit.denoiser.loading import (
    FoundDenoiser,
    GivenDenoiser,
    find_denoiser,
    find_shipped,
    source_name,
)
from denoising_vit.environment import package_version
from denoising_vit.errors import PlanError

Progress = Callable[[int, int], None]


def denoise_image(
    backbone: Backbone,
    photo: Photo,
    *,
    artifact: KnownArtifact | None = None,
    denoiser: GivenDenoiser | None = None,
    progress: Progress | None = None,
    watch: Callable[[Evaluation], None] | None = None,
    options: DenoiseOptions | None = None,
    **changes: Any,
) -> Decomposition:
    """Separates a photo's features into semantic field, shared artifact and residual (the paper's per-image denoising).

    With ``method="denoiser"`` one pass over the whole photo is mapped to the semantic field (stage 2). A denoiser does
    not tell the artifact from what else it removes: the artifact is zero then, and all of it is in the residual.

    Args:
        backbone: from :func:`~denoising_vit.load_backbone`.
        photo: a path, a PIL image, an (H, W, 3) uint8 array, or a normalised (1, 3, H, W) tensor.
        artifact: the backbone's artifact where it is known: an :class:`~denoising_vit.Artifact`, a file of one,
            ``"shipped"``, or values (h, w, C); then only the field is fitted.
        denoiser: the backbone's denoiser: a :class:`~denoising_vit.Denoiser`, or what
            :func:`~denoising_vit.load_denoiser` takes; only with the methods ``denoiser`` and ``auto``, which take the
            one that comes with the package where none is given.
        progress: called as ``progress(done, total)`` after each batch of views; with the neural field, after each step
            as well: ``total`` is :func:`work`.
        watch: called with every look that the neural field takes at the held-out views.
        options: how to run; the defaults where none.
        **changes: single fields of :class:`DenoiseOptions`, such as ``views=128``.

    Returns:
        The decomposition on the patch grid of ``size``, on the CPU.

    Raises:
        PhotoError: if the photo cannot be read or used.
        SizeError: if the size does not fit the patch grid.
        PlanError: if the views are too few, an option is out of range, or the method does not use what is given.
        BackboneError: if the features are not finite or not a grid.
        FitError: if the neural field's loss is not finite.
        ArtifactError: if the artifact is that of another backbone, or the method needs one and none is given.
        DenoiserError: if the denoiser is for another backbone, or the method needs one and none is given or found.
        FormatError: if the file of the artifact or the denoiser is missing, damaged or something else.
    """
    started = time.perf_counter()
    options, found = settle(replace(options or DenoiseOptions(), **changes), backbone, denoiser, artifact)
    if found is not None and artifact is not None:
        raise PlanError("an artifact is given, which the method 'denoiser' does not use; leave it out")
    image, about = load_image(photo, backbone)
    if isinstance(photo, Tensor) and options.size is None:
        options = replace(options, size=tuple(photo.shape[2:]))  # its owner has prepared it: it is shown as it is
    # Fails before the forward passes, not after them, where views are too few or the size is off the grid.
    known = given_artifact(artifact, backbone, options)
    fitted, held_out = prepare(backbone, options, known)
    job = Job(backbone, image, fitted, held_out, options, _Reporter(progress, work(options)).add)
    if options.method == "exact":
        parts = separate_exactly(job, known)
    elif options.method == "neural-field":
        parts = separate_neurally(job, known, watch)
    elif found is not None:
        parts = map_to_clean(job, found)
    else:
        parts = subtract(job, known)
    return Decomposition(
        field=parts.field.float().cpu(),
        artifact=parts.artifact.float().cpu(),
        raw=parts.raw.float().cpu(),
        size=fitted.size,
        patch_size=backbone.patch_size,
        stride=backbone.stride,
        predicted_residual=None if parts.residual is None else parts.residual.float().cpu(),
        info={
            "version": package_version(),
            "photo": about,
            "backbone": describe(backbone),
            "plan": fitted.digest,
            **options.recorded(),
            **parts.info,
            "artifact": artifact_digest(known),  # None where it was fitted, or there is none
            "seconds": round(time.perf_counter() - started, 3),
        },
    )


def settle(
    options: DenoiseOptions,
    backbone: Backbone,
    denoiser: GivenDenoiser | None = None,
    artifact: KnownArtifact | None = None,
) -> tuple[DenoiseOptions, FoundDenoiser | None]:
    """The options with the method that is run, and the denoiser where that uses one.

    ``auto`` is denoiser where one is given, exact where an artifact is given, which only stage 1 uses, and otherwise
    denoiser where one comes with the package for this backbone with these weights, layer and stride, else exact.

    Raises:
        PlanError: if a denoiser is given for a method that uses none, or an option is out of range.
        DenoiserError: if the denoiser is for another backbone, or cannot be found or fetched.
        FormatError: if the denoiser's file is damaged or something else.
    """
    options.validate()
    if options.method not in ("auto", "denoiser"):
        if denoiser is not None:
            raise PlanError(
                f"a denoiser ({source_name(denoiser)}) is given, but the method is {options.method!r}, which uses none"
                ": leave one of them out"
            )
        return options, None
    if options.method == "denoiser" or denoiser is not None:
        found = find_denoiser(denoiser, backbone)
    else:
        found = find_shipped(backbone) if artifact is None else None
    return replace(options, method="exact" if found is None else "denoiser"), found


def work(options: DenoiseOptions) -> int:
    """What progress on one photo counts up to: views, and the steps of the neural field."""
    if options.method in ONE_PASS:
        return 1
    steps = options.neural.total_steps if options.method == "neural-field" else 0
    return options.views + options.held_out + steps


class _Reporter:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self.add(0)

    def add(self, done: int) -> None:
        self._done += done
        if self._progress is not None:
            self._progress(self._done, self._total)
