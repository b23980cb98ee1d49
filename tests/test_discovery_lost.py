"""LOST on known grids of features: comparison with plain loops, single steps, and planted objects."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.discovery import find_object
from denoising_vit.evaluation.discovery.annotations import box_around
from denoising_vit.evaluation.discovery.lost import component, degrees, expanded, ranking
from denoising_vit.evaluation.options import SeedBy

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(h: int, w: int, channels: int = 6, seed: int = 0, smooth: int = 0) -> Tensor:
    features = torch.randn(channels, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for _ in range(smooth):
        features = torch.nn.functional.avg_pool2d(features[None], 3, 1, 1)[0]
    return features.permute(1, 2, 0)


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def by_loops(features: Tensor, seed_by: SeedBy, k: int, centred: bool) -> tuple[tuple[int, int], set[tuple[int, int]]]:
    """LOST as described in the paper, in plain Python: the seed, and the patches of the object."""
    h, w, channels = features.shape
    f = {(y, x): features[y, x].double().tolist() for y in range(h) for x in range(w)}
    if centred:
        mean = [math.fsum(one[c] for one in f.values()) / len(f) for c in range(channels)]
        f = {place: [value - mean[c] for c, value in enumerate(one)] for place, one in f.items()}
    if seed_by == "degree":
        rank = {p: sum(1 for q in f if dot(f[p], f[q]) >= 0) for p in f}
    else:
        rank = {p: -math.sqrt(dot(f[p], f[p])) for p in f}
    ordered = sorted(f, key=lambda p: (rank[p], p))
    seed = ordered[0]
    speakers = [q for q in ordered[:k] if dot(f[seed], f[q]) >= 0]
    mask = {q for q in f if math.fsum(dot(f[q], f[s]) for s in speakers) >= 0}
    found, waiting = {seed}, [seed]
    while waiting:
        y, x = waiting.pop()
        for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if place in mask and place not in found:
                found.add(place)
                waiting.append(place)
    return seed, found


@pytest.mark.parametrize("seed_by", ["degree", "norm"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("k", "smooth", "seed"), [(1, 0, 0), (5, 1, 1), (20, 2, 2), (100, 0, 3), (1000, 1, 4)])
def test_result_matches_the_paper_in_plain_loops(
    seed_by: SeedBy, centred: bool, k: int, smooth: int, seed: int
) -> None:
    features = noise(9, 7, seed=seed, smooth=smooth) + 0.2
    expected, patches = by_loops(features, seed_by, k, centred)
    found = find_object(features, seed_by, k, centred=centred)
    assert found.seed == expected
    assert {(int(y), int(x)) for y, x in zip(*np.nonzero(found.mask), strict=True)} == patches
    rows, columns = zip(*patches, strict=True)
    assert found.box == (min(columns), min(rows), max(columns) + 1, max(rows) + 1)


def test_options_give_different_objects() -> None:
    """Otherwise the comparison with loops would prove little."""
    features = noise(9, 7, seed=1, smooth=1) + 0.2
    found = {
        (by, k, centred): find_object(features, by, k, centred=centred).mask.tobytes()
        for by in ("degree", "norm")
        for k in (1, 10)
        for centred in (False, True)
    }
    assert len(set(found.values())) >= 6


# --- the steps ---


def test_degree_counts_non_negative_products_including_the_patch_itself() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [2.0, 2.0]])
    # Right angles count: the inner product is 0.
    assert degrees(features).tolist() == [3, 4, 2, 3]


def test_degrees_do_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    features = noise(10, 10).flatten(0, 1)
    whole = degrees(features)
    for most in (1, 250, 1000):
        monkeypatch.setattr("denoising_vit.evaluation.discovery.lost._AT_ONCE", most)
        assert torch.equal(degrees(features), whole)


def test_ties_are_ranked_in_their_order() -> None:
    features = torch.tensor([[1.0], [-2.0], [3.0], [-2.0], [3.0]])
    assert ranking(features, "degree").tolist() == [1, 3, 0, 2, 4]
    assert ranking(features, "norm").tolist() == [2, 4, 1, 3, 0]


def test_only_the_first_k_patches_expand_the_seed() -> None:
    """Patch 3 is similar to the seed and ranks fourth; its support of patch 4 counts from k = 4 on."""
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [0.1, 5.0], [-0.2, 1.0]])
    ranked = torch.arange(5)
    assert expanded(features, ranked, 3).tolist() == [True, False, False, True, False]
    assert expanded(features, ranked, 4).tolist() == [True, False, False, True, True]


def test_expansion_uses_the_sum_of_products_not_a_majority() -> None:
    """Two small negative products with patch 3 are outweighed by one large positive product."""
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 9.0], [-1.0, 1.0]])
    assert expanded(features, torch.arange(4), 3).tolist() == [True, True, True, True]
    assert expanded(features, torch.arange(4), 2).tolist() == [True, True, True, False]


def test_patch_orthogonal_to_the_seed_takes_part_in_the_expansion() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-0.1, 1.0]])
    assert expanded(features, torch.arange(3), 2).tolist() == [True, True, True]
    assert expanded(features, torch.arange(3), 1).tolist() == [True, True, False]


def test_seed_is_kept_despite_rounding() -> None:
    """Patches orthogonal to a seed of much smaller norm, whose sum has more digits than the dtype holds."""
    for number in range(20):
        halves = torch.randint(-(2**22), 2**22, (40, 2), generator=torch.Generator().manual_seed(number)).float()
        features = torch.cat([halves, -halves.sum(1, keepdim=True)], 1)
        features[0] = 2.0**-30
        assert expanded(features, torch.arange(40), 40)[0]


def test_only_patches_that_share_a_side_are_connected() -> None:
    mask = np.array([[1, 1, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0]], dtype=bool)
    assert component(mask, (0, 0)).tolist() == [[True, True, False, False], [False] * 4, [False] * 4]
    right = component(mask, (1, 2))
    assert right.tolist() == [[False, False, False, True], [False, False, True, True], [False] * 4]
    assert box_around(right) == (2, 0, 4, 2)


def test_component_follows_a_winding_path_to_its_end() -> None:
    mask = np.zeros((9, 9), dtype=bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True
    assert np.array_equal(component(mask, (0, 0)), mask)


# --- planted objects ---


def planted(
    box: tuple[int, int, int, int], h: int = 14, w: int = 18, common: float = 0.0, spread: float = 0.03
) -> Tensor:
    """An object with features longer than those of the background and opposite to them, plus a common component."""
    features = torch.zeros(h, w, 8)
    features[..., 0] = -0.5
    x0, y0, x1, y1 = box
    features[y0:y1, x0:x1, 0], features[y0:y1, x0:x1, 1] = 2.0, 0.5
    features += spread * torch.randn(h, w, 8, generator=torch.Generator().manual_seed(sum(box)))
    features[..., 2] += common
    return features


BOXES = [(2, 3, 7, 8), (0, 0, 4, 5), (14, 10, 18, 14), (5, 1, 6, 12)]


@pytest.mark.parametrize("seed_by", ["degree", "norm"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("box", BOXES)
def test_planted_objects_are_found(seed_by: SeedBy, centred: bool, box: tuple[int, int, int, int]) -> None:
    found = find_object(planted(box), seed_by, centred=centred)
    assert found.box == box
    assert box[1] <= found.seed[0] < box[3] and box[0] <= found.seed[1] < box[2]


@pytest.mark.parametrize("box", BOXES)
def test_common_component_hides_objects_unless_features_are_centred(box: tuple[int, int, int, int]) -> None:
    features = planted(box, common=5.0)
    assert find_object(features).box == (0, 0, 18, 14)
    assert find_object(features, centred=True).box == box
    assert find_object(features, "norm", centred=True).box == box


def test_of_two_similar_objects_only_the_one_with_the_seed_is_boxed() -> None:
    features = planted((1, 1, 5, 5), spread=0.0)
    features[9:12, 10:16] = features[1, 1]
    features[9, 10] *= 1.5
    assert find_object(features, "degree").box == (1, 1, 5, 5)
    assert find_object(features, "norm").box == (10, 9, 16, 12)


def test_large_norm_in_the_background_misleads_only_seeds_by_norm() -> None:
    """Why seeding by norm needs features without artifacts."""
    features = planted((2, 3, 7, 8))
    features[12, 16] *= 20
    assert find_object(features, "degree").box == (2, 3, 7, 8)
    assert find_object(features, "norm").seed == (12, 16)


def test_constant_features_give_the_whole_grid_as_box() -> None:
    found = find_object(torch.zeros(3, 4, 2))
    assert found.seed == (0, 0) and found.box == (0, 0, 4, 3)
    assert find_object(torch.ones(1, 1, 1)).box == (0, 0, 1, 1)


@pytest.mark.parametrize("seed_by", ["degree", "norm"])
@pytest.mark.parametrize("centred", [False, True])
def test_same_features_give_the_same_object(seed_by: SeedBy, centred: bool) -> None:
    features = noise(12, 15, 16).half().float()  # as stored on disk
    first = find_object(features, seed_by, centred=centred)
    assert first.mask.shape == (12, 15) and first.mask[first.seed]
    for _ in range(3):
        again = find_object(features.clone(), seed_by, centred=centred)
        assert again.seed == first.seed and np.array_equal(again.mask, first.mask)


def test_features_are_not_modified() -> None:
    features = noise(5, 5)
    before = features.clone()
    find_object(features, centred=True)
    assert torch.equal(features, before)


@pytest.mark.parametrize(
    "features",
    [
        torch.zeros(4, 4),
        torch.zeros(1, 4, 4, 2),
        torch.zeros(0, 4, 2),
        torch.full((2, 2, 2), math.nan),
        torch.full((2, 2, 2), math.inf),
    ],
)
def test_invalid_features_are_rejected(features: Tensor) -> None:
    with pytest.raises(EvaluationError, match=r"expected finite features of patches \(h, w, C\), got \("):
        find_object(features)
