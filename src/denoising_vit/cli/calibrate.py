"""``dvit calibrate``: the artifact of a backbone from a few dozen photos, as a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.exit_codes import INTERRUPTED, OK, SOME_FAILED, WRONG_USAGE
from denoising_vit.cli.reporting import CountProgress, print_error, print_note
from denoising_vit.cli.streams import print_json
from denoising_vit.decomposition.options import CalibrationOptions
from denoising_vit.files import Mark, owned_path, require_ours

if TYPE_CHECKING:
    from denoising_vit.data import Skipped
    from denoising_vit.decomposition.calibration.calibrate import Calibration


def calibrate(
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")],
    /,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")],
    calibration: tyro.conf.OmitArgPrefixes[CalibrationOptions] = CalibrationOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    photos: int = 64,
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """The artifact that a backbone adds to every image, from a few dozen varied photos.

    Reports its reliability and the number of photos needed. Use it with `dvit denoise PHOTO --artifact FILE -o DIR`.

    Args:
        data: a folder, text list, tar shards or URL, as for `dvit fit`.
        out: output file (.safetensors).
        calibration: options of the calibration.
        model: the backbone, and how to run it.
        photos: number of photos to use, spread evenly over the data set; 0 for all.
        json: print the figures as one JSON line.
    """
    from denoising_vit.cli.outputs import input_digest
    from denoising_vit.data import named_photos, open_dataset, spread
    from denoising_vit.decomposition.calibration.calibrate import run_calibration

    if out.suffix != ".safetensors" or not out.parent.is_dir() or out.is_dir():
        print_error(f"-o {out}: expected the name of a .safetensors file in a folder that exists")
        return WRONG_USAGE
    if photos < 0:
        print_error(f"--photos must be 0 (all) or more, got {photos}")
        return WRONG_USAGE
    mark = Mark("artifact", input_digest(data, model))
    require_ours(out, mark)
    calibration.denoising()  # report wrong options before the model is loaded
    dataset = open_dataset(data)
    for item in dataset.skipped:
        print_error(f"{item.item}: {item.reason}", "skipped")
    backbone = model.load()
    print_note(f"backbone {backbone.extra_repr()} on {backbone.device}, fingerprint {backbone.fingerprint.short}")
    chosen = spread(len(dataset), photos)
    with CountProgress(len(chosen), "photos") as progress:
        try:
            found = run_calibration(
                backbone, named_photos(dataset, chosen), progress=lambda *_: progress.advance(), options=calibration
            )
        except KeyboardInterrupt:
            progress.stop()
            print_note("interrupted; nothing was written")
            return INTERRUPTED
    try:
        with owned_path(out, mark) as temporary:
            replace(found.artifact, info=found.artifact.info | {"made": str(mark)}).save(temporary)
    except OSError as error:
        print_error(f"cannot write {out} ({error.strerror or error})")
        return WRONG_USAGE
    return _tell(found, [*dataset.skipped, *found.skipped], out, as_json=json)


def _tell(found: Calibration, skipped: list[Skipped], out: Path, *, as_json: bool) -> int:
    from denoising_vit.decomposition.calibration.calibrate import doubt_about

    for item in found.skipped:
        print_error(f"{item.item}: {item.reason}", "skipped")
    stability = found.stability
    if as_json:
        record = stability.record() | {"split_half_by_photos": found.split_half, "output": str(out)}
        print_json(record | {"skipped": [item.item for item in skipped]})
    halves = ", ".join(f"{value:.3f} ({count})" for count, value in found.split_half.items())
    print_note(f"split-half correlation (photos): {halves}")
    enough = f"; 0.95 takes {stability.suggested} photos" if stability.suggested else ""
    print_note(f"reliability of the artifact of {stability.photos} photos: {stability.reliability:.3f}{enough}")
    if doubt := doubt_about(stability):
        print_error(doubt, "warning")
    print_note(f"artifact written to {out}")
    return SOME_FAILED if skipped else OK
