"""Stage 1 for one photo, with cheap backbones whose artifacts are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from skimage import data
from torch import Tensor, nn

import denoising_vit as dv
import planted as tiny
from denoising_vit import (
    Backbone,
    BackboneError,
    Decomposition,
    DenoiseOptions,
    FormatError,
    PhotoError,
    PlanError,
    SizeError,
)
from denoising_vit.decomposition.inputs import prepare

PATCH, SIDE, CHANNELS = 8, 56, 5  # a grid of 7 x 7
FEW: dict[str, Any] = {"views": 12, "held_out": 3}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """One convolution whose kernel and stride are one patch."""
    torch.manual_seed(0)
    return dv.load_backbone(nn.Conv2d(3, CHANNELS, PATCH, PATCH), patch_size=PATCH, default_size=SIDE)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """(100, 150, 3)."""
    return np.array(Image.fromarray(data.chelsea()).resize((150, 100)))


@pytest.fixture(scope="module")
def result(backbone: Backbone, photo: np.ndarray) -> Decomposition:
    return dv.denoise_image(backbone, photo, **FEW)


def pattern(h: int, w: int, channels: int = CHANNELS) -> Tensor:
    """A planted artifact (h, w, C) with mean zero over its positions."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    maps = [torch.sin((c + 1) * 2 * x + c) * torch.cos((c + 2) * y) + 0.3 * x * y for c in range(channels)]
    planted = torch.stack(maps, dim=-1)
    return planted - planted.mean((0, 1))


def clean_features(image: Tensor) -> Tensor:
    """Patch means mixed into C channels, (B, h, w, C): the same for every view of a smooth photo."""
    mixing = torch.randn(3, CHANNELS, generator=torch.Generator().manual_seed(1))
    return F.avg_pool2d(image, PATCH).permute(0, 2, 3, 1) @ mixing


def with_pattern(image: Tensor) -> Tensor:
    features = clean_features(image)
    return features + pattern(*features.shape[1:3])


def smooth_photo() -> np.ndarray:
    """(120, 160, 3), a blurred cat: bilinear interpolation between patches is nearly exact."""
    tiny = Image.fromarray(data.chelsea()).resize((6, 5), Image.Resampling.BOX)
    return np.array(tiny.resize((160, 120), Image.Resampling.BICUBIC))


def plain(extractor: Any) -> Backbone:
    return dv.load_backbone(extractor, patch_size=PATCH, default_size=SIDE)


# --- input ---


def test_shapes_and_types_of_a_result(result: Decomposition) -> None:
    assert result.semantic.shape == result.artifact.shape == result.raw.shape == result.residual.shape == (7, 7, 5)
    assert result.field.shape == (14, 14, 5)
    assert result.coords.shape == (7, 7, 2)
    for tensor in (result.semantic, result.artifact, result.raw, result.field, result.coords):
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert torch.isfinite(tensor).all()
    assert (result.size, result.patch_size, result.stride) == ((56, 56), 8, 8)


def test_path_pil_image_and_array_give_identical_results(
    backbone: Backbone, photo: np.ndarray, result: Decomposition, tmp_path: Path
) -> None:
    path = tmp_path / "cat.png"
    Image.fromarray(photo).save(path)
    for same in (path, str(path), Image.fromarray(photo)):
        other = dv.denoise_image(backbone, same, **FEW)
        assert torch.equal(other.field, result.field)
        assert torch.equal(other.artifact, result.artifact)
        assert torch.equal(other.raw, result.raw)


def test_normalised_tensor_gives_the_same_result(backbone: Backbone, photo: np.ndarray, result: Decomposition) -> None:
    mean, std = torch.tensor(backbone.mean), torch.tensor(backbone.std)
    tensor = ((torch.from_numpy(photo) / 255 - mean) / std).permute(2, 0, 1)[None]
    other = dv.denoise_image(backbone, tensor, size=SIDE, **FEW)
    torch.testing.assert_close(other.semantic, result.semantic, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.artifact, result.artifact, rtol=1e-3, atol=1e-4)


