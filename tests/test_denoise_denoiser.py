"""`denoise_image` with a denoiser: results, records, choice of the denoiser, and errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import denoising_vit as dv
import tiny_artifact
import tiny_denoiser as tiny
from denoising_vit import (
    Backbone,
    BackboneError,
    Decomposition,
    DenoisedViT,
    DenoiseOptions,
    Denoiser,
    DenoiserError,
    FormatError,
    PlanError,
    SizeError,
)
from denoising_vit.backbones import loading as backbone_loading
from denoising_vit.backbones.base import IMAGENET_MEAN, IMAGENET_STD
from denoising_vit.denoise import settle, work
from denoising_vit.denoiser import loading
from denoising_vit.denoiser.loading import denoiser_digest, find_denoiser, find_shipped
from denoising_vit.extractors import Cleaners

pytestmark = pytest.mark.usefixtures("one_thread")

DINOV2_S = "vit_small_patch14_dinov2.lvd142m"
FEW: dict[str, Any] = {"views": 8, "held_out": 2}


@pytest.fixture(autouse=True)
def nothing_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the denoisers that the package ships."""
    tiny.ship(tmp_path / "shipped", monkeypatch)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


@pytest.fixture(scope="module")
def denoiser(backbone: Backbone) -> Denoiser:
    return tiny.denoiser(backbone)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return tiny_artifact.photos(1)[0]


@pytest.fixture(scope="module")
def result(one_thread: None, backbone: Backbone, denoiser: Denoiser, photo: np.ndarray) -> Decomposition:
    return dv.denoise_image(backbone, photo, method="denoiser", denoiser=denoiser)


