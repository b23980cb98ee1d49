"""``dvit diagnose`` and ``dvit evaluate artifacts``: a backbone's artifacts, and whether cleaning is worthwhile."""

from __future__ import annotations

import hashlib
import json as json_lines
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.comparison import figures_table, finish
from denoising_vit.cli.reporting import (
    load_backbone,
    open_photos,
    photo_progress,
    print_error,
    print_left_out,
    print_note,
    print_skipped,
)
from denoising_vit.cli.streams import OK, SOME_FAILED, print_json
from denoising_vit.diagnosis.options import WRITTEN, DiagnoseOptions
from denoising_vit.environment import run_info
from denoising_vit.errors import OutputError
from denoising_vit.evaluation.results import Record, Results
from denoising_vit.extractors import KINDS, Cleaners, Extractor, Unused, features_arg, parse_names
from denoising_vit.files import Mark, owned_path, require_ours, unwritable

if TYPE_CHECKING:
    from denoising_vit.data import Dataset
    from denoising_vit.diagnosis.diagnose import Diagnosis
    from denoising_vit.evaluation.workbench import Line


#: Result files, and the kinds of their marks.
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
    """Measure a backbone's artifacts on your photos, and whether cleaning is worthwhile.

    Writes DIR/diagnosis.html (a page with maps, for a browser), DIR/diagnosis.json, and DIR/artifact.safetensors (for
    `--artifact`).

    Args:
        data: a folder, text list, tar shards or URL, as for `dvit fit`.
        out: folder for the results; created if it does not exist.
        diagnosing: options of the diagnosis.
        model: the backbone.
        photos: number of photos to use, spread evenly over the data set; 0 uses all.
        denoiser: a denoiser to evaluate as well: a file, or voc_denoised or imgnet_denoised for the published ones;
            defaults to the one in the package for this backbone.
        json: print the metrics as one JSON line instead of a table.
    """
    from denoising_vit.cli.outputs import input_digest, require_writable
    from denoising_vit.data import named_photos
    from denoising_vit.denoiser import find_denoiser, find_shipped
    from denoising_vit.denoiser.denoised_vit import DenoisedViT
    from denoising_vit.diagnosis.diagnose import run_diagnosis

    source = input_digest(data, model)
    for name, kind in _FILES.items():
        require_ours(out / name, Mark(kind, source))
    diagnosing.calibration()  # check the options before the model is loaded
    dataset, chosen = open_photos(data, photos)
    print_left_out(dataset.skipped)
    require_writable(out)
    backbone = load_backbone(model)
    cleaner = find_shipped(backbone) if denoiser is None else find_denoiser(denoiser, backbone)
    extractors = {} if cleaner is None else {"denoiser": DenoisedViT(backbone, cleaner.denoiser)}
    with photo_progress(len(chosen)) as progress:
        found = run_diagnosis(backbone, named_photos(dataset, chosen), extractors, progress, diagnosing)
    code = _print_result(found, as_json=json)
    from denoising_vit.diagnosis.page import write_diagnosis  # matplotlib and scikit-learn take seconds to import

    mark, artifact = Mark(_FILES["artifact.safetensors"], source), found.evidence.calibration.artifact
    try:
        with owned_path(out / "artifact.safetensors", mark) as temporary:
            replace(artifact, info=artifact.info | {"made": str(mark)}).save(temporary)
        write_diagnosis(found, out, source)
    except OSError as error:
        raise OutputError(f"cannot write to {out} ({unwritable(error)})") from error
    print_note(f"maps and metrics in {out / 'diagnosis.html'}, artifact in {out / 'artifact.safetensors'}")
    return SOME_FAILED if dataset.skipped else code


def _print_result(found: Diagnosis, *, as_json: bool) -> int:
    skipped = found.info["skipped"]
    for name, reason in skipped:
        print_skipped(name, reason)
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

    table = figures_table({name: asdict(metrics) for name, metrics in found.metrics.items()}, ARTIFACT_LABELS)
    outcomes = [found.judgements[name].outcome if name in found.judgements else "" for name in found.metrics]
    table.add_row("verdict", *outcomes)
    return table


