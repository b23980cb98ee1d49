"""Prepare backbones one after another: artifact G, subspace, registers, denoiser, diagnosis and model card.

Each stage of a backbone writes one file into its folder and then records its findings in ``prepared.json``. A stage
with an entry is not run again, so the same command resumes an interrupted run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from denoising_vit.artifact import NONE, Artifact
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.data import Dataset, Skipped, named_photos, spread
from denoising_vit.decomposition.calibration import STABLE, run_calibration
from denoising_vit.decomposition.options import CalibrationOptions, DenoiseOptions
from denoising_vit.denoiser import Denoiser, find_denoiser
from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.denoiser.job import Photos, TrainJob
from denoising_vit.denoiser.options import PairOptions, TrainOptions
from denoising_vit.diagnosis.diagnose import run_diagnosis
from denoising_vit.diagnosis.options import DiagnoseOptions
from denoising_vit.diagnosis.page import write_diagnosis
from denoising_vit.errors import BackboneError, DenoisingVitError, OutputError, PlanError
from denoising_vit.files import atomic_path, digest
from denoising_vit.hub.card import write_card
from denoising_vit.hub.pretrained import push_folder
from denoising_vit.preparation.options import PrepareOptions
from denoising_vit.progress import Progress, no_progress
from denoising_vit.training.pair_files import remove_pairs
from denoising_vit.training.run_folder import differences, held, is_new, read_object
from denoising_vit.training_free import find_registers, find_subspace

FORMAT = "denoising-vit/prepared"

#: Record of a folder: its options, the findings of each stage, and the reason if the last command failed.
RECORD = "prepared.json"

Say = Callable[[str], None]


def prepare(
    models: Sequence[str],
    dataset: Dataset,
    out: Path,
    options: PrepareOptions,
    *,
    push: str | None = None,
    watch: Progress = no_progress,
    say: Say = lambda _text: None,
) -> dict[str, str]:
    """Prepare each backbone in its own folder; a failure does not stop the others.

    Args:
        models: names of backbones.
        dataset: unlabelled photos.
        out: parent folder.
        options: options of the preparation.
        push: user or organisation on the hub to upload each folder to.
        watch: reports progress.
        say: called with a message when a stage of a backbone starts.

    Returns:
        Reasons of failures, by backbone.

    Raises:
        PlanError: if two backbones have the same folder, or an option is out of range.
    """
    options.validate()
    folders = {model: out / folder_name(model) for model in models}
    if len(set(folders.values())) < len(models):
        raise PlanError(f"expected models with different folder names, got {', '.join(models)}")
    failed: dict[str, str] = {}
    for model, folder in folders.items():
        try:
            _prepare_one(model, dataset, folder, options, push, watch, say)
        except Exception as error:  # for example, the model does not fit into memory; others may
            failed[model] = _reason(error)
    return failed


def folder_name(model: str) -> str:
    """Name of a backbone's folder, which is also its name on the hub."""
    return re.sub(r"[^\w.-]+", "-", model, flags=re.ASCII).strip("-.")


def _prepare_one(
    model: str, dataset: Dataset, folder: Path, options: PrepareOptions, push: str | None, watch: Progress, say: Say
) -> None:
    """Prepare one backbone in its folder, from the first unfinished stage; the reason of a failure is recorded."""
    record = _opened(folder, {"model": model, "photos": dataset.digest, "options": options.recorded()})
    done = record["stages"]
    with held(folder, "prepare"):
        try:
            if wanted := [name for name in _STAGES if name not in done and (name != "denoiser" or options.denoiser)]:
                spec = BackboneSpec(model, options.weights, device=options.device, dtype=options.dtype)
                work = _Work(spec.load(), dataset, folder, options, watch, done)
                if "denoiser" in wanted:  # the diagnosis also evaluates it
                    wanted = [*dict.fromkeys([*wanted, "diagnosis"])]
                for name in wanted:
                    say(f"{model}: {name}")
                    done[name] = _STAGES[name](work)
                    _write(folder, record)
            write_card(folder, _figures(done))
            if push is not None:
                say(f"{model}: uploaded to {push_folder(folder, f'{push}/{folder.name}')}")
        except Exception as error:
            _write(folder, record | {"failed": _reason(error)})
            raise
        _write(folder, record)


@dataclass(frozen=True)
class _Work:
    """Inputs of the stages of one backbone."""

    backbone: Backbone
    dataset: Dataset
    folder: Path
    options: PrepareOptions
    watch: Progress
    done: Mapping[str, Any]  #: findings of earlier stages

    @property
    def chosen(self) -> list[int]:
        """The sample of the photos."""
        return spread(len(self.dataset), self.options.sample)

    @cached_property
    def pixels(self) -> list[np.ndarray]:
        """Pixels (H, W, 3) uint8 of the sample."""
        photos = named_photos(self.dataset, self.chosen)
        return [pixels for _, pixels in photos if not isinstance(pixels, Skipped)]

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of the images; None for the backbone's own."""
        return None if self.options.size is None else (self.options.size, self.options.size)


