"""``dvit diagnose``: artifacts of a backbone, and whether cleaning is worth it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.exit_codes import INTERRUPTED, OK, SOME_FAILED, WRONG_USAGE
from denoising_vit.cli.reporting import CountProgress, print_error, print_note
from denoising_vit.cli.streams import print_json
from denoising_vit.diagnosis.options import WRITTEN, DiagnoseOptions
from denoising_vit.files import Mark, owned_path, require_ours, unwritable

if TYPE_CHECKING:
    from denoising_vit.diagnosis.diagnose import Diagnosis


#: Files of the results, and the kinds of their marks.
_FILES = {"artifact.safetensors": "artifact", **WRITTEN}


def diagnose(
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")],
    /,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")],
    diagnosing: tyro.conf.OmitArgPrefixes[DiagnoseOptions] = DiagnoseOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    photos: int = 64,
    denoiser: str | None = None,
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Measure a backbone's artifacts on your photos, and whether cleaning is worth it.

    Writes DIR/diagnosis.html (a page with maps, for a browser), DIR/diagnosis.json, and DIR/artifact.safetensors (for
    `--artifact`).

    Args:
        data: a folder, text list, tar shards or URL, as for `dvit fit`.
        out: folder for the results; created if missing.
        diagnosing: options of the diagnosis.
        model: the backbone.
        photos: number of photos, evenly spread over the data set; 0 for all.
        denoiser: a denoiser to judge as well: a file, or voc_denoised or imgnet_denoised for the published ones; the
            one in the package for this backbone by default.
        json: print the figures as one JSON line instead of a table.
    """
    from denoising_vit.cli.outputs import input_digest, require_writable
    from denoising_vit.data import named_photos, open_dataset, spread
    from denoising_vit.denoiser import find_denoiser, find_shipped
    from denoising_vit.denoiser.denoised_vit import DenoisedViT
    from denoising_vit.diagnosis.diagnose import run_diagnosis

    if photos < 0:
        print_error(f"--photos must be 0 (all) or more, got {photos}")
        return WRONG_USAGE
    source = input_digest(data, model)
    for name, kind in _FILES.items():
        require_ours(out / name, Mark(kind, source))
    diagnosing.calibration()  # checks the options before the model is loaded
    dataset = open_dataset(data)
    for item in dataset.skipped:
        print_error(f"{item.item}: {item.reason}", "skipped")
    require_writable(out)
    backbone = model.load()
    print_note(f"backbone {backbone.extra_repr()} on {backbone.device}, fingerprint {backbone.fingerprint.short}")
    cleaner = find_shipped(backbone) if denoiser is None else find_denoiser(denoiser, backbone)
    extractors = {} if cleaner is None else {"denoiser": DenoisedViT(backbone, cleaner.denoiser)}
    chosen = spread(len(dataset), photos)
    with CountProgress(len(chosen), "photos") as progress:
        try:
            found = run_diagnosis(
                backbone, named_photos(dataset, chosen), extractors, lambda *_: progress.advance(), diagnosing
            )
        except KeyboardInterrupt:
            progress.stop()
            print_note("interrupted; nothing was written")
            return INTERRUPTED
    code = _tell(found, as_json=json)
    try:
        _write(found, out, source)
    except OSError as error:
        print_error(f"cannot write to {out} ({unwritable(error)})")
        return WRONG_USAGE
    print_note(f"maps and figures in {out / 'diagnosis.html'}, G in {out / 'artifact.safetensors'}")
    return SOME_FAILED if dataset.skipped else code


def _write(found: Diagnosis, out: Path, source: str) -> None:
    from denoising_vit.diagnosis.page import write_diagnosis  # matplotlib and scikit-learn take seconds to import

    artifact = Mark(_FILES["artifact.safetensors"], source)
    with owned_path(out / "artifact.safetensors", artifact) as temporary:
        stored = found.evidence.calibration.artifact
        replace(stored, info=stored.info | {"made": str(artifact)}).save(temporary)
    write_diagnosis(found, out, source)


def _tell(found: Diagnosis, *, as_json: bool) -> int:
    skipped = found.info["skipped"]
    for name, reason in skipped:
        print_error(f"{name}: {reason}", "skipped")
    if as_json:
        print_json(found.record())
    else:
        console = Console()
        console.print(_table(found))
        console.print(found.verdict.words, highlight=False, markup=False, style="bold")
    if found.info["doubt"]:
        print_error(found.info["doubt"], "warning")
    print_note(f"{len(found.info['photos'])} photos in {found.info['seconds']:.0f} s")
    return SOME_FAILED if skipped else OK


def _table(found: Diagnosis) -> Table:
    from denoising_vit.evaluation.tables.sections import ARTIFACT_LABELS

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in found.metrics:
        table.add_column(name, justify="right")
    for key, label in ARTIFACT_LABELS.items():
        values = [getattr(metrics, key) for metrics in found.metrics.values()]
        table.add_row(label, *("-" if value is None else f"{value:.3g}" for value in values))
    outcomes = [found.judgements[name].outcome if name in found.judgements else "" for name in found.metrics]
    table.add_row("judged", *outcomes)
    return table
