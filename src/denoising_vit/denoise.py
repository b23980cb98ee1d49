"""Denoise photos: separate a photo's features by stage 1, or clean them in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoising_vit.artifact import KnownArtifact, artifact_digest
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import describe, same_weights
from denoising_vit.decomposition.inputs import Photo, given_artifact, load_image, prepare
from denoising_vit.decomposition.methods import UNJUDGED, Job, Parts, separate_exactly, separate_neurally
from denoising_vit.decomposition.neural_field.fit import Evaluation
from denoising_vit.decomposition.options import STAGE_ONE, DenoiseOptions
from denoising_vit.decomposition.result import Decomposition
from denoising_vit.decomposition.statistics import require_finite
from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.denoiser.loading import FoundDenoiser, GivenDenoiser, find_denoiser, source_name
from denoising_vit.environment import package_version
from denoising_vit.errors import PlanError
from denoising_vit.extractors import KINDS, Cleaners, Extractor, GivenRegisters, GivenSubspace
from denoising_vit.progress import OnProgress
from denoising_vit.training_free import AveragedViT
from denoising_vit.views.rendering import ViewRenderer
from denoising_vit.views.sampling import on_nodes


def denoise_image(
    backbone: Backbone,
    photo: Photo,
    *,
    artifact: KnownArtifact | None = None,
    denoiser: GivenDenoiser | None = None,
    subspace: GivenSubspace | None = None,
    registers: GivenRegisters | None = None,
    distilled: str | Path | None = None,
    progress: OnProgress | None = None,
    watch: Callable[[Evaluation], None] | None = None,
    options: DenoiseOptions | None = None,
    **changes: Any,
) -> Decomposition:
    """Separate a photo's features into semantic field, shared artifact and residual (the paper's per-image denoising).

    With ``method="denoiser"``, one pass over the whole photo is mapped to the semantic field (stage 2). A denoiser does
    not separate the artifact from the rest that it removes, so the artifact is zero and the residual contains
    everything.

    Args:
        backbone: from :func:`~denoising_vit.load_backbone`.
        photo: a path, a PIL image, an (H, W, 3) uint8 array, or a normalised (1, 3, H, W) tensor.
        artifact: the backbone's artifact, if known: an :class:`~denoising_vit.Artifact`, its file, ``"shipped"``, or
            values (h, w, C). Stage 1 then fits the field only.
        denoiser: the backbone's denoiser: a :class:`~denoising_vit.Denoiser`, or a source for
            :func:`~denoising_vit.load_denoiser`; for the method ``denoiser``. Defaults to the one in the package.
        subspace: positional directions for the method ``project``; by default, they are found on a black image.
        registers: register neurons for the method ``registers``, which needs them.
        distilled: file of weights for the method ``distilled``; defaults to those in the package. A given denoiser,
            subspace, registers, weights or artifact (``exact``) determine the method ``auto``.
        progress: called as ``progress(done, total)`` after each batch of views, and after each step of the neural
            field; ``total`` is :func:`work`.
        watch: called with each evaluation of the neural field on the held-out views.
        options: options of the denoising; None uses the defaults.
        **changes: individual fields of :class:`DenoiseOptions`, such as ``views=128``.

    Returns:
        The decomposition on the patch grid of ``size``, on the CPU.

    Raises:
        PhotoError: if the photo cannot be read.
        SizeError: if the size does not fit the patch grid.
        PlanError: if there are too few views, an option is out of range, or the method does not use a given argument.
        BackboneError: if the features are not finite or not a grid.
        FitError: if the neural field's loss is not finite.
        ArtifactError: if the artifact belongs to another backbone, or the method needs one and none is given.
        DenoiserError: if the denoiser belongs to another backbone, or the method needs one and none is given or found.
        FormatError: if the file of the artifact or the denoiser is missing, damaged or of another type.
    """
    options = replace(options or DenoiseOptions(), **changes)
    if isinstance(photo, Tensor) and photo.ndim == 4 and options.size is None:
        options = replace(options, size=tuple(photo.shape[2:]))  # a prepared tensor is used unchanged
    given = None if distilled is None else str(distilled)
    cleaners = Cleaners(artifact, denoiser, given, subspace, registers)
    return Denoising(backbone, options, cleaners)(photo, progress=progress, watch=watch)


class Denoising:
    """A denoising method, set up once for any number of photos; see :func:`denoise_image` for the arguments.

    Attributes:
        backbone: the given backbone.
        options: the given options, with ``auto`` resolved to a method.
        artifact: G (h, w, C) on the grid of the views, if known, else None.
        denoiser: the denoiser, if the method uses one.
        fitted: the views to fit; the first shows the whole photo.
        held_out: the views to evaluate the fit on, if any.
        work: total amount of work for one photo.

    Raises:
        SizeError, PlanError, ArtifactError, DenoiserError, FormatError: as in :func:`denoise_image`, before any forward
            pass over a photo.
    """

    def __init__(
        self,
        backbone: Backbone,
        options: DenoiseOptions,
        cleaners: Cleaners = Cleaners(),  # noqa: B008, frozen
    ) -> None:
        self.backbone = backbone
        self.options, self.denoiser = settle(options, backbone, cleaners)
        method = self.options.method
        uses = "artifact" if method in STAGE_ONE else KINDS[method].uses
        for name, words in {
            "artifact": ("an artifact is", "it"),
            "subspace": ("a subspace is", "it"),
            "registers": ("registers are", "them"),
            "distilled": ("distilled weights are", "them"),
        }.items():
            if getattr(cleaners, name) is not None and name != uses:
                raise PlanError(f"{words[0]} given, but method {method!r} does not use {words[1]}; omit {words[1]}")
        self._extractor: Extractor | None = None
        self._identity: dict[str, str] = {}
        self.artifact: Tensor | None = None
        if uses == "artifact":
            self.artifact = given_artifact(cleaners.artifact, backbone, self.options)
        elif self.denoiser is None:
            self._extractor, self._identity = cleaners.extractor(method, backbone)
        self.fitted, self.held_out = prepare(backbone, self.options, self.artifact)
        self.work = work(self.options)

    def __call__(
        self,
        photo: Photo,
        *,
        progress: OnProgress | None = None,
        watch: Callable[[Evaluation], None] | None = None,
        digest: str | None = None,
    ) -> Decomposition:
        """Denoise a photo; see :func:`denoise_image`. Its digest is computed unless given."""
        started = time.perf_counter()
        image, about = load_image(photo, self.backbone, digest)
        reporter = _Reporter(progress, self.work)
        job = Job(self.backbone, image, self.fitted, self.held_out, self.options, reporter.add)
        if self.options.method == "exact":
            parts = separate_exactly(job, self.artifact)
        elif self.options.method == "neural-field":
            parts = separate_neurally(job, self.artifact, watch)
        else:
            parts = self._one_pass(job)
        return Decomposition(
            field=parts.field.float().cpu(),
            artifact=parts.artifact.float().cpu(),
            raw=parts.raw.float().cpu(),
            size=self.fitted.size,
            patch_size=self.backbone.patch_size,
            stride=self.backbone.stride,
            predicted_residual=None if parts.residual is None else parts.residual.float().cpu(),
            info={
                "version": package_version(),
                "photo": about,
                "backbone": describe(self.backbone),
                "plan": self.fitted.digest,
                **self.options.recorded(),
                **parts.info,
                "artifact": artifact_digest(self.artifact),  # None if it was fitted, or there is none
                **self._identity,
                "seconds": round(time.perf_counter() - started, 3),
            },
        )

    def made(self, info: dict[str, Any]) -> bool:
        """True if a result with this ``info`` was made with this backbone, these views and these settings."""
        decisive = self.options.recorded("views", "shape", "nothing")
        decisive |= {"plan": self.fitted.digest, "artifact": artifact_digest(self.artifact)} | self._identity
        decisive |= {"tiles": None}  # a result made from tiles of this size does not match
        return (
            all(info.get(key) == value for key, value in decisive.items())
            and info.get("denoiser", {}).get("digest") == (None if self.denoiser is None else self.denoiser.digest)
            and same_weights(info["backbone"], describe(self.backbone))
        )

    @torch.no_grad()
    def _one_pass(self, job: Job) -> Parts:
        """One pass over the whole photo; everything except a known artifact goes into the residual."""
        (features,) = job.features(job.fitted)
        require_finite(features)
        raw = features[0]
        artifact = torch.zeros_like(raw) if self.artifact is None else self.artifact.to(raw)
        info: dict[str, Any] = dict(UNJUDGED)
        if self.denoiser is not None:
            module = self.denoiser.denoiser
            clean = module(features.to(module.pos_embed.device))[0]
            info["denoiser"] = self.denoiser.recorded
        elif self._extractor is None:
            clean = raw - artifact
        elif isinstance(self._extractor, DenoisedViT) and self._extractor.backbone is self.backbone:
            clean = self._extractor.clean(features)[0]
        else:
            view = ViewRenderer(job.image, job.fitted, self.backbone.mean, self.backbone.std)(slice(1))
            if isinstance(self._extractor, AveragedViT):  # its first pass is the raw one
                clean = self._extractor.averaged_with(view, features)[0]
            else:
                clean = self._extractor(view)[0]
        require_finite(clean)
        return Parts(on_nodes(clean, job.fitted), artifact, raw, None, info)


def methods() -> tuple[str, ...]:
    """Values of ``method``: those of stage 1, the one-pass features, and ``auto``."""
    return (*STAGE_ONE, *(kind.name for kind in KINDS.values() if kind.cleans and not kind.per_image), "auto")


def settle(
    options: DenoiseOptions,
    backbone: Backbone,
    cleaners: Cleaners = Cleaners(),  # noqa: B008, frozen
) -> tuple[DenoiseOptions, FoundDenoiser | None]:
    """The options with ``auto`` resolved by :meth:`Cleaners.preferred`, and the denoiser if the method uses one.

    Raises:
        PlanError: if the method is unknown, a denoiser is given for a method that uses none, or an option is out of
            range.
        DenoiserError: if the denoiser belongs to another backbone, or cannot be found or downloaded.
        FormatError: if the denoiser's file is damaged or of another type.
    """
    options.validate()
    if options.method not in methods():
        raise PlanError(f"unknown method {options.method!r}; choose from {', '.join(methods())}")
    if options.method == "auto":
        options = replace(options, method=cleaners.preferred(backbone))
    if options.method == "denoiser":
        return options, find_denoiser(cleaners.denoiser, backbone)
    if cleaners.denoiser is not None:
        raise PlanError(
            f"a denoiser ({source_name(cleaners.denoiser)}) is given, but method {options.method!r} does not use one; "
            "omit one of them"
        )
    return options, None


def work(options: DenoiseOptions) -> int:
    """Total amount of work for one photo: number of views, and steps of the neural field."""
    if options.method not in STAGE_ONE:
        return 1
    steps = options.neural.total_steps if options.method == "neural-field" else 0
    return options.views + options.held_out + steps


class _Reporter:
    def __init__(self, progress: OnProgress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self.add(0)

    def add(self, done: int) -> None:
        self._done += done
        if self._progress is not None:
            self._progress(self._done, self._total)