def _artifact(work: _Work) -> dict[str, Any]:
    options = CalibrationOptions(size=work.size, seed=work.options.seed)
    with work.watch("photos", len(work.chosen)) as advance:
        photos = named_photos(work.dataset, work.chosen)
        found = run_calibration(work.backbone, photos, progress=lambda *_: advance(), options=options)
    found.artifact.save(Artifact.path_in(work.folder))
    return {"photos": found.stability.photos, "reliability": round(found.stability.reliability, 4)}


def _subspace(work: _Work) -> dict[str, Any]:
    found = find_subspace(work.backbone, work.pixels, size=work.size)
    found.save(found.path_in(work.folder))
    return {"rank": found.rank}


def _registers(work: _Work) -> dict[str, Any]:
    try:
        found = find_registers(work.backbone, work.pixels, size=work.size)
    except BackboneError as error:  # not a failure: registers support one kind of model only
        return {"none": str(error)}
    if not found.neurons:
        return {"none": found.info["reason"]}
    found.save(found.path_in(work.folder))
    return {"neurons": len(found.neurons)} | {f"outliers {when}": found.info[when] for when in ("before", "after")}


def _denoiser(work: _Work) -> dict[str, Any]:
    asked, run = work.options, work.folder / "run"
    training = TrainOptions(
        steps=asked.steps, batch_size=asked.batch_size, learning_rate=asked.learning_rate, seed=asked.seed
    )
    # An unreliable artifact is noise; targets without an artifact are then better.
    artifact = Artifact.path_in(work.folder) if work.done["artifact"]["reliability"] >= STABLE else NONE
    source = Photos(work.dataset, replace(DenoiseOptions.context(), size=work.size, seed=asked.seed), artifact)
    resume = (run / "run.json").is_file()
    job = TrainJob.prepare(source, run, work.backbone, training, PairOptions(), resume=resume)
    job.fill(work.watch)
    with work.watch("steps", training.steps) as advance:
        progress = job.training().run(lambda *_: advance())
    Denoiser.load(job.folder.denoiser).save(Denoiser.path_in(work.folder))
    remove_pairs(job.folder.pairs)  # 8 MB per photo for a small ViT
    assert progress.best is not None  # a run ends with an evaluation
    return {"held-out cosine": round(progress.best, 4), "photos skipped": len(job.skipped)}


def _diagnosis(work: _Work) -> dict[str, Any]:
    path = Denoiser.path_in(work.folder)
    denoiser = find_denoiser(path, work.backbone).denoiser if path.is_file() else None
    extractors = {} if denoiser is None else {"denoiser": DenoisedViT(work.backbone, denoiser)}
    options = DiagnoseOptions(size=work.size, seed=work.options.seed)
    with work.watch("photos", len(work.chosen)) as advance:
        photos = named_photos(work.dataset, work.chosen)
        found = run_diagnosis(work.backbone, photos, extractors, lambda *_: advance(), options)
    write_diagnosis(found, work.folder, digest([work.backbone.name, work.dataset.digest]))
    return {"verdict": found.verdict.words}


#: The stages of a backbone, in order; each writes a file and returns its findings as JSON values.
_STAGES: dict[str, Callable[[_Work], dict[str, Any]]] = {
    "artifact": _artifact,
    "subspace": _subspace,
    "registers": _registers,
    "denoiser": _denoiser,
    "diagnosis": _diagnosis,
}


def _opened(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The record of a folder, which is created if it does not exist; OutputError if it has other contents."""
    found = read_object(folder / RECORD) if (folder / RECORD).is_file() else None
    if found is None or found.get("format") != FORMAT:
        if not is_new(folder, RECORD):
            raise OutputError(f"{folder} exists and was not written by dvit prepare; choose another folder with -o")
        folder.mkdir(parents=True, exist_ok=True)
        return {"format": FORMAT, "version": 1, **identity, "stages": {}}
    before = {name: found[name] for name in identity}
    # An option in only one of the two records belongs to training that was not requested before, or not this time.
    shared = before["options"].keys() & identity["options"].keys()
    options = [{name: record["options"][name] for name in shared} for record in (before, identity)]
    if different := differences(before | {"options": options[0]}, identity | {"options": options[1]}):
        raise OutputError(
            f"{folder}: was prepared with other options: {'; '.join(different)}. Use the same ones, or another folder"
        )
    found.pop("failed", None)
    return found | {"options": before["options"] | identity["options"]}


def _write(folder: Path, record: dict[str, Any]) -> None:
    with atomic_path(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def _figures(done: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Findings of the stages, as rows of the card."""
    stages = [name for name in _STAGES if name in done]
    return {f"{stage}, {name}": value for stage in stages for name, value in done[stage].items()}


def _reason(error: Exception) -> str:
    """An error in one line; errors of other packages have their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, DenoisingVitError) else f"{type(error).__name__}: {text}"
