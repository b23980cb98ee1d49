"""Calibration: a planted artifact is recovered, its reliability is correct, and bad photos have no effect."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import denoising_vit as dv
import tiny_artifact as tiny
from denoising_vit import Artifact, ArtifactError, Backbone, CalibrationOptions, PlanError, SizeError
from denoising_vit.decomposition.calibration import (
    Calibration,
    Stability,
    curve,
    doubt_about,
    run_calibration,
    split_half,
)
from denoising_vit.decomposition.inputs import named_pixels
from denoising_vit.decomposition.stage_one import Ready, StageOne
from denoising_vit.errors import DenoisingVitWarning

pytestmark = pytest.mark.usefixtures("one_thread")

TRUTH = tiny.pattern(*tiny.GRID)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return tiny.photos(16)


@pytest.fixture(scope="module")
def found(one_thread: None, backbone: Backbone, photos: list[np.ndarray]) -> Calibration:
    return run_calibration(backbone, named_pixels(photos))


def error(artifact: Artifact, truth: Tensor = TRUTH) -> float:
    return float((artifact.values - truth).norm() / truth.norm())


def solved(backbone: Backbone, photos: list[np.ndarray], options: CalibrationOptions) -> tuple[StageOne, list[Ready]]:
    """The statistics of each photo, not yet solved."""
    stage = StageOne(backbone, options.denoising())
    ready = [result for result in stage.run((i, str(i), p) for i, p in enumerate(photos)) if isinstance(result, Ready)]
    assert len(ready) == len(photos)
    return stage, ready


# --- planted artifacts are found ---


def test_planted_artifact_is_found_in_shape_and_scale(found: Calibration) -> None:
    values = found.artifact.values
    assert tiny.correlation(values, TRUTH) > 0.99
    assert float((values * TRUTH).sum() / TRUTH.square().sum()) == pytest.approx(1, abs=0.03)


def test_planted_artifact_is_found_with_offsets(
    backbone: Backbone, photos: list[np.ndarray], found: Calibration
) -> None:
    calibration = run_calibration(backbone, named_pixels(photos), offsets=True)
    values = calibration.artifact.values
    assert tiny.correlation(values, TRUTH) > 0.99
    assert float((values * TRUTH).sum() / TRUTH.square().sum()) == pytest.approx(1, abs=0.03)
    assert not torch.equal(values, found.artifact.values)


def test_planted_artifact_is_reported_as_stable(found: Calibration) -> None:
    assert found.stability.photos == 16
    assert found.stability.reliability > 0.98
    assert found.stability.signal == pytest.approx(float(TRUTH.square().sum(-1).mean()), rel=0.05)
    assert found.split_half[16] > 0.95
    assert doubt_about(found.stability) is None


def test_reliability_is_the_squared_correlation_with_the_truth() -> None:
    weak = run_calibration(tiny.backbone(0.1), named_pixels(tiny.photos(16)))
    reached = tiny.correlation(weak.artifact.values, TRUTH) ** 2
    assert 0.3 < reached < 0.95  # a case in which the estimate is informative
    assert weak.stability.reliability == pytest.approx(reached, abs=0.1)


@pytest.mark.parametrize("size", [(40, 72), (72, 56), 88], ids=str)
def test_planted_artifact_is_found_at_other_sizes(photos: list[np.ndarray], size: int | tuple[int, int]) -> None:
    artifact = dv.calibrate(tiny.backbone(), photos, size=size)
    height, width = (size, size) if isinstance(size, int) else size
    assert artifact.size == (height, width)
    assert artifact.grid == (height // 8, width // 8)
    assert error(artifact, tiny.pattern(*artifact.grid)) < 0.2


def test_planted_artifact_is_found_with_overlapping_patches(photos: list[np.ndarray]) -> None:
    artifact = dv.calibrate(tiny.backbone(stride=4), photos)
    assert artifact.grid == (13, 13)
    assert error(artifact, tiny.pattern(13, 13)) < 0.2


def test_error_falls_as_photos_are_added(backbone: Backbone) -> None:
    photos = tiny.photos(64)
    few, more, many = (error(dv.calibrate(backbone, photos[:count])) for count in (4, 16, 64))
    assert few > more > many
    assert many < 0.45 * few  # the errors of photos are independent: a quarter is expected


def test_artifact_has_mean_zero_in_every_channel(found: Calibration) -> None:
    torch.testing.assert_close(found.artifact.values.mean((0, 1)), torch.zeros(6), rtol=0, atol=1e-5)


def test_artifact_records_its_backbone_and_size(found: Calibration, backbone: Backbone) -> None:
    assert found.artifact.values.dtype == torch.float32
    assert found.artifact.size == (56, 56)
    assert found.artifact.backbone["name"] == "Planted"
    assert (found.artifact.backbone["stride"], found.artifact.backbone["patch_size"]) == (8, 8)
    found.artifact.require_of(backbone)


def test_info_records_the_calibration_as_json(found: Calibration) -> None:
    info = json.loads(json.dumps(found.artifact.info, allow_nan=False))
    assert (info["views"], info["seed"], info["taper"]) == (16, 0, 0.3)
    assert info["photos"] == [f"photo {number}" for number in range(16)]
    assert info["skipped"] == []
    assert set(info["split_half"]) == {"4", "8", "16"}
    assert info["stability"]["reliability"] == found.stability.reliability
    assert info["stability"]["suggested"] == found.stability.suggested


def test_info_survives_saving_and_loading(found: Calibration, tmp_path: Path) -> None:
    found.artifact.save(tmp_path / "a.safetensors")
    assert Artifact.load(tmp_path / "a.safetensors").info == found.artifact.info


# --- jointly over photos ---


def test_joint_artifact_is_the_mean_over_single_photos(
    found: Calibration, backbone: Backbone, photos: list[np.ndarray]
) -> None:
    stage, ready = solved(backbone, photos, CalibrationOptions())
    alone = [stage.solver.solve(photo.statistics.b, photo.statistics.g)[1] for photo in ready]
    torch.testing.assert_close(found.artifact.values, torch.stack(alone).mean(0).float(), rtol=1e-5, atol=1e-5)


def test_joint_artifact_is_the_solution_for_the_summed_statistics(
    found: Calibration, backbone: Backbone, photos: list[np.ndarray]
) -> None:
    stage, ready = solved(backbone, photos, CalibrationOptions())
    b, g = (sum(getattr(photo.statistics, name) for photo in ready) / len(ready) for name in "bg")
    joint = stage.solver.solve(torch.as_tensor(b), torch.as_tensor(g))[1].float()
    torch.testing.assert_close(found.artifact.values, joint, rtol=1e-5, atol=1e-5)


def test_joint_artifact_matches_a_dense_joint_solve() -> None:
    """The dense system of N fields and one G, solved at once, on a grid of 5 x 5 with 8 x 8 nodes."""
    options = CalibrationOptions(views=8, size=40, resolution=8, smoothness=0.05, shrinkage=0.02)
    photos = tiny.photos(4)
    found = dv.calibrate(tiny.backbone(channels=3), photos, options=options)
    stage, ready = solved(tiny.backbone(channels=3), photos, options)
    nodes, places, count = 64, 25, len(photos)
    wy, wx = stage.fitted.weights
    rows, columns = stage.fitted.windows
    matrix = torch.zeros(count * nodes + places, count * nodes + places, dtype=torch.float64)
    right = torch.zeros(count * nodes + places, 3, dtype=torch.float64)
    shared = slice(count * nodes, None)
    observations = float(torch.einsum("vy,vx->", rows, columns))
    step = torch.diff(torch.eye(8, dtype=torch.float64), dim=0)
    path = step.T @ step
    laplacian = torch.kron(path, torch.eye(8)) + torch.kron(torch.eye(8), path)
    for number, photo in enumerate(ready):
        own = slice(number * nodes, (number + 1) * nodes)
        for down, across, row, column in zip(wy, wx, rows, columns, strict=True):
            sampling = torch.kron(down, across)  # (h w, Ry Rx)
            weighted = torch.outer(row, column).flatten()[:, None] * sampling
            matrix[own, own] += sampling.T @ weighted
            matrix[shared, own] += weighted
            matrix[own, shared] += weighted.T
            matrix[shared, shared] += torch.outer(row, column).flatten().diag()
        matrix[own, own] += options.smoothness * observations / nodes * laplacian
        right[own] = photo.statistics.b.flatten(0, 1)
        right[shared] += photo.statistics.g.flatten(0, 1)
    matrix[shared, shared] += count * options.shrinkage * observations / places * torch.eye(places, dtype=torch.float64)
    joint = torch.linalg.solve(matrix, right)[shared].unflatten(0, (5, 5))
    joint = joint - joint.mean((0, 1))
    torch.testing.assert_close(found.values, joint.float(), rtol=1e-4, atol=1e-4)


# --- repeatability ---


def test_same_seed_gives_identical_results(found: Calibration, photos: list[np.ndarray]) -> None:
    again = dv.calibrate(tiny.backbone(), photos)
    assert torch.equal(again.values, found.artifact.values)
    assert again.info == found.artifact.info


def test_other_seed_gives_other_views_and_nearly_the_same_artifact(
    found: Calibration, backbone: Backbone, photos: list[np.ndarray]
) -> None:
    other = dv.calibrate(backbone, photos, seed=1)
    assert other.info["plan"] != found.artifact.info["plan"]
    assert not torch.equal(other.values, found.artifact.values)
    assert tiny.correlation(other.values, found.artifact.values) > 0.98


def test_order_of_the_photos_does_not_matter(found: Calibration, backbone: Backbone, photos: list[np.ndarray]) -> None:
    turned = run_calibration(backbone, named_pixels(photos[::-1]))
    torch.testing.assert_close(turned.artifact.values, found.artifact.values, rtol=1e-5, atol=1e-6)
    assert turned.stability.reliability == pytest.approx(found.stability.reliability, abs=1e-6)


def test_batch_size_does_not_matter(found: Calibration, backbone: Backbone, photos: list[np.ndarray]) -> None:
    other = dv.calibrate(backbone, photos, batch_size=7)
    torch.testing.assert_close(other.values, found.artifact.values, rtol=1e-4, atol=1e-5)


def test_photos_may_be_paths_images_or_arrays(backbone: Backbone, tmp_path: Path) -> None:
    arrays = tiny.photos(4)
    folder = tiny.write_photos(tmp_path, 4)
    paths = sorted(folder.iterdir())
    mixed = [paths[0], str(paths[1]), Image.fromarray(arrays[2]), arrays[3]]
    artifact = dv.calibrate(backbone, mixed)
    assert torch.equal(artifact.values, dv.calibrate(backbone, arrays).values)
    assert artifact.info["photos"] == [str(paths[0]), str(paths[1]), "photo 2", "photo 3"]


def test_photos_may_be_an_iterator(backbone: Backbone) -> None:
    arrays = tiny.photos(4)
    assert torch.equal(dv.calibrate(backbone, iter(arrays)).values, dv.calibrate(backbone, arrays).values)


def test_progress_reports_each_photo_and_why_it_was_skipped(backbone: Backbone) -> None:
    seen: list[tuple[str, str | None]] = []
    dv.calibrate(backbone, [*tiny.photos(4), tiny.flat()], progress=lambda *report: seen.append(report))
    assert seen[:4] == [(f"photo {number}", None) for number in range(4)]
    assert seen[4] == ("photo 4", "no content: all pixels are the same")


def test_forward_passes_are_views_times_photos() -> None:
    module = tiny.Planted()
    extractor = tiny.plain(module)
    views = []
    module.register_forward_pre_hook(lambda _module, inputs: views.append(len(inputs[0])))
    dv.calibrate(extractor, tiny.photos(5), views=12)
    assert sum(views) == 5 * 12 + 1  # one for the fingerprint


# --- invalid options ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": 1}, "views must be at least 2, got 1"),
        ({"views": 0}, "views must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"smoothness": math.nan}, "smoothness must be at least 0"),
        ({"shrinkage": -1.0}, "shrinkage must be at least 0"),
        ({"clip": 0.0}, "clip must be a positive number"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"views": 3}, "3 views of 7 x 7 patches are too few .* and an artifact; expected at least 5"),
        ({"resolution": 40}, "16 views of 7 x 7 patches are too few for a field of 40 x 40 nodes"),
    ],
    ids=str,
)
def test_invalid_options_are_rejected_before_reading_photos(
    backbone: Backbone, changes: dict[str, Any], message: str
) -> None:
    def untouched() -> Any:
        raise AssertionError("no photo was to be read")
        yield

    with pytest.raises(PlanError, match=message):
        dv.calibrate(backbone, untouched(), **changes)


def test_size_off_the_patch_grid_is_refused(backbone: Backbone) -> None:
    with pytest.raises(SizeError, match="Nearest: 56 or 64"):
        dv.calibrate(backbone, tiny.photos(4), size=60)


def test_unknown_option_is_a_type_error(backbone: Backbone) -> None:
    with pytest.raises(TypeError, match="held_out"):
        dv.calibrate(backbone, tiny.photos(4), held_out=3)


# --- too few photos, and too little in common ---


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_photos_are_rejected_with_the_number_needed(backbone: Backbone, count: int) -> None:
    with pytest.raises(
        ArtifactError, match=rf"^{count} usable photos; an artifact needs at least 4, preferably a few dozen"
    ):
        dv.calibrate(backbone, tiny.photos(count))


def test_too_few_photos_error_says_why_others_were_skipped(backbone: Backbone) -> None:
    with pytest.raises(ArtifactError, match=r"3 usable photos \(2 skipped; first: photo 0: no content"):
        dv.calibrate(backbone, [tiny.flat(), *tiny.photos(3), tiny.flat(9)])


def test_four_photos_suffice(backbone: Backbone) -> None:
    assert dv.calibrate(backbone, tiny.photos(4)).info["stability"]["photos"] == 4


def test_noisy_artifact_warns_with_the_number_of_photos_needed() -> None:
    extractor = tiny.backbone(0.1)
    with pytest.warns(DenoisingVitWarning) as warned:
        artifact = dv.calibrate(extractor, tiny.photos(6))
    stability = artifact.info["stability"]
    assert 0 < stability["reliability"] < 0.8
    assert stability["suggested"] > 6
    (message,) = [str(each.message) for each in warned]
    assert message.startswith("6 photos are too few for a stable artifact")
    assert f"use about {stability['suggested']} for 0.95" in message


def test_suggested_number_of_photos_is_enough(one_thread: None) -> None:
    few = run_calibration(tiny.backbone(0.2), named_pixels(tiny.photos(8)))
    suggested = few.stability.suggested
    assert suggested is not None and 8 < suggested < 120
    enough = run_calibration(tiny.backbone(0.2), named_pixels(tiny.photos(suggested, seed=5)))
    assert tiny.correlation(enough.artifact.values, TRUTH) ** 2 > 0.92


@pytest.mark.parametrize("count", [4, 8, 24])
def test_clean_backbone_warns_that_photos_share_no_artifact(count: int) -> None:
    with pytest.warns(DenoisingVitWarning, match=f"{count} photos have hardly any artifact in common"):
        artifact = dv.calibrate(tiny.backbone(0.0), tiny.photos(count))
    assert artifact.info["stability"]["reliability"] < 0.3


# --- photos and features that cannot be used ---


def test_unreadable_photos_are_skipped_and_recorded(backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "words.jpg").write_text("words")
    bad = [tmp_path / "words.jpg", tmp_path / "none.jpg", np.zeros((9, 9), np.uint8)]
    artifact = dv.calibrate(backbone, [bad[0], *tiny.photos(4), *bad[1:]])
    skipped = dict(artifact.info["skipped"])
    assert list(skipped) == [str(bad[0]), str(bad[1]), "photo 6"]
    assert skipped[str(bad[0])].startswith("not an image file")
    assert skipped[str(bad[1])] == "no such file"
    assert "(9, 9)" in skipped["photo 6"]
    assert artifact.info["photos"] == ["photo 1", "photo 2", "photo 3", "photo 4"]


def test_skipped_photos_do_not_affect_the_artifact(backbone: Backbone) -> None:
    photos = tiny.photos(4)
    with_bad = dv.calibrate(backbone, [tiny.flat(), photos[0], tiny.flat(9), *photos[1:], photos[2]])
    torch.testing.assert_close(with_bad.values, dv.calibrate(backbone, photos).values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_photos_of_one_colour_have_no_content(backbone: Backbone, level: int) -> None:
    artifact = dv.calibrate(backbone, [*tiny.photos(4), tiny.flat(level)])
    assert artifact.info["skipped"] == [["photo 4", "no content: all pixels are the same"]]


def test_photo_of_one_colour_that_is_not_grey_has_no_content(backbone: Backbone) -> None:
    red = np.broadcast_to(np.array([255, 0, 9], np.uint8), (90, 120, 3))
    assert dv.calibrate(backbone, [*tiny.photos(4), red]).info["skipped"][0][0] == "photo 4"


def test_black_photo_with_faint_noise_has_no_content(backbone: Backbone) -> None:
    faint = (np.random.default_rng(0).random((90, 120, 3)) < 0.2).astype(np.uint8)
    assert dv.calibrate(backbone, [*tiny.photos(4), faint]).info["skipped"][0][0] == "photo 4"


def test_photo_that_varies_in_one_channel_only_has_content(backbone: Backbone) -> None:
    ramp = tiny.flat()
    ramp[..., 1] = np.linspace(0, 255, 120, dtype=np.uint8)
    assert dv.calibrate(backbone, [*tiny.photos(4), ramp]).info["skipped"] == []


def test_black_photos_alone_are_refused(backbone: Backbone) -> None:
    with pytest.raises(ArtifactError, match=r"0 usable photos \(8 skipped; first: photo 0: no content"):
        dv.calibrate(backbone, [tiny.flat()] * 8)


def test_same_picture_in_another_file_counts_once(backbone: Backbone, tmp_path: Path) -> None:
    photos = tiny.photos(4)
    Image.fromarray(photos[1]).save(tmp_path / "copy.bmp")
    artifact = dv.calibrate(backbone, [*photos, tmp_path / "copy.bmp"])
    assert artifact.info["skipped"] == [[str(tmp_path / "copy.bmp"), "a duplicate of photo 1"]]
    assert artifact.info["stability"]["photos"] == 4


def test_same_file_named_twice_counts_once(backbone: Backbone, tmp_path: Path) -> None:
    paths = sorted(tiny.write_photos(tmp_path, 4).iterdir())
    artifact = dv.calibrate(backbone, [*paths, paths[2]])
    assert artifact.info["skipped"] == [[str(paths[2]), f"a duplicate of {paths[2]}"]]
    assert artifact.info["stability"]["photos"] == 4
    assert artifact.info["photos"] == [str(path) for path in paths]


def test_one_image_many_times_is_refused(backbone: Backbone) -> None:
    with pytest.raises(ArtifactError, match=r"1 usable photos \(9 skipped; .*a duplicate of photo 0\)"):
        dv.calibrate(backbone, tiny.photos(1) * 10)


def test_photo_smaller_than_a_patch_is_skipped(backbone: Backbone) -> None:
    artifact = dv.calibrate(backbone, [*tiny.photos(4), tiny.photos(1, seed=9)[0][:7]])
    ((name, reason),) = artifact.info["skipped"]
    assert name == "photo 4"
    assert "less than one patch" in reason


def failing_where(bad: Callable[[Tensor], Tensor], value: float) -> Backbone:
    """The planted backbone, with one feature of this value in images (B, 3, H, W) for which ``bad`` holds (B,)."""
    module = tiny.Planted()

    def extract(image: Tensor) -> Tensor:
        features = module(image).clone()
        features[bad(image), 1, 2, 3] = value
        return features

    return tiny.plain(extract)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_photos_with_non_finite_features_are_skipped(value: float) -> None:
    bright = (tiny.photos(1, seed=7)[0] // 20 + 240).astype(np.uint8)
    extractor = failing_where(lambda image: image.mean((1, 2, 3)) > 1.8, value)
    artifact = dv.calibrate(extractor, [bright, *tiny.photos(4)])
    ((name, reason),) = artifact.info["skipped"]
    assert name == "photo 0"
    assert "not finite" in reason
    assert torch.isfinite(artifact.values).all()


def test_features_that_are_never_finite_raise() -> None:
    extractor = failing_where(lambda image: torch.ones(len(image), dtype=torch.bool), math.nan)
    with pytest.raises(ArtifactError, match=r"0 usable photos \(5 skipped; first: photo 0: .* not finite"):
        dv.calibrate(extractor, tiny.photos(5))


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_constant_output_has_no_artifact(constant: float) -> None:
    extractor = tiny.plain(
        lambda image: torch.full((len(image), image.shape[2] // 8, image.shape[3] // 8, 6), constant)
    )
    with pytest.warns(DenoisingVitWarning, match="hardly any artifact in common"):
        artifact = dv.calibrate(extractor, tiny.photos(5))
    torch.testing.assert_close(artifact.values, torch.zeros(7, 7, 6), rtol=0, atol=1e-6)
    json.dumps(artifact.info, allow_nan=False)


def test_features_independent_of_the_photo_are_all_artifact() -> None:
    """Features that do not depend on the photo at all are only artifact."""
    extractor = tiny.plain(lambda image: TRUTH.expand(len(image), -1, -1, -1))
    artifact = dv.calibrate(extractor, tiny.photos(4))
    assert error(artifact) < 0.05
    assert artifact.info["stability"]["reliability"] == pytest.approx(1)


# --- stability, from hand-made products ---


def products(photos: int, signal: float, noise: float) -> np.ndarray:
    """Products (N, N) of photos with a common signal, and with errors orthogonal to it and to each other."""
    return np.full((photos, photos), signal) + noise * np.eye(photos)


def simulated(photos: int, noise: float, size: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """G of unit square, and G_i = G + e_i (N, size) with errors of mean square ``noise``."""
    chance = np.random.default_rng(seed)
    truth = chance.normal(0, 1, size) / math.sqrt(size)
    return truth, truth + chance.normal(0, math.sqrt(noise / size), (photos, size))


@pytest.mark.parametrize(("photos", "signal", "noise"), [(4, 2.0, 1.0), (7, 0.5, 3.0), (12, 3.0, 0.0)])
def test_signal_and_noise_are_separated(photos: int, signal: float, noise: float) -> None:
    stability = Stability.of(products(photos, signal, noise))
    assert stability.photos == photos
    assert stability.signal == pytest.approx(signal)
    assert stability.noise == pytest.approx(noise, abs=1e-12)
    assert stability.reliability == pytest.approx(signal / (signal + noise / photos))


def test_signal_is_the_mean_of_products_of_different_photos() -> None:
    matrix = np.array([[9.0, 1, 2, 3], [1, 7, 4, 5], [2, 4, 5, 6], [3, 5, 6, 11]])
    stability = Stability.of(matrix)
    assert stability.signal == pytest.approx(21 / 6)  # (1 + 2 + 3 + 4 + 5 + 6) / 6
    assert stability.noise == pytest.approx(8 - 3.5)  # (9 + 7 + 5 + 11) / 4 - 3.5


@pytest.mark.parametrize(
    ("signal", "noise", "suggested"),
    [(1.0, 1.0, 19), (2.0, 1.0, 10), (1.0, 10.0, 190), (10.0, 1.0, 4), (1.0, 0.0, 4), (3.0, 1.1, 7)],
)
def test_suggested_number_reaches_reliability_095(signal: float, noise: float, suggested: int) -> None:
    stability = Stability.of(products(6, signal, noise))
    assert stability.suggested == suggested
    assert stability.reliability_of(suggested) >= 0.95 - 1e-9
    assert suggested == 4 or stability.reliability_of(suggested - 1) < 0.95


def test_suggested_number_reaches_its_reliability_in_simulation() -> None:
    _, few = simulated(16, noise=3.0)
    suggested = Stability.of(few @ few.T).suggested
    assert suggested is not None
    assert suggested == pytest.approx(57, abs=12)
    truth, many = simulated(suggested, noise=3.0, seed=1)
    mean = many.mean(0)
    share = float(truth @ mean) ** 2 / float(truth @ truth) / float(mean @ mean)
    assert share == pytest.approx(0.95, abs=0.015)


def test_no_number_is_suggested_without_signal() -> None:
    errors = np.eye(4) - 0.25  # four errors whose sum is zero
    stability = Stability.of(errors @ errors.T)
    assert stability.signal < 0
    assert stability.suggested is None
    assert stability.reliability == 0
    assert stability.record()["suggested"] is None


def test_artifacts_that_are_all_zero_have_no_reliability() -> None:
    stability = Stability.of(np.zeros((5, 5)))
    assert (stability.signal, stability.noise, stability.split_half, stability.reliability) == (0, 0, 0, 0)
    assert stability.suggested is None


def test_split_half_of_four_photos_by_hand() -> None:
    # Halves of two: 4 s across, 4 s + 2 n within each, for any choice of halves.
    assert split_half(products(4, 2.0, 1.0), 4) == pytest.approx(8 / 10)
    assert split_half(products(4, 2.0, 1.0), 2) == pytest.approx(2 / 3)


@pytest.mark.parametrize("photos", [6, 7, 16])
def test_split_half_follows_the_formula(photos: int) -> None:
    half = photos // 2
    expected = half**2 * 1.5 / (half**2 * 1.5 + half * 4.0)
    assert split_half(products(photos, 1.5, 4.0), photos) == pytest.approx(expected)


def test_split_half_is_the_correlation_of_the_means_of_disjoint_halves() -> None:
    _, each = simulated(4, noise=2.0, size=50)
    cosines = []
    for one, two in (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))):
        a, b = each[list(one)].mean(0), each[list(two)].mean(0)
        cosines.append(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
    found = split_half(each @ each.T, 4)
    assert min(cosines) < found < max(cosines)
    assert found == pytest.approx(np.mean(cosines), abs=0.1 * (max(cosines) - min(cosines)) + 1e-3)


def test_opposite_halves_correlate_negatively() -> None:
    each = np.array([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    assert split_half(each @ each.T, 2) < 0


def test_split_half_is_the_same_for_the_same_seed() -> None:
    _, each = simulated(12, noise=5.0, size=30)
    matrix = each @ each.T
    assert split_half(matrix, 12, seed=3) == split_half(matrix, 12, seed=3)
    assert split_half(matrix, 12, seed=3) != split_half(matrix, 12, seed=4)


@pytest.mark.parametrize(
    ("photos", "counts"),
    [(4, [4]), (5, [4, 5]), (8, [4, 8]), (20, [4, 8, 16, 20]), (64, [4, 8, 16, 32, 64]), (7, [4, 7])],
)
def test_curve_has_powers_of_two_and_all_photos(photos: int, counts: list[int]) -> None:
    assert list(curve(products(photos, 1.0, 1.0))) == counts


def test_curve_rises_with_the_number_of_photos() -> None:
    values = list(curve(products(32, 1.0, 4.0)).values())
    assert values == sorted(values)
    assert values[-1] == pytest.approx(256 / (256 + 64))


# --- messages about stability ---


def test_stable_artifact_raises_no_doubt() -> None:
    assert doubt_about(Stability.of(products(20, 1.0, 2.0))) is None


def test_doubt_names_the_number_of_photos_needed() -> None:
    message = doubt_about(Stability.of(products(8, 1.0, 10.0)))
    assert message is not None
    assert "8 photos are too few" in message
    assert "a fraction of 0.44" in message  # 1 / (1 + 10 / 8)
    assert "use about 190 for 0.95" in message


@pytest.mark.parametrize("noise", [1e4, 1e9])
def test_absurd_numbers_of_photos_are_not_suggested(noise: float) -> None:
    message = doubt_about(Stability.of(products(8, 1.0, noise)))
    assert message is not None
    assert "hardly any artifact in common" in message
    assert "use about" not in message


@pytest.mark.parametrize("kind", ["array", "picture"])
def test_single_photo_is_not_split_into_rows(backbone: Backbone, kind: str) -> None:
    (photo,) = tiny.photos(1)
    with pytest.raises(ArtifactError, match=r"^1 usable photos; "):
        dv.calibrate(backbone, photo if kind == "array" else Image.fromarray(photo))  # pyright: ignore[reportArgumentType]


def test_saved_artifact_contains_no_folder_names(backbone: Backbone, tmp_path: Path) -> None:
    folder = tmp_path / "private"
    paths = sorted(tiny.write_photos(folder, 4).iterdir())
    artifact = dv.calibrate(backbone, [*paths, paths[2], folder / "none.png"])
    artifact.save(tmp_path / "a.safetensors")
    assert b"private" not in (tmp_path / "a.safetensors").read_bytes()
    info = Artifact.load(tmp_path / "a.safetensors").info
    assert info["photos"] == [path.name for path in paths]
    assert info["skipped"][0] == [paths[2].name, f"a duplicate of {paths[2].name}"]
    assert info["skipped"][1][0] == "none.png"
