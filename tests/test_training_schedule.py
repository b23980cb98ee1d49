"""The loss, the learning rate and the optimiser, against hand-computed values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_training as tiny
from denoising_vit.training.loop import denoising_loss, learning_rate, peak_rate


def published(step: int, peak: float = 5e-5) -> float:
    return learning_rate(step, 50_000, peak, 1e-6, 0.15)


def test_the_peak_grows_with_the_root_of_the_batch() -> None:
    assert peak_rate(2e-4, 256) == pytest.approx(2e-4)
    assert peak_rate(2e-4, 16) == pytest.approx(5e-5)
    assert peak_rate(2e-4, 64) == pytest.approx(1e-4)


def test_published_schedule_at_key_steps() -> None:
    assert published(0) == pytest.approx(5e-5 / 7500)
    assert published(3749) == pytest.approx(2.5e-5)  # half-way up
    assert published(7499) == pytest.approx(5e-5)  # the last of 7,500 steps up
    assert published(7500) == pytest.approx(5e-5)  # the cosine begins at the top
    assert published(49_999) == pytest.approx(1e-6)
    middle = (published(28_749) + published(28_750)) / 2  # 7,500 + 42,499 / 2
    assert middle == pytest.approx((5e-5 + 1e-6) / 2, rel=1e-6)


def test_a_quarter_of_the_cosine() -> None:
    # 101 steps, no rise: step 25 is a quarter of the way, 1/2 (1 + cos 45 degrees) = 0.853553
    assert learning_rate(25, 101, 1.0, 0.0, 0.0) == pytest.approx(0.8535533905932737)


def test_the_rate_rises_then_falls_and_stays_between_its_ends() -> None:
    rates = [learning_rate(step, 97, 1.0, 0.01, 0.15) for step in range(97)]
    assert rates[:15] == sorted(rates[:15])
    assert rates[15:] == sorted(rates[15:], reverse=True)
    assert max(rates) == 1.0
    assert min(rates[15:]) == pytest.approx(0.01)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_shortest_runs_have_finite_rates(steps: int) -> None:
    rates = [learning_rate(step, steps, 1.0, 0.1, 0.5) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


def test_loss_by_hand() -> None:
    clean = torch.tensor([[[[3.0, 4.0], [1.0, 0.0]]]])  # (1, 1, 2, 2)
    target = torch.tensor([[[[4.0, 3.0], [0.0, 2.0]]]])
    squared, cosine = denoising_loss(clean, target)
    assert float(squared) == pytest.approx((1 + 1 + 1 + 4) / 4)
    assert float(cosine) == pytest.approx((24 / 25 + 0) / 2)


def test_a_perfect_denoiser_has_no_loss() -> None:
    features = torch.randn(2, 3, 5, 7)
    squared, cosine = denoising_loss(features, features)
    assert float(squared) == 0
    assert float(cosine) == pytest.approx(1)


def test_a_run_follows_the_schedule_with_the_published_optimiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny.fitted(tmp_path)
    made: list[torch.optim.AdamW] = []

    class Watched(torch.optim.AdamW):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            made.append(self)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    rates: list[float] = []
    step = Watched.step

    def watched_step(self: Watched, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(Watched, "step", watched_step)
    training = tiny.options(learning_rate=2e-4, weight_decay=1e-5, batch_size=4)
    job, _ = tiny.trained(data.stored, tmp_path / "run", None, training)
    peak = 2e-4 * math.sqrt(4 / 256)
    assert rates[:4] == pytest.approx([peak / 3, peak * 2 / 3, peak, peak])  # 15 % of 20 steps
    assert len(rates) == 20
    assert rates[-1] == pytest.approx(1e-6)
    assert [row["rate"] for row in tiny.rows(job.folder.path, "train")] == pytest.approx(rates)
    (optimiser,) = made
    group = optimiser.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 1e-5)
    assert len(group["params"]) == len(list(job.training().denoiser.parameters()))