@dataclass(frozen=True)
class _OtherCleaners(Cleaners):
    """Cleaners other than G, which the diagnosis estimates itself."""

    artifact: Unused = None


def artifacts(
    data: str,
    features: Annotated[str, features_arg()] = "raw,subtract,exact",
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("results.jsonl"),
    diagnosing: tyro.conf.OmitArgPrefixes[DiagnoseOptions] = DiagnoseOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    photos: int = 64,
    cleaners: tyro.conf.OmitArgPrefixes[_OtherCleaners] = _OtherCleaners(),
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Label-free metrics of artifacts, as in `dvit diagnose`; none of them is meaningful on its own.

    Each half of the photos is cleaned with the artifact from the other half, so that it is tested on new photos. The
    metrics include the blank-image test: the fraction of raw's variance over positions that remains on images without
    content, which is 0 for a constant map. It is skipped for exact, which would need a fit of each image.

    Args:
        data: photos: a folder, text list, tar shards or URL, as for `dvit fit`.
        features: names of features.
        out: file to append lines of results to.
        diagnosing: options of the diagnosis.
        model: the backbone and its options.
        photos: number of photos to use, spread evenly over the data set; 0 uses all.
        cleaners: sources of the denoiser and other cleaners.
        json: print the result lines instead of a table.
    """
    from denoising_vit.data import named_photos
    from denoising_vit.diagnosis.diagnose import run_diagnosis
    from denoising_vit.diagnosis.evidence import OWN
    from denoising_vit.evaluation.sources import backbone_settings
    from denoising_vit.metrics.blank_test import BLANK_TEST

    names = parse_names(features, KINDS)
    diagnosing.calibration()  # report invalid options before the model is loaded
    dataset, chosen = open_photos(data, photos)
    results = Results(out)
    backbone = load_backbone(model)
    about = {"name": Path(data).name or data, "layout": "photos", "digest": _digest(dataset, chosen)}
    settings: dict[str, Any] = {"data": about, "backbone": backbone_settings(backbone), "blank_test": BLANK_TEST}
    settings |= diagnosing.recorded()
    extractors: dict[str, Extractor] = {}
    blank: dict[str, Record] = {}
    kept: dict[str, Any] = {}
    for name in names:
        identity: dict[str, str] = {}
        if name not in OWN:  # the diagnosis computes these itself, with its own G
            extractors[name], identity = cleaners.extractor(name, backbone)
        own = json_lines.loads(json_lines.dumps(settings | {"features": identity}))
        blank[name] = Record("artifacts", name, own, run=run_info())
        if (line := results.find(blank[name])) is not None:
            kept[name] = line
            extractors.pop(name, None)
            print_note(f"{name} (kept from an earlier run)")
    if len(kept) == len(blank):
        return _finish([(line, True) for line in kept.values()], out, as_json=json)
    with photo_progress(len(chosen)) as progress:
        found = run_diagnosis(backbone, named_photos(dataset, chosen), extractors, progress, diagnosing)
    skipped = [[item.item, item.reason] for item in dataset.skipped] + [list(item) for item in found.info["skipped"]]
    lines = [
        (kept[name], True) if name in kept else (results.add(_filled(record, found, skipped)), False)
        for name, record in blank.items()
    ]
    return _finish(lines, out, as_json=json)


def _finish(lines: list[Line], out: Path, *, as_json: bool) -> int:
    if as_json:
        for line, _ in lines:
            print_json(line)
    return finish(lines, out, as_json=as_json)


def _digest(dataset: Dataset, chosen: list[int]) -> str:
    """SHA-256 of the photos' pixels in order; for unreadable photos, of the reason."""
    from denoising_vit.data import Skipped, named_photos
    from denoising_vit.data.photos import photo_digest

    digest = hashlib.sha256()
    for _, pixels in named_photos(dataset, chosen):
        digest.update((pixels.reason if isinstance(pixels, Skipped) else photo_digest(pixels)).encode())
    return digest.hexdigest()[:16]


def _filled(record: Record, found: Diagnosis, skipped: list[list[str]]) -> Record:
    return replace(
        record,
        metrics=asdict(found.metrics[record.features]),
        images={"photos": len(found.info["photos"])},
        skipped=skipped,
        seconds=found.info["seconds"],
    )
