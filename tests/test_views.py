"""Plans of views: geometry by hand, determinism, coverage, and rejected arguments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from denoising_vit.errors import PlanError
from denoising_vit.views.options import CropOptions
from denoising_vit.views.plan import ViewPlan, least_views, linear_weights

DINO = {"size": (518, 518), "patch_size": 14}
SMALL = {"size": (96, 96), "patch_size": 16}


def make(views: int = 16, **options: Any) -> ViewPlan:
    return ViewPlan.make(views, **{**SMALL, **options})


# --- linear weights ---


def test_weights_of_a_small_example() -> None:
    # Four nodes at 0.125, 0.375, 0.625, 0.875.
    weights = linear_weights(np.array([0.125, 0.25, 0.6875, 0.875]), 4)
    expected = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.75, 0.25], [0, 0, 0, 1]]
    np.testing.assert_allclose(weights, expected, atol=1e-12)


def test_positions_beyond_the_outer_nodes_are_clamped() -> None:
    weights = linear_weights(np.array([0.0, 0.1, 0.9, 1.0]), 4)
    np.testing.assert_allclose(weights, [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]], atol=1e-12)


@pytest.mark.parametrize("nodes", [1, 2, 3, 7, 74])
def test_rows_sum_to_one_and_are_not_negative(nodes: int) -> None:
    weights = linear_weights(np.linspace(0, 1, 101), nodes)
    assert weights.shape == (101, nodes)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-12)
    assert weights.min() >= 0
    assert ((weights > 0).sum(-1) <= 2).all()


def test_single_node_has_all_the_weight() -> None:
    assert linear_weights(np.array([0.0, 0.3, 1.0]), 1).tolist() == [[1], [1], [1]]


@pytest.mark.parametrize("nodes", [2, 5, 11])
def test_linear_functions_are_exact_between_the_outer_nodes(nodes: int) -> None:
    place = (np.arange(nodes) + 0.5) / nodes
    positions = np.linspace(place[0], place[-1], 57)
    np.testing.assert_allclose(linear_weights(positions, nodes) @ (3 * place - 2), 3 * positions - 2, atol=1e-12)


def test_leading_dimensions_are_kept() -> None:
    positions = np.random.RandomState(0).random_sample((3, 5))
    weights = linear_weights(positions, 7)
    assert weights.shape == (3, 5, 7)
    np.testing.assert_array_equal(weights[2, 4], linear_weights(positions[2, 4:], 7)[0])


# --- plans: identity ---


def test_same_arguments_give_the_same_plan() -> None:
    one, two = make(seed=3), make(seed=3)
    np.testing.assert_array_equal(one.boxes, two.boxes)
    np.testing.assert_array_equal(one.flips, two.flips)
    assert one == two
    assert one.digest == two.digest
    assert hash(one) == hash(two)
    assert len({one, two}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"size": (112, 112)},
        {"size": (96, 112)},
        {"stride": 8},
        {"patch_size": 8},
        {"resolution": 11},
        {"resolution": (12, 11)},
        {"views": 17},
        {"full_image": False},
        {"crops": CropOptions(coverage="plain")},
        {"crops": CropOptions(area=(0.2, 0.5))},
        {"crops": CropOptions(ratio=(1.0, 1.0))},
    ],
    ids=str,
)
def test_changing_any_argument_changes_the_digest(change: dict[str, Any]) -> None:
    assert make(**change).digest != make().digest
    assert make(**change) != make()


def test_flips_alone_change_the_digest() -> None:
    plan = make()
    assert dataclasses.replace(plan, flips=~plan.flips).digest != plan.digest


def test_explicit_defaults_give_the_same_plan() -> None:
    assert make(stride=16, resolution=12, crops=CropOptions()) == make()
    assert make(resolution=(12, 12)) == make()


def test_plan_is_not_equal_to_another_type() -> None:
    assert make() != make().digest


def test_plain_crops_come_from_a_fixed_random_stream() -> None:
    """Stored results are identified by their plan: if this fails, increase PLAN_VERSION."""
    plan = ViewPlan.make(2, size=(28, 28), patch_size=14, crops=CropOptions(coverage="plain"))
    # View 1, computed by hand from NumPy's Mersenne Twister.
    stream = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(0)))
    area, ratio, left, top, flip = stream.random_sample((2, 5))[1]
    area = 0.1 + 0.4 * area
    ratio = 0.75 * (16 / 9) ** ratio
    width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    expected = [left * (1 - width), top * (1 - height)]
    np.testing.assert_allclose(plan.boxes[1], [*expected, expected[0] + width, expected[1] + height], rtol=1e-8)
    assert bool(plan.flips[1]) == (flip < 0.5)


def test_digest_does_not_depend_on_the_last_bit_of_exp_and_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's exp and log differ in that bit between CPUs; results must be recognised on any machine."""
    digest = make(64).digest
    exp, log = np.exp, np.log
    monkeypatch.setattr(np, "exp", lambda x: np.nextafter(exp(x), np.inf))
    monkeypatch.setattr(np, "log", lambda x: np.nextafter(log(x), np.inf))
    plan = make(64)
    monkeypatch.undo()
    assert plan.digest == digest


