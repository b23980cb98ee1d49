"""The published protocol of linear segmentation, number by number, and how options change it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from denoising_vit import PlanError
from denoising_vit.evaluation.patches import centre_pads
from denoising_vit.evaluation.segmentation import PAPER, QUICK, SegmentationOptions
from denoising_vit.evaluation.segmentation.evaluate import windows
from denoising_vit.evaluation.segmentation.samples import scaled_size


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1e-9),
        (1, 0.999975e-3 * (1e-6 + (1 - 1e-6) / 1500)),
        (750, 4.90625490625e-4),  # 1e-3 x 0.98125 x 0.5000005
        (1_499, 0.962525e-3 * 0.999333334),
        (1_500, 9.625e-4),
        (20_000, 5e-4),
        (30_000, 2.5e-4),
        (39_999, 2.5e-8),
    ],
)
def test_learning_rate_of_the_published_schedule(step: int, rate: float) -> None:
    assert PAPER.learning_rate_at(step) == pytest.approx(rate, rel=1e-9)


def test_learning_rate_matches_the_formula_at_every_step() -> None:
    steps = np.arange(40_000)
    wanted = 1e-3 * (1 - steps / 40_000)
    wanted[:1_500] *= 1 - (1 - steps[:1_500] / 1_500) * (1 - 1e-6)
    found = np.array([PAPER.learning_rate_at(step) for step in range(40_000)])
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert found.argmax() == 1_500


def test_paper_has_the_published_numbers() -> None:
    assert PAPER.preset == "paper"
    assert (PAPER.steps, PAPER.batch, PAPER.warmup) == (40_000, 16, 1_500)
    assert (PAPER.learning_rate, PAPER.weight_decay) == (1e-3, 1e-4)
    assert (PAPER.short_side, PAPER.long_side, PAPER.scale, PAPER.crop) == (512, 2048, (0.5, 2.0), 512)
    assert (PAPER.most, PAPER.flip, PAPER.distort, PAPER.augment) == (0.75, 0.5, True, True)
    assert (PAPER.window, PAPER.window_stride, PAPER.normalisation) == (512, 341, "imagenet")


def test_quick_uses_whole_images_and_the_same_share_of_warm_up() -> None:
    assert not QUICK.augment
    assert QUICK.normalisation == "own"
    assert QUICK.warmup == round(QUICK.steps * PAPER.warmup / PAPER.steps)
    assert (QUICK.batch, QUICK.weight_decay) == (PAPER.batch, PAPER.weight_decay)
    assert QUICK.learning_rate == 10 * PAPER.learning_rate


def test_omitted_options_are_those_of_the_preset() -> None:
    assert SegmentationOptions().protocol() == QUICK
    assert SegmentationOptions(preset="paper").protocol() == PAPER


def test_options_override_the_preset_and_keep_the_share_of_warm_up() -> None:
    changed = SegmentationOptions(
        preset="paper", steps=400, batch=3, learning_rate=0.5, weight_decay=0.0, seeds=(4,)
    ).protocol()
    assert changed == replace(PAPER, steps=400, warmup=15, batch=3, learning_rate=0.5, weight_decay=0.0)
    assert SegmentationOptions(size=(28, 42)).protocol() == replace(QUICK, size=(28, 42))


def test_training_too_short_for_a_warm_up_begins_at_the_full_rate() -> None:
    few = SegmentationOptions(steps=4).protocol()
    assert few.warmup == 0
    assert [few.learning_rate_at(step) for step in range(4)] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SegmentationOptions(preset="paper", size=518), "size applies to preset quick"),
        (SegmentationOptions(seeds=()), "seeds must be one or more different numbers"),
        (SegmentationOptions(seeds=(1, 1)), r"different numbers of at least 0, got \(1, 1\)"),
        (SegmentationOptions(seeds=(0, -1)), "numbers of at least 0"),
        (SegmentationOptions(steps=0), "steps must be at least 1, got 0"),
        (SegmentationOptions(batch=0), "batch must be at least 1, got 0"),
        (SegmentationOptions(learning_rate=0.0), "learning_rate must be a positive number, got 0.0"),
        (SegmentationOptions(learning_rate=float("nan")), "learning_rate must be a positive number, got nan"),
        (SegmentationOptions(weight_decay=-1.0), "weight_decay must be at least 0, got -1.0"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: SegmentationOptions, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        options.protocol()


@pytest.mark.parametrize(
    ("image", "limits", "scaled"),
    [
        ((480, 640), (512, 2048), (512, 683)),  # x 1.0667: 682.67
        ((375, 500), (256, 1024), (256, 341)),  # at half the scale: 341.33
        ((333, 500), (1024, 4096), (1024, 1538)),  # at twice the scale: 1537.54
        ((500, 333), (512, 2048), (769, 512)),  # 768.77
        ((100, 1000), (512, 2048), (205, 2048)),  # limited by the longer side: x 2.048
        ((512, 512), (512, 2048), (512, 512)),
        ((1, 1000), (512, 200), (1, 200)),  # at least one pixel
    ],
)
def test_images_keep_their_aspect_ratio_when_scaled(
    image: tuple[int, int], limits: tuple[int, int], scaled: tuple[int, int]
) -> None:
    assert scaled_size(*image, *limits) == scaled


@pytest.mark.parametrize(
    ("sides", "patch", "pads"),
    [
        ((512, 512), (14, 14), (3, 3, 3, 3)),  # 518
        ((512, 512), (16, 16), (0, 0, 0, 0)),
        ((512, 512), (8, 8), (0, 0, 0, 0)),
        ((512, 512), (14, 7), (3, 3, 3, 3)),  # 14 + 72 x 7 = 518
        ((513, 512), (14, 14), (3, 2, 3, 3)),  # the odd pixel goes below
        ((300, 2048), (14, 14), (5, 4, 5, 4)),  # 308 and 2058
        ((10, 14), (14, 14), (0, 2, 0, 2)),  # at least one patch
        ((511, 512), (16, 4), (0, 0, 0, 1)),
    ],
)
def test_pads_extend_sides_evenly_to_whole_patches(
    sides: tuple[int, int], patch: tuple[int, int], pads: tuple[int, int, int, int]
) -> None:
    assert centre_pads(*sides, *patch) == pads  # left, top, right, bottom


@pytest.mark.parametrize(
    ("sides", "tops", "lefts"),
    [
        ((512, 512), [0], [0]),
        ((512, 683), [0], [0, 171]),
        ((683, 512), [0, 171], [0]),
        ((512, 853), [0], [0, 341]),
        ((512, 854), [0], [0, 341, 342]),
        ((512, 1365), [0], [0, 341, 682, 853]),
        ((300, 2048), [0], [0, 341, 682, 1023, 1364, 1536]),
        ((700, 700), [0, 188], [0, 188]),
    ],
)
def test_windows_start_every_341_pixels_and_the_last_ends_at_the_border(
    sides: tuple[int, int], tops: list[int], lefts: list[int]
) -> None:
    height, width = sides
    shown = min(height, 512), min(width, 512)
    found = windows(height, width, PAPER, (14, 14))
    wanted = [(left, top, left + shown[1], top + shown[0]) for top in tops for left in lefts]
    pixels = [np.array(crop.box) * (width, height, width, height) for crop in found]
    np.testing.assert_allclose(pixels, wanted, atol=1e-9)
    assert {crop.size for crop in found} == {shown}
    assert {crop.pads for crop in found} == {centre_pads(*shown, 14, 14)}
    assert not any(crop.flip or crop.inverted for crop in found)


def test_windows_cover_every_pixel_of_any_image() -> None:
    tiny = replace(PAPER, window=13, window_stride=9)
    for height in (1, 7, 12, 13, 14, 22, 23, 31, 57):
        for width in (1, 13, 21, 22, 23, 40):
            seen = np.zeros((height, width), dtype=int)
            for crop in windows(height, width, tiny, (4, 4)):
                x0, y0, x1, y1 = (np.array(crop.box) * (width, height, width, height)).round().astype(int)
                assert 0 <= x0 < x1 <= width
                assert 0 <= y0 < y1 <= height
                assert (y1 - y0, x1 - x0) == crop.size
                seen[y0:y1, x0:x1] += 1
            assert seen.min() >= 1