def image_of(height: int, width: int) -> Tensor:
    """A normalised image of noise, (1, 3, H, W)."""
    pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    return (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


# --- results ---


@pytest.mark.parametrize("size", [(56, 56), (40, 72)], ids=str)
def test_features_match_denoised_vit(backbone: Backbone, denoiser: Denoiser, size: tuple[int, int]) -> None:
    image = image_of(*size)
    found = dv.denoise_image(backbone, image, method="denoiser", denoiser=denoiser)
    expected = DenoisedViT(backbone, denoiser)(image)[0]
    assert not torch.allclose(expected, backbone(image)[0], atol=0.1)  # the denoiser changes the features
    torch.testing.assert_close(found.semantic, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.raw, backbone(image)[0], rtol=1e-4, atol=1e-4)


def test_features_of_overlapping_patches_match_denoised_vit() -> None:
    fine = tiny.backbone(stride=4)
    image = image_of(56, 56)
    found = dv.denoise_image(fine, image, method="denoiser", denoiser=tiny.denoiser(fine))
    assert found.raw.shape == (13, 13, 64)
    expected = DenoisedViT(fine, tiny.denoiser(fine))(image)[0]
    torch.testing.assert_close(found.semantic, expected, rtol=1e-3, atol=1e-3)


def test_artifact_is_zero_and_the_residual_is_all_that_was_removed(result: Decomposition) -> None:
    assert result.artifact.shape == result.raw.shape == (7, 7, 64)
    assert not result.artifact.any()
    assert torch.equal(result.residual, result.raw - result.semantic)


def test_size_is_that_of_the_options(backbone: Backbone, denoiser: Denoiser, photo: np.ndarray) -> None:
    found = dv.denoise_image(backbone, photo, method="denoiser", denoiser=denoiser, size=(40, 72))
    assert (found.size, found.semantic.shape) == ((40, 72), (5, 9, 64))


def test_result_takes_one_forward_pass(denoiser: Denoiser, photo: np.ndarray) -> None:
    extractor = tiny_artifact.Planted(channels=64)
    wrapped = tiny_artifact.plain(extractor)
    _ = wrapped.fingerprint
    extractor.passes, seen = 0, []
    dv.denoise_image(
        wrapped, photo, method="denoiser", denoiser=denoiser, progress=lambda done, total: seen.append((done, total))
    )
    assert extractor.passes == 1
    assert seen == [(0, 1), (1, 1)]
    assert work(DenoiseOptions(method="denoiser")) == 1


def test_second_call_is_bit_identical(
    result: Decomposition, backbone: Backbone, denoiser: Denoiser, photo: np.ndarray
) -> None:
    again = dv.denoise_image(backbone, photo, method="denoiser", denoiser=denoiser)
    assert torch.equal(again.field, result.field)
    assert torch.equal(again.raw, result.raw)


@pytest.mark.parametrize("unused", [{"seed": 5}, {"views": 200}, {"resolution": 3}, {"taper": 0.0}, {"held_out": 0}])
def test_options_of_stage_one_change_nothing(
    result: Decomposition, backbone: Backbone, denoiser: Denoiser, photo: np.ndarray, unused: dict[str, Any]
) -> None:
    other = dv.denoise_image(backbone, photo, method="denoiser", denoiser=denoiser, **unused)
    assert torch.equal(other.field, result.field)
    assert other.info["plan"] == result.info["plan"]


def test_results_have_no_gradients_and_a_given_module_is_unchanged(backbone: Backbone, photo: np.ndarray) -> None:
    mine = Denoiser(64, (4, 4)).train()
    found = dv.denoise_image(backbone, photo, method="denoiser", denoiser=mine)
    assert not found.semantic.requires_grad
    assert mine.training and all(value.requires_grad for value in mine.parameters())


def test_result_can_be_sampled_upsampled_and_read_back(result: Decomposition, tmp_path: Path) -> None:
    torch.testing.assert_close(result.sample(result.coords), result.semantic, rtol=0, atol=1e-5)
    assert result.upsample(2).shape == (14, 14, 64)
    result.save(tmp_path / "r.safetensors")
    loaded = Decomposition.load(tmp_path / "r.safetensors")
    torch.testing.assert_close(loaded.semantic, result.semantic, rtol=2e-3, atol=2e-3)
    assert loaded.info == json.loads(json.dumps(result.info))


# --- records ---


def test_info_records_the_denoiser_and_no_unused_options(result: Decomposition, denoiser: Denoiser) -> None:
    info = json.loads(json.dumps(result.info, allow_nan=False))
    assert info["method"] == "denoiser"
    assert info["denoiser"] == {"source": "given", "digest": denoiser_digest(denoiser)}
    assert (info["heldout_r2"], info["heldout_cosine"], info["artifact"]) == (None, None, None)
    assert not {"views", "held_out", "smoothness", "clip", "neural", "seed"} & set(info)
    assert result.heldout_r2 is None and result.heldout_cosine is None


def test_other_methods_record_no_denoiser(backbone: Backbone, photo: np.ndarray) -> None:
    assert "denoiser" not in dv.denoise_image(backbone, photo, **FEW).info


def test_file_is_recorded_by_its_name_without_its_folder(
    backbone: Backbone, denoiser: Denoiser, photo: np.ndarray, tmp_path: Path
) -> None:
    path = tiny.write(tmp_path / "secret", denoiser, "mine.safetensors")
    for given in (path, str(path)):
        found = dv.denoise_image(backbone, photo, method="denoiser", denoiser=given)
        assert found.info["denoiser"] == {"source": "mine.safetensors", "digest": denoiser_digest(denoiser)}
        assert "secret" not in json.dumps(found.info)


def test_digest_identifies_a_denoiser_in_any_precision(denoiser: Denoiser, tmp_path: Path) -> None:
    path = tiny.write(tmp_path, tiny.denoiser(), "d.safetensors")
    wide, low = (find_denoiser(path, tiny.backbone().to(dtype=kind)) for kind in (torch.float32, torch.bfloat16))
    assert low.denoiser.pos_embed.dtype == torch.bfloat16
    assert wide.digest == low.digest == denoiser_digest(denoiser)
    assert wide.digest != denoiser_digest(tiny.denoiser(seed=1))


def test_backbone_in_lower_precision_is_supported(photo: np.ndarray, denoiser: Denoiser, tmp_path: Path) -> None:
    low = tiny.backbone().to(dtype=torch.bfloat16)
    path = tiny.write(tmp_path, denoiser, "d.safetensors")
    found = dv.denoise_image(low, photo, method="denoiser", denoiser=path)
    wide = dv.denoise_image(tiny.backbone(), photo, method="denoiser", denoiser=path)
    assert found.semantic.dtype == torch.float32
    assert float(torch.cosine_similarity(found.semantic, wide.semantic, dim=-1).mean()) > 0.99


# --- choice of the denoiser ---


def test_shipped_denoiser_is_used_if_none_is_given(
    backbone: Backbone, denoiser: Denoiser, result: Decomposition, tmp_path: Path, photo: np.ndarray, monkeypatch: Any
) -> None:
    other = tiny.denoiser(tiny.backbone(seed=1), seed=1)
    tiny.ship(tmp_path / "package", monkeypatch, a=other, b=denoiser, c=tiny.denoiser(seed=2))
    for given in (None, "shipped"):
        found = dv.denoise_image(backbone, photo, method="denoiser", denoiser=given)
        assert found.info["denoiser"] == {"source": "shipped", "digest": denoiser_digest(denoiser)}
        assert torch.equal(found.field, result.field)


def test_shipped_denoiser_must_match_name_weights_and_stride(
    denoiser: Denoiser, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.ship(tmp_path / "package", monkeypatch, weights=denoiser)
    found = find_shipped(backbone)
    assert found is not None and found.digest == denoiser_digest(found.denoiser) == denoiser_digest(denoiser)
    assert not found.denoiser.training and not any(value.requires_grad for value in found.denoiser.parameters())
    for other in (tiny.backbone(seed=1), tiny.backbone(stride=4)):
        assert find_shipped(other) is None
    renamed = tiny.backbone()
    renamed.name = "Plan"
    assert find_shipped(renamed) is None


def test_shipped_denoiser_without_a_recorded_backbone_is_not_used(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.ship(tmp_path / "package", monkeypatch, unknown=tiny.denoiser())
    assert find_shipped(backbone) is None


def test_missing_folder_of_shipped_denoisers_is_no_error(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_SHIPPED", tmp_path / "nowhere")
    assert find_shipped(backbone) is None


def test_automatic_method_is_denoiser_if_there_is_one(
    backbone: Backbone, denoiser: Denoiser, photo: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dv.denoise_image(backbone, photo, method="auto", **FEW).info["method"] == "exact"
    assert dv.denoise_image(backbone, photo, method="auto", denoiser=denoiser).info["method"] == "denoiser"
    tiny.ship(tmp_path / "package", monkeypatch, weights=denoiser)
    assert dv.denoise_image(backbone, photo, method="auto").info["method"] == "denoiser"
    assert dv.denoise_image(backbone, photo, **FEW).info["method"] == "exact"  # only if requested
    assert dv.denoise_image(tiny.backbone(seed=1), photo, method="auto", **FEW).info["method"] == "exact"


def test_automatic_method_is_exact_if_an_artifact_is_given(
    backbone: Backbone, denoiser: Denoiser, photo: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.ship(tmp_path / "package", monkeypatch, weights=denoiser)
    artifact = tiny_artifact.artifact_of(backbone)
    found = dv.denoise_image(backbone, photo, method="auto", artifact=artifact, **FEW)
    assert found.info["method"] == "exact" and "denoiser" not in found.info
    assert torch.equal(found.artifact, artifact.values)


def test_automatic_method_matches_the_method_given_by_name(backbone: Backbone, photo: np.ndarray) -> None:
    automatic, named = (dv.denoise_image(backbone, photo, method=name, **FEW) for name in ("auto", "exact"))
    assert torch.equal(automatic.field, named.field)
    assert automatic.info | {"seconds": 0} == named.info | {"seconds": 0}


# --- errors ---


def test_error_without_a_denoiser_says_what_to_do(backbone: Backbone, photo: np.ndarray) -> None:
    message = r"no denoiser for Planted with these weights .* stride 8; train one with dvit train and "
    for given in (None, "shipped"):
        with pytest.raises(DenoiserError, match=message + "pass it with --denoiser FILE$"):
            dv.denoise_image(backbone, photo, method="denoiser", denoiser=given)


def test_error_names_the_published_denoiser_if_there_is_one(photo: np.ndarray) -> None:
    named = tiny.backbone()
    named.name = DINOV2_S
    with pytest.raises(DenoiserError, match=r"--denoiser FILE, or --denoiser voc_denoised for the published one$"):
        dv.denoise_image(named, photo, method="denoiser")


def test_loading_the_shipped_denoiser_needs_a_backbone() -> None:
    with pytest.raises(DenoiserError, match="depends on the backbone: also give the backbone"):
        dv.load_denoiser("shipped")


@pytest.mark.parametrize("given", ["module", "file"])
def test_error_for_another_backbone_names_both_backbones(
    denoiser: Denoiser, photo: np.ndarray, tmp_path: Path, given: str
) -> None:
    path = tiny.write(tmp_path, denoiser, "d.safetensors")
    with pytest.raises(DenoiserError, match=r"was trained for Planted \(.*, got Planted \("):
        dv.denoise_image(
            tiny.backbone(seed=1), photo, method="denoiser", denoiser=denoiser if given == "module" else path
        )


def test_denoiser_of_another_width_is_refused(photo: np.ndarray, denoiser: Denoiser) -> None:
    with pytest.raises(DenoiserError, match=r"the denoiser has 64 channels, but Planted .* has 6"):
        dv.denoise_image(tiny_artifact.backbone(), photo, method="denoiser", denoiser=denoiser)


@pytest.mark.parametrize("method", ["exact", "neural-field", "subtract"])
def test_denoiser_with_another_method_is_refused(backbone: Backbone, photo: np.ndarray, method: str) -> None:
    message = f"a denoiser \\(voc_denoised\\) is given, but method '{method}' does not use one"
    with pytest.raises(PlanError, match=message):
        dv.denoise_image(backbone, photo, method=method, denoiser="voc_denoised")


def test_artifact_with_a_denoiser_is_refused(backbone: Backbone, denoiser: Denoiser, photo: np.ndarray) -> None:
    artifact = tiny_artifact.artifact_of(backbone)
    for method in ("denoiser", "auto"):
        with pytest.raises(PlanError, match="an artifact is given, but method 'denoiser' does not use it"):
            dv.denoise_image(backbone, photo, method=method, denoiser=denoiser, artifact=artifact)


def test_missing_or_wrong_file_is_refused(backbone: Backbone, photo: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such denoiser file"):
        dv.denoise_image(backbone, photo, method="denoiser", denoiser=tmp_path / "none.safetensors")
    (tmp_path / "words.safetensors").write_text("words")
    with pytest.raises(FormatError, match="not a denoiser, or damaged"):
        dv.denoise_image(backbone, photo, method="denoiser", denoiser=tmp_path / "words.safetensors")


def test_error_for_a_wrong_type_names_the_type(backbone: Backbone, photo: np.ndarray) -> None:
    with pytest.raises(DenoiserError, match="expected a denoiser as a Denoiser, file or name, got list"):
        dv.denoise_image(backbone, photo, method="denoiser", denoiser=[1.0])  # pyright: ignore[reportArgumentType]


def test_size_off_the_patch_grid_is_refused(backbone: Backbone, denoiser: Denoiser, photo: np.ndarray) -> None:
    with pytest.raises(SizeError, match="Nearest: 56 or 64"):
        dv.denoise_image(backbone, photo, method="denoiser", denoiser=denoiser, size=60)


def test_non_finite_features_are_refused(photo: np.ndarray) -> None:
    broken = tiny_artifact.plain(lambda image: torch.full((len(image), 7, 7, 64), math.nan))
    with pytest.raises(BackboneError, match="not finite"):
        dv.denoise_image(broken, photo, method="denoiser", denoiser=tiny.denoiser())


def test_settled_options_name_the_method_that_is_run(backbone: Backbone, denoiser: Denoiser) -> None:
    options, found = settle(DenoiseOptions(method="auto", views=9), backbone, Cleaners(denoiser=denoiser))
    assert (options.method, options.views) == ("denoiser", 9)
    assert found is not None and found.denoiser is denoiser
    assert settle(DenoiseOptions(method="auto"), backbone) == (DenoiseOptions(method="exact"), None)
    assert settle(DenoiseOptions(method="subtract"), backbone) == (DenoiseOptions(method="subtract"), None)


def test_a_given_cleaner_decides_the_preferred_features(
    backbone: Backbone, denoiser: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Cleaners().preferred(backbone) == "exact"
    tiny.ship(tmp_path / "package", monkeypatch, weights=denoiser)
    assert Cleaners().preferred(backbone) == "denoiser"
    assert Cleaners(artifact=tiny_artifact.artifact_of(backbone)).preferred(backbone) == "exact"
    assert Cleaners(distilled="weights.safetensors").preferred(backbone) == "distilled"
    monkeypatch.setattr(backbone_loading, "find_distilled", lambda _: tmp_path / "distilled.safetensors")
    assert Cleaners().preferred(backbone) == "distilled"
    assert Cleaners(denoiser=denoiser).preferred(backbone) == "denoiser"
    assert Cleaners(subspace="a.safetensors").preferred(backbone) == "project"
    assert Cleaners(registers="a.safetensors", artifact="none").preferred(backbone) == "registers"
    with pytest.raises(PlanError, match=r"several kinds of features are given \(denoiser, distilled\); choose one"):
        Cleaners(denoiser=denoiser, distilled="a.safetensors").preferred(backbone)
    bfloat16 = backbone.to(torch.bfloat16)
    assert Cleaners().preferred(bfloat16) == "denoiser"  # a difference cannot be added to weights in a coarse precision
