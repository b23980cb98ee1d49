"""From what a user names to a run of stage 3 that is ready to go."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.recorded import describe
from denoising_vit.backbones.runtime import dtype_on
from denoising_vit.data import Dataset
from denoising_vit.denoiser import GivenDenoiser
from denoising_vit.denoiser.job import Stored
from denoising_vit.denoiser.pairs import backbone_identity
from denoising_vit.denoiser.targets import StoredTargets
from denoising_vit.distilled.judging import HeldOut
from denoising_vit.distilled.options import DistillOptions
from denoising_vit.distilled.photos import FittedPhotos, PlainPhotos, SeenPhotos, ViewReader
from denoising_vit.distilled.student import Student, blocks_of, trained_groups
from denoising_vit.distilled.teacher import DenoiserTeacher, FieldTeacher, Teacher
from denoising_vit.distilled.train import Distillation
from denoising_vit.errors import TrainError
from denoising_vit.training.engine import arithmetic, device_of, make_accelerator
from denoising_vit.training.options import ViewOptions
from denoising_vit.training.pair_files import read_reasons
from denoising_vit.training.run_folder import RunFolder
from denoising_vit.training.samples import Sampler, split


@dataclass
class DistillJob:
    """A run with its teacher and its photos; made by :meth:`prepare`.

    Attributes:
        folder: of the run.
        teacher: frozen.
        student: float32, trained as a whole.
        photos: to train on and to judge by.
        options: how long and how fast, with the steps that the epochs take.
        views: which views of photos.
        sizes: (H, W) of the views.
        accelerator: processes and devices.
    """

    folder: RunFolder
    teacher: Teacher
    student: Student
    photos: SeenPhotos
    options: DistillOptions
    views: ViewOptions
    sizes: tuple[tuple[int, int], ...]
    accelerator: Any

    @classmethod
    def prepare(
        cls,
        source: Dataset | Stored,
        run: str | Path,
        model: BackboneSpec | Backbone,
        options: DistillOptions,
        views: ViewOptions,
        *,
        denoiser: GivenDenoiser | None = None,
        also: Sequence[GivenDenoiser] = (),
        resume: bool = False,
    ) -> DistillJob:
        """Loads the backbone twice, to teach and to be taught, and makes or opens the folder of the run.

        Args:
            source: photos, for a denoiser as teacher; or a store of fields with its photos, for stage 1 as teacher.
            run: the folder of the run.
            model: the backbone in words, for one on the device of each process; or the backbone itself.
            options: how long and how fast.
            views: which views of photos.
            denoiser: of the backbone; the one that comes with the package where none is given.
            also: denoisers of further layers, which are taught as well.
            resume: go on with the run that is there.

        Raises:
            TrainError: if anything of this does not fit the other, or the folder.
            DenoiserError: if a denoiser is for another backbone, of another width, or cannot be found.
            SizeError: if a size does not fit the patch grid.
            BackboneError: if the backbone cannot be loaded.
        """
        options.validate()
        views.validate()
        accelerator = make_accelerator(str(model.device))
        student, backbone = _pair(model, accelerator)
        photos, teacher = _lessons(source, backbone, denoiser, also)
        held_out = options.held_out_of(len(photos.images))
        options = options.with_steps(len(photos.images) - held_out, accelerator.num_processes)
        sizes = tuple(views.parsed_sizes() or [(backbone.default_size, backbone.default_size)])
        for size in sizes:
            backbone.grid_size(*size)
        _require_crops(photos, views)
        taught = Student(student, teacher.layers)
        taught.require_grad(min(sizes), prefix=options.hold_prefix > 0)
        _require_blocks(taught, options)
        if options.checkpointing:
            _checkpoint_blocks(student)
        folder = RunFolder(Path(run))
        identity = {
            "stage": "distillation",
            "options": options.recorded(),
            "views": asdict(views),
            "backbone": backbone_identity(backbone),
            "teacher": teacher.identity,
            "photos": photos.identity,
            "processes": accelerator.num_processes,
        }
        folder.begin_together(identity, accelerator, resume=resume)
        return cls(folder, teacher, taught, photos, options, views, sizes, accelerator)

    def training(self) -> Distillation:
        """The run itself; the teacher is asked for the held-out photos.

        Raises:
            TrainError: if no held-out photo can be read.
        """
        options, accelerator, backbone = self.options, self.accelerator, self.teacher.backbone
        images = self.photos.images
        trained, held_out = split(images, options.held_out_of(len(images)), options.seed)
        reader = ViewReader(self.photos, backbone, backbone.device, self.sizes, self.folder.path)
        judged = copy.deepcopy(self.student).requires_grad_(False).to(backbone.dtype)
        record = {
            "backbone": describe(backbone),
            "info": {
                "photos": len(trained),
                "options": options.recorded(),
                "views": asdict(self.views),
                "teacher": self.teacher.identity,
            },
        }
        return Distillation(
            folder=self.folder,
            student=self.student,
            teacher=self.teacher,
            reader=reader,
            sampler=Sampler(
                trained, self.sizes, self.views, options.seed, options.views_a_step(accelerator.num_processes)
            ),
            judge=HeldOut.of(held_out, reader, self.teacher),
            judged=judged,
            record=record,
            options=options,
            accelerator=accelerator,
            dtype=arithmetic(accelerator.device, options.precision),
        )

    @property
    def skipped(self) -> dict[str, str]:
        """Why photos could not be used, by id, as far as the run has come by them."""
        return read_reasons(self.folder.path)


def _pair(model: BackboneSpec | Backbone, accelerator: Any) -> tuple[Backbone, Backbone]:
    """The student's backbone in float32, and the teacher's in the precision that was asked for."""
    if isinstance(model, BackboneSpec):
        precision = dtype_on(model.dtype, accelerator.device)
        student = replace(model, device=device_of(accelerator, model.device), dtype="float32").load()
        teacher = copy.deepcopy(student).to(precision)
    else:
        teacher, student = model, copy.deepcopy(model).float()
    student._fingerprint = None  # it will have other weights than the one that was copied
    return student, teacher


def _lessons(
    source: Dataset | Stored, backbone: Backbone, denoiser: GivenDenoiser | None, also: Sequence[GivenDenoiser]
) -> tuple[SeenPhotos, Teacher]:
    if isinstance(source, Dataset):
        return PlainPhotos(source), DenoiserTeacher.of(backbone, denoiser, also)
    if denoiser is not None or also:
        raise TrainError("a store has fields, which are the teacher; give photos to have a denoiser teach")
    targets = StoredTargets(source.store, source.photos, backbone)
    return FittedPhotos(targets), FieldTeacher(backbone)


def _require_crops(photos: SeenPhotos, views: ViewOptions) -> None:
    if isinstance(photos, FittedPhotos) and not photos.targets.keeps_fields and views.whole < 1:
        raise TrainError(
            f"{photos.targets.store.url} keeps the patch grid alone, too coarse for crops; fit with --grid field, or "
            "train on whole photos (--views.whole 1)"
        )


def _require_blocks(student: Student, options: DistillOptions) -> None:
    """Refuses options that need to know a model's blocks now, not when the run begins."""
    if options.shard:
        blocks_of(student)
    trained_groups(student, options.weight_decay, options.layer_decay)


def _checkpoint_blocks(backbone: Backbone) -> None:
    model: Any = getattr(backbone, "model", None)
    if not hasattr(model, "set_grad_checkpointing"):
        raise TrainError(f"--checkpointing needs a timm model; got {backbone.name}")
    model.set_grad_checkpointing(True)
