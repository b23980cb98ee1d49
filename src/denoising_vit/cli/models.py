"""``dvit models``: the published backbones and their weights."""

from __future__ import annotations

from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from denoising_vit.backbones import SEEDS
from denoising_vit.backbones.catalog import MODEL_FAMILIES
from denoising_vit.cli.reporting import print_note


def models(families: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(name="all")] = False) -> None:
    """List the backbones that the method was published for.

    Any other timm VisionTransformer, Eva or NaFlexVit model works by its name in the same way.

    Args:
        families: list the families of models that load, and those that do not, with the reason.
    """
    if families:
        _list_families()
        return
    from denoising_vit.backbones.bundled import bundled_available
    from denoising_vit.denoiser import HUB_ID, published_file, published_variants

    table = Table(box=None, pad_edge=False)
    table.add_column("backbone", no_wrap=True)  # names are there to be copied
    table.add_column("pretraining")
    for heading in ("patch", "size", "weights"):
        table.add_column(heading, no_wrap=True)
    table.add_column("published by the authors")
    for name, seed in SEEDS.items():
        weights = "installed" if bundled_available(name) else "hub"
        table.add_row(
            name, seed.family, str(seed.patch_size), str(seed.size), weights, ", ".join(published_variants(name)) or "-"
        )
    Console().print(table)
    print_note(f"published checkpoints: {HUB_ID} on the hub, as in {published_file('MODEL', 'voc_denoised')}")


def _list_families() -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("family")
    table.add_column("example", no_wrap=True)
    for heading in ("loads", "what to know"):
        table.add_column(heading)
    for family in MODEL_FAMILIES:
        table.add_row(family.name, family.example, "yes" if family.loads else "no", family.note)
    Console().print(table)
    print_note("built from the code with random weights; only the DINOv2 ViT-S/14 was checked with pretrained ones")
