"""Label retrieval: a vote by hand, comparison with loops, content of the memory, and scores of named classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from denoising_vit.errors import EvaluationError, PlanError
from denoising_vit.evaluation import patches
from denoising_vit.evaluation.knn import Memory, drawn, hummingbird, retrieved
from denoising_vit.evaluation.labelled import LabelledData
from denoising_vit.evaluation.options import HummingbirdOptions
from denoising_vit.evaluation.scores import Counts, scores
from tiny_correspondence import workbench
from tiny_labelled import PATCH, SIZE, Picture, coloured, source_of, speckled, tiny_backbone, write_labelled

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = HummingbirdOptions(k=5, memory=0, temperature=0.1)


def shifted(count: int, seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> list[Picture]:
    """Pictures whose classes change inside patches, with some unlabelled pixels."""
    pictures = []
    for pixels, mask in coloured(count, seed, (size[0] + 3, size[1] + 3)):
        mask[:2] = 255
        pictures.append((pixels[3:, 3:], np.roll(mask, 5, axis=0)[3:, 3:]))
    return pictures


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LabelledData:
    return write_labelled(tmp_path_factory.mktemp("data"), shifted(4, 0), shifted(3, 1, (43, 53)))


def test_soft_labels_by_hand() -> None:
    """Cosines 1, 0.8 and 0.6 at T = 0.2: weights 1, e^-1 and e^-2 over their sum; the fourth is not among the 3."""
    features = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    labels = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    memory = Memory(features, labels, torch.arange(4), {})
    found = memory.retrieve(torch.tensor([[7.0, 0.0]]), 3, 0.2)
    total = 1 + np.exp(-1) + np.exp(-2)
    assert found[0].tolist() == pytest.approx([(1 + 0.5 * np.exp(-1)) / total, (0.5 * np.exp(-1) + np.exp(-2)) / total])
    without = memory.retrieve(torch.tensor([[7.0, 0.0]]), 1, 0.2, torch.tensor([False, True, False, False]))
    assert without[0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("at_once", [1, 50, 2**25])
def test_nearest_matches_a_full_sort_for_any_chunk_size(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(patches, "_AT_ONCE", at_once)
    monkeypatch.setattr(patches, "_QUERIES", 4)
    chance = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(11, 5, generator=chance), F.normalize(torch.randn(37, 5, generator=chance), dim=-1)
    without = torch.rand(37, generator=chance) < 0.3
    similarity, rows = patches.nearest(queries, bank, 7, without)
    cosines = F.cosine_similarity(queries[:, None], bank[None], dim=-1).masked_fill(without, -2)
    expected = cosines.sort(dim=-1, descending=True)
    assert torch.equal(rows, expected.indices[:, :7])
    assert torch.allclose(similarity, expected.values[:, :7], atol=1e-6)


def by_loops(data: LabelledData, k: int, temperature: float) -> Counts:
    """Counts from the files, patch by patch; PyTorch resizes label maps to pixels."""
    kinds = len(data.train.class_names)

    def patches(photo: Path, size: tuple[int, int]) -> np.ndarray:
        pixels = torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1)[None] / 255
        assert pixels.shape[2:] == size
        return speckled(pixels)[0].half().double().numpy()

    bank, labels = [], []
    for image in data.train.images:
        features, mask = patches(image.photo, (SIZE, SIZE)), image.labels().numpy()
        for i, j in np.ndindex(*features.shape[:2]):
            part = mask[PATCH * i : PATCH * (i + 1), PATCH * j : PATCH * (j + 1)]
            known = part[part >= 0]
            if known.size:
                bank.append(features[i, j] / np.linalg.norm(features[i, j]))
                labels.append(np.bincount(known, minlength=kinds) / known.size)
    found = []
    for image in data.val.images:
        features, mask = patches(image.photo, (SIZE, SIZE)), image.labels().numpy()
        soft = np.zeros((*features.shape[:2], kinds))
        for i, j in np.ndindex(*features.shape[:2]):
            cosines = np.array([features[i, j] @ one for one in bank]) / np.linalg.norm(features[i, j])
            chosen = np.argsort(-cosines)[:k]
            weights = np.exp((cosines[chosen] - cosines[chosen].max()) / temperature)
            soft[i, j] = sum(w * labels[n] for w, n in zip(weights / weights.sum(), chosen, strict=True))
        planes = torch.from_numpy(soft).permute(2, 0, 1)[None]
        classes = F.interpolate(planes, mask.shape, mode="bilinear")[0].argmax(0).numpy()
        known = mask >= 0
        counts = [
            [int(((mask == c) & (classes == c)).sum()) for c in range(kinds)],
            [int((mask == c).sum()) for c in range(kinds)],
            [int(((classes == c) & known).sum()) for c in range(kinds)],
        ]
        found.append(Counts(*(np.array([row]) for row in counts)))
    return Counts.joined(found)


def test_counts_match_plain_loops(tmp_path: Path) -> None:
    data = write_labelled(tmp_path, shifted(4, 0), shifted(3, 1))
    found, expected = retrieved(source_of(speckled), data, ALL), by_loops(data, 5, 0.1)
    assert np.array_equal(found.truth, expected.truth)
    assert found.truth.sum() == sum((image.labels() >= 0).sum() for image in data.val.images)
    for name in ("hits", "predicted"):  # ties between classes at single pixels may be resolved differently
        assert np.abs(getattr(found, name) - getattr(expected, name)).max() <= 2
    assert (found.predicted.sum(0) > 500).all()


def test_images_of_any_size_are_scored_at_their_own_resolution(data: LabelledData) -> None:
    counts = retrieved(source_of(), data, ALL)
    assert counts.truth.sum(1).tolist() == [int((image.labels() >= 0).sum()) for image in data.val.images]


def test_image_does_not_retrieve_its_own_patches(tmp_path: Path) -> None:
    """Patches differ only by noise, so an image's own patches would give a perfect score."""
    chance = np.random.default_rng(0)
    pictures = [
        (chance.integers(0, 255, (SIZE, SIZE, 3), np.uint8), np.kron(chance.integers(0, 3, (6, 6)), np.ones((8, 8))))
        for _ in range(4)
    ]
    pictures = [(pixels, mask.astype(np.uint8)) for pixels, mask in pictures]
    both = write_labelled(tmp_path / "both", [*pictures, pictures[0]], pictures)
    alone = write_labelled(tmp_path / "alone", pictures[1:], pictures[:1])
    options = HummingbirdOptions(k=1, memory=0)
    found, expected = retrieved(source_of(), both, options), retrieved(source_of(), alone, options)
    assert np.array_equal(found.hits[0], expected.hits[0])
    assert scores(found).miou < 45
    with pytest.raises(EvaluationError, match="memory has 0 labelled patches of other images, fewer than the 1 neigh"):
        retrieved(source_of(), write_labelled(tmp_path / "one", pictures[:1], pictures[:1]), options)


