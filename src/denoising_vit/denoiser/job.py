"""Prepare a run of stage 2 from photos or a store, a backbone and options."""

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
from denoising_vit.denoiser.held_out import HeldOut
from denoising_vit.denoiser.module import Denoiser
from denoising_vit.denoiser.options import PairOptions, TrainOptions
from denoising_vit.denoiser.pairs import KeptPairs
from denoising_vit.denoiser.targets import FittedTargets, StoredTargets, Targets
from denoising_vit.denoiser.train import Training, last_layers
from denoising_vit.errors import TrainError
from denoising_vit.progress import Progress
from denoising_vit.store import FeatureStore
from denoising_vit.training.blanks import BLANKS, Blanks
from denoising_vit.training.engine import arithmetic, device_of, from_all, from_first, make_accelerator
from denoising_vit.training.photos import ViewReader
from denoising_vit.training.run_folder import RunFolder, backbone_identity
from denoising_vit.training.samples import Sampler, split


@dataclass(frozen=True)
class Photos:
    """Photos to fit during the run, without a store.

    Attributes:
        dataset: the photos.
        denoising: options of stage 1.
        artifact: the known artifact G, if any.
    """

    dataset: Dataset
    denoising: DenoiseOptions = field(default_factory=DenoiseOptions)
    artifact: KnownArtifact | None = None

    def targets(self, backbone: Backbone) -> Targets:
        """Fields of these photos."""
        return FittedTargets(StageOne(backbone, self.denoising, self.artifact), self.dataset)


@dataclass(frozen=True)
class Stored:
    """A store of fields, with the photos that it was fitted on.

    Attributes:
        store: the store.
        photos: the photos.
    """

    store: FeatureStore
    photos: Dataset

    def targets(self, backbone: Backbone) -> Targets:
        """Fields of these photos."""
        return StoredTargets(self.store, self.photos, backbone)