@pytest.mark.parametrize("coverage", ["even", "plain"])
def test_more_views_extend_a_plan(coverage: Any) -> None:
    crops = CropOptions(coverage=coverage)
    few, many = make(8, crops=crops), make(50, crops=crops)
    np.testing.assert_array_equal(few.boxes, many.boxes[:8])
    np.testing.assert_array_equal(few.flips, many.flips[:8])
    assert many.subset(slice(0, 8)) == few


# --- plans: views ---


def test_view_zero_is_the_full_image_and_not_flipped() -> None:
    for seed in range(10):
        plan = make(4, seed=seed)
        assert plan.boxes[0].tolist() == [0, 0, 1, 1]
        assert not plan.flips[0]


def test_without_full_image_view_zero_is_a_crop_and_the_rest_is_unchanged() -> None:
    plan = make(8, full_image=False)
    assert plan.boxes[0].tolist() != [0, 0, 1, 1]
    np.testing.assert_array_equal(plan.boxes[1:], make(8).boxes[1:])


@pytest.mark.parametrize("coverage", ["even", "plain"])
@pytest.mark.parametrize("size", [(518, 518), (224, 448), (448, 224), (350, 518)])
def test_boxes_lie_in_the_image_with_area_and_ratio_in_range(size: tuple[int, int], coverage: Any) -> None:
    plan = ViewPlan.make(300, size=size, patch_size=14, seed=2, crops=CropOptions(coverage=coverage))
    boxes = plan.boxes[1:]
    assert boxes.min() >= 0 and boxes.max() <= 1
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = width * height
    ratio = (width * size[1]) / (height * size[0])  # in pixels of the rendered view
    assert area.min() >= 0.1 - 1e-9 and area.max() <= 0.5 + 1e-9
    assert ratio.min() >= 0.75 - 1e-9 and ratio.max() <= 4 / 3 + 1e-9


def test_released_boxes_are_whole_pixels_of_a_view_and_reach_its_edges() -> None:
    plan = make(2000, crops=CropOptions(coverage="released"))
    pixels = plan.boxes * np.tile((plan.size[1], plan.size[0]), 2)
    np.testing.assert_allclose(pixels, np.round(pixels), atol=1e-9)
    assert (plan.boxes[1:].min(0)[:2] == 0).all() and (plan.boxes[1:].max(0)[2:] == 1).all()
    width, height = (plan.boxes[1:, side + 2] - plan.boxes[1:, side] for side in (0, 1))
    assert 0.095 < (width * height).min() < 0.11 and 0.49 < (width * height).max() < 0.505
    assert 0.45 < plan.flips.mean() < 0.55


def test_released_patch_centres_span_a_view_from_edge_to_edge() -> None:
    plan = make(40, crops=CropOptions(coverage="released"))
    rows, columns = plan.centres()
    np.testing.assert_allclose(rows[:, [0, -1]], plan.boxes[:, [1, 3]], atol=1e-12)
    ends = np.where(plan.flips[:, None], plan.boxes[:, [2, 0]], plan.boxes[:, [0, 2]])
    np.testing.assert_allclose(columns[:, [0, -1]], ends, atol=1e-12)
    assert plan.flips.any() and np.ptp(np.diff(rows, axis=1), axis=1).max() < 1e-12