def test_tensor_keeps_its_own_size(backbone: Backbone) -> None:
    tensor = torch.randn(1, 3, 40, 72, generator=torch.Generator().manual_seed(0)) * 0.3
    result = dv.denoise_image(backbone, tensor, **FEW)
    assert result.size == (40, 72)
    with torch.no_grad():
        torch.testing.assert_close(result.raw, backbone(tensor)[0], rtol=1e-4, atol=1e-4)


def test_tensor_off_the_patch_grid_is_refused(backbone: Backbone) -> None:
    with pytest.raises(SizeError, match="Nearest: 40 or 48"):
        dv.denoise_image(backbone, torch.zeros(1, 3, 44, 48), **FEW)


def test_record_of_the_photo(backbone: Backbone, photo: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    Image.fromarray(photo).save(path)
    from_path = dv.denoise_image(backbone, path, **FEW).info["photo"]
    from_array = dv.denoise_image(backbone, photo, **FEW).info["photo"]
    assert (from_path["name"], from_path["height"], from_path["width"]) == ("cat.png", 100, 150)
    assert from_array["name"] is None
    assert from_path["sha256"] == from_array["sha256"]
    assert len(from_path["sha256"]) == 64


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, 56, 56), r"got \(3, 56, 56\) of torch.float32"),
        (torch.zeros(2, 3, 56, 56), r"got \(2, 3, 56, 56\)"),
        (torch.zeros(1, 1, 56, 56), r"got \(1, 1, 56, 56\)"),
        (torch.zeros(1, 3, 56, 56, dtype=torch.uint8), r"got \(1, 3, 56, 56\) of torch.uint8"),
    ],
    ids=str,
)
def test_wrong_tensor_is_refused_with_its_shape_and_dtype(backbone: Backbone, tensor: Tensor, message: str) -> None:
    with pytest.raises(PhotoError, match=rf"expected a normalised \(1, 3, H, W\) float tensor, {message}"):
        dv.denoise_image(backbone, tensor, **FEW)


def test_tensor_that_is_not_finite_is_refused(backbone: Backbone) -> None:
    tensor = torch.zeros(1, 3, 56, 56)
    tensor[0, 1, 2, 3] = math.nan
    with pytest.raises(PhotoError, match="not finite"):
        dv.denoise_image(backbone, tensor, **FEW)


def test_photo_smaller_than_a_patch_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    Image.new("RGB", (30, 7)).save(tmp_path / "flat.png")
    with pytest.raises(PhotoError, match=r"flat.png: 30 x 7 pixels .* at least 8 per side"):
        dv.denoise_image(backbone, tmp_path / "flat.png", **FEW)


def test_missing_photo_raises_photo_error(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="no such file"):
        dv.denoise_image(backbone, tmp_path / "none.jpg", **FEW)


# --- reproducibility ---


def test_same_seed_is_bit_identical(backbone: Backbone, photo: np.ndarray, result: Decomposition) -> None:
    again = dv.denoise_image(backbone, photo, seed=0, **FEW)
    for name in ("field", "artifact", "raw", "semantic"):
        assert torch.equal(getattr(again, name), getattr(result, name)), name
    for key in set(result.info) - {"seconds"}:
        assert again.info[key] == result.info[key], key


def test_other_seed_gives_other_views(backbone: Backbone, photo: np.ndarray, result: Decomposition) -> None:
    other = dv.denoise_image(backbone, photo, seed=1, **FEW)
    assert not torch.equal(other.field, result.field)
    assert other.info["plan"] != result.info["plan"]
    assert torch.equal(other.raw, result.raw)  # the full image is among the views of every plan


