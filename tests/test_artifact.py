"""The artifact: files, resampling to other grids, matching its backbone, and the forms that users may pass."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_artifact as tiny
import tiny_fit
from denoising_vit import Artifact, ArtifactError, Backbone, FormatError, PlanError, load_artifact
from denoising_vit import artifact as known
from denoising_vit.artifact import FORMAT, FORMAT_VERSION, known_artifact, resampling_note, shipped_for

pytestmark = pytest.mark.usefixtures("one_thread")

#: Key of the metadata in a file.
KEY = "denoising_vit"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


@pytest.fixture
def artifact(backbone: Backbone) -> Artifact:
    return tiny.artifact_of(backbone)


@pytest.fixture
def saved(artifact: Artifact, tmp_path: Path) -> Path:
    artifact.save(tmp_path / "saved.safetensors")
    return tmp_path / "saved.safetensors"


def grid_of_noise(*shape: int) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    return values - values.mean((0, 1))


def ramp(h: int, w: int) -> Tensor:
    """(h, w, 2): channel 0 rises downwards, channel 1 to the right, by 1 over the image; mean zero."""
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h - 0.5, (torch.arange(w) + 0.5) / w - 0.5, indexing="ij")
    return torch.stack([y, x], dim=-1)


def without_border(new: int, old: int) -> slice:
    """Positions of a grid resampled from ``old`` to ``new`` without effects of the border, which reach two cells."""
    reach = math.ceil((2 * max(1, old / new) + 1) * new / old)
    return slice(reach, new - reach)


# --- files ---


@pytest.mark.parametrize("shape", [(7, 7, 6), (5, 11, 3), (1, 1, 6), (2, 3, 1)], ids=str)
def test_saved_values_match_to_half_precision(backbone: Backbone, shape: tuple[int, ...], tmp_path: Path) -> None:
    values = grid_of_noise(*shape)
    tiny.artifact_of(backbone, values).save(tmp_path / "a.safetensors")
    loaded = Artifact.load(tmp_path / "a.safetensors")
    assert loaded.values.dtype == torch.float32
    assert loaded.grid == shape[:2]
    torch.testing.assert_close(loaded.values, values, rtol=2**-11, atol=2**-25)


def test_metadata_is_saved_and_loaded(artifact: Artifact, saved: Path) -> None:
    loaded = Artifact.load(saved)
    assert loaded.size == artifact.size == (56, 56)
    assert loaded.info == artifact.info
    assert loaded.backbone == json.loads(json.dumps(artifact.backbone))


def test_loaded_artifact_matches_its_backbone(backbone: Backbone, saved: Path) -> None:
    assert Artifact.load(saved).is_of(backbone)


def test_file_holds_half_precision(saved: Path) -> None:
    assert load_file(saved)["artifact"].dtype == torch.float16


@pytest.mark.parametrize("largest", [65504.0, 7e4, 1e9])
def test_values_beyond_half_precision_are_kept_exactly(artifact: Artifact, largest: float, tmp_path: Path) -> None:
    values = artifact.values / artifact.values.abs().max() * largest
    Artifact(values, artifact.size, artifact.backbone, {}).save(tmp_path / "large.safetensors")
    assert torch.equal(Artifact.load(tmp_path / "large.safetensors").values, values)


def test_non_contiguous_values_with_gradients_can_be_saved(artifact: Artifact, tmp_path: Path) -> None:
    values = artifact.values.transpose(0, 1).clone().requires_grad_().transpose(0, 1)
    Artifact(values, artifact.size, artifact.backbone, {}).save(tmp_path / "a.safetensors")
    torch.testing.assert_close(Artifact.load(tmp_path / "a.safetensors").values, artifact.values, rtol=1e-3, atol=1e-6)


def test_failed_save_leaves_the_old_file_and_nothing_else(artifact: Artifact, saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(TypeError):
        Artifact(artifact.values, artifact.size, artifact.backbone, {"not": object()}).save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_save_into_a_missing_folder_is_an_os_error(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        artifact.save(tmp_path / "none" / "a.safetensors")


def test_home_folder_in_a_path_is_expanded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert Artifact.load("~/saved.safetensors").grid == tiny.GRID


# --- wrong and damaged files ---


class Bomb:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("write", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))])
def test_pickles_are_refused_and_never_run(write: Callable[..., Any], tmp_path: Path) -> None:
    write(Bomb(tmp_path / "run"), tmp_path / "bomb.safetensors")
    with pytest.raises(FormatError, match="not an artifact, or damaged"):
        Artifact.load(tmp_path / "bomb.safetensors")
    assert not (tmp_path / "run").exists()


def test_missing_file_is_a_format_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none\.safetensors: no such file"):
        Artifact.load(tmp_path / "none.safetensors")


def test_folder_is_a_format_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        Artifact.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"words", b"\0" * 64, b"\xff" * 100], ids=["empty", "words", "zeros", "ones"])
def test_garbage_is_a_format_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"bad\.safetensors: not an artifact, or damaged"):
        Artifact.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_file_is_a_format_error(saved: Path, share: float) -> None:
    saved.write_bytes(saved.read_bytes()[: int(share * saved.stat().st_size)])
    with pytest.raises(FormatError, match="not an artifact, or damaged"):
        Artifact.load(saved)


def test_weights_file_is_not_an_artifact(tmp_path: Path) -> None:
    save_file({"artifact": torch.zeros(7, 7, 6)}, tmp_path / "weights.safetensors")
    with pytest.raises(FormatError, match=f"expected a safetensors file with an artifact.*'{FORMAT}'"):
        Artifact.load(tmp_path / "weights.safetensors")


def rewrite(path: Path, **changes: Any) -> None:
    """Rewrites a file with other metadata (None removes an entry) or another tensor."""
    tensors = {"artifact": changes.pop("tensor", load_file(path)["artifact"])}
    artifact = Artifact.load(path)
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "size": artifact.size, "backbone": artifact.backbone}
    head = {**head, "info": artifact.info, **changes}
    whole = {key: value for key, value in head.items() if value is not None}
    save_file(tensors, path, metadata={KEY: json.dumps(whole)})


def test_rewritten_file_without_changes_loads(saved: Path) -> None:
    before = Artifact.load(saved)
    rewrite(saved)
    assert torch.equal(Artifact.load(saved).values, before.values)


def test_newer_version_says_upgrade(saved: Path) -> None:
    rewrite(saved, format_version=FORMAT_VERSION + 1)
    with pytest.raises(FormatError, match=r"format version 1 or lower, got 2; upgrade"):
        Artifact.load(saved)


@pytest.mark.parametrize("key", ["format_version", "size", "backbone", "info"])
def test_missing_metadata_is_named_in_the_error(saved: Path, key: str) -> None:
    rewrite(saved, **{key: None})
    with pytest.raises(FormatError, match=f"damaged: {key} missing in its metadata$"):
        Artifact.load(saved)


@pytest.mark.parametrize("text", ["words", "[]", "3", '{"format": "other"}', "null"])
def test_other_metadata_is_a_format_error(saved: Path, text: str) -> None:
    save_file(load_file(saved), saved, metadata={KEY: text})
    with pytest.raises(FormatError, match=r"saved\.safetensors: "):
        Artifact.load(saved)


@pytest.mark.parametrize(
    "changes",
    [{"format_version": "one"}, {"size": 56}, {"backbone": "vit"}, {"backbone": {}}],
    ids=str,
)
def test_damaged_metadata_is_a_format_error(saved: Path, changes: dict[str, Any]) -> None:
    rewrite(saved, **changes)
    with pytest.raises(FormatError, match=r"saved\.safetensors: damaged"):
        Artifact.load(saved)


def test_file_without_the_tensor_is_a_format_error(saved: Path, artifact: Artifact) -> None:
    with_metadata = {"format": FORMAT, "format_version": 1, "size": [56, 56], "backbone": artifact.backbone, "info": {}}
    save_file({"other": torch.zeros(7, 7, 6)}, saved, metadata={KEY: json.dumps(with_metadata)})
    with pytest.raises(FormatError, match="not an artifact, or damaged"):
        Artifact.load(saved)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_in_a_file_are_refused(saved: Path, bad: float) -> None:
    values = load_file(saved)["artifact"]
    values[2, 3, 1] = bad
    rewrite(saved, tensor=values)
    with pytest.raises(FormatError, match=r"damaged artifact: expected finite values \(h, w, C\)"):
        Artifact.load(saved)


@pytest.mark.parametrize("shape", [(49, 6), (1, 7, 7, 6), (6,)], ids=str)
def test_values_with_a_wrong_number_of_dimensions_are_refused(saved: Path, shape: tuple[int, ...]) -> None:
    rewrite(saved, tensor=torch.zeros(shape))
    with pytest.raises(FormatError, match=r"expected finite values \(h, w, C\), got \(") as refused:
        Artifact.load(saved)
    assert str(shape) in str(refused.value)


# --- resampling ---


def test_own_grid_returns_the_values_unchanged(artifact: Artifact) -> None:
    assert torch.equal(artifact.at(tiny.GRID), artifact.values)


@pytest.mark.parametrize("grid", [(11, 13), (14, 14), (3, 2), (7, 5), (23, 7), (1, 1)], ids=str)
def test_resampled_values_have_the_new_shape_and_mean_zero(backbone: Backbone, grid: tuple[int, int]) -> None:
    resampled = tiny.artifact_of(backbone, grid_of_noise(7, 5, 6) * 40).at(grid)
    assert resampled.shape == (*grid, 6)
    torch.testing.assert_close(resampled.mean((0, 1)), torch.zeros(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("own", [(13, 13), (11, 17)], ids=str)
@pytest.mark.parametrize("grid", [(19, 23), (29, 31), (26, 13), (7, 11)], ids=str)
def test_resampled_ramp_is_a_ramp_away_from_the_border(
    backbone: Backbone, own: tuple[int, int], grid: tuple[int, int]
) -> None:
    """Rows and columns are not swapped, and positions are those of patch centres."""
    found = tiny.artifact_of(backbone, ramp(*own)).at(grid)
    inside = tuple(without_border(new, old) for new, old in zip(grid, own, strict=True))
    assert found[inside].numel() > 0
    exact = all(new >= old for new, old in zip(grid, own, strict=True))
    # Interpolation keeps the ramp to rounding, averaging over cells of a coarser grid to a thousandth of its height.
    torch.testing.assert_close(found[inside], ramp(*grid)[inside], rtol=0, atol=1e-5 if exact else 1e-3)


def test_smooth_artifact_is_the_same_on_a_finer_grid() -> None:
    extractor = tiny.backbone()
    found, truth = tiny.artifact_of(extractor, tiny.pattern(13, 11)).at((19, 29)), tiny.pattern(19, 29)
    assert float((found - truth).norm() / truth.norm()) < 0.03


def test_resampling_does_not_change_the_artifact_itself(artifact: Artifact) -> None:
    before = artifact.values.clone()
    artifact.at((11, 13))
    assert torch.equal(artifact.values, before)
    assert artifact.grid == tiny.GRID


# --- matching the backbone ---


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: tiny.backbone(seed=1), id="weights"),
        pytest.param(lambda: tiny.backbone(stride=4), id="stride"),
        pytest.param(lambda: tiny.backbone(channels=9), id="width"),
    ],
)
def test_artifact_of_another_backbone_is_refused(artifact: Artifact, other: Callable[[], Backbone]) -> None:
    theirs = other()
    assert not artifact.is_of(theirs)
    with pytest.raises(ArtifactError, match=r"calibrated for Planted .*, got Planted .*dvit calibrate"):
        artifact.require_of(theirs)


def test_error_for_another_stride_names_both_strides(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"calibrated for .*stride 8.*, got .*stride 4"):
        artifact.require_of(tiny.backbone(stride=4))


def test_error_for_other_weights_distinguishes_both_backbones(artifact: Artifact) -> None:
    """Two modules, two files of one name or two seeds of `random` are described alike; something must differ."""
    with pytest.raises(ArtifactError) as refused:
        artifact.require_of(tiny.backbone(seed=1))
    ours, theirs = str(refused.value).split("calibrated for ")[1].split(". Use the")[0].split(", got ")
    assert ours != theirs


def test_new_instance_of_its_backbone_is_accepted(artifact: Artifact) -> None:
    artifact.require_of(tiny.backbone())


def test_artifact_on_any_grid_matches_its_backbone(backbone: Backbone) -> None:
    tiny.artifact_of(backbone, grid_of_noise(5, 3, 6)).require_of(backbone)  # the grid does not matter


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_fit.write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def test_error_for_another_layer_names_both_layers(weights: Path) -> None:
    last, inner = tiny_fit.spec_of(weights).load(), tiny_fit.spec_of(weights, layer=5).load()
    artifact = tiny.artifact_of(last, grid_of_noise(3, 3, last.embed_dim))
    artifact.require_of(last)
    with pytest.raises(ArtifactError, match=r"vit_tiny_patch16_224 \(layer 11, .*, got .*\(layer 5, "):
        artifact.require_of(inner)


def test_features_without_the_final_norm_do_not_match(weights: Path) -> None:
    last, bare = tiny_fit.spec_of(weights).load(), tiny_fit.spec_of(weights, norm=False).load()
    artifact = tiny.artifact_of(last, grid_of_noise(3, 3, last.embed_dim))
    with pytest.raises(ArtifactError, match=r"norm True.*, got .*norm False"):
        artifact.require_of(bare)


# --- artifacts given by users ---


def test_none_gives_no_artifact(backbone: Backbone) -> None:
    assert known_artifact(None, backbone, tiny.GRID) is None


def test_artifact_named_none_is_zero(backbone: Backbone) -> None:
    found = known_artifact("none", backbone, (5, 3))
    assert found is not None and found.shape == (5, 3, backbone.embed_dim) and not found.any()
    assert resampling_note("none", backbone, (5, 3)) is None


@pytest.mark.parametrize("kind", [str, Path, Artifact.load], ids=["str", "Path", "Artifact"])
def test_path_or_loaded_artifact_gives_its_values(backbone: Backbone, saved: Path, kind: Callable[[str], Any]) -> None:
    found = known_artifact(kind(str(saved)), backbone, tiny.GRID)
    assert found is not None
    assert torch.equal(found, Artifact.load(saved).values)


def test_artifact_is_resampled_to_the_grid_of_the_views(backbone: Backbone, artifact: Artifact) -> None:
    found = known_artifact(artifact, backbone, (5, 11))
    assert found is not None
    assert torch.equal(found, artifact.at((5, 11)))


def test_given_tensor_is_used_unchanged(backbone: Backbone) -> None:
    values = grid_of_noise(5, 3, 6)
    found = known_artifact(values, backbone, (5, 3))
    assert found is not None
    assert torch.equal(found, values)


def test_given_tensor_is_detached(backbone: Backbone) -> None:
    found = known_artifact(grid_of_noise(5, 3, 6).requires_grad_(), backbone, (5, 3))
    assert found is not None
    assert not found.requires_grad


@pytest.mark.parametrize("shape", [(7, 7, 5), (7, 5, 6), (49, 6), (1, 7, 7, 6)], ids=str)
def test_error_for_a_tensor_of_another_shape_names_both_shapes(backbone: Backbone, shape: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match=r"of shape \(7, 7, 6\) for Planted on a grid of 7 x 7 patches") as refused:
        known_artifact(torch.zeros(shape), backbone, tiny.GRID)
    assert str(shape) in str(refused.value)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_non_finite_tensor_is_refused(backbone: Backbone, bad: float) -> None:
    values = grid_of_noise(7, 7, 6)
    values[0, 6, 2] = bad
    with pytest.raises(PlanError, match="not finite"):
        known_artifact(values, backbone, tiny.GRID)


@pytest.mark.parametrize("as_file", [True, False])
def test_artifact_of_another_backbone_is_refused_when_given(saved: Path, as_file: bool) -> None:
    with pytest.raises(ArtifactError, match="calibrated for"):
        known_artifact(saved if as_file else Artifact.load(saved), tiny.backbone(seed=1), tiny.GRID)


def test_missing_file_given_is_a_format_error(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        load_artifact(tmp_path / "none.safetensors", backbone)


def test_resampling_note_names_both_grids(backbone: Backbone, saved: Path) -> None:
    assert resampling_note(saved, backbone, tiny.GRID) is None
    note = resampling_note(saved, backbone, (5, 11))
    assert note == "the artifact was calibrated on 7 x 7 patches and is resampled to 5 x 11"


# --- shipped with the package ---


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, artifact: Artifact, tmp_path: Path) -> Path:
    """A package with two artifacts for backbones of this name; the second matches the backbone of the tests."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    tiny.artifact_of(tiny.backbone(seed=1)).save(folder / "Planted-a.safetensors")
    artifact.save(folder / "Planted-b.safetensors")
    monkeypatch.setattr(known, "_FOLDER", folder)
    return folder


def test_shipped_artifact_of_the_same_weights_is_found(shipped: Path, backbone: Backbone) -> None:
    found = load_artifact("shipped", backbone)
    assert torch.equal(found.values, Artifact.load(shipped / "Planted-b.safetensors").values)


def test_error_without_a_shipped_artifact_suggests_calibration(shipped: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no artifact for Planted .*stride 8; create one with dvit calibrate"):
        load_artifact("shipped", tiny.backbone(seed=2))


@pytest.mark.parametrize("name", ["<lambda>", "hf-hub:timm/vit.lvd", "local-dir:/models/vit", "a[b"])
def test_any_backbone_name_can_be_looked_up(shipped: Path, name: str) -> None:
    extractor = tiny.backbone(seed=2)
    extractor.name = name
    assert shipped_for(extractor) is None