def test_released_plan_differs_from_a_plan_with_the_same_boxes() -> None:
    plan = make(9, crops=CropOptions(coverage="released"))
    assert plan != dataclasses.replace(plan, released=False)
    assert plan.subset(slice(3)).released


def test_coords_of_nodes_of_standard_and_released_plans() -> None:
    plan = ViewPlan.make(3, size=(40, 56), patch_size=8, resolution=(15, 7))
    rows, columns = plan.coords_of_nodes((15, 7))
    np.testing.assert_allclose(rows, (np.arange(15) + 0.5) / 15)
    np.testing.assert_allclose(columns, (np.arange(7) + 0.5) / 7)
    rows, columns = dataclasses.replace(plan, released=True).coords_of_nodes((15, 7))
    np.testing.assert_allclose(rows[1::3], np.linspace(0, 1, 5))  # three nodes a patch: these are patch centres
    np.testing.assert_allclose(rows[2], 1 / 12)  # a third of the way from the first to the second
    assert (rows[0], rows[-1]) == (0, 1)
    np.testing.assert_allclose(columns, np.linspace(0, 1, 7))


def test_area_and_ratio_fill_their_range() -> None:
    boxes = make(400).boxes[1:]
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height, width / height
    assert area.min() < 0.11 and area.max() > 0.49
    assert ratio.min() < 0.77 and ratio.max() > 1.3
    assert np.mean(ratio > 1) == pytest.approx(0.5, abs=0.05)  # wide and tall are equally likely


def test_crop_options_are_obeyed() -> None:
    plan = make(50, crops=CropOptions(area=(0.25, 0.25), ratio=(1.0, 1.0), flip=0.0))
    np.testing.assert_allclose(plan.boxes[1:, 2:] - plan.boxes[1:, :2], 0.5, atol=1e-12)
    assert not plan.flips.any()
    assert make(50, crops=CropOptions(flip=1.0)).flips[1:].all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("coverage", ["even", "plain"])
def test_about_half_of_the_views_are_flipped(seed: int, coverage: Any) -> None:
    flips = make(256, seed=seed, crops=CropOptions(coverage=coverage)).flips
    assert 0.4 < flips.mean() < 0.6


def share_of_the_least_covered(views: int, seed: int, coverage: Any) -> float:
    covered = ViewPlan.make(views, **DINO, seed=seed, crops=CropOptions(coverage=coverage)).coverage()
    return float(covered.min() / covered.mean())


@pytest.mark.parametrize("views", [64, 128, 256])
def test_even_crops_cover_every_node(views: int) -> None:
    assert min(share_of_the_least_covered(views, seed, "even") for seed in range(20)) >= 0.15


def test_plain_crops_cover_the_corners_badly() -> None:
    shares = [share_of_the_least_covered(64, seed, "plain") for seed in range(20)]
    assert max(shares) < 0.1
    assert np.mean(shares) < 0.05


def test_coverage_is_the_sum_of_all_weights() -> None:
    plan = make(9)
    wy, wx = plan.weights
    by_hand = torch.zeros(12, 12, dtype=torch.float64)
    for v in range(9):
        for row in wy[v]:
            for column in wx[v]:
                by_hand += torch.outer(row, column)
    torch.testing.assert_close(plan.coverage(), by_hand)
    assert float(plan.coverage().sum()) == pytest.approx(9 * 36)  # every token has weight one


# --- plans: geometry of the patches ---


def one_view(box: tuple[float, float, float, float], flip: bool, **options: Any) -> ViewPlan:
    plan = make(1, **options)
    return dataclasses.replace(plan, boxes=np.array([box]), flips=np.array([flip]))


