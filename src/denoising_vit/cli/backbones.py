"""``dvit models``, ``dvit calibrate`` and ``dvit prepare``: backbones, and the files made for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from denoising_vit.backbones import SEEDS, BackboneSpec
from denoising_vit.backbones.catalog import MODEL_FAMILIES
from denoising_vit.cli.reporting import (
    load_backbone,
    open_photos,
    photo_progress,
    plain_table,
    print_error,
    print_left_out,
    print_note,
    show_progress,
)
from denoising_vit.cli.streams import OK, SOME_FAILED, interruptible, print_json
from denoising_vit.decomposition.options import CalibrationOptions
from denoising_vit.errors import OutputError
from denoising_vit.files import Mark, owned_path, require_ours
from denoising_vit.preparation.options import PrepareOptions

if TYPE_CHECKING:
    from denoising_vit.data import Skipped
    from denoising_vit.decomposition.calibration import Calibration


def models(families: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(name="all")] = False) -> None:
    """List the backbones that the method was published for.

    Any other timm VisionTransformer, Eva or NaFlexVit model works in the same way, by its name.

    Args:
        families: list the supported families of models, and unsupported ones with the reason.
    """
    if families:
        _list_families()
        return
    from denoising_vit.backbones.bundled import bundled_available
    from denoising_vit.denoiser import HUB_ID, published_file, published_variants

    table = plain_table("backbone", "pretraining", "patch", "size", "weights", "published by the authors")
    for column in (0, 2, 3, 4):
        table.columns[column].no_wrap = True  # names can be copied
    for name, seed in SEEDS.items():
        weights = "installed" if bundled_available(name) else "hub"
        table.add_row(
            name, seed.family, str(seed.patch_size), str(seed.size), weights, ", ".join(published_variants(name)) or "-"
        )
    Console().print(table)
    print_note(f"published checkpoints: {HUB_ID} on the hub, such as {published_file('MODEL', 'voc_denoised')}")


def _list_families() -> None:
    table = plain_table("family", "example", "loads", "notes")
    table.columns[1].no_wrap = True
    for family in MODEL_FAMILIES:
        table.add_row(family.name, family.example, "yes" if family.loads else "no", family.note)
    Console().print(table)
    print_note("tested with random weights; only the DINOv2 ViT-S/14 was tested with pretrained weights")


def calibrate(
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")],
    /,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")],
    calibration: tyro.conf.OmitArgPrefixes[CalibrationOptions] = CalibrationOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    photos: int = 64,
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Estimate the artifact that a backbone adds to every image, from a few dozen varied photos.

    Reports its reliability and the number of photos needed. Use it with `dvit denoise PHOTO --artifact FILE -o DIR`.

    Args:
        data: a folder, text list, tar shards or URL, as for `dvit fit`.
        out: output file (.safetensors).
        calibration: options of the calibration.
        model: the backbone and its options.
        photos: number of photos to use, spread evenly over the data set; 0 uses all.
        json: print the metrics as one JSON line.
    """
    from denoising_vit.cli.outputs import input_digest
    from denoising_vit.data import named_photos
    from denoising_vit.decomposition.calibration import run_calibration

    if out.suffix != ".safetensors" or not out.parent.is_dir() or out.is_dir():
        raise OutputError(f"-o {out}: expected a .safetensors file in an existing folder")
    mark = Mark("artifact", input_digest(data, model))
    require_ours(out, mark)
    calibration.denoising()  # report invalid options before the model is loaded
    dataset, chosen = open_photos(data, photos)
    print_left_out(dataset.skipped)
    backbone = load_backbone(model)
    with photo_progress(len(chosen)) as progress:
        found = run_calibration(backbone, named_photos(dataset, chosen), progress=progress, options=calibration)
    try:
        with owned_path(out, mark) as temporary:
            replace(found.artifact, info=found.artifact.info | {"made": str(mark)}).save(temporary)
    except OSError as error:
        raise OutputError(f"cannot write {out} ({error.strerror or error})") from error
    return _print_result(found, [*dataset.skipped, *found.skipped], out, as_json=json)


def _print_result(found: Calibration, skipped: list[Skipped], out: Path, *, as_json: bool) -> int:
    from denoising_vit.decomposition.calibration import doubt_about

    print_left_out(found.skipped)
    stability = found.stability
    if as_json:
        record = stability.record() | {"split_half_by_photos": found.split_half, "output": str(out)}
        print_json(record | {"skipped": [item.item for item in skipped]})
    halves = ", ".join(f"{value:.3f} ({count})" for count, value in found.split_half.items())
    print_note(f"split-half correlation (photos): {halves}")
    enough = f"; {stability.suggested} photos needed for 0.95" if stability.suggested else ""
    print_note(f"reliability of the artifact from {stability.photos} photos: {stability.reliability:.3f}{enough}")
    if doubt := doubt_about(stability):
        print_error(doubt, "warning")
    print_note(f"artifact written to {out}")
    return SOME_FAILED if skipped else OK


def prepare(
    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")],
    photos: Annotated[str, tyro.conf.arg(metavar="DATA")],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")],
    preparing: tyro.conf.OmitArgPrefixes[PrepareOptions] = PrepareOptions(),  # noqa: B008, frozen
    push: Annotated[str | None, tyro.conf.arg(metavar="OWNER")] = None,
) -> int:
    """Prepare backbones for use: artifact, subspace, registers, denoiser, diagnosis and model card of each.

    Each backbone gets a folder DIR/NAME with files for the options of the other verbs: artifact.safetensors for
    --artifact, subspace.safetensors for --subspace, denoiser.safetensors for --denoiser and, if a few neurons write
    outlier tokens, registers.safetensors for --registers; also diagnosis.html and a model card, README.md. The same
    command resumes an interrupted run and skips finished steps. A backbone that fails does not stop the others; the
    reason is printed at the end and recorded in prepared.json.

    Args:
        models: timm names or hf:ID, as for `--backbone` of the other verbs.
        photos: unlabelled photos: a folder, text list, tar shards or URL, as for `dvit fit`.
        out: folder for the results; created if it does not exist.
        preparing: options of the preparation.
        push: upload the safetensors files and the card of each folder to the Hugging Face hub, as OWNER/NAME. Log in
            first (`hf auth login`). The diagnosis is not uploaded, because it shows your photos.
    """
    preparing.validate()  # before torch is imported, which takes seconds
    from denoising_vit.cli.outputs import require_writable
    from denoising_vit.data import open_dataset
    from denoising_vit.preparation.prepare import prepare as prepare_all

    dataset = open_dataset(photos)
    print_left_out(dataset.skipped)
    require_writable(out)
    with interruptible("interrupted; run the command again to resume"):
        failed = prepare_all(models, dataset, out, preparing, push=push, watch=show_progress, say=print_note)
    for model, reason in failed.items():
        print_error(f"{model}: {reason}", "failed")
    print_note(f"{len(models) - len(failed)} of {len(models)} backbones prepared in {out}")
    return SOME_FAILED if failed else OK
