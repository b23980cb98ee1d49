"""Stage 1 with a known artifact: given in any form, and subtracted (``method="subtract"``)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import denoising_vit as dv
import tiny_artifact as tiny
from denoising_vit import Artifact, ArtifactError, Backbone, BackboneError, Decomposition, PlanError, SizeError
from denoising_vit import artifact as known
from denoising_vit.artifact import artifact_digest

pytestmark = pytest.mark.usefixtures("one_thread")

FEW: dict[str, Any] = {"views": 8, "held_out": 2}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


@pytest.fixture(scope="module")
def artifact(backbone: Backbone) -> Artifact:
    return tiny.artifact_of(backbone)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return tiny.photos(1)[0]


@pytest.fixture(scope="module")
def result(one_thread: None, backbone: Backbone, artifact: Artifact, photo: np.ndarray) -> Decomposition:
    return dv.denoise_image(backbone, photo, method="subtract", artifact=artifact)


def digest(values: Tensor) -> str:
    return hashlib.sha256(values.half().numpy().tobytes()).hexdigest()  # float16, as in files


# --- a known artifact, with the exact solver ---


@pytest.fixture(params=["Artifact", "Path", "str"])
def given(request: pytest.FixtureRequest, artifact: Artifact, tmp_path: Path) -> Any:
    """The artifact in each form in which it may be given, with the precision of a file."""
    artifact.save(tmp_path / "g.safetensors")
    forms: dict[str, Callable[[Path], Any]] = {"Artifact": Artifact.load, "Path": Path, "str": str}
    return forms[request.param](tmp_path / "g.safetensors")


@pytest.mark.parametrize("method", ["exact", "subtract"])
def test_artifact_in_any_form_gives_the_result_of_its_values(
    backbone: Backbone, artifact: Artifact, photo: np.ndarray, given: Any, method: Any
) -> None:
    values = artifact.values.half().float()
    one = dv.denoise_image(backbone, photo, artifact=given, method=method, **FEW)
    other = dv.denoise_image(backbone, photo, artifact=values, method=method, **FEW)
    assert torch.equal(one.artifact, values)
    assert torch.equal(one.field, other.field)
    assert one.info["artifact"] == other.info["artifact"] == digest(values)


def test_field_with_known_artifact_matches_the_clean_backbone(
    backbone: Backbone, artifact: Artifact, photo: np.ndarray
) -> None:
    found = dv.denoise_image(backbone, photo, artifact=artifact, **FEW)
    zero = torch.zeros(7, 7, 6)
    clean = dv.denoise_image(tiny.backbone(0.0), photo, artifact=zero, **FEW)
    torch.testing.assert_close(found.field, clean.field, rtol=1e-4, atol=1e-4)


def test_fewer_views_suffice_if_the_artifact_is_known(
    backbone: Backbone, artifact: Artifact, photo: np.ndarray
) -> None:
    with pytest.raises(PlanError, match="and an artifact; expected at least 5"):
        dv.denoise_image(backbone, photo, views=4, held_out=0)
    assert dv.denoise_image(backbone, photo, artifact=artifact, views=4, held_out=0).field.shape == (14, 14, 6)


def test_known_artifact_is_resampled_to_the_size(backbone: Backbone, artifact: Artifact, photo: np.ndarray) -> None:
    found = dv.denoise_image(backbone, photo, artifact=artifact, size=(40, 72), **FEW)
    assert torch.equal(found.artifact, artifact.at((5, 9)))


def test_size_of_a_prepared_tensor_decides_the_grid(backbone: Backbone, artifact: Artifact) -> None:
    found = dv.denoise_image(backbone, torch.randn(1, 3, 40, 72), artifact=artifact, **FEW)
    assert torch.equal(found.artifact, artifact.at((5, 9)))


def test_neural_field_takes_a_known_artifact_as_well(backbone: Backbone, artifact: Artifact, photo: np.ndarray) -> None:
    neural = dv.NeuralFieldOptions(steps=4)
    found = dv.denoise_image(backbone, photo, artifact=artifact, method="neural-field", neural=neural, **FEW)
    assert torch.equal(found.artifact, artifact.values)
    assert found.info["artifact"] == digest(artifact.values)


def test_fitted_artifact_is_recorded_as_none(backbone: Backbone, photo: np.ndarray) -> None:
    assert dv.denoise_image(backbone, photo, **FEW).info["artifact"] is None


@pytest.mark.parametrize("method", ["exact", "subtract"])
def test_artifact_of_another_backbone_is_rejected_before_any_pass(
    artifact: Artifact, photo: np.ndarray, method: Any
) -> None:
    module = tiny.Planted(seed=1)
    other = tiny.plain(module)
    _ = other.fingerprint
    before = module.passes
    with pytest.raises(ArtifactError, match="calibrated for"):
        dv.denoise_image(other, photo, artifact=artifact, method=method)
    assert module.passes == before


def test_digest_distinguishes_artifacts_and_is_none_for_none(artifact: Artifact) -> None:
    assert artifact_digest(None) is None
    assert artifact_digest(artifact.values) == digest(artifact.values)
    assert artifact_digest(artifact.values.double()) == digest(artifact.values)
    assert artifact_digest(artifact.values.half().float()) == digest(artifact.values)
    assert artifact_digest(artifact.values + 1e-2) != digest(artifact.values)


# --- subtraction ---


def test_semantic_is_raw_minus_artifact(result: Decomposition, artifact: Artifact) -> None:
    assert torch.equal(result.artifact, artifact.values)
    torch.testing.assert_close(result.semantic, result.raw - artifact.values, rtol=0, atol=1e-6)


def test_residual_is_zero(result: Decomposition) -> None:
    torch.testing.assert_close(result.residual, torch.zeros(7, 7, 6), rtol=0, atol=1e-6)


def test_raw_matches_that_of_the_exact_method(
    result: Decomposition, backbone: Backbone, artifact: Artifact, photo: np.ndarray
) -> None:
    exact = dv.denoise_image(backbone, photo, artifact=artifact, **FEW)
    torch.testing.assert_close(result.raw, exact.raw, rtol=1e-5, atol=1e-5)


def test_only_one_forward_pass_is_run(artifact: Artifact, photo: np.ndarray) -> None:
    module = tiny.Planted()
    extractor = tiny.plain(module)
    _ = extractor.fingerprint
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    dv.denoise_image(extractor, photo, method="subtract", artifact=artifact)
    assert seen == [1]


@pytest.mark.parametrize("size", [(40, 72), (104, 56), 88, 16], ids=str)
def test_artifact_is_resampled_to_any_size(
    backbone: Backbone, artifact: Artifact, photo: np.ndarray, size: int | tuple[int, int]
) -> None:
    found = dv.denoise_image(backbone, photo, method="subtract", artifact=artifact, size=size)
    height, width = (size, size) if isinstance(size, int) else size
    assert found.size == (height, width)
    assert found.semantic.shape == (height // 8, width // 8, 6)
    assert torch.equal(found.artifact, artifact.at((height // 8, width // 8)))
    torch.testing.assert_close(found.semantic, found.raw - found.artifact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stride", [4, 2, 3])
def test_overlapping_patches_are_blurred_only_slightly(photo: np.ndarray, stride: int) -> None:
    """Patch centres lie between the nodes: features are interpolated twice and blurred by less than a stride."""
    extractor = tiny.backbone(stride=stride)
    values = tiny.pattern(16, 16)
    found = dv.denoise_image(extractor, photo, method="subtract", artifact=values, size=8 + 15 * stride)
    wanted = found.raw - values
    lost = (found.semantic - wanted)[:, :-1].norm()
    step = (wanted[:, 1:] - wanted[:, :-1]).norm()
    assert found.semantic.shape == (16, 16, 6)
    assert float(lost) < 0.5 * float(step)
    cosine = torch.nn.functional.cosine_similarity(found.semantic, wanted, dim=-1)
    assert float(cosine.mean()) > 0.95


def test_overlapping_patches_keep_smooth_features_in_place() -> None:
    """Features encode the position of a patch: nodes must be at the patch centres, up to a small error."""
    extractor = tiny.plain(lambda image: torch.nn.functional.avg_pool2d(image, 8, 4).permute(0, 2, 3, 1), stride=4)
    ramp = torch.linspace(-1, 1, 104)
    image = torch.stack([ramp.expand(56, 104), ramp[:56, None].expand(56, 104), torch.zeros(56, 104)])[None]
    found = dv.denoise_image(extractor, image, method="subtract", artifact=torch.zeros(13, 25, 3))
    torch.testing.assert_close(found.semantic[1:-1, 1:-1], found.raw[1:-1, 1:-1], rtol=0, atol=1e-5)


def test_missing_artifact_raises_if_none_is_shipped(backbone: Backbone, photo: np.ndarray) -> None:
    with pytest.raises(ArtifactError, match=r"no artifact for Planted .*; create one with dvit cal"):
        dv.denoise_image(backbone, photo, method="subtract")


def test_shipped_artifact_is_used_if_none_is_given(
    backbone: Backbone, artifact: Artifact, photo: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact.save(tmp_path / "Planted.safetensors")
    monkeypatch.setattr(known, "_FOLDER", tmp_path)
    found = dv.denoise_image(backbone, photo, method="subtract")
    assert torch.equal(found.artifact, artifact.values.half().float())


def test_held_out_metrics_are_none(result: Decomposition) -> None:
    assert result.heldout_r2 is None
    assert result.heldout_cosine is None


def test_info_records_the_method_and_no_unused_options(result: Decomposition, artifact: Artifact) -> None:
    info = json.loads(json.dumps(result.info, allow_nan=False))
    assert info["method"] == "subtract"
    assert info["artifact"] == digest(artifact.values)
    assert not {"views", "held_out", "smoothness", "clip", "neural", "seed"} & set(info)


@pytest.mark.parametrize(
    "unused",
    [{"seed": 5}, {"views": 200}, {"resolution": 3}, {"taper": 0.0}, {"coverage": "plain"}, {"held_out": 0}],
    ids=str,
)
def test_options_of_the_other_methods_change_nothing(
    backbone: Backbone, artifact: Artifact, photo: np.ndarray, result: Decomposition, unused: dict[str, Any]
) -> None:
    other = dv.denoise_image(backbone, photo, method="subtract", artifact=artifact, **unused)
    assert torch.equal(other.field, result.field)
    assert other.info["plan"] == result.info["plan"]


def test_result_survives_saving_and_loading(result: Decomposition, tmp_path: Path) -> None:
    result.save(tmp_path / "r.safetensors")
    loaded = Decomposition.load(tmp_path / "r.safetensors")
    torch.testing.assert_close(loaded.semantic, result.semantic, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(loaded.artifact, result.artifact, rtol=2e-3, atol=2e-3)
    assert loaded.info == json.loads(json.dumps(result.info))
    assert loaded.heldout_r2 is None


def test_result_can_be_sampled_and_upsampled(result: Decomposition) -> None:
    torch.testing.assert_close(result.sample(result.coords), result.semantic, rtol=0, atol=1e-5)
    assert result.upsample(2).shape == (14, 14, 6)


def test_progress_reaches_its_total(backbone: Backbone, artifact: Artifact, photo: np.ndarray) -> None:
    seen: list[tuple[int, int]] = []
    dv.denoise_image(
        backbone, photo, method="subtract", artifact=artifact, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(0, 1), (1, 1)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(artifact: Artifact, photo: np.ndarray, bad: float) -> None:
    extractor = tiny.plain(lambda image: torch.full((len(image), 7, 7, 6), bad))
    with pytest.raises(BackboneError, match="not finite"):
        dv.denoise_image(extractor, photo, method="subtract", artifact=artifact.values)


def test_size_off_the_patch_grid_is_refused(backbone: Backbone, artifact: Artifact, photo: np.ndarray) -> None:
    with pytest.raises(SizeError, match="Nearest: 56 or 64"):
        dv.denoise_image(backbone, photo, method="subtract", artifact=artifact, size=60)


def test_unknown_method_error_lists_the_methods(backbone: Backbone, photo: np.ndarray) -> None:
    with pytest.raises(PlanError, match=r"unknown method 'minus'; choose from exact, .*denoiser, .*auto"):
        dv.denoise_image(backbone, photo, method="minus")


def test_artifact_of_a_wrong_type_is_rejected_by_type_name() -> None:
    with pytest.raises(PlanError, match=r"expected an Artifact, a file name or a tensor.*got list"):
        known.known_artifact([1.0], tiny.backbone(), (7, 7))  # pyright: ignore[reportArgumentType]