def test_centres_of_a_crop_by_hand() -> None:
    rows, columns = one_view((0.2, 0.5, 0.6, 0.8), False, size=(32, 64)).centres()
    # Rows: patches at 1/4 and 3/4 of [0.5, 0.8]; columns: at 1/8, 3/8, 5/8, 7/8 of [0.2, 0.6].
    np.testing.assert_allclose(rows, [[0.575, 0.725]])
    np.testing.assert_allclose(columns, [[0.25, 0.35, 0.45, 0.55]])


def test_centres_of_a_flipped_crop_run_right_to_left() -> None:
    rows, columns = one_view((0.2, 0.5, 0.6, 0.8), True, size=(32, 64)).centres()
    np.testing.assert_allclose(rows, [[0.575, 0.725]])
    np.testing.assert_allclose(columns, [[0.55, 0.45, 0.35, 0.25]])


def test_centres_of_a_flipped_view_with_leftover_pixels() -> None:
    # One patch of 16 in 20 pixels has its centre at 8 / 20 = 0.4; mirrored, it shows the image at 0.6.
    _, columns = one_view((0, 0, 1, 1), True, size=(16, 20)).centres()
    np.testing.assert_allclose(columns, [[0.6]])


def test_weights_are_bilinear_interpolation_at_the_centres() -> None:
    plan = ViewPlan.make(12, size=(70, 98), patch_size=14, stride=7, resolution=(11, 13), seed=5)
    field = torch.randn(11, 13, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wy, wx = plan.weights
    sampled = torch.einsum("vyr,rsc,vxs->vyxc", wy, field, wx)
    rows, columns = map(torch.from_numpy, plan.centres())
    h, w = plan.grid
    grid = torch.stack([columns[:, None, :].expand(-1, h, w), rows[:, :, None].expand(-1, h, w)], dim=-1) * 2 - 1
    direct = F.grid_sample(
        field.permute(2, 0, 1).expand(12, -1, -1, -1), grid, mode="bilinear", padding_mode="border", align_corners=False
    ).permute(0, 2, 3, 1)  # (V, C, h, w) -> (V, h, w, C)
    torch.testing.assert_close(sampled, direct, rtol=1e-9, atol=1e-9)


def test_weights_have_the_shapes_of_grid_and_field() -> None:
    plan = ViewPlan.make(5, size=(70, 98), patch_size=14, stride=7, resolution=(11, 13))
    wy, wx = plan.weights
    assert plan.grid == (9, 13)
    assert wy.shape == (5, 9, 11) and wx.shape == (5, 13, 13)
    assert wy.dtype == wx.dtype == torch.float64


def test_flipped_view_has_mirrored_columns_when_stride_is_patch() -> None:
    plan = make(10)
    other = dataclasses.replace(plan, flips=~plan.flips)
    torch.testing.assert_close(other.weights[1], plan.weights[1].flip(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(other.weights[0], plan.weights[0], rtol=0, atol=0)


def test_flipped_view_has_mirrored_columns_when_patches_overlap() -> None:
    plan = make(10, size=(34, 34), patch_size=10, stride=4)  # (34 - 10) % 4 == 0
    other = dataclasses.replace(plan, flips=~plan.flips)
    assert plan.grid == (7, 7)
    torch.testing.assert_close(other.weights[1], plan.weights[1].flip(1), rtol=0, atol=1e-12)


def test_grid_and_default_resolution() -> None:
    assert ViewPlan.make(1, **DINO).grid == (37, 37)
    assert ViewPlan.make(1, **DINO).resolution == (74, 74)
    assert ViewPlan.make(1, **DINO, stride=7).grid == (73, 73)
    wide = make(1, size=(32, 80))
    assert wide.grid == (2, 5)
    assert wide.resolution == (4, 10)
    assert make(1, resolution=7).resolution == (7, 7)


def test_length_and_subset() -> None:
    plan = make(10)
    assert len(plan) == 10
    part = plan.subset(slice(2, 5))
    assert len(part) == 3
    np.testing.assert_array_equal(part.boxes, plan.boxes[2:5])
    np.testing.assert_array_equal(part.flips, plan.flips[2:5])
    torch.testing.assert_close(part.weights[1], plan.weights[1][2:5])


def test_least_views_by_hand() -> None:
    plan = make(1)  # 36 patches, 144 nodes
    assert least_views(plan, artifact_known=False) == 5  # 180 unknowns
    assert least_views(plan, artifact_known=True) == 4
    assert least_views(make(1, resolution=13), artifact_known=True) == 5  # 169 / 36 = 4.7
    assert least_views(make(1, resolution=2), artifact_known=True) == 1


# --- rejected arguments ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 0}, "at least 1 view, got 0"),
        ({"views": -3}, "at least 1 view, got -3"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"size": (15, 96)}, "15 x 96 pixels are smaller than one patch of 16"),
        ({"size": (96, 0)}, "96 x 0 pixels are smaller than one patch of 16"),
        ({"resolution": 1}, "at least 2 x 2 nodes, got 1 x 1"),
        ({"resolution": (8, 1)}, "at least 2 x 2 nodes, got 8 x 1"),
        ({"stride": -1}, "stride"),
        ({"stride": -16}, "stride"),
        ({"patch_size": 0}, "patch"),
    ],
    ids=str,
)
def test_bad_argument_raises_a_plan_error_that_names_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"area": (0.5, 0.1)}, r"area must be two increasing fractions in \(0, 1\], got \(0.5, 0.1\)"),
        ({"area": (0.0, 0.5)}, "area must be"),
        ({"area": (0.1, 1.5)}, "area must be"),
        ({"ratio": (2.0, 0.5)}, "ratio must be two increasing positive numbers"),
        ({"ratio": (0.0, 1.0)}, "ratio must be"),
        ({"flip": 1.5}, r"flip must be a probability in \[0, 1\], got 1.5"),
        ({"flip": -0.1}, "flip must be"),
        ({"coverage": "full"}, "coverage must be 'even', 'plain' or 'released', got 'full'"),
    ],
    ids=str,
)
def test_bad_crop_option_raises_a_plan_error_that_names_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        CropOptions(**options)


