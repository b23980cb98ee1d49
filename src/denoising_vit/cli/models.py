"""``dvit models``: the published backbones and their weights."""

from __future__ import annotations

from typing import Annotated

import tyro
from rich.console import Console

from denoising_vit.backbones import SEEDS
from denoising_vit.backbones.catalog import MODEL_FAMILIES
from denoising_vit.cli.reporting import plain_table, print_note


def models(families: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(name="all")] = False) -> None:
    """List the backbones that the method was published for.

    Any other timm VisionTransformer, Eva or NaFlexVit model works in the same way, by its name.

    Args:
        families: list the supported families of models, and unsupported ones with the reason.
    """
    if families:
        _list_families()
        return
    from denoising_vit.backbones.bundled import bundled_available
    from denoising_vit.denoiser import HUB_ID, published_file, published_variants

    table = plain_table("backbone", "pretraining", "patch", "size", "weights", "published by the authors")
    for column in (0, 2, 3, 4):
        table.columns[column].no_wrap = True  # names can be copied
    for name, seed in SEEDS.items():
        weights = "installed" if bundled_available(name) else "hub"
        table.add_row(
            name, seed.family, str(seed.patch_size), str(seed.size), weights, ", ".join(published_variants(name)) or "-"
        )
    Console().print(table)
    print_note(f"published checkpoints: {HUB_ID} on the hub, such as {published_file('MODEL', 'voc_denoised')}")


def _list_families() -> None:
    table = plain_table("family", "example", "loads", "notes")
    table.columns[1].no_wrap = True
    for family in MODEL_FAMILIES:
        table.add_row(family.name, family.example, "yes" if family.loads else "no", family.note)
    Console().print(table)
    print_note("tested with random weights; only the DINOv2 ViT-S/14 was tested with pretrained weights")
