"""Shared by the tests of the page: a tiny backbone with its denoiser and artifact in files, and photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

import tiny_export
from denoising_vit.backbones import BackboneSpec
from denoising_vit.denoiser import write_denoiser
from denoising_vit.show.app.models import Models

SAMPLE = Path(__file__).parents[1] / "examples" / "cat.jpg"


def spec(folder: Path) -> BackboneSpec:
    """Twelve blocks of 192 channels, patches of 16 pixels."""
    weights = folder / "weights.safetensors"
    if not weights.exists():
        tiny_export.distilled(weights, None)
    return BackboneSpec(tiny_export.MODEL, weights=str(weights), device="cpu", dtype="float32")


def models(folder: Path) -> Models:
    """With a denoiser and an artifact of its own."""
    found = spec(folder)
    backbone = found.load()
    write_denoiser(tiny_export.denoiser(backbone), folder / "denoiser.safetensors")
    tiny_export.artifact(backbone).save(folder / "artifact.safetensors")
    return Models(found, str(folder / "denoiser.safetensors"), str(folder / "artifact.safetensors"))


def photo(folder: Path, height: int, width: int, colour: int | None = None, name: str = "photo.png") -> Path:
    """A photo of noise, or of one colour."""
    chance = np.random.default_rng(height * width)
    noise = chance.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels = noise if colour is None else np.full_like(noise, colour)
    Image.fromarray(pixels).save(folder / name)
    return folder / name