# --- weights of patches ---


def test_without_a_taper_all_patches_weigh_the_same() -> None:
    assert all(bool((window == 1).all()) for window in ViewPlan.make(9, size=(70, 98), patch_size=14).windows)


def test_taper_applies_to_borders_within_the_image_only() -> None:
    boxes = np.array([[0, 0, 1, 1], [0.2, 0, 0.7, 0.5], [0.2, 0, 0.7, 0.5], [0.5, 0.5, 1, 1]])
    flips = np.array([False, False, True, True])
    plan = ViewPlan(boxes, flips, (140, 140), 14, 14, (20, 20), taper=0.3)
    rows, columns = (window.numpy() for window in plan.windows)
    places = (np.arange(10) + 0.5) / 10
    rise = 0.2 + 0.8 * (1 - np.cos(np.pi * np.minimum(places / 0.3, 1))) / 2  # by hand: 0.25, 0.6, 0.95, 1, ...
    np.testing.assert_allclose(rise[:4], [0.253590, 0.6, 0.946410, 1], atol=1e-6)
    np.testing.assert_allclose(rows[0], 1)
    np.testing.assert_allclose(columns[0], 1)
    np.testing.assert_allclose(rows[1], rise[::-1])  # the top is the border of the image, the bottom is within it
    np.testing.assert_allclose(columns[1], np.minimum(rise, rise[::-1]))
    np.testing.assert_allclose(columns[2], columns[1])
    np.testing.assert_allclose(columns[3], rise[::-1])  # mirrored: its left border is the right border of the image
    np.testing.assert_allclose(rows[3], rise)


def test_a_taper_changes_the_digest_and_keeps_the_coverage() -> None:
    plain, tapered = (ViewPlan.make(64, size=(518, 518), patch_size=14, taper=taper) for taper in (0.0, 0.3))
    assert plain.digest != tapered.digest
    coverage = tapered.coverage()
    assert coverage.min() / coverage.mean() >= 0.15


@pytest.mark.parametrize("taper", [-0.1, 0.6, float("nan")])
def test_taper_out_of_range_is_rejected(taper: float) -> None:
    with pytest.raises(PlanError, match="taper must be a fraction"):
        ViewPlan.make(8, size=(70, 70), patch_size=14, taper=taper)