def test_batch_size_does_not_change_the_result(backbone: Backbone, photo: np.ndarray, result: Decomposition) -> None:
    other = dv.denoise_image(backbone, photo, batch_size=7, **FEW)
    torch.testing.assert_close(other.semantic, result.semantic, rtol=1e-4, atol=1e-5)
    assert other.heldout_r2 == pytest.approx(result.heldout_r2, abs=1e-5)


def test_keywords_override_the_options_object(backbone: Backbone, photo: np.ndarray, result: Decomposition) -> None:
    options = DenoiseOptions(views=99, held_out=3)
    changed = dv.denoise_image(backbone, photo, options=options, views=12)  # keywords take precedence
    assert torch.equal(changed.field, result.field)
    assert options.views == 99


def test_raw_matches_the_backbone_on_the_full_image(
    backbone: Backbone, photo: np.ndarray, result: Decomposition
) -> None:
    image = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
    image = F.interpolate(image, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))
    with torch.no_grad():
        torch.testing.assert_close(result.raw, backbone((image - mean) / std)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["raw", "semantic", "artifact", "residual", "field"])
def test_results_can_be_trained_on(result: Decomposition, name: str) -> None:
    features = getattr(result, name)
    layer = nn.Linear(CHANNELS, 2)
    layer(features).sum().backward()
    assert layer.weight.grad is not None


def test_inference_mode_is_off_after_success_and_failure(backbone: Backbone, photo: np.ndarray) -> None:
    dv.denoise_image(backbone, photo, **FEW)
    assert not torch.is_inference_mode_enabled()
    with pytest.raises(BackboneError):
        broken = plain(lambda image: clean_features(image) * (math.nan if len(image) == 2 else 1))
        dv.denoise_image(broken, photo, batch_size=2)
    assert not torch.is_inference_mode_enabled()


def test_other_sizes(backbone: Backbone, photo: np.ndarray) -> None:
    wide = dv.denoise_image(backbone, photo, size=(40, 72), **FEW)
    assert wide.size == (40, 72)
    assert wide.semantic.shape == wide.raw.shape == (5, 9, CHANNELS)
    assert wide.field.shape == (10, 18, CHANNELS)
    square = dv.denoise_image(backbone, photo, size=48, resolution=9, **FEW)
    assert square.raw.shape == (6, 6, CHANNELS)
    assert square.field.shape == (9, 9, CHANNELS)


def test_stride_below_the_patch_gives_a_finer_grid(photo: np.ndarray) -> None:
    def overlapping(image: Tensor) -> Tensor:
        return F.avg_pool2d(image, PATCH, stride=4).permute(0, 2, 3, 1)

    fine = dv.load_backbone(overlapping, patch_size=PATCH, stride=4, default_size=SIDE)
    result = dv.denoise_image(fine, photo, **FEW)
    assert result.semantic.shape == (13, 13, 3)
    assert result.stride == 4
    # Centres (4 k + 4) / 56, not (k + 0.5) / 13.
    torch.testing.assert_close(result.coords[0, :, 0], (torch.arange(13) * 4 + 4) / 56)
    torch.testing.assert_close(result.coords[:, 0, 1], (torch.arange(13) * 4 + 4) / 56)


# --- decomposition ---


@pytest.mark.parametrize("size", [SIDE, (40, 72)])
def test_planted_pattern_becomes_the_artifact(size: Any) -> None:
    result = dv.denoise_image(plain(with_pattern), smooth_photo(), size=size, views=48, held_out=4)
    planted = pattern(*result.artifact.shape[:2])
    correlation = torch.corrcoef(torch.stack([result.artifact.flatten(), planted.flatten()]))[0, 1]
    assert float(correlation) > 0.999
    assert float((result.artifact - planted).norm() / planted.norm()) < 0.05
    # The content is kept and nothing else: up to its mean, it is that of features without the pattern.
    clean = dv.denoise_image(plain(clean_features), smooth_photo(), size=size, views=48, held_out=4)
    truth = clean.raw - clean.raw.mean((0, 1))
    found = result.semantic - result.semantic.mean((0, 1))
    assert float((found - truth).norm() / truth.norm()) < 0.05
    assert float((result.raw - clean.raw - planted).abs().max()) < 1e-4  # the pattern was in the input
    assert result.heldout_r2 is not None and result.heldout_r2 > 0.99
    assert result.heldout_cosine is not None and result.heldout_cosine > 0.99


