"""The published checkpoints and scores; the CSV files name their source in the first line."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from denoising_vit.errors import DenoiserError, EvaluationError
from denoising_vit.files import first_line

#: Hub repository of the published checkpoints.
HUB_ID = "jjaiweiyang/DVT"

#: Variants: the pretrained model; with a denoiser trained on VOC or ImageNet-1k; distilled from such a denoiser.
VARIANTS = ("baseline", "voc_denoised", "voc_distilled", "imgnet_denoised", "imgnet_distilled")

#: Keys of a row's scores, in the order of the file: semantic segmentation of VOC and ADE20K, depth of NYU.
FIGURES = ("voc_miou", "voc_macc", "ade_miou", "ade_macc", "nyu_rmse", "nyu_absrel", "nyu_a1")

#: Keys of a row's scores in object discovery: VOC 2007 and 2012 trainval, COCO20k.
DISCOVERY = ("voc07", "voc12", "coco20k")


@dataclass(frozen=True)
class PublishedRow:
    """Published scores of one variant of a model.

    Attributes:
        model: timm name.
        variant: one of VARIANTS.
        figures: by FIGURES, in percent except nyu_rmse in metres and nyu_absrel as a ratio; None if not published.
    """

    model: str
    variant: str
    figures: Mapping[str, float | None] = field(hash=False)


@dataclass(frozen=True)
class DiscoveryRow:
    """Published object discovery scores of a model.

    Attributes:
        model: timm name.
        variant: baseline or denoised.
        figures: CorLoc in percent by DISCOVERY.
    """

    model: str
    variant: str
    figures: Mapping[str, float] = field(hash=False)


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """All published rows, by model and variant."""
    return tuple(_row(found) for found in _read("figures.csv"))


@cache
def published_discovery() -> tuple[DiscoveryRow, ...]:
    """Object discovery by LOST with feature norms, by model and variant."""
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
        EvaluationError: if there is none; the message names published variants of the model, or similar models.
    """
    variants = {row.variant: row for row in published_rows() if row.model == model}
    if variant in variants:
        return variants[variant]
    if variants:
        raise EvaluationError(
            f"expected a variant of {model} with published scores ({', '.join(variants)}), got {variant!r}"
        )
    models = list(dict.fromkeys(row.model for row in published_rows()))
    near = get_close_matches(model, models, n=3, cutoff=0.5)
    remedy = f"did you mean {' or '.join(near)}?" if near else f"published models: {', '.join(models)}"
    raise EvaluationError(f"expected a model with published scores, got {model!r}; {remedy}")


def _row(found: Mapping[str, str]) -> PublishedRow:
    figures = {key: None if found[key] == "-" else float(found[key]) for key in FIGURES}
    return PublishedRow(found["model"], found["variant"], MappingProxyType(figures))


def published_variants(model: str) -> tuple[str, ...]:
    """The published variants of a model: voc_denoised, voc_distilled, imgnet_denoised, imgnet_distilled, or none.

    Args:
        model: timm name.
    """
    return tuple(row.variant for row in published_rows() if row.model == model and row.variant != "baseline")


def published_file(model: str, variant: str) -> str:
    """File name of a checkpoint in the hub repository."""
    return f"{variant}/{model}.pth"


def fetch_published(model: str, variant: str) -> Path:
    """Download a published checkpoint, unless it is cached.

    Args:
        model: the timm name.
        variant: such as voc_denoised.

    Raises:
        DenoiserError: if none was published for the model, or the download fails; the message says what to do.
    """
    variants = published_variants(model)
    if variant not in variants:
        there = f"; published: {', '.join(variants)}" if variants else "; `dvit models` lists the published ones"
        raise DenoiserError(f"no {variant} was published for {model}{there}")
    from huggingface_hub import hf_hub_download

    from denoising_vit.backbones.runtime import offline_if_unreachable

    name = published_file(model, variant)
    try:
        with offline_if_unreachable():
            return Path(hf_hub_download(HUB_ID, name))
    except Exception as error:  # network, missing file, damaged cache, ...
        raise DenoiserError(
            f"{name} could not be downloaded from the hub ({type(error).__name__}: "
            f"{first_line(error)}). Download {name} of {HUB_ID} on a machine with network "
            "access, and give the file: --denoiser FILE"
        ) from error