def test_rare_classes_are_preferred_in_the_memory() -> None:
    """Ten patches of class 0, two of class 1 and one without a label; two are kept."""
    counts = torch.zeros(13, 2, dtype=torch.int64)
    counts[:10, 0], counts[10:12, 1] = 64, 64
    picks = torch.stack([drawn(counts, 2, torch.Generator().manual_seed(seed)) for seed in range(400)])
    assert picks.max() < 12
    # Simulated with 10 u for class 0 and 2 u for class 1: most of the two smallest values are of class 1.
    chance = np.random.default_rng(0).random((20_000, 12)) * np.array([10] * 10 + [2] * 2)
    expected = (chance.argsort(1)[:, :2] >= 10).mean()
    assert float((picks >= 10).float().mean()) == pytest.approx(expected, abs=0.06)
    assert drawn(counts, None, torch.Generator()).tolist() == list(range(12))


def test_memory_has_the_given_size(data: LabelledData) -> None:
    whole = retrieved(source_of(speckled), data, ALL)
    few = retrieved(source_of(speckled), data, HummingbirdOptions(k=5, memory=30, temperature=0.1))
    assert not np.array_equal(few.hits, whole.hits)
    with pytest.raises(EvaluationError, match="memory has 4 labelled patches"):
        retrieved(source_of(), data, HummingbirdOptions(k=5, memory=4))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (HummingbirdOptions(k=0), "k must be at least 1, got 0"),
        (HummingbirdOptions(memory=-1), "memory must be at least 0, got -1"),
        (HummingbirdOptions(temperature=0.0), "temperature must be a positive number, got 0"),
    ],
)
def test_options_out_of_range_are_refused(data: LabelledData, options: HummingbirdOptions, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        retrieved(source_of(), data, options)


# --- result lines and scores of named classes


def test_result_lines_have_paired_intervals_over_images(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", coloured(4, 0), coloured(6, 1))
    bench = workbench(tmp_path, data, {"clean": tiny_backbone()})
    raw, clean = (line for line, _ in hummingbird(bench, ["raw", "clean"], ALL))
    assert clean["task"] == "hummingbird" and clean["settings"]["memory"] == 0 and clean["settings"]["k"] == 5
    paired = clean["paired"]
    assert paired["difference"] == pytest.approx(clean["metrics"]["mIoU"] - raw["metrics"]["mIoU"])
    assert paired["low"] < paired["difference"] < paired["high"] and paired["groups"] == 6
    assert [kept for _, kept in hummingbird(bench, ["raw", "clean"], ALL)] == [True, True]


def test_only_named_classes_are_scored_but_all_are_predicted(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", coloured(4, 0), coloured(6, 1))
    ((whole, _),) = hummingbird(workbench(tmp_path, data), ["raw"], ALL)
    named = data.scoring(["class 2", "class 0"])
    raw, clean = (
        line for line, _ in hummingbird(workbench(tmp_path, named, {"c": tiny_backbone()}), ["raw", "c"], ALL)
    )
    assert raw["settings"]["data"]["scored"] == list(raw["classes"]) == ["class 0", "class 2"]
    iou = [whole["classes"][name]["IoU"] for name in raw["classes"]]
    assert [raw["classes"][name]["IoU"] for name in raw["classes"]] == iou
    assert raw["metrics"]["mIoU"] == pytest.approx(np.mean(iou))
    assert clean["paired"]["difference"] == pytest.approx(clean["metrics"]["mIoU"] - raw["metrics"]["mIoU"])


@pytest.mark.parametrize("score", [["class 0"], ["class 0", "cat"], ["class 0", "class 0"]])
def test_invalid_class_names_are_rejected(data: LabelledData, score: list[str]) -> None:
    with pytest.raises(EvaluationError, match=r"must be two or more different classes of .*, got class 0.*class 2"):
        data.scoring(score)


def test_classes_to_score_must_occur_in_the_data(tmp_path: Path) -> None:
    data = write_labelled(tmp_path, coloured(4, 0), coloured(3, 1), classes=5).scoring(["class 1", "class 4"])
    assert data.absent == ("class 4",)
    with pytest.raises(EvaluationError, match=r"expected at least two classes .* found class 1 of 2"):
        data.require_two_classes()