def test_artifact_has_mean_zero(result: Decomposition) -> None:
    torch.testing.assert_close(result.artifact.mean((0, 1)), torch.zeros(CHANNELS), rtol=0, atol=1e-5)


def test_clean_features_have_no_artifact() -> None:
    result = dv.denoise_image(plain(clean_features), smooth_photo(), views=48, held_out=0)
    varying = result.raw - result.raw.mean((0, 1))
    assert float(result.artifact.norm() / varying.norm()) < 0.05


def test_parts_sum_to_raw(result: Decomposition) -> None:
    torch.testing.assert_close(result.semantic + result.artifact + result.residual, result.raw, rtol=1e-5, atol=1e-5)


def test_known_artifact_is_returned_unchanged_and_subtracted() -> None:
    planted = pattern(7, 7)
    extractor = plain(with_pattern)
    result = dv.denoise_image(extractor, smooth_photo(), artifact=planted, views=24, held_out=2)
    assert torch.equal(result.artifact, planted)
    assert len(result.info["artifact"]) == 64
    clean = dv.denoise_image(plain(clean_features), smooth_photo(), artifact=torch.zeros(7, 7, 5), views=24)
    torch.testing.assert_close(result.field, clean.field, rtol=1e-4, atol=1e-4)


def test_known_artifact_needs_fewer_views(backbone: Backbone, photo: np.ndarray) -> None:
    with pytest.raises(PlanError):
        dv.denoise_image(backbone, photo, views=4)
    known = dv.denoise_image(backbone, photo, views=4, artifact=torch.zeros(7, 7, CHANNELS))
    assert known.info["views"] == 4


@pytest.mark.parametrize("shape", [(7, 8, 5), (7, 7, 4), (49, 5)])
def test_wrong_artifact_shape_is_refused_with_both_shapes(
    backbone: Backbone, photo: np.ndarray, shape: tuple[int, ...]
) -> None:
    given = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(PlanError, match=rf"artifact of shape \(7, 7, 5\).*7 x 7 patches, got {given}"):
        dv.denoise_image(backbone, photo, artifact=torch.zeros(shape))


# --- progress ---


def test_progress_rises_to_the_total(backbone: Backbone, photo: np.ndarray) -> None:
    calls: list[tuple[int, int]] = []
    record = lambda done, total: calls.append((done, total))  # noqa: E731
    dv.denoise_image(backbone, photo, views=9, held_out=4, batch_size=2, progress=record)
    done, totals = zip(*calls, strict=True)
    assert set(totals) == {13}
    assert list(done) == sorted(done)
    assert done[-1] == 13
    assert done == (0, 2, 4, 6, 8, 9, 11, 13)


# --- record of the run ---

KEYS = {
    "version", "photo", "backbone", "plan", "method", "views", "held_out", "size", "resolution", "smoothness",
    "shrinkage", "clip", "coverage", "seed", "batch_size", "heldout_r2", "heldout_cosine", "artifact",
    "clipped_tokens", "seconds",
}  # fmt: skip


@pytest.mark.parametrize("size", [None, (40, 72)])
def test_info_has_all_keys_and_is_json(backbone: Backbone, photo: np.ndarray, size: Any) -> None:
    info = dv.denoise_image(backbone, photo, size=size, seed=5, **FEW).info
    assert set(info) >= KEYS
    read = json.loads(json.dumps(info, allow_nan=False))
    assert (read["views"], read["held_out"], read["seed"], read["artifact"]) == (12, 3, 5, None)
    assert set(read["backbone"]) >= {"name", "weights", "fingerprint", "layer", "norm", "dtype"}
    assert read["backbone"]["name"] == "Conv2d"
    assert read["backbone"]["dtype"] == "float32"
    assert isinstance(read["heldout_r2"], float) and read["heldout_r2"] <= 1
    assert -1 <= read["heldout_cosine"] <= 1


