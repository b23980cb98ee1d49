"""Reads ``figures.csv`` and ``discovery.csv``, which name their source in their first line."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from denoising_vit.errors import EvaluationError

#: The model as pretrained; with a denoiser trained on VOC or ImageNet-1k; fine-tuned to such a denoiser's output.
VARIANTS = ("baseline", "voc_denoised", "voc_distilled", "imgnet_denoised", "imgnet_distilled")

#: Keys of a row's figures, in the order of the file: semantic segmentation of VOC and ADE20K, depth of NYU.
FIGURES = ("voc_miou", "voc_macc", "ade_miou", "ade_macc", "nyu_rmse", "nyu_absrel", "nyu_a1")

#: Keys of a row's figures of object discovery: VOC 2007 and 2012 trainval, COCO20k.
DISCOVERY = ("voc07", "voc12", "coco20k")


@dataclass(frozen=True)
class PublishedRow:
    """What was published for one variant of one model.

    Attributes:
        model: timm's name.
        variant: one of VARIANTS.
        figures: one for each of FIGURES, in percent, but nyu_rmse in metres and nyu_absrel a ratio; None where none
            was published.
    """

    model: str
    variant: str
    figures: Mapping[str, float | None] = field(hash=False)


@dataclass(frozen=True)
class DiscoveryRow:
    """What was published of object discovery for a model, as pretrained or denoised.

    Attributes:
        model: timm's name.
        variant: baseline or denoised.
        figures: CorLoc in percent for each of DISCOVERY.
    """

    model: str
    variant: str
    figures: Mapping[str, float] = field(hash=False)


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """All of them, by model and then by variant."""
    return tuple(_row(found) for found in _read("figures.csv"))


@cache
def published_discovery() -> tuple[DiscoveryRow, ...]:
    """Object discovery by LOST with feature norms, by model and then by variant."""
    return tuple(
        DiscoveryRow(found["model"], found["variant"], MappingProxyType({key: float(found[key]) for key in DISCOVERY}))
        for found in _read("discovery.csv")
    )


def _read(name: str) -> list[dict[str, str]]:
    text = files("denoising_vit.denoiser.published").joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def published_row(model: str, variant: str) -> PublishedRow:
    """The row of one variant of one model.

    Raises:
        EvaluationError: if nothing was published for it; names what was published for the model, or similar models.
    """
    variants = {row.variant: row for row in published_rows() if row.model == model}
    if variant in variants:
        return variants[variant]
    if variants:
        raise EvaluationError(
            f"expected a variant of {model} with published figures ({', '.join(variants)}), got {variant!r}; name one"
            " of these"
        )
    models = list(dict.fromkeys(row.model for row in published_rows()))
    near = get_close_matches(model, models, n=3, cutoff=0.5)
    remedy = f"did you mean {' or '.join(near)}?" if near else f"there are figures for {', '.join(models)}"
    raise EvaluationError(f"expected a model with published figures, got {model!r}; {remedy}")


def _row(found: Mapping[str, str]) -> PublishedRow:
    figures = {key: None if found[key] == "-" else float(found[key]) for key in FIGURES}
    return PublishedRow(found["model"], found["variant"], MappingProxyType(figures))
