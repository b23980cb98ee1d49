"""``dvit calibrate``: the artifact of a backbone from a few dozen photos, as a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.reporting import (
    load_backbone,
    open_photos,
    photo_progress,
    print_error,
    print_left_out,
    print_note,
)
from denoising_vit.cli.streams import OK, SOME_FAILED, print_json
from denoising_vit.decomposition.options import CalibrationOptions
from denoising_vit.errors import OutputError
from denoising_vit.files import Mark, owned_path, require_ours

if TYPE_CHECKING:
    from denoising_vit.data import Skipped
    from denoising_vit.decomposition.calibration import Calibration


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
    print_left_out(dataset)
    backbone = load_backbone(model)
    with photo_progress(len(chosen)) as progress:
        found = run_calibration(backbone, named_photos(dataset, chosen), progress=progress, options=calibration)
    try:
        with owned_path(out, mark) as temporary:
            replace(found.artifact, info=found.artifact.info | {"made": str(mark)}).save(temporary)
    except OSError as error:
        raise OutputError(f"cannot write {out} ({error.strerror or error})") from error
    return _tell(found, [*dataset.skipped, *found.skipped], out, as_json=json)


def _tell(found: Calibration, skipped: list[Skipped], out: Path, *, as_json: bool) -> int:
    from denoising_vit.decomposition.calibration import doubt_about

    for item in found.skipped:
        print_error(f"{item.item}: {item.reason}", "skipped")
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
