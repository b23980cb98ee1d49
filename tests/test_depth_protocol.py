"""Training of depth probes: learning rate and momentum per step, the optimiser, and the options."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from denoising_vit.errors import PlanError
from denoising_vit.evaluation import probing
from denoising_vit.evaluation.depth import PAPER, QUICK, DepthOptions
from denoising_vit.evaluation.depth.probe import DepthProbe, depth_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_published_numbers() -> None:
    recorded = asdict(PAPER)
    wanted = {
        "steps": 38_400,
        "warmup": 12_800,
        "batch": 16,
        "learning_rate": 5e-3,
        "weight_decay": 0.01,
        "gradient_limit": 35,
        "cycle": True,
        "mean_first": 100,
        "augment": True,
        "rotate": 2.5,
        "flip": 0.5,
        "crop": (416, 544),
        "gamma": (0.9, 1.1),
        "brightness": (0.75, 1.25),
        "colour": (0.9, 1.1),
        "flip_test": True,
        "normalisation": "imagenet",
        "size": None,
    }
    assert {name: recorded[name] for name in wanted} == wanted


def test_quick_uses_whole_images_and_the_same_probe() -> None:
    assert not QUICK.augment and not QUICK.flip_test and not QUICK.cycle and QUICK.mean_first == 0
    same = ("bins", "nearest", "farthest", "class_token", "upsample", "gradient")
    assert all(getattr(QUICK, name) == getattr(PAPER, name) for name in same)
    assert QUICK.warmup / QUICK.steps == pytest.approx(PAPER.warmup / PAPER.steps, abs=0.01)
    assert QUICK.normalisation == "own"


# --- Rates and momentum


@pytest.mark.parametrize("step", [0, 1, 99, 6_400, 12_799, 12_800, 25_000, 38_399])
def test_the_rate_is_half_a_cosine_times_the_warm_up(step: int) -> None:
    least = 5e-3 * 1e-8
    cosine = least + (5e-3 - least) / 2 * (1 + math.cos(math.pi * step / 38_400))
    warm = 1e-3 + (1 - 1e-3) * step / 12_800 if step < 12_800 else 1
    assert PAPER.learning_rate_at(step) == pytest.approx(cosine * warm, rel=1e-9)


def test_learning_rate_at_start_peak_and_end() -> None:
    assert PAPER.learning_rate_at(0) == pytest.approx(5e-6)
    assert PAPER.learning_rate_at(38_400) == pytest.approx(5e-11)
    rates = [PAPER.learning_rate_at(step) for step in range(38_400)]
    assert 12_700 <= rates.index(max(rates)) <= 12_800
    assert rates[12_800:] == sorted(rates[12_800:], reverse=True)


@pytest.mark.parametrize("steps", [38_400, 100, 30])
def test_momentum_goes_through_one_cycle(steps: int) -> None:
    probe = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(probe.parameters(), betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=steps, pct_start=0.3, base_momentum=0.85, max_momentum=0.95
    )
    protocol = replace(PAPER, steps=steps)
    looked = range(steps) if steps < 1_000 else range(1_000)
    for step in looked:
        assert protocol.momentum_at(step) == pytest.approx(optimizer.param_groups[0]["betas"][0], abs=1e-9)
        optimizer.step()
        schedule.step()
    turn = 0.3 * steps - 1
    assert protocol.momentum_at(0) == pytest.approx(0.95) and protocol.momentum_at(steps - 1) == pytest.approx(0.95)
    assert protocol.momentum_at(round(turn)) == pytest.approx(0.85, abs=1e-6)
    assert protocol.momentum_at(round(turn / 2)) == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_very_short_trainings_have_valid_momentum_and_learning_rate(steps: int) -> None:
    for protocol in (replace(PAPER, steps=steps, warmup=0), replace(QUICK, steps=steps, warmup=0)):
        assert all(0.85 <= protocol.momentum_at(step) <= 0.95 for step in range(steps))
        assert all(0 < protocol.learning_rate_at(step) <= protocol.learning_rate for step in range(steps))


def test_quick_has_a_constant_momentum() -> None:
    assert {QUICK.momentum_at(step) for step in range(QUICK.steps)} == {0.9}


# --- The optimiser


class Noise:
    """Random features and depth, determined by the step."""

    channels = 5

    def __init__(self, loud: float = 1.0) -> None:
        self.loud = loud

    def loss(self, probe: DepthProbe, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        features = torch.randn(2, 6, 6, self.channels, generator=generator)
        truth = 1 + 8 * torch.rand(2, 6, 6, generator=generator)
        return self.loud * depth_loss(probe.at_patches(features, None), truth, 0.5, mean_only=step < 2)


def probe_of(seed: int = 0) -> DepthProbe:
    return DepthProbe(5, 16, 0.001, 10.0, 4, seed)


def test_the_optimiser_is_adamw_with_the_published_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.optim.AdamW] = []
    seen: list[tuple[float, tuple[float, float]]] = []
    limits: list[float] = []
    clip = nn.utils.clip_grad_norm_

    class Spy(torch.optim.AdamW):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

        def step(self, *args: Any, **kwargs: Any) -> Any:
            seen.extend((group["lr"], group["betas"]) for group in self.param_groups)
            return super().step(*args, **kwargs)

    def clipped(parameters: Any, max_norm: float) -> Tensor:
        limits.append(max_norm)
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clipped)
    protocol = replace(PAPER, steps=20, warmup=5)
    probe = probe_of()
    probing.train(probe, Noise().loss, protocol)
    (optimizer,) = made
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["eps"], group["amsgrad"]) == (0.01, 1e-8, False)
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in probe.parameters()}
    assert [rate for rate, _ in seen] == pytest.approx([protocol.learning_rate_at(step) for step in range(20)])
    assert [betas[0] for _, betas in seen] == pytest.approx([protocol.momentum_at(step) for step in range(20)])
    assert min(betas[0] for _, betas in seen) < 0.86 and max(betas[0] for _, betas in seen) == 0.95
    assert {betas[1] for _, betas in seen} == {0.999}
    assert limits == [35] * 20


def test_training_equals_a_loop_by_hand() -> None:
    """With gradients so large that they are clipped."""
    protocol, samples = replace(PAPER, steps=6, warmup=2), Noise(loud=1e4)
    probe, byhand = probe_of(4), probe_of(4)
    curve = probing.train(probe, samples.loss, protocol, looks=3)
    optimizer = torch.optim.AdamW(byhand.parameters(), lr=5e-3, betas=(0.95, 0.999), weight_decay=0.01)
    losses, norms = [], []
    for step in range(6):
        optimizer.param_groups[0]["lr"] = protocol.learning_rate_at(step)
        optimizer.param_groups[0]["betas"] = protocol.momentum_at(step), 0.999
        loss = samples.loss(byhand, step)
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in byhand.parameters() if parameter.grad is not None]
        norms.append(math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)))
        for gradient in gradients:
            gradient.mul_(min(1.0, 35 / norms[-1]))
        optimizer.step()
        losses.append(float(loss.detach()))
    assert max(norms) > 100
    torch.testing.assert_close(probe.weigh.weight, byhand.weigh.weight, rtol=1e-4, atol=1e-7)
    assert [loss for _, loss in curve.losses] == pytest.approx(
        [sum(losses[start : start + 2]) / 2 for start in (0, 2, 4)], rel=1e-4
    )
    assert not torch.equal(probe.weigh.weight, probe_of(4).weigh.weight)


# --- Options


def test_options_override_the_preset() -> None:
    assert DepthOptions().protocol() == QUICK
    assert DepthOptions(preset="paper").protocol() == PAPER
    changed = DepthOptions(
        "quick", size=(56, 84), steps=30, batch=2, learning_rate=0.1, weight_decay=0.0, farthest=80.0, gradient=0.0
    ).protocol()
    wanted: dict[str, Any] = {"size": (56, 84), "steps": 30, "warmup": 10, "batch": 2, "learning_rate": 0.1}
    assert changed == replace(QUICK, weight_decay=0.0, farthest=80.0, gradient=0.0, **wanted)
    assert DepthOptions("paper", steps=300).protocol() == replace(PAPER, steps=300, warmup=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ()}, "seeds must be one or more different numbers"),
        ({"seeds": (1, 1)}, "seeds must be one or more different numbers"),
        ({"seeds": (-1,)}, "seeds must be one or more different numbers"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": -2}, "batch must be at least 1, got -2"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive number, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be a positive number"),
        ({"learning_rate": math.inf}, "learning_rate must be a positive number"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"gradient": -1.0}, "gradient must be at least 0, got -1.0"),
        ({"gradient": math.nan}, "gradient must be at least 0"),
        ({"farthest": 0.001}, "farthest must be a depth of more than 0.001 m, got 0.001"),
        ({"farthest": math.inf}, "farthest must be a depth of more than 0.001 m, got inf"),
        ({"preset": "paper", "size": 56}, "size applies to preset quick"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        DepthOptions(**options).protocol()
