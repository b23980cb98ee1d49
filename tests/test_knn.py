"""Nearest-neighbour segmentation of folders whose labels depend on colour, on position, or on nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from denoising_vit.errors import EvaluationError, PlanError, SizeError
from denoising_vit.evaluation.data import EvaluationImage
from denoising_vit.evaluation.features import FeatureCache, see
from denoising_vit.evaluation.knn import crops_of, nearest_neighbours, vote
from denoising_vit.evaluation.labelled import LabelledData, open_labelled
from denoising_vit.evaluation.options import KnnOptions
from denoising_vit.evaluation.scores import Counts, scores
from denoising_vit.evaluation.sources import Colour, ExtractorSource
from denoising_vit.views.crops import Crop
from tiny_labelled import (
    PALETTE,
    PATCH,
    SIZE,
    Picture,
    coloured,
    colours,
    source_of,
    speckled,
    tiny_backbone,
    write_labelled,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = KnnOptions(k=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LabelledData:
    return write_labelled(tmp_path_factory.mktemp("coloured"), coloured(4, 0), coloured(3, 1))


def judged(model: Callable[[Tensor], Tensor], data: LabelledData, options: KnnOptions = FEW) -> Counts:
    return nearest_neighbours(source_of(model), data, options)


def guessed(counts: Counts) -> float:
    """MIoU of guesses with the same class frequencies that are independent of the truth."""
    truth, predicted = (values.sum(0) / values.sum() for values in (counts.truth, counts.predicted))
    both = truth * predicted
    return 100 * float(np.mean(both / (truth + predicted - both)))


# --- votes ---

#: Cosines with (1, 0) of five points, and their classes.
COSINES, LABELS = torch.tensor([0.6, 0.9, 0.7, 0.8, 0.5]), torch.tensor([2, 0, 1, 1, 2])
POINTS = torch.stack([COSINES, (1 - COSINES.square()).sqrt()], dim=1)


@pytest.mark.parametrize(
    ("k", "temperature", "expected"),
    [
        (1, 1.0, 0),  # only the nearest
        (3, 1.0, 1),  # e^0.9 = 2.46 against e^0.8 + e^0.7 = 4.24
        (3, 0.1, 0),  # e^9 = 8103 against e^8 + e^7 = 4078
        (5, 100.0, 1),  # nearly one vote each: two of class 1 are a little nearer than two of class 2
        (2, 0.001, 0),
    ],
)
def test_a_vote_by_hand(k: int, temperature: float, expected: int) -> None:
    queries = torch.tensor([[1.0, 0.0], [250.0, 0.0]])  # the length of a query does not matter
    assert vote(queries, POINTS, LABELS, 3, k, temperature).tolist() == [expected, expected]


def test_temperature_decides_between_nearer_and_more_neighbours() -> None:
    """Class 0 wins over two of class 1 if 1 > e^(-0.1/T) + e^(-0.2/T), that is below T = 0.2078."""
    query = torch.tensor([[1.0, 0.0]])
    assert vote(query, POINTS, LABELS, 3, 3, 0.206).tolist() == [0]
    assert vote(query, POINTS, LABELS, 3, 3, 0.210).tolist() == [1]


def test_each_query_has_its_own_neighbours() -> None:
    gallery = torch.eye(4)
    queries = torch.eye(4)[[2, 0, 3, 1]] + 0.1
    assert vote(queries, gallery, torch.tensor([4, 5, 6, 7]), 8, 1, 0.07).tolist() == [6, 4, 7, 5]


# --- scores ---


def test_better_features_score_better(data: LabelledData) -> None:
    good, bad = scores(judged(colours, data)), scores(judged(speckled, data))
    assert good.miou > 99
    assert bad.miou < good.miou - 20


def one_hot(image: Tensor) -> Tensor:
    """The class given by the colour, one-hot."""
    return torch.nn.functional.one_hot(colours(image).argmax(-1), 3).float()


def test_one_hot_classes_as_features_score_100(data: LabelledData) -> None:
    counts = judged(one_hot, data)
    found = scores(counts)
    assert (found.miou, found.macc, found.aacc) == (100.0, 100.0, 100.0)
    assert counts.truth.sum(1).tolist() == [36, 36, 36]  # every patch of every image


def test_random_labels_score_like_guesses(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)

    def shuffled(pictures: list[Picture]) -> list[Picture]:
        return [(pixels, chance.permutation(mask.flatten()).reshape(mask.shape)) for pixels, mask in pictures]

    nothing = write_labelled(tmp_path, shuffled(coloured(8, 0)), shuffled(coloured(12, 1)))
    counts = judged(colours, nothing)
    expected = guessed(counts)
    assert 15 < expected < 25  # a fifth if three classes are equally common
    assert scores(counts).miou == pytest.approx(expected, abs=5)


def place(image: Tensor) -> Tensor:
    """The position of each patch in the view, and nothing else."""
    count, _, height, width = image.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height // PATCH), torch.linspace(-1, 1, width // PATCH), indexing="ij")
    return torch.stack([x, y, torch.full_like(x, 0.5)], dim=-1).expand(count, -1, -1, -1)


def test_position_is_uninformative_in_neutral_crops(tmp_path: Path) -> None:
    """One class is above and another below, like sky and road."""
    mask = np.repeat([0, 1], SIZE // 2)[:, None].repeat(SIZE, 1).astype(np.uint8)
    pictures = [(np.full((SIZE, SIZE, 3), 100, np.uint8), mask)] * 24
    skies = write_labelled(tmp_path, pictures, pictures, classes=2)
    assert scores(judged(place, skies, KnnOptions(k=24))).miou == 100
    counts = judged(place, skies, KnnOptions(k=24, crops="neutral"))
    assert scores(counts).miou == pytest.approx(guessed(counts), abs=10)
    assert scores(counts).miou < 50


def test_content_is_still_recognised_in_neutral_crops(data: LabelledData) -> None:
    whole, neutral = judged(colours, data), judged(colours, data, KnnOptions(k=5, crops="neutral"))
    assert scores(neutral).miou > 85
    assert not np.array_equal(whole.truth, neutral.truth)


# --- crops and sizes ---


def test_neutral_crops_differ_between_splits(data: LabelledData) -> None:
    source, seen = source_of(), []

    class Watched(ExtractorSource):
        def inputs(self, image: EvaluationImage, crop: Crop, colour: Colour | None = None) -> Tensor:
            seen.append((image.split, crop))
            return super().inputs(image, crop, colour)

    nearest_neighbours(Watched("raw", tiny_backbone()), data, KnnOptions(k=5, crops="neutral"))
    train, val = ([crop.box for split, crop in seen if split == name] for name in ("train", "val"))
    assert (len(set(train)), len(set(val))) == (4, 3)
    assert not set(train) & set(val)
    again = crops_of(data.train, source, KnnOptions(k=5, crops="neutral"))
    assert [crop.box for _, crop in again] == train


@pytest.mark.parametrize("size", [None, 64, (32, 80)])
def test_images_of_different_sizes(tmp_path: Path, size: int | tuple[int, int] | None) -> None:
    train = [*coloured(2, 0, (45, 61)), *coloured(2, 1, (64, 48))]
    val = [*coloured(1, 2, (53, 47)), *coloured(1, 3, (96, 40))]
    mixed = write_labelled(tmp_path, train, val)
    counts = judged(colours, mixed, KnnOptions(k=5, size=size))
    patches = {None: [7 * 6, 12 * 5], 64: [64, 64], (32, 80): [40, 40]}[size]  # 53 x 47 becomes 56 x 48
    assert counts.truth.sum(1).tolist() == patches
    assert scores(counts).miou > 60


def test_a_size_that_does_not_fit_the_patch_grid_is_refused(data: LabelledData) -> None:
    for size in (SIZE + 3, (SIZE, SIZE + 3)):
        with pytest.raises(SizeError, match=r"51 pixels does not fit the patch grid.*Nearest: 48 or 56"):
            judged(colours, data, KnnOptions(size=size))


def test_an_image_without_any_label_adds_nothing(tmp_path: Path, data: LabelledData) -> None:
    (pixels, mask), *_ = coloured(1, 7)
    blank = [pixels, np.full_like(mask, 255)]
    val = coloured(3, 1)
    more = write_labelled(tmp_path, coloured(4, 0), [val[0], (blank[0], blank[1]), *val[1:]])
    counts, without = judged(colours, more), judged(colours, data)
    assert counts.items == 4
    assert not counts.truth[1].any() and not counts.predicted[1].any()
    assert np.array_equal(np.delete(counts.hits, 1, 0), without.hits)


def test_patches_without_a_label_neither_vote_nor_count(tmp_path: Path) -> None:
    """The lower halves show the colour of class 0, which would mislead in training if they had labels."""
    train, val = coloured(4, 0), coloured(3, 1)
    for pixels, mask in (*train, *val):
        mask[SIZE // 2 :] = 255
        pixels[SIZE // 2 :] = PALETTE[0]
    counts = judged(colours, write_labelled(tmp_path, train, val))
    assert counts.truth.sum(1).tolist() == [18, 18, 18]
    assert scores(counts).miou == 100


# --- the gallery ---


def gallery_of(data: LabelledData, options: KnnOptions, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Features and labels of the gallery."""
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(queries: Tensor, gallery: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
        seen.append((gallery, labels))
        return vote(queries, gallery, labels, classes, k, temperature)

    monkeypatch.setattr("denoising_vit.evaluation.knn.vote", spy)
    judged(colours, data, options)
    return seen[0]


def test_gallery_depends_on_the_seed(data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (gallery_of(data, KnnOptions(k=5, gallery=40, seed=s), monkeypatch) for s in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert len(first[0]) == len(other[0]) == 40
    assert not torch.equal(first[0], other[0])
    assert torch.allclose(first[0].norm(dim=-1), torch.ones(40), atol=1e-5)


def test_gallery_has_equally_many_patches_of_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image k has only class k, so that labels identify the image."""
    plain = [(np.full((SIZE, SIZE, 3), PALETTE[k], np.uint8), np.full((SIZE, SIZE), k, np.uint8)) for k in range(3)]
    split = write_labelled(tmp_path, plain, plain)
    _, labels = gallery_of(split, KnnOptions(k=5, gallery=30), monkeypatch)
    assert torch.bincount(labels).tolist() == [10, 10, 10]
    _, everything = gallery_of(split, KnnOptions(k=5, gallery=0), monkeypatch)
    assert torch.bincount(everything).tolist() == [36, 36, 36]


@pytest.mark.parametrize("most", [1, 2, 7, 29, 31, 40])
def test_gallery_size_equals_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    split = write_labelled(tmp_path, coloured(3, 0), coloured(1, 1))
    gallery, _ = gallery_of(split, KnnOptions(k=1, gallery=most), monkeypatch)
    assert len(gallery) == most


def test_the_gallery_is_spread_over_the_images(data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not take just the first patches of each image."""
    thinned, _ = gallery_of(data, KnnOptions(k=5, gallery=40), monkeypatch)
    shown = crops_of(data.train, source_of(), FEW)
    full = torch.cat([features.flatten(0, 1) for features in see(source_of(), shown)])
    similarity = thinned @ torch.nn.functional.normalize(full, dim=-1).T
    chosen = similarity.argmax(-1).tolist()
    assert len(set(chosen)) == 40
    assert [sum(36 * n <= index < 36 * (n + 1) for index in chosen) for n in range(4)] == [10] * 4
    assert max(index % 36 for index in chosen) > 25


def test_more_neighbours_than_patches_are_refused(data: LabelledData) -> None:
    assert judged(colours, data, KnnOptions(k=4 * 36)).items == 3
    with pytest.raises(EvaluationError, match=r"144 labelled patches, fewer than the 145 neighbours"):
        judged(colours, data, KnnOptions(k=4 * 36 + 1))


def test_error_for_a_too_small_gallery_names_the_option(data: LabelledData) -> None:
    """There are 144 labelled patches; the gallery option leaves 8 of them."""
    with pytest.raises(EvaluationError, match="gallery"):
        judged(colours, data, KnnOptions(k=20, gallery=8))


# --- errors ---


def test_error_for_non_finite_features_names_the_source(data: LabelledData) -> None:
    def broken(image: Tensor) -> Tensor:
        features = colours(image).clone()
        features[0, 2, 1, 0] = torch.nan
        return features

    source = ExtractorSource("the broken one", tiny_backbone(), broken)
    with pytest.raises(EvaluationError, match=r"the broken one: \d+ of \d+ feature values are not finite"):
        nearest_neighbours(source, data, FEW)


def test_error_for_features_on_another_grid_names_the_source(data: LabelledData) -> None:
    source = ExtractorSource("coarse", tiny_backbone(), lambda image: colours(image)[:, ::2])
    with pytest.raises(EvaluationError, match=r"coarse: expected features \(B, 6, 6, C\), got"):
        nearest_neighbours(source, data, FEW)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (KnnOptions(k=0), "k must be at least 1, got 0"),
        (KnnOptions(gallery=-1), "gallery must be at least 0, got -1"),
        (KnnOptions(seed=-1), "seed must be at least 0, got -1"),
        (KnnOptions(temperature=0.0), "temperature must be a positive number, got 0"),
        (KnnOptions(temperature=float("nan")), "temperature must be a positive number, got nan"),
    ],
)
def test_options_out_of_range_are_refused(data: LabelledData, options: KnnOptions, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        judged(colours, data, options)


# --- cache and progress ---


def test_scores_are_the_same_with_features_from_disk(data: LabelledData, tmp_path: Path) -> None:
    source, steps = source_of(speckled), []
    first = nearest_neighbours(source, data, FEW)
    for _ in range(2):
        steps.clear()
        found = nearest_neighbours(
            source, data, FEW, cache=FeatureCache(tmp_path / "cache"), progress=lambda: steps.append(1)
        )
        assert np.array_equal(found.hits, first.hits) and np.array_equal(found.predicted, first.predicted)
        assert len(steps) == 7
    assert len(list(tmp_path.rglob("*.safetensors"))) == 7


def test_reopened_data_set_scores_the_same(data: LabelledData) -> None:
    again = open_labelled(data.train.images[0].photo.parents[2])
    assert np.array_equal(judged(speckled, data).hits, judged(speckled, again).hits)
