"""Nearest-neighbour labels in four settings, and the gain over raw features pooled over them.

    python benchmarks/pooled.py camvid [--denoiser FILE] [--out pooled.json]

Settings: the images' own size and 518 x 518, whole images and position-neutral crops; fitted on train, scored on val.
The 95 % interval is that of the mean difference over the four settings, over the same images in each.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from measuring import hardware

from denoising_vit.backbones import BackboneSpec
from denoising_vit.denoiser import find_denoiser
from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.evaluation.features import FeatureCache
from denoising_vit.evaluation.knn import nearest_neighbours
from denoising_vit.evaluation.labelled import open_labelled
from denoising_vit.evaluation.options import KnnOptions
from denoising_vit.evaluation.outcomes import paired_interval
from denoising_vit.evaluation.scores import Counts, scores
from denoising_vit.evaluation.sources import ExtractorSource

SETTINGS = {
    "native, whole": KnnOptions(),
    "native, neutral": KnnOptions(crops="neutral"),
    "518, whole": KnnOptions(size=518),
    "518, neutral": KnnOptions(size=518, crops="neutral"),
}


def main(
    data: tyro.conf.Positional[Path],
    /,
    denoiser: str | None = None,
    cache: Path = Path("pooled.cache"),
    out: Annotated[Path | None, tyro.conf.arg(name="out")] = None,
) -> None:
    """Compares a denoiser with raw features.

    Args:
        data: folder of labelled images.
        denoiser: file of a denoiser; the shipped one if None.
        cache: folder for raw features.
        out: file for the record.
    """
    backbone = BackboneSpec().load()
    found = find_denoiser(denoiser, backbone)
    raw = ExtractorSource("raw", backbone)
    clean = ExtractorSource("denoiser", backbone, DenoisedViT(backbone, found.denoiser), {"denoiser": found.digest})
    labelled, kept = open_labelled(data), FeatureCache(cache)
    record: dict[str, Any] = {"hardware": hardware(), "backbone": backbone.extra_repr(), "denoiser": found.digest}
    counts: dict[str, tuple[Counts, Counts]] = {}
    for name, options in SETTINGS.items():
        theirs, ours = (nearest_neighbours(source, labelled, options, cache=kept) for source in (raw, clean))
        counts[name] = ours, theirs
        record[name] = told([ours], [theirs])
        print(name, json.dumps(record[name]), flush=True)
    record["pooled"] = told([ours for ours, _ in counts.values()], [theirs for _, theirs in counts.values()])
    print("pooled", json.dumps(record["pooled"]))
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n")


def told(ours: list[Counts], theirs: list[Counts]) -> dict[str, float | None]:
    """Mean mIoU of both, and their difference with its interval."""
    raw, clean = (float(np.mean([scores(one).miou for one in each])) for each in (theirs, ours))
    figures = {"raw": raw, "denoiser": clean, **asdict(paired_interval(ours, theirs))}
    return {name: None if value is None else round(value, 2) for name, value in figures.items()}


if __name__ == "__main__":
    tyro.cli(main)
