"""Views of a training step: a function of seed and step, with every image once per epoch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from denoising_vit.denoiser.options import PairOptions
from denoising_vit.training.samples import Sample, Sampler, fresh_view, kept_view, split, whole_view

IMAGES = (2, 3, 5, 7, 11, 13, 17)
SIZES = ((56, 56), (40, 72))


def sampler(pairs: int = 4, seed: int = 3, sizes: tuple[tuple[int, int], ...] = SIZES, **views: Any) -> Sampler:
    return Sampler(IMAGES, sizes, PairOptions(**views), seed, pairs)


def seen(drawn: Sampler, steps: int) -> list[int]:
    return [sample.image for step in range(steps) for sample in drawn.step(step)]


@pytest.mark.parametrize("keep", [0, 8])
@pytest.mark.parametrize("pairs", [1, 3, 4, 7, 10])
def test_every_image_is_used_once_per_epoch(pairs: int, keep: int) -> None:
    images = seen(sampler(pairs, keep=keep), 28)
    epochs = [images[at : at + 7] for at in range(0, len(images) - 6, 7)]
    assert all(sorted(epoch) == list(IMAGES) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # another order each time


def test_all_samples_of_a_step_have_one_size() -> None:
    drawn = sampler(pairs=6)
    for step in range(7):
        assert len(drawn.step(step)) == 6
        assert len({sample.size for sample in drawn.step(step)}) == 1


def test_step_depends_only_on_seed_and_number() -> None:
    first, again = sampler(), sampler()
    there = [first.step(step) for step in range(20)]
    assert [again.step(step) for step in reversed(range(20))] == there[::-1]
    assert [sampler(seed=4).step(step) for step in range(20)] != there


def test_fraction_of_whole_images_matches_the_option() -> None:
    for keep in (0, 8):
        drawn = sampler(pairs=50, whole=0.25, keep=keep)
        samples = [sample for step in range(40) for sample in drawn.step(step)]
        whole = sum(sample.crop.box == (0, 0, 1, 1) for sample in samples) / len(samples)
        assert whole == pytest.approx(0.25, abs=0.03)  # three standard deviations of 2,000 draws


@pytest.mark.parametrize("keep", [0, 2])
def test_whole_images_only_with_half_of_them_mirrored(keep: int) -> None:
    drawn = sampler(pairs=50, whole=1, keep=keep)
    samples = [sample for step in range(20) for sample in drawn.step(step)]
    assert {sample.crop.box for sample in samples} == {(0, 0, 1, 1)}
    assert sum(sample.crop.flip for sample in samples) / len(samples) == pytest.approx(0.5, abs=0.05)
    assert not any(sample.crop.inverted for sample in samples)


def test_all_sizes_are_equally_frequent() -> None:
    drawn = sampler(pairs=2)
    counts = Counter(drawn.step(step)[0].size for step in range(600))
    assert counts[0] == pytest.approx(300, abs=40)
    assert all(sample.crop.size == SIZES[sample.size] for step in range(20) for sample in drawn.step(step))


def test_all_kept_views_are_drawn_and_crops_equally_often() -> None:
    drawn = sampler(pairs=70, whole=0.5, keep=5)
    counts = Counter(sample.number for step in range(40) for sample in drawn.step(step))
    assert counts.keys() == {0, 1, 2, 3, 4}
    assert counts[0] + counts[1] == pytest.approx(1400, abs=90)
    assert [counts[number] for number in (2, 3, 4)] == pytest.approx([1400 / 3] * 3, abs=70)


def test_kept_sample_is_the_kept_view_of_its_number() -> None:
    drawn = sampler(keep=5)
    for sample in (sample for step in range(20) for sample in drawn.step(step)):
        assert sample.number is not None
        assert sample.crop == kept_view(3, sample.image, sample.number, SIZES[sample.size], drawn.views)


def test_first_kept_views_are_the_whole_image_and_its_mirror_image() -> None:
    views = PairOptions(flip=0.1, inverted=1)
    assert kept_view(0, 5, 0, (56, 40), views) == whole_view((56, 40), mirrored=False)
    assert kept_view(0, 5, 1, (56, 40), views) == whole_view((56, 40), mirrored=True)
    assert kept_view(0, 5, 2, (56, 40), views).inverted


def test_nothing_is_mirrored_if_flip_is_zero() -> None:
    views = PairOptions(flip=0, inverted=1)
    assert kept_view(0, 5, 0, (56, 40), views) == whole_view((56, 40), mirrored=False)
    assert all(kept_view(0, 5, number, (56, 40), views).inverted for number in (1, 2, 3))  # crops
    drawn = sampler(pairs=70, whole=0.5, keep=4, flip=0)
    samples = [sample for step in range(40) for sample in drawn.step(step)]
    assert not any(sample.crop.flip for sample in samples)
    counts = Counter(sample.number for sample in samples)
    assert counts[0] == pytest.approx(1400, abs=90)
    assert [counts[number] for number in (1, 2, 3)] == pytest.approx([1400 / 3] * 3, abs=70)


def test_kept_crops_match_those_of_earlier_versions() -> None:
    """Pairs on disk are read by number; another view under the same number would make them wrong."""
    views = PairOptions(inverted=0.25)
    first, second = kept_view(0, 5, 2, (56, 56), views), kept_view(3, 17, 7, (364, 476), views)
    box = (0.07462776198612829, 0.007839350102007819, 0.6363874422707021, 0.6625122351020764)
    assert first.box == pytest.approx(box, abs=1e-12)
    box = (0.35219012061381694, 0.18541686307431293, 0.9290598959277271, 0.8046137100305834)
    assert second.box == pytest.approx(box, abs=1e-12)
    assert (first.flip, first.inverted, second.flip, second.inverted) == (False, False, True, False)


def test_kept_views_differ_by_image_number_seed_and_size() -> None:
    views = PairOptions()
    keys = [(0, 5, 2, (56, 56)), (0, 5, 3, (56, 56)), (0, 6, 2, (56, 56)), (1, 5, 2, (56, 56)), (0, 5, 2, (56, 40))]
    boxes = {kept_view(seed, image, number, size, views).box for seed, image, number, size in keys}
    assert len(boxes) == len(keys)


def test_fresh_views_are_never_repeated() -> None:
    drawn = sampler(pairs=7, whole=0, keep=0)
    boxes = [sample.crop.box for step in range(30) for sample in drawn.step(step)]
    assert len(set(boxes)) == len(boxes)
    assert all(sample.number is None for step in range(3) for sample in drawn.step(step))


@pytest.mark.parametrize("size", [(56, 56), (40, 80), (80, 40)])
def test_crops_have_the_given_area_ratio_flips_and_inversions(size: tuple[int, int]) -> None:
    views = PairOptions(area=(0.2, 0.4), ratio=(3 / 4, 4 / 3), flip=0.3, inverted=0.6)
    crops = [fresh_view(0, count, size, views) for count in range(500)]
    boxes = np.array([crop.box for crop in crops])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    free = (width < 1) & (height < 1)
    assert free.mean() > 0.8
    area, shape = width * height, width * size[1] / (height * size[0])
    assert area[free].min() >= 0.2 - 1e-9
    assert area.max() <= 0.4 + 1e-9
    assert area[free].mean() == pytest.approx(0.3, abs=0.02)
    assert shape[free].min() >= 3 / 4 - 1e-9
    assert shape[free].max() <= 4 / 3 + 1e-9
    assert np.mean([crop.flip for crop in crops]) == pytest.approx(0.3, abs=0.07)
    assert np.mean([crop.inverted for crop in crops]) == pytest.approx(0.6, abs=0.07)


def test_split_depends_on_the_seed_and_uses_all_images() -> None:
    images = tuple(range(100, 137))
    trained, held_out = split(images, 5, 1)
    assert len(held_out) == 5
    assert sorted((*trained, *held_out)) == list(images)
    assert (trained, held_out) == split(images, 5, 1)
    assert held_out == tuple(sorted(held_out))
    assert split(images, 5, 2) != (trained, held_out)


def test_samples_compare_by_value() -> None:
    view = whole_view((56, 56), mirrored=False)
    assert Sample(1, 0, 0, view) == Sample(1, 0, 0, whole_view((56, 56), mirrored=False))
