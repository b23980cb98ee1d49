"""``dvit evaluate artifacts``: label-free metrics as lines of results."""

from __future__ import annotations

import hashlib
import json as json_lines
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.comparison import finish
from denoising_vit.cli.exit_codes import INTERRUPTED, WRONG_USAGE
from denoising_vit.cli.reporting import CountProgress, print_error, print_note
from denoising_vit.cli.streams import print_json
from denoising_vit.diagnosis.options import DiagnoseOptions
from denoising_vit.environment import run_info
from denoising_vit.evaluation.results import Record, Results
from denoising_vit.extractors import KINDS, Cleaners, Extractor, features_arg, parse_names

if TYPE_CHECKING:
    from denoising_vit.data import Dataset
    from denoising_vit.diagnosis.diagnose import Diagnosis
    from denoising_vit.evaluation.workbench import Line


def artifacts(
    data: str,
    features: Annotated[str, features_arg()] = "raw,subtract,exact",
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("results.jsonl"),
    diagnosing: tyro.conf.OmitArgPrefixes[DiagnoseOptions] = DiagnoseOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    photos: int = 64,
    denoiser: str | None = None,
    distilled: str | None = None,
    subspace: str | None = None,
    registers: str | None = None,
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Label-free metrics of artifacts, as in `dvit diagnose`; none of them is meaningful alone.

    Each half of the photos is cleaned with the artifact found in the other half, like new photos. The metrics include
    the blank-image test: the share of raw's variance over places left on images without content, which is 0 for a
    constant map. It is left out for exact, which would need a fit of each image.

    Args:
        data: photos: a folder, text list, tar shards or URL, as for `dvit fit`.
        features: names of features.
        out: file to append lines of results to.
        diagnosing: options of the diagnosis.
        model: the backbone and its options.
        photos: number of photos to use, spread evenly over the data set; 0 takes all.
        denoiser: denoiser file, or voc_denoised or imgnet_denoised for the published ones. Without it, the one shipped
            with the package.
        distilled: weights of the backbone after stage 3: `distilled.safetensors` of a run of `dvit distill`, or a
            published file.
        subspace: positional directions for project. Without it, the 16 strongest of a black image.
        registers: register neurons for registers.
        json: print the lines of results instead of a table.
    """
    from denoising_vit.data import named_photos, open_dataset, spread
    from denoising_vit.diagnosis.diagnose import run_diagnosis
    from denoising_vit.diagnosis.evidence import OWN
    from denoising_vit.evaluation.sources import backbone_settings
    from denoising_vit.metrics.blank_test import BLANK_TEST

    if photos < 0:
        print_error(f"--photos must be 0 (all) or more, got {photos}")
        return WRONG_USAGE
    names = parse_names(features, KINDS)
    diagnosing.calibration()  # report wrong options before loading the model
    dataset = open_dataset(data)
    chosen = spread(len(dataset), photos)
    results = Results(out)
    backbone = model.load()
    about = {"name": Path(data).name or data, "layout": "photos", "digest": _digest(dataset, chosen)}
    settings: dict[str, Any] = {"data": about, "backbone": backbone_settings(backbone), "blank_test": BLANK_TEST}
    settings |= diagnosing.recorded()
    cleaners = Cleaners(None, denoiser, distilled, subspace, registers)
    extractors: dict[str, Extractor] = {}
    blank: dict[str, Record] = {}
    kept: dict[str, Any] = {}
    for name in names:
        identity: dict[str, str] = {}
        if name not in OWN:  # the diagnosis makes these itself, with the G it finds
            extractors[name], identity = cleaners.extractor(name, backbone)
        own = json_lines.loads(json_lines.dumps(settings | {"features": identity}))
        blank[name] = Record("artifacts", name, own, run=run_info())
        if (line := results.find(blank[name])) is not None:
            kept[name] = line
            extractors.pop(name, None)
            print_note(f"{name} (kept from an earlier run)")
    if len(kept) == len(blank):
        return _finish([(line, True) for line in kept.values()], out, as_json=json)
    print_note(f"backbone {backbone.extra_repr()} on {backbone.device}, fingerprint {backbone.fingerprint.short}")
    with CountProgress(len(chosen), "photos") as progress:
        try:
            found = run_diagnosis(
                backbone, named_photos(dataset, chosen), extractors, lambda *_: progress.advance(), diagnosing
            )
        except KeyboardInterrupt:
            progress.stop()
            print_note("interrupted; nothing was written")
            return INTERRUPTED
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
    """SHA-256 of the photos' pixels in order, or of the reason for unreadable ones."""
    from denoising_vit.data import Skipped, named_photos
    from denoising_vit.data.photos import photo_digest

    digest = hashlib.sha256()
    for _, pixels in named_photos(dataset, chosen):
        digest.update((pixels.reason if isinstance(pixels, Skipped) else photo_digest(pixels)).encode())
    return digest.hexdigest()[:16]


def _filled(record: Record, found: Diagnosis, skipped: list[list[str]]) -> Record:
    return Record(
        record.task,
        record.features,
        record.settings,
        metrics=asdict(found.metrics[record.features]),
        images={"photos": len(found.info["photos"])},
        skipped=skipped,
        seconds=found.info["seconds"],
        run=record.run,
    )