def test_held_out_metrics_are_none_without_held_out_views(backbone: Backbone, photo: np.ndarray) -> None:
    result = dv.denoise_image(backbone, photo, views=12, held_out=0)
    assert result.heldout_r2 is None and result.heldout_cosine is None
    assert result.info["heldout_r2"] is None and result.info["heldout_cosine"] is None


def test_held_out_views_do_not_change_the_fit(backbone: Backbone, photo: np.ndarray, result: Decomposition) -> None:
    assert torch.equal(dv.denoise_image(backbone, photo, views=12, held_out=0).field, result.field)


def test_no_held_out_view_is_fitted(backbone: Backbone) -> None:
    for seed in range(5):
        fitted, judged = prepare(backbone, DenoiseOptions(views=40, held_out=20, seed=seed))
        assert judged is not None
        assert (len(fitted), len(judged)) == (40, 20)
        assert not {tuple(box) for box in fitted.boxes} & {tuple(box) for box in judged.boxes}


def test_photo_of_one_colour_gives_finite_results(backbone: Backbone) -> None:
    result = dv.denoise_image(backbone, np.full((60, 60, 3), 90, dtype=np.uint8), **FEW)
    assert torch.isfinite(result.semantic).all()
    json.dumps(result.info, allow_nan=False)


# --- errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 4}, "4 views of 7 x 7 patches are too few .* expected at least 5"),
        ({"views": 12, "resolution": 60}, "expected at least 75"),  # (3600 + 49) / 49 = 74.5
        ({"views": 0}, "views must be at least 1, got 0"),
        ({"held_out": -1}, "held_out must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"clip": 0.0}, "clip must be a positive number"),
        ({"smoothness": -1.0}, "smoothness must be at least 0, got -1.0"),
        ({"shrinkage": float("nan")}, "shrinkage must be at least 0, got nan"),
        ({"method": "magic"}, r"unknown method 'magic'; choose from exact, neural-field, subtract, denoiser, .*auto"),
        ({"coverage": "full"}, "coverage must be 'even', 'plain' or 'released'"),
        ({"resolution": 1}, "at least 2 x 2 nodes"),
    ],
    ids=str,
)
def test_bad_option_is_refused_by_name(
    backbone: Backbone, photo: np.ndarray, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        dv.denoise_image(backbone, photo, **options)


def test_unknown_option_raises_type_error(backbone: Backbone, photo: np.ndarray) -> None:
    with pytest.raises(TypeError, match="viewz"):
        dv.denoise_image(backbone, photo, viewz=3)


def test_size_off_the_grid_is_refused_with_the_nearest_sizes(backbone: Backbone, photo: np.ndarray) -> None:
    with pytest.raises(SizeError, match=r"side of 50 pixels.*Nearest: 48 or 56"):
        dv.denoise_image(backbone, photo, size=50)


def test_bad_options_are_refused_before_the_backbone_runs(photo: np.ndarray) -> None:
    calls: list[int] = []

    def counting(image: Tensor) -> Tensor:
        calls.append(len(image))
        return clean_features(image)

    extractor = plain(counting)
    calls.clear()  # loading a module runs it on one image
    with pytest.raises(PlanError):
        dv.denoise_image(extractor, photo, views=4)
    assert calls == []


def test_features_that_are_not_finite_are_refused(photo: np.ndarray) -> None:
    broken = plain(lambda image: clean_features(image) / torch.zeros(1))
    with pytest.raises(BackboneError, match="not finite"):
        dv.denoise_image(broken, photo, **FEW)


# --- outlier tokens ---


def with_outliers(image: Tensor) -> Tensor:
    """Add a large vector to about one token in 40, chosen by the last digits of its features: no two views agree."""
    features = clean_features(image)
    digits = (features[..., 0] * 1e4).remainder(1)
    features[digits < 0.025] += 80 * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    return features


def test_clipping_counts_outlier_tokens_and_protects_the_field() -> None:
    photo, extractor = smooth_photo(), plain(with_outliers)
    truth = dv.denoise_image(plain(clean_features), photo, views=32).semantic
    free = dv.denoise_image(extractor, photo, views=32)
    clipped = dv.denoise_image(extractor, photo, views=32, clip=3.0)
    assert free.info["clipped_tokens"] == 0
    tokens = 32 * 49
    assert 0.01 * tokens < clipped.info["clipped_tokens"] < 0.2 * tokens
    error, bounded = (float((each.semantic - truth).norm()) for each in (free, clipped))
    assert bounded < 0.3 * error


# --- saving and loading ---


def assert_close_in_half(actual: Tensor, expected: Tensor) -> None:
    """Equal but for rounding to float16."""
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_round_trip(result: Decomposition, tmp_path: Path) -> None:
    path = tmp_path / "result.safetensors"
    result.save(path)
    loaded = Decomposition.load(path)
    for name in ("field", "artifact", "raw", "semantic"):
        assert_close_in_half(getattr(loaded, name), getattr(result, name))
        assert getattr(loaded, name).dtype == torch.float32
    torch.testing.assert_close(loaded.coords, result.coords, rtol=0, atol=0)
    assert (loaded.size, loaded.patch_size, loaded.stride) == (result.size, result.patch_size, result.stride)
    assert loaded.info == json.loads(json.dumps(result.info))
    assert loaded.heldout_r2 == result.heldout_r2 and loaded.heldout_cosine == result.heldout_cosine
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.safetensors"]


def test_sample_and_upsample_work_after_loading(result: Decomposition, tmp_path: Path) -> None:
    result.save(str(tmp_path / "result.safetensors"))
    loaded = Decomposition.load(str(tmp_path / "result.safetensors"))
    coords = torch.rand(11, 2, generator=torch.Generator().manual_seed(0))
    assert_close_in_half(loaded.sample(coords), result.sample(coords))
    assert_close_in_half(loaded.upsample(3), result.upsample(3))
    torch.testing.assert_close(loaded.sample(loaded.coords), loaded.semantic, rtol=1e-4, atol=1e-5)


def test_file_holds_float16_tensors_that_other_tools_can_read(result: Decomposition, tmp_path: Path) -> None:
    result.save(tmp_path / "result.safetensors")
    tensors = load_file(tmp_path / "result.safetensors")
    assert set(tensors) == {"field", "semantic", "artifact", "raw"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert_close_in_half(tensors["semantic"].float(), result.semantic)


def hand_made(field: Tensor, **info: Any) -> Decomposition:
    """A result with the given field (Ry, Rx, C) on a grid of 2 x 2 patches."""
    zeros = torch.zeros(2, 2, field.shape[-1])
    return Decomposition(field, zeros, zeros, size=(28, 28), patch_size=14, stride=14, info=info)


def test_float32_is_kept_where_values_exceed_float16(tmp_path: Path) -> None:
    large = hand_made(torch.full((4, 4, 1), 123_456.0))
    large.save(tmp_path / "large.safetensors")
    tensors = load_file(tmp_path / "large.safetensors")
    assert tensors["field"].dtype == tensors["semantic"].dtype == torch.float32
    assert tensors["raw"].dtype == torch.float16
    assert torch.equal(Decomposition.load(tmp_path / "large.safetensors").field, large.field)


def test_semantic_sample_and_upsample_by_hand() -> None:
    # Nodes of x at 1/8, 3/8, 5/8, 7/8 with values 0, 10, 20, 30; the same in every row.
    result = hand_made(torch.tensor([0.0, 10, 20, 30]).expand(4, 4)[..., None])
    assert result.semantic[..., 0].tolist() == [[5, 25], [5, 25]]  # patch centres 1/4 and 3/4
    sampled = result.sample(torch.tensor([[0.125, 0.5], [0.5, 0.1], [0.45, 0.9], [0.0, 0.0], [2.0, -1.0]]))
    torch.testing.assert_close(sampled[:, 0], torch.tensor([0.0, 15, 13, 0, 30]))
    fine = result.upsample(2)  # centres 1/8, 3/8, 5/8, 7/8: the nodes themselves
    torch.testing.assert_close(fine[..., 0], torch.tensor([0.0, 10, 20, 30]).expand(4, 4))
    torch.testing.assert_close(result.upsample(1), result.semantic)
    assert result.upsample(3).shape == (6, 6, 1)


def test_coords_are_x_then_y() -> None:
    result = hand_made(torch.zeros(4, 4, 1))
    assert result.coords[0, 1].tolist() == [0.75, 0.25]
    assert result.coords[1, 0].tolist() == [0.25, 0.75]
    # Samples of a field that changes only along y depend only on y.
    down = hand_made(torch.tensor([0.0, 10, 20, 30])[:, None, None].expand(4, 4, 1))
    torch.testing.assert_close(down.sample(torch.tensor([0.9, 0.375])), torch.tensor([10.0]))


def test_sample_of_a_wide_field_is_bilinear_interpolation() -> None:
    field = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    coords = torch.rand(40, 2, generator=torch.Generator().manual_seed(1))
    grid = (coords * 2 - 1)[None, None]  # (1, 1, 40, 2)
    direct = F.grid_sample(field.permute(2, 0, 1)[None], grid, padding_mode="border", align_corners=False)
    sampled = hand_made(field).sample(coords)
    torch.testing.assert_close(sampled, direct[0, :, 0].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hand_made(field).sample(coords.view(4, 5, 2, 2)), sampled.view(4, 5, 2, 2))


def test_bad_coordinates_and_factors_are_refused(result: Decomposition) -> None:
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 2\); got shape \(5, 3\)"):
        result.sample(torch.zeros(5, 3))
    for factor in (0, -2, 1.5):
        with pytest.raises(ValueError, match=f"whole number of at least 1, got {factor}"):
            result.upsample(factor)  # pyright: ignore[reportArgumentType]


def rewritten(path: Path, change: dict[str, Any]) -> Path:
    """The same file with a changed header."""
    with safe_open(path, framework="pt") as file:
        head = json.loads(file.metadata()["denoising_vit"])
    save_file(load_file(path), path, metadata={"denoising_vit": json.dumps(head | change)})
    return path


def test_newer_format_version_is_refused_with_advice_to_upgrade(result: Decomposition, tmp_path: Path) -> None:
    path = tmp_path / "future.safetensors"
    result.save(path)
    with pytest.raises(
        FormatError, match=r"future.safetensors: expected format version .*got 99; upgrade denoising-vit"
    ):
        Decomposition.load(rewritten(path, {"format_version": 99}))


@pytest.mark.parametrize("missing", ["format_version", "size", "info", "patch_size", "stride"])
def test_incomplete_header_is_refused(result: Decomposition, tmp_path: Path, missing: str) -> None:
    path = tmp_path / "header.safetensors"
    result.save(path)
    with safe_open(path, framework="pt") as file:
        head = json.loads(file.metadata()["denoising_vit"])
    del head[missing]
    save_file(load_file(path), path, metadata={"denoising_vit": json.dumps(head)})
    with pytest.raises(FormatError, match=r"header\.safetensors"):
        Decomposition.load(path)


@pytest.mark.parametrize(
    "change",
    [{"format_version": "one"}, {"size": 56}, {"size": [56, -1]}, {"patch_size": "14"}, {"stride": None}, {"info": []}],
    ids=str,
)
def test_damaged_metadata_raises_format_error(result: Decomposition, tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "header.safetensors"
    result.save(path)
    with pytest.raises(FormatError, match=r"header\.safetensors: damaged"):
        Decomposition.load(rewritten(path, change))


@pytest.mark.parametrize("name", ["field", "artifact", "raw"])
def test_tensors_with_different_channels_are_refused(result: Decomposition, tmp_path: Path, name: str) -> None:
    path = tmp_path / "parts.safetensors"
    result.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name][..., :-1].contiguous()}, path, metadata=metadata)
    with pytest.raises(FormatError, match=r"parts\.safetensors: damaged decomposition: its tensors do not match"):
        Decomposition.load(path)


