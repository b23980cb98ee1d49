"""Shared by the tests of denoisers: denoisers of the planted backbone, in files and in the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_artifact
from denoising_vit import Backbone, Denoiser
from denoising_vit.backbones.recorded import describe
from denoising_vit.denoiser import loading, write_denoiser

CHANNELS = 64


def backbone(seed: int = 0, stride: int = tiny_artifact.PATCH) -> Backbone:
    """The planted backbone, with a width that a denoiser supports."""
    return tiny_artifact.backbone(seed=seed, channels=CHANNELS, stride=stride)


def denoiser(trained_for: Backbone | None = None, seed: int = 0) -> Denoiser:
    """A frozen denoiser whose weights all have an effect and are exact in float16."""
    made = Denoiser(CHANNELS, (4, 5), trained_for=None if trained_for is None else describe(trained_for))
    chance = torch.Generator().manual_seed(seed)
    for value in made.requires_grad_(False).parameters():
        value.copy_((torch.randn(value.shape, generator=chance) * 0.1).half())
    return made.eval()


def write(folder: Path, made: Denoiser, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_denoiser(made, folder / name)
    return folder / name


def ship(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: Denoiser) -> None:
    """Makes the package ship exactly these denoisers, by the tag after the model's name."""
    folder.mkdir(exist_ok=True)
    for tag, made in files.items():
        write(folder, made, f"Planted.{tag}.safetensors")
    monkeypatch.setattr(loading, "_SHIPPED", folder)
