"""Prepare a run of stage 3 from photos or a store, a backbone and options."""

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
from denoising_vit.denoiser.targets import StoredTargets
from denoising_vit.distilled.contrast import final_norm
from denoising_vit.distilled.held_out import HeldOut
from denoising_vit.distilled.models import DenoiserTeacher, FieldTeacher, Student, Teacher, blocks_of, trained_groups
from denoising_vit.distilled.options import DistillOptions
from denoising_vit.distilled.train import Distillation
from denoising_vit.distilled.weights import trained_further
from denoising_vit.errors import TrainError
from denoising_vit.training.engine import arithmetic, device_of, make_accelerator
from denoising_vit.training.options import ViewOptions
from denoising_vit.training.pair_files import read_reasons
from denoising_vit.training.photos import PlainPhotos, SeenPhotos, ViewReader
from denoising_vit.training.run_folder import RunFolder, backbone_identity
from denoising_vit.training.samples import Sampler, split


@dataclass
class DistillJob:
    """A prepared run: :meth:`prepare`, then :meth:`training`.

    Attributes:
        folder: folder of the run.
        teacher: the frozen teacher.
        student: the trained model, float32.
        photos: photos to train and evaluate on.
        options: length, learning rate and logging, with the number of steps for the epochs.
        views: views of the photos to train on.
        sizes: (H, W) of the views.
        accelerator: processes and devices.
        started: digest of the distilled weights to start from; None for the backbone's own.
    """

    folder: RunFolder
    teacher: Teacher
    student: Student
    photos: SeenPhotos
    options: DistillOptions
    views: ViewOptions
    sizes: tuple[tuple[int, int], ...]
    accelerator: Any
    started: str | None = None

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
        start: str | Path | None = None,
        resume: bool = False,
    ) -> DistillJob:
        """Load teacher and student, and create or open the folder of the run.

        Args:
            source: photos, with a denoiser as the teacher; or a store and its photos, with its fields as the teacher,
                fitted with this backbone or with the weights to start from.
            run: folder of the run.
            model: specification of the backbone, to be loaded on the device of each process; or the backbone.
            options: length, learning rate and logging.
            views: views of the photos to train on.
            denoiser: denoiser of the backbone. Defaults to the shipped one.
            also: denoisers of further layers to train.
            start: distilled weights of this backbone to train further, or ``distilled`` for the package's. Defaults to
                the backbone's own weights.
            resume: resume the run in the folder.

        Raises:
            TrainError: if source, backbone, options or folder do not match.
            DenoiserError: if a denoiser belongs to another backbone or has another width, or cannot be found.
            FormatError: if the weights to start from are damaged, or belong to another backbone.
            WeightsError: if they are missing.
            SizeError: if a size does not fit the patch grid.
            BackboneError: if the backbone cannot be loaded.
            PlanError: if contrast cannot be restored, because the model has no final norm with a bias.
        """
        options.validate()
        views.validate()
        accelerator = make_accelerator(str(model.device))
        student, backbone = _pair(model, accelerator)
        begun = None
        if start is not None:
            student = trained_further(student, start)
            begun = copy.deepcopy(student).to(backbone.dtype) if isinstance(source, Stored) else None
        started = None if start is None else student.digest
        photos, teacher = _photos_and_teacher(source, backbone, begun, denoiser, also)
        held_out = options.held_out_of(len(photos.images))
        options = options.with_steps(len(photos.images) - held_out, accelerator.num_processes)
        sizes = tuple(views.parsed_sizes() or [(backbone.default_size, backbone.default_size)])
        for size in sizes:
            backbone.grid_size(*size)
        if isinstance(photos, StoredTargets) and not photos.keeps_fields and views.whole < 1:
            raise TrainError(
                f"{photos.store.url} has the patch grid only, which is too coarse for crops; fit with --grid field, or "
                "train on whole photos (--views.whole 1)"
            )
        taught = Student(student, teacher.layers)
        taught.require_grad(min(sizes), prefix=options.hold_prefix > 0)
        if options.shard:
            blocks_of(taught)  # rejects unsuitable models now, not when the run starts
        trained_groups(taught, options.weight_decay, options.layer_decay)  # also rejects unsuitable models
        if options.contrast:
            final_norm(student)
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
        if started is not None:
            identity["start"] = started
        if options.blanks:
            identity["loss on content-free images"] = "relative to raw"  # the published one in earlier versions
        folder.begin_together(identity, accelerator, resume=resume)
        return cls(folder, teacher, taught, photos, options, views, sizes, accelerator, started)

    def training(self) -> Distillation:
        """The run, ready to start, with the targets of the held-out photos.

        Raises:
            TrainError: if no held-out photo can be read.
        """
        options, accelerator, backbone = self.options, self.accelerator, self.teacher.backbone
        images = self.photos.images
        trained, held_out = split(images, options.held_out_of(len(images)), options.seed)
        reader = ViewReader(self.photos, backbone, backbone.device, self.sizes, self.folder.path)
        info = {
            "photos": len(trained),
            "options": options.recorded(),
            "views": asdict(self.views),
            "teacher": self.teacher.identity,
        }
        if self.started is not None:
            info["start"] = self.started
        photos_a_step = options.photos_a_step(accelerator.num_processes)
        return Distillation(
            folder=self.folder,
            student=self.student,
            teacher=self.teacher,
            reader=reader,
            sampler=Sampler(trained, self.sizes, self.views, options.seed, photos_a_step),
            held_out=HeldOut.of(held_out, reader, self.teacher),
            evaluated=copy.deepcopy(self.student).requires_grad_(False).to(backbone.dtype),
            record={"backbone": describe(backbone), "info": info},
            options=options,
            accelerator=accelerator,
            dtype=arithmetic(accelerator.device, options.precision),
        )

    @property
    def skipped(self) -> dict[str, str]:
        """Reasons why photos are unusable so far, by id."""
        return read_reasons(self.folder.path)


def _pair(model: BackboneSpec | Backbone, accelerator: Any) -> tuple[Backbone, Backbone]:
    """The student's backbone in float32, and the teacher's in the requested precision."""
    if isinstance(model, BackboneSpec):
        precision = dtype_on(model.dtype, accelerator.device)
        student = replace(model, device=device_of(accelerator, model.device), dtype="float32").load()
        teacher = copy.deepcopy(student).to(precision)
    else:
        teacher, student = model, copy.deepcopy(model).float()
    student._fingerprint = None  # its weights will change
    return student, teacher


def _photos_and_teacher(
    source: Dataset | Stored,
    backbone: Backbone,
    start: Backbone | None,
    denoiser: GivenDenoiser | None,
    also: Sequence[GivenDenoiser],
) -> tuple[SeenPhotos, Teacher]:
    if isinstance(source, Dataset):
        return PlainPhotos(source), DenoiserTeacher.of(backbone, denoiser, also)
    if denoiser is not None or also:
        raise TrainError("with --fields, the targets are the store's fields; omit the denoiser or --fields")
    return StoredTargets(source.store, source.photos, backbone, start), FieldTeacher(backbone)


def _checkpoint_blocks(backbone: Backbone) -> None:
    model: Any = getattr(backbone, "model", None)
    if not hasattr(model, "set_grad_checkpointing"):
        raise TrainError(f"--checkpointing needs a timm model; got {backbone.name}")
    model.set_grad_checkpointing(True)
