"""Options of training: published defaults, and errors that name the invalid value."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from denoising_vit.denoiser.options import PairOptions, TrainOptions
from denoising_vit.errors import TrainError


def test_the_published_recipe_is_the_default() -> None:
    options = TrainOptions()
    assert (options.steps, options.batch_size, options.blocks) == (50_000, 16, 1)
    assert (options.learning_rate, options.final_rate, options.warmup) == (2e-4, 1e-6, 0.15)
    assert options.weight_decay == 1e-5
    assert options.blank == 0.5  # not published: half of a batch are blank images
    options.validate()
    PairOptions().validate()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("blocks", 0, "blocks must be at least 1, got 0"),
        ("held_out", 0, "held_out must be at least 1, got 0"),
        ("evaluate_every", 0, "evaluate_every must be at least 1, got 0"),
        ("checkpoint_every", -1, "checkpoint_every must be at least 1, got -1"),
        ("stop_at", 0, "stop_at must be at least 1, got 0"),
        ("seed", -1, "seed must be at least 0, got -1"),
        ("learning_rate", -1e-4, "learning_rate must be at least 0, got -0.0001"),
        ("learning_rate", math.nan, "learning_rate must be at least 0, got nan"),
        ("final_rate", -1.0, "final_rate must be at least 0"),
        ("weight_decay", math.nan, "weight_decay must be at least 0, got nan"),
        ("warmup", 1.0, r"warmup must be a fraction in \[0, 1\), got 1.0"),
        ("warmup", math.nan, r"warmup must be a fraction in \[0, 1\), got nan"),
        ("precision", "float64", "precision must be one of auto, float32, bfloat16, got 'float64'"),
    ],
)
def test_training_options_out_of_range_are_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        TrainOptions(**{name: value}).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"whole": 1.5}, r"whole must be a fraction in \[0, 1\], got 1.5"),
        ({"flip": -0.1}, r"flip must be a fraction in \[0, 1\], got -0.1"),
        ({"inverted": math.nan}, r"inverted must be a fraction in \[0, 1\], got nan"),
        ({"area": (0.0, 0.5)}, r"area must be two increasing fractions in \(0, 1\], got \(0.0, 0.5\)"),
        ({"area": (0.6, 0.5)}, "area must be two increasing fractions"),
        ({"area": (0.6, 1.1)}, "area must be two increasing fractions"),
        ({"ratio": (0.0, 1.0)}, "ratio must be two increasing positive numbers"),
        ({"ratio": (2.0, 1.0)}, "ratio must be two increasing positive numbers"),
        ({"keep": -1}, "keep must be at least 0, got -1"),
        ({"keep": 2}, "none of the 2 kept views is a crop, because the whole image and its mirror image .* 3 or more"),
        ({"keep": 1, "flip": 0}, "none of the 1 kept views is a crop, because the whole image comes first.* 2 or more"),
    ],
)
def test_pair_options_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        PairOptions(**changes).validate()


WITHOUT_CONTRADICTION = [
    {"keep": 0},
    {"keep": 3},
    {"keep": 1, "whole": 1},
    {"keep": 2, "whole": 1},
    {"keep": 2, "flip": 0},
]


@pytest.mark.parametrize("changes", WITHOUT_CONTRADICTION)
def test_consistent_pair_options_are_accepted(changes: dict[str, Any]) -> None:
    PairOptions(**changes).validate()


def test_sizes_are_heights_and_widths() -> None:
    assert PairOptions(sizes="518").parsed_sizes() == [(518, 518)]
    assert PairOptions(sizes=" 518x518 , 364X476").parsed_sizes() == [(518, 518), (364, 476)]
    assert PairOptions().parsed_sizes() == []


@pytest.mark.parametrize("text", ["", "large", "518,", "518x", "x518", "1x2x3", "0", "518x-14", "5.5", "518;364"])
def test_invalid_sizes_are_shown_in_the_error(text: str) -> None:
    with pytest.raises(TrainError, match=r"sizes must be pixel sizes such as 518 or 364x476.*got ") as caught:
        PairOptions(sizes=text).validate()
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(("images", "count"), [(2, 1), (11, 1), (88, 9), (1000, 100), (10_000, 100)])
def test_one_tenth_is_held_out_but_at_most_100_images(images: int, count: int) -> None:
    assert TrainOptions().held_out_of(images) == count


@pytest.mark.parametrize(("images", "held_out"), [(0, None), (1, None), (3, 3), (3, 5)])
def test_no_image_to_train_on_is_an_error(images: int, held_out: int | None) -> None:
    with pytest.raises(TrainError, match=f"expected more than .* are held out for evaluation; got {images}"):
        TrainOptions(held_out=held_out).held_out_of(images)


def test_stop_at_does_not_change_the_recorded_options() -> None:
    assert TrainOptions(steps=20, stop_at=10).recorded() == TrainOptions(steps=20).recorded()
    assert [TrainOptions(steps=20, stop_at=stop).last_step for stop in (None, 10, 30)] == [20, 10, 20]


def test_every_other_option_is_recorded() -> None:
    run = TrainOptions(accumulate=2, start="random")
    recorded = run.recorded()
    assert recorded.keys() == {field for field in TrainOptions.__dataclass_fields__ if field != "stop_at"}
    for other in (replace(run, seed=1), replace(run, accumulate=3), replace(run, start="identity")):
        assert other.recorded() != recorded
