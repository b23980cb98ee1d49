"""From what a user names to a run that is ready to go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from denoising_vit.artifact import KnownArtifact
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.recorded import describe
from denoising_vit.backbones.runtime import seeded
from denoising_vit.data import Dataset
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.stage_one import StageOne
from denoising_vit.denoiser import Denoiser
from denoising_vit.denoiser.fresh import FreshPairs, Pairs
from denoising_vit.denoiser.judging import Judge
from denoising_vit.denoiser.options import PairOptions, TrainOptions
from denoising_vit.denoiser.pairs import KeptPairs, backbone_identity
from denoising_vit.denoiser.panels import HeldOutPanel
from denoising_vit.denoiser.targets import FittedTargets, StoredTargets, Targets
from denoising_vit.denoiser.train import Training, last_layers
from denoising_vit.errors import TrainError
from denoising_vit.metrics.blank_test import BLANK_PHOTOS, BlankProbe
from denoising_vit.progress import Progress
from denoising_vit.store import FeatureStore
from denoising_vit.training.engine import arithmetic, device_of, from_all, from_first, make_accelerator
from denoising_vit.training.run_folder import RunFolder
from denoising_vit.training.samples import Sampler, split


@dataclass(frozen=True)
class Photos:
    """Photos that stage 1 is fitted on in the run itself, without a store.

    Attributes:
        dataset: the photos.
        denoising: options of stage 1.
        artifact: G where it is known.
    """

    dataset: Dataset
    denoising: DenoiseOptions = field(default_factory=DenoiseOptions)
    artifact: KnownArtifact | None = None

    def targets(self, backbone: Backbone) -> Targets:
        """Their fields."""
        return FittedTargets(StageOne(backbone, self.denoising, self.artifact), self.dataset)


@dataclass(frozen=True)
class Stored:
    """A store of fields, and the photos that it was fitted on.

    Attributes:
        store: opened for reading.
        photos: the photos.
    """

    store: FeatureStore
    photos: Dataset

    def targets(self, backbone: Backbone) -> Targets:
        """Their fields."""
        return StoredTargets(self.store, self.photos, backbone)


@dataclass
class TrainJob:
    """A run that has its images, but perhaps not yet their features; made by :meth:`prepare`.

    Attributes:
        folder: of the run.
        backbone: frozen.
        targets: images and fields.
        options: how long and how fast.
        views: which views are pairs.
        sizes: (H, W) of the views.
        kept: pairs on disk: of all images, or of the held-out ones alone where views are drawn anew.
        accelerator: processes and devices.
    """

    folder: RunFolder
    backbone: Backbone
    targets: Targets
    options: TrainOptions
    views: PairOptions
    sizes: tuple[tuple[int, int], ...]
    kept: KeptPairs
    accelerator: Any

    @classmethod
    def prepare(
        cls,
        source: Photos | Stored,
        run: str | Path,
        model: BackboneSpec | Backbone,
        options: TrainOptions,
        views: PairOptions,
        *,
        cache: str | Path | None = None,
        resume: bool = False,
    ) -> TrainJob:
        """Loads the backbone, opens the targets, and makes or opens the folder of the run.

        Args:
            source: images and targets.
            run: the folder of the run.
            model: the backbone in words, for one on the device of each process; or the backbone itself.
            options: how long and how fast.
            views: which views are pairs.
            cache: where features are kept; by default in the folder of the run.
            resume: go on with the run that is there.

        Raises:
            TrainError: if anything of this does not fit the other, or the folder.
            StoreError: if what a store tells of its images is damaged.
            SizeError: if a size does not fit the patch grid.
            BackboneError: if the backbone cannot be loaded.
        """
        options.validate()
        views.validate()
        accelerator = make_accelerator(str(model.device))
        if isinstance(model, BackboneSpec):
            model = replace(model, device=device_of(accelerator, model.device)).load()
        backbone, targets = model, source.targets(model)
        _require_crops(targets, views)
        options.held_out_of(len(targets.images))
        sizes = tuple(views.parsed_sizes() or [targets.size])
        for size in sizes:
            backbone.grid_size(*size)
        folder = RunFolder(Path(run))
        identity = {
            "stage": "denoiser",
            "options": options.recorded(),
            "views": asdict(views),
            "backbone": backbone_identity(backbone),
            "targets": targets.identity,
            "processes": accelerator.num_processes,
        }
        folder.begin_together(identity, accelerator, resume=resume)
        if views.whole == 1 and views.keep > views.wholes:
            views = replace(views, keep=views.wholes)  # no crop is ever drawn
        kept_views = views if views.keep else replace(views, keep=views.wholes + 1)
        place = folder.pairs if cache is None else Path(cache)
        # Where views are drawn anew, only those of the held-out images are kept.
        images = targets.images if views.keep else _split(targets.images, options)[1]
        kept = KeptPairs(place, targets, images, backbone, sizes, kept_views, options.seed)
        return cls(folder, backbone, targets, options, views, sizes, kept, accelerator)

    def fill(self, watch: Progress) -> None:
        """Sees the views that are kept and are not there yet; several processes share them.

        Raises:
            TrainError: if a target is missing, features are not finite, or there is no room.
        """
        accelerator = self.accelerator
        try:
            if accelerator.is_main_process:
                self.kept.open(create=True)
            accelerator.wait_for_everyone()
            if not accelerator.is_main_process:
                self.kept.open(create=False)
            # The first process decides what is to do, and what was done is told, not read from a disk that machines
            # share: each may see another state of it for a while.
            todo = from_first(accelerator, self.kept.todo())
            mine = todo[accelerator.process_index :: accelerator.num_processes]
            with watch("images seen", len(mine)) as advance:
                self.kept.fill(mine, advance)
            known = from_all(accelerator, self.kept.marks())
            self.kept.open(create=False)  # what others wrote is there now
            for marks, told in known:
                self.kept.adopt(marks, told)
        except OSError as error:
            raise TrainError(
                f"{self.kept.folder}: cannot be written to ({error.strerror or error}); what is there stays, and "
                "--resume goes on"
            ) from error

    def training(self) -> Training:
        """The run itself.

        Raises:
            TrainError: if too few images can be used.
        """
        images = self.kept.usable() if self.views.keep else tuple(self.targets.images)
        trained, held_out = _split(images, self.options)
        options, ids = self.options, tuple(self.targets.ids)
        pairs: Pairs = self.kept
        if not self.views.keep:
            assert isinstance(self.targets, StoredTargets)
            pairs = FreshPairs(self.targets, self.backbone)
        whole = options.views_a_step(self.accelerator.num_processes)
        with seeded(options.seed):
            denoiser = Denoiser(self.backbone.embed_dim, self._grid, options.blocks, describe(self.backbone))
        if options.start == "identity":
            _start_as_identity(denoiser)
        denoiser.info = {
            "images": len(trained),
            "options": options.recorded(),
            "views": asdict(self.views),
            "targets": self.targets.identity,
        }
        return Training(
            folder=self.folder,
            denoiser=denoiser,
            pairs=pairs,
            sampler=Sampler(trained, self.sizes, self.views, options.seed, whole),
            judge=Judge(self.kept, held_out, self.sizes, self.accelerator.device, lambda: self._blank(held_out)),
            ids=ids,
            options=options,
            accelerator=self.accelerator,
            dtype=arithmetic(self.accelerator.device, options.precision),
            draw=HeldOutPanel(self.folder.panels, self.targets, self.kept, held_out, ids).draw,
        )

    def _blank(self, held_out: Sequence[int]) -> BlankProbe:
        """Raw features of the blank-image test."""
        photos = [self.targets.photo(image) for image in held_out[:BLANK_PHOTOS]]
        return BlankProbe.of(self.backbone, self.sizes[0], photos).through(self.backbone)

    @property
    def skipped(self) -> dict[str, str]:
        """Why images cannot be used, by id; after :meth:`fill`."""
        return self.kept.unusable()

    @property
    def _grid(self) -> tuple[int, int]:
        """Of the position embedding: that of the backbone's own size, as published."""
        return self.backbone.grid_size(self.backbone.default_size, self.backbone.default_size)


def _split(images: Sequence[int], options: TrainOptions) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The images to train on, and those held out."""
    return split(images, options.held_out_of(len(images)), options.seed)


def _start_as_identity(denoiser: Denoiser) -> None:
    """Lets each block begin by passing features on as they are: training need not find its way back to them first."""
    with torch.no_grad():
        for parameter in last_layers(denoiser):
            parameter.zero_()


def _require_crops(targets: Targets, views: PairOptions) -> None:
    """Refuses crops where the targets do not have them."""
    if not views.keep and isinstance(targets, FittedTargets):
        raise TrainError(
            "new views in every step (--pairs.keep 0) need the fields of a store: run dvit fit first; with "
            "--on-the-fly, expected --pairs.keep 1 or more"
        )
    if isinstance(targets, StoredTargets) and not targets.keeps_fields and views.whole < 1:
        raise TrainError(
            f"{targets.store.url} keeps the patch grid alone, too coarse for crops; fit with --grid field, or train on "
            "whole images (--pairs.whole 1)"
        )
