"""A denoiser whose blocks add a little less than they learned: in evaluations and files, not in training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import tiny_training as tiny
from denoising_vit import Denoiser
from denoising_vit.denoiser import read_denoiser
from denoising_vit.denoiser.options import TrainOptions
from denoising_vit.denoiser.train import shrunk
from denoising_vit.errors import TrainError

pytestmark = pytest.mark.usefixtures("one_thread")


def random_denoiser(blocks: int = 1) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(64, (3, 5), blocks, info={"images": 7})


@pytest.mark.parametrize("factor", [0.0, -0.5, 1.1, math.nan])
def test_factors_out_of_range_are_named(factor: float) -> None:
    with pytest.raises(TrainError, match=rf"shrink must be a factor in \(0, 1\], got {factor}"):
        TrainOptions(shrink=factor).validate()


def test_default_factor_changes_nothing() -> None:
    assert TrainOptions().shrink == 1
    made = random_denoiser()
    features = torch.randn(2, 3, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(shrunk(made, 1.0)(features), made.eval()(features))


@pytest.mark.parametrize("blocks", [1, 2])
def test_factor_0_adds_only_the_position_embedding(blocks: int) -> None:
    made = random_denoiser(blocks)
    features = torch.randn(2, 3, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(shrunk(made, 0.0)(features), features + made.pos_embed.view(1, 3, 5, 64))


def test_a_copy_is_shrunk_and_the_original_is_not() -> None:
    made = random_denoiser().train()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    copied = shrunk(made, 0.5)
    assert made.training
    assert not copied.training
    assert copied.info["images"] == 7
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name])
        factor = 0.5 if "attn.proj" in name or "mlp.fc2" in name else 1
        torch.testing.assert_close(copied.state_dict()[name], factor * value)


def test_shrinking_changes_evaluations_and_files_but_not_training(tmp_path: Path) -> None:
    data = tiny.fitted(tmp_path)
    runs = {factor: tmp_path / f"run-{factor}" for factor in (1.0, 0.5)}
    options = {factor: tiny.options(shrink=factor) for factor in runs}
    for factor, run in runs.items():
        tiny.trained(data.stored, run, None, options[factor])
    assert tiny.rows(runs[0.5], "train") == tiny.rows(runs[1.0], "train")
    last = "checkpoints/step-0000020.safetensors"
    whole, same = tiny.weights_of(runs[1.0] / last), tiny.weights_of(runs[0.5] / last)
    assert all(torch.equal(value, same[name]) for name, value in whole.items())
    written = read_denoiser(runs[0.5] / "last.safetensors")
    for name, value in read_denoiser(runs[1.0] / "last.safetensors").state_dict().items():
        factor = 0.5 if "attn.proj" in name or "mlp.fc2" in name else 1
        torch.testing.assert_close(written.state_dict()[name], factor * value, atol=1e-6, rtol=2e-3)
    judge = tiny.prepared(data.stored, runs[0.5], None, options[0.5], resume=True).training().held_out
    logged = tiny.rows(runs[0.5], "held_out")[-1]
    assert judge(written)["cosine"] == pytest.approx(logged["cosine"], abs=1e-4)
    assert logged["cosine"] != tiny.rows(runs[1.0], "held_out")[-1]["cosine"]
