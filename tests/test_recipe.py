"""The recipe of the shipped denoiser, at a tiny size on the CPU."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data

from denoising_vit.denoiser.module import read_denoiser

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def recipe() -> Callable[[list[str]], None]:
    sys.path.insert(0, str(RECIPES))
    try:
        return runpy.run_path(str(RECIPES / "shipped_denoiser.py"))["main"]
    finally:
        sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(data, name)()).resize((160, 128)).save(folder / f"{name}.png")
    return folder


def command(photos: Path, out: Path, *more: str) -> list[str]:
    small = "--model vit_tiny_patch16_224 --weights random --device cpu --tiny --scenes 2 --views 4 --plans 2 --batch 4"
    return [*small.split(), "--blanks", "32", "--photos", str(photos), "-o", str(out), *more]


@pytest.mark.usefixtures("one_thread")
def test_it_trains_and_writes_a_denoiser(recipe: Callable[[list[str]], None], photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)  # of the backbone's random weights
    recipe(command(photos, tmp_path, "--steps", "240", "--variants", "half-blank", "no-blank"))
    lines = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    left = {line["features"]: line["variance_left"] for line in lines if line.get("blank") == "uniform"}
    assert left["raw"] == pytest.approx(1)
    assert left["half-blank"] < min(left["raw"], left["no-blank"])  # known truth does what it is there for
    denoiser = read_denoiser(tmp_path / "half-blank.safetensors")
    assert denoiser.info["area"] == [0.4, 1.0] and denoiser.info["blank"] == 0.5
    assert denoiser.trained_for is not None and denoiser.trained_for["name"] == "vit_tiny_patch16_224"
    assert denoiser(torch.randn(1, 8, 8, 192)).shape == (1, 8, 8, 192)
