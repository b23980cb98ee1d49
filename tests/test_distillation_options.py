"""Options of distillation: published defaults, steps from epochs, and errors that name the given value."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from denoising_vit.distilled.options import DistillOptions
from denoising_vit.errors import TrainError
from denoising_vit.training.options import ViewOptions


def test_the_published_recipe_is_the_default() -> None:
    options, views = DistillOptions(), ViewOptions()
    options.validate()
    views.validate()
    assert (options.epochs, options.batch_size, options.accumulate) == (5, 16, 1)
    assert (options.learning_rate, options.final_rate, options.warmup) == (2e-4, 1e-6, 0.15)
    assert (options.weight_decay, options.layer_decay, options.ema) == (1e-5, 1, 0)
    assert (views.whole, views.flip, views.sizes) == (1, 0.5, None)


def test_prefix_and_blank_are_on_and_memory_savings_off_by_default() -> None:
    options = DistillOptions()
    assert (options.hold_prefix, options.blank) == (1, 0.125)  # neither is published
    assert not (options.checkpointing or options.shard)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", -1, "steps must be at least 0, got -1"),
        ("epochs", -0.5, "epochs must be at least 0, got -0.5"),
        ("epochs", math.nan, "epochs must be at least 0, got nan"),
        ("epochs", 0, "expected --epochs above 0, or --steps"),
        ("epochs", math.inf, "expected --epochs above 0, or --steps; got inf epochs"),
        ("accumulate", 0, "accumulate must be at least 1, got 0"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("layer_decay", 0, r"layer_decay must be a factor in \(0, 1\], got 0"),
        ("layer_decay", 1.1, r"layer_decay must be a factor in \(0, 1\], got 1.1"),
        ("layer_decay", math.nan, r"layer_decay must be a factor in \(0, 1\], got nan"),
        ("ema", 1, r"ema must be a factor in \[0, 1\), got 1"),
        ("ema", -0.1, r"ema must be a factor in \[0, 1\), got -0.1"),
        ("ema", math.nan, r"ema must be a factor in \[0, 1\), got nan"),
        ("hold_prefix", -1, "hold_prefix must be at least 0, got -1"),
        ("hold_prefix", math.nan, "hold_prefix must be at least 0, got nan"),
        ("seed", -1, "seed must be at least 0, got -1"),
        ("learning_rate", math.nan, "learning_rate must be at least 0, got nan"),
        ("warmup", 1.0, r"warmup must be a fraction in \[0, 1\), got 1.0"),
        ("held_out", 0, "held_out must be at least 1, got 0"),
        ("stop_at", 0, "stop_at must be at least 1, got 0"),
        ("precision", "float16", "precision must be one of auto, float32, bfloat16, got 'float16'"),
    ],
)
def test_options_out_of_range_raise_with_name_and_value(name: str, value: Any, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        DistillOptions(**{name: value}).validate()


@pytest.mark.parametrize("changes", [{"steps": 1}, {"steps": 7, "epochs": 0}, {"layer_decay": 1}, {"ema": 0}])
def test_limits_of_ranges_are_allowed(changes: dict[str, Any]) -> None:
    DistillOptions(**changes).validate()


@pytest.mark.parametrize(
    ("changes", "images", "processes", "steps"),
    [
        ({"epochs": 5, "batch_size": 16, "blank": 0}, 1600, 1, 500),
        ({"epochs": 5, "batch_size": 16, "blank": 0}, 1600, 2, 250),
        ({"epochs": 5, "batch_size": 16}, 1400, 1, 500),  # 14 photos and 2 content-free images a step
        ({"epochs": 5, "batch_size": 4, "accumulate": 4}, 1600, 1, 500),
        ({"epochs": 5, "batch_size": 4, "accumulate": 2}, 1600, 4, 250),
        ({"epochs": 0.5, "batch_size": 1}, 7, 1, 4),
        ({"epochs": 1, "batch_size": 16}, 3, 1, 1),  # at least one
        ({"steps": 9, "epochs": 5}, 1600, 2, 9),
        ({"steps": 9, "epochs": 0}, 1600, 1, 9),
    ],
)
def test_steps_follow_from_epochs_unless_given(
    changes: dict[str, Any], images: int, processes: int, steps: int
) -> None:
    options = DistillOptions(**changes).with_steps(images, processes)
    assert options.steps == steps
    assert options.last_step == steps
    assert options == replace(DistillOptions(**changes), steps=steps)


def test_views_of_a_step_count_all_batches_and_processes() -> None:
    options = DistillOptions(batch_size=3, accumulate=5, blank=0.3)
    assert (options.views_a_step(7), options.photos_a_step(7)) == (105, 70)


def test_stop_at_is_not_recorded() -> None:
    assert DistillOptions(stop_at=3).recorded() == DistillOptions().recorded()
    recorded = DistillOptions(ema=0.5, hold_prefix=0.25, checkpointing=True).recorded()
    assert (recorded["ema"], recorded["hold_prefix"], recorded["checkpointing"]) == (0.5, 0.25, True)


@pytest.mark.parametrize(
    ("batch", "processes", "rate", "safer"),
    [
        (4, 1, 2e-4, 2.5e-5),  # this peak rate diverged
        (4, 1, 4e-5, None),  # this peak rate trained
        (32, 1, 2e-4, 7.07e-5),
        (8, 4, 2e-4, 7.07e-5),
        (64, 1, 2e-4, None),
        (16, 8, 2e-4, None),  # as published
    ],
)
def test_lower_rate_is_suggested_for_steps_with_few_views(
    batch: int, processes: int, rate: float, safer: float | None
) -> None:
    found = DistillOptions(batch_size=batch, learning_rate=rate).safer_rate(processes)
    assert found == (None if safer is None else pytest.approx(safer, rel=1e-3))
