"""The published checkpoints: which there are, and where."""

from __future__ import annotations

from pathlib import Path

from denoising_vit.denoiser.published import published_rows
from denoising_vit.errors import DenoiserError

#: Where the authors published them.
HUB_ID = "jjaiweiyang/DVT"


def published_variants(model: str) -> tuple[str, ...]:
    """What was published for a model: voc_denoised, voc_distilled, imgnet_denoised, imgnet_distilled; none for others.

    Args:
        model: its timm name.
    """
    return tuple(row.variant for row in published_rows() if row.model == model and row.variant != "baseline")


def published_file(model: str, variant: str) -> str:
    """The name of a checkpoint within the hub's repository."""
    return f"{variant}/{model}.pth"


def fetch_published(model: str, variant: str) -> Path:
    """A published checkpoint on this machine, fetched where it is not there yet.

    Args:
        model: the timm name.
        variant: such as voc_denoised.

    Raises:
        DenoiserError: if none was published for the model, or it cannot be fetched; it says what to download then.
    """
    variants = published_variants(model)
    if variant not in variants:
        there = f"; there are {', '.join(variants)}" if variants else "; `dvit models` lists what was"
        raise DenoiserError(f"no {variant} was published for {model}{there}")
    from huggingface_hub import hf_hub_download

    from denoising_vit.backbones.runtime import offline_if_unreachable

    name = published_file(model, variant)
    try:
        with offline_if_unreachable():
            return Path(hf_hub_download(HUB_ID, name))
    except Exception as error:  # the hub's client raises many kinds: network, missing file, damaged cache
        reason = str(error).strip().splitlines()
        raise DenoiserError(
            f"{name} could not be fetched from the hub ({type(error).__name__}: "
            f"{reason[0] if reason else 'no reason given'}). Download {name} of {HUB_ID} where there is a network, and "
            "give the file: --denoiser FILE"
        ) from error