@dataclass
class TrainJob:
    """A prepared run: :meth:`prepare`, then :meth:`fill` for missing features, then :meth:`training`.

    Attributes:
        folder: folder of the run.
        backbone: the frozen backbone.
        targets: photos and fields.
        options: length, learning rate and logging.
        views: the views to use as pairs.
        sizes: (H, W) of the views.
        kept: pairs on disk, of all images; only of the held-out images if each step draws new views.
        accelerator: processes and devices.
        blanks: content-free images, set by :meth:`fill`; None if the run uses none.
    """

    folder: RunFolder
    backbone: Backbone
    targets: Targets
    options: TrainOptions
    views: PairOptions
    sizes: tuple[tuple[int, int], ...]
    kept: KeptPairs
    accelerator: Any
    blanks: Blanks | None = None

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
        """Load the backbone, open the targets, and create or open the folder of the run.

        Args:
            source: photos and targets.
            run: folder of the run.
            model: specification of the backbone, to be loaded on the device of each process; or the backbone.
            options: length, learning rate and logging.
            views: the views to use as pairs.
            cache: folder of the kept pairs. Defaults to a folder in that of the run.
            resume: resume the run in the folder.

        Raises:
            TrainError: if source, backbone, options or folder do not match.
            StoreError: if the records of the store are damaged.
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
            views = replace(views, keep=views.wholes)  # no crops are drawn
        kept_views = views if views.keep else replace(views, keep=views.wholes + 1)
        place = folder.pairs if cache is None else Path(cache)
        images = targets.images if views.keep else _split(targets.images, options)[1]
        kept = KeptPairs(place, targets, images, backbone, sizes, kept_views, options.seed)
        return cls(folder, backbone, targets, options, views, sizes, kept, accelerator)

    def fill(self, watch: Progress) -> None:
        """Compute the missing pairs, with images divided between the processes, and features of content-free images.

        Raises:
            TrainError: if a target is missing, features are not finite, or the disk is full.
        """
        accelerator = self.accelerator
        try:
            if accelerator.is_main_process:
                self.kept.open(create=True)
            accelerator.wait_for_everyone()
            if not accelerator.is_main_process:
                self.kept.open(create=False)
            # The first process decides, and results are exchanged, because machines may see a shared disk in different
            # states for a while.
            todo = from_first(accelerator, self.kept.todo())
            mine = todo[accelerator.process_index :: accelerator.num_processes]
            with watch("images processed", len(mine)) as advance:
                self.kept.fill(mine, advance)
            known = from_all(accelerator, self.kept.marks())
            self.kept.open(create=False)  # with the rows that other processes wrote
            for marks, reasons in known:
                self.kept.adopt(marks, reasons)
        except OSError as error:
            raise TrainError(
                f"{self.kept.folder}: cannot be written to ({error.strerror or error}); existing files are kept, so "
                "continue with --resume"
            ) from error
        if self.options.blanks:
            with watch("content-free images", BLANKS * len(self.sizes)) as advance:
                self.blanks = Blanks.of(self.backbone, self.sizes, self.options.seed, advance)

    def training(self) -> Training:
        """The run, ready to start; after :meth:`fill`.

        Raises:
            TrainError: if too few images are usable.
        """
        options, backbone, device = self.options, self.backbone, self.accelerator.device
        assert self.blanks is not None or not options.blanks, "fill() comes first"
        images = self.kept.usable() if self.views.keep else tuple(self.targets.images)
        trained, held_out = _split(images, options)
        pairs: KeptPairs | ViewReader = self.kept
        if not self.views.keep:
            assert isinstance(self.targets, StoredTargets)
            pairs = ViewReader(self.targets, backbone, backbone.device, self.sizes, self.folder.path)
        photos_a_step = options.photos_a_step(self.accelerator.num_processes)
        return Training(
            folder=self.folder,
            denoiser=self._denoiser(len(trained)),
            backbone=backbone,
            pairs=pairs,
            blanks=self.blanks,
            sampler=Sampler(trained, self.sizes, self.views, options.seed, photos_a_step),
            held_out=HeldOut(self.targets, self.kept, held_out, backbone, self.sizes, device, self.folder.panels),
            ids=tuple(self.targets.ids),
            options=options,
            accelerator=self.accelerator,
            dtype=arithmetic(device, options.precision),
        )

    def _denoiser(self, images: int) -> Denoiser:
        """A new denoiser; its position embedding has the grid of the backbone's default size, as published."""
        backbone, options = self.backbone, self.options
        grid = backbone.grid_size(backbone.default_size, backbone.default_size)
        with seeded(options.seed):
            denoiser = Denoiser(backbone.embed_dim, grid, options.blocks, describe(backbone))
        if options.start == "identity":
            with torch.no_grad():
                for parameter in last_layers(denoiser):
                    parameter.zero_()
        denoiser.info = {
            "images": images,
            "options": options.recorded(),
            "views": asdict(self.views),
            "targets": self.targets.identity,
        }
        return denoiser

    @property
    def skipped(self) -> dict[str, str]:
        """Reasons why images are unusable, by id; after :meth:`fill`."""
        return self.kept.unusable()


def _split(images: Sequence[int], options: TrainOptions) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The images to train on, and the held-out images."""
    return split(images, options.held_out_of(len(images)), options.seed)


def _require_crops(targets: Targets, views: PairOptions) -> None:
    """Check that the targets support the views."""
    if not views.keep and isinstance(targets, FittedTargets):
        raise TrainError(
            "new views in every step (--pairs.keep 0) need the fields of a store: run dvit fit first, or use "
            "--pairs.keep 1 or more with --on-the-fly"
        )
    if isinstance(targets, StoredTargets) and not targets.keeps_fields and views.whole < 1:
        raise TrainError(
            f"{targets.store.url} has the patch grid only, which is too coarse for crops; fit with --grid field, or "
            "train on whole images (--pairs.whole 1)"
        )