def test_safetensors_without_a_decomposition_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"model.safetensors: expected a safetensors file with a decomposition"):
        Decomposition.load(tmp_path / "model.safetensors")


def test_missing_tensors_are_refused(result: Decomposition, tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    result.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"raw": torch.zeros(2, 2, 1)}, path, metadata=metadata)
    with pytest.raises(FormatError, match=r"bare.safetensors: damaged decomposition"):
        Decomposition.load(path)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.99])
def test_damaged_file_is_refused(result: Decomposition, tmp_path: Path, kept: float) -> None:
    path = tmp_path / "cut.safetensors"
    result.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(FormatError, match=r"cut.safetensors"):
        Decomposition.load(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none\.safetensors: no such file"):
        Decomposition.load(tmp_path / "none.safetensors")


def test_saving_below_a_regular_file_raises_oserror(result: Decomposition, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        result.save(tmp_path / "file" / "result.safetensors")


def test_artifact_that_is_not_finite_is_refused(backbone: Backbone, photo: np.ndarray) -> None:
    with pytest.raises(PlanError, match="artifact has values that are not finite"):
        dv.denoise_image(backbone, photo, artifact=torch.full((7, 7, CHANNELS), math.nan), **FEW)


def test_artifact_that_requires_gradients_is_detached(backbone: Backbone, photo: np.ndarray) -> None:
    artifact = torch.zeros(7, 7, CHANNELS, requires_grad=True)
    assert not dv.denoise_image(backbone, photo, artifact=artifact, **FEW).field.requires_grad


def test_offsets_keep_a_constant_of_each_crop_out_of_the_field() -> None:
    def with_context(image: Tensor) -> Tensor:
        features = with_pattern(image)
        return features + 3 * clean_features(image).mean((1, 2), keepdim=True)  # depends on the whole crop

    def error(**options: Any) -> float:
        found = dv.denoise_image(plain(with_context), smooth_photo(), views=32, held_out=4, **options)
        truth = dv.denoise_image(plain(with_pattern), smooth_photo(), views=32, held_out=4).semantic
        difference = found.semantic - truth
        return float((difference - difference.mean((0, 1))).norm() / (truth - truth.mean((0, 1))).norm())

    assert error() > 0.5
    assert error(offsets=True) < 0.1


def test_offsets_are_recorded_only_if_fitted() -> None:
    assert "offsets" not in DenoiseOptions().recorded()
    assert DenoiseOptions(offsets=True).recorded()["offsets"] is True
    assert "offsets" not in DenoiseOptions(method="neural-field", offsets=True).recorded()


def test_wide_crops_are_optional_and_recorded() -> None:
    assert "area" not in DenoiseOptions().recorded() and "ratio" not in DenoiseOptions().recorded()
    wide = DenoiseOptions.context()
    assert (wide.views, wide.recorded()["area"]) == (16, [0.4, 1.0])
    plan, _ = prepare(tiny.backbone(), wide)
    sides = plan.boxes[:, 2:] - plan.boxes[:, :2]
    assert sides.prod(1).min() >= 0.4 - 1e-9 and sides.prod(1).min() < 0.5
    with pytest.raises(PlanError, match=r"crop area must be two increasing fractions in \(0, 1\], got \(0.5, 0.1\)"):
        DenoiseOptions(area=(0.5, 0.1)).validate()
