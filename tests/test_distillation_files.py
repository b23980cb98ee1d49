"""Files of distilled models: they load like any timm model and give the features that were evaluated."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import denoising_vit as dv
import tiny_distillation as tiny
import tiny_fit
from denoising_vit.backbones.recorded import describe
from denoising_vit.backbones.timm_vit import TimmBackbone, build_timm_model
from denoising_vit.backbones.weights import load_weights, read_state_dict
from denoising_vit.distilled import weights as distil
from denoising_vit.distilled.train import Distillation
from denoising_vit.distilled.weights import write_distilled
from denoising_vit.errors import TrainError, WeightsError
from denoising_vit.files import DISTILLED

pytestmark = pytest.mark.usefixtures("one_thread")

ARCHITECTURES = {
    "DINOv2 with registers": "vit_small_patch14_reg4_dinov2.lvd142m",
    "DeiT-III": "deit3_base_patch16_224.fb_in1k",
    "CLIP": "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k",
    "DINO": "vit_base_patch16_224.dino",
    "MAE": "vit_base_patch16_224.mae",
    "EVA-02": "eva02_base_patch16_clip_224.merged2b",
    "supervised": "vit_base_patch16_384.augreg_in21k_ft_in1k",
}


@pytest.fixture(scope="module", autouse=True)
def blank_panels() -> Iterator[None]:
    with tiny.blank_panels():
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_fit.write_photos(tmp_path_factory.mktemp("photos"), 4)


@pytest.fixture(scope="module")
def ran(one_thread: None, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Distillation, dv.Backbone]:
    """A run of two steps on the whole tiny model from a file, and the original model."""
    folder = tmp_path_factory.mktemp("ran")
    spec = tiny_fit.spec_of(tiny_fit.write_weights(folder / "tiny.safetensors"))
    training = tiny.options(steps=2, held_out=1, evaluate_every=2, learning_rate=0.01)
    with tiny.blank_panels():
        run = tiny.prepared(photos, folder / "run", spec, training, denoiser=tiny.denoiser(spec.load())).training()
        run.run()
    return run, spec.load()


def tokens_of(model: Any, image: Tensor) -> Tensor:
    """Patch tokens (B, h w, C) of a plain timm model after its final norm, which some models apply after pooling."""
    found = model.forward_features(image)[:, model.num_prefix_tokens :]
    return model.fc_norm(found) if isinstance(model.norm, torch.nn.Identity) else found


def assert_near(found: Tensor, expected: Tensor, other: Tensor) -> None:
    """Check that features are equal up to float16 rounding, and less similar to others, which are raw."""
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    away = torch.nn.functional.cosine_similarity(found, other, dim=-1).mean()
    assert away < torch.nn.functional.cosine_similarity(found, expected, dim=-1).mean() - 0.001


# --- loading ---


@pytest.mark.parametrize("name", ["distilled.safetensors", "last.safetensors"])
def test_the_files_load_as_weights_and_as_a_plain_timm_model(ran: tuple[Distillation, dv.Backbone], name: str) -> None:
    run, raw = ran
    path, image = run.folder.path / name, torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    backbone = dv.load_backbone(tiny.MODEL, weights=path, dtype="float32", device="cpu")
    plain = timm.create_model(tiny.MODEL, num_classes=0, checkpoint_path=str(path)).eval()
    with torch.no_grad():
        expected = run.evaluated.backbone(image)
        found = backbone(image)
        assert_near(found, expected, raw(image))
        torch.testing.assert_close(tokens_of(plain, image), found.flatten(1, 2), rtol=1e-5, atol=1e-5)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, run.evaluated.state_dict()[f"backbone.model.{key}"].half().float()), key


def test_fingerprint_differs_from_that_of_the_raw_model(ran: tuple[Distillation, dv.Backbone]) -> None:
    run, raw = ran
    backbone = dv.load_backbone(tiny.MODEL, weights=run.folder.distilled, dtype="float32", device="cpu")
    assert not backbone.fingerprint.matches(raw.fingerprint)
    assert describe(backbone)["weights"] == str(run.folder.distilled)


def test_other_model_rejects_the_file(ran: tuple[Distillation, dv.Backbone]) -> None:
    with pytest.raises(WeightsError, match="its weights do not fit vit_small_patch16_224"):
        dv.load_backbone("vit_small_patch16_224", weights=ran[0].folder.distilled)


#: Two blocks of 128 channels.
SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 128, "num_heads": 2}


def two_blocks(name: str) -> TimmBackbone:
    model = build_timm_model(name, pretrained=False, **SMALL)
    return TimmBackbone(model, name=name, stride=None, layer=-1, norm=True, weights="two blocks")


@pytest.mark.parametrize("name", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_models_of_every_architecture_load(photos: Path, tmp_path: Path, name: str) -> None:
    raw = two_blocks(name)
    shown = tiny.views(sizes=str(3 * raw.patch_size))
    training = tiny.options(steps=1, batch_size=1, held_out=1, learning_rate=0.02)
    denoiser = tiny.denoiser(raw, channels=raw.embed_dim)
    run = tiny.prepared(photos, tmp_path / "run", raw, training, shown, denoiser=denoiser).training()
    run.run()
    path = run.folder.distilled
    again = two_blocks(name)
    load_weights(again.model, read_state_dict(path), name=name, source="distilled")
    heads: dict[str, Any] = {} if "dinov2" in name else {"num_classes": 0}  # DINOv2 comes without a head
    plain: Any = timm.create_model(name, checkpoint_path=str(path), **SMALL, **heads).eval()
    image = torch.randn(1, 3, *plain.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = again(image)
        assert_near(found, run.evaluated.backbone(image), raw(image))
        torch.testing.assert_close(tokens_of(plain, image), found.flatten(1, 2), rtol=1e-4, atol=1e-4)


def test_overlapping_patches_and_an_inner_layer_keep_the_names(photos: Path, tmp_path: Path) -> None:
    model = build_timm_model(tiny.MODEL, pretrained=False, depth=3)
    raw = TimmBackbone(model, name=tiny.MODEL, stride=8, layer=1, norm=False, weights="")
    job, _ = tiny.distilled(photos, tmp_path / "run", raw, tiny.options(steps=1, held_out=1))
    plain = timm.create_model(tiny.MODEL, depth=3, num_classes=0, checkpoint_path=str(job.folder.last))
    for name in ("blocks.2.mlp.fc1.weight", "norm.weight"):  # after the layer
        assert torch.equal(plain.get_parameter(name), model.get_parameter(name).half().float())
    assert not torch.equal(
        plain.get_parameter("blocks.1.mlp.fc1.weight"), model.get_parameter("blocks.1.mlp.fc1.weight")
    )


# --- content ---


def head(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})["denoising_vit"])


def test_the_record_names_the_backbone_and_how_it_was_distilled(ran: tuple[Distillation, dv.Backbone]) -> None:
    run, raw = ran
    record = head(run.folder.distilled)
    assert (record["format"], record["format_version"]) == (DISTILLED, 1)
    assert record["backbone"] == json.loads(json.dumps(describe(raw)))
    assert record["backbone"]["name"] == tiny.MODEL
    assert record["step"] == 2
    (figures,) = tiny.rows(run.folder.path, "held_out")
    judged = {name: value for name, value in figures.items() if name not in ("step", "kind")}
    assert record["held_out"] == pytest.approx(judged, abs=1e-6)
    assert record["info"]["photos"] == 3
    assert record["info"]["options"] == json.loads(json.dumps(run.options.recorded()))
    assert record["info"]["views"]["sizes"] == str(tiny.SIZE)
    assert record["info"]["teacher"] == run.teacher.identity


def test_weights_are_float16_under_the_models_own_names(ran: tuple[Distillation, dv.Backbone]) -> None:
    tensors = load_file(ran[0].folder.last)
    assert tensors.keys() == timm.create_model(tiny.MODEL, num_classes=0).state_dict().keys()
    assert {value.dtype for value in tensors.values()} == {torch.float16}


def test_nothing_is_pickled(ran: tuple[Distillation, dv.Backbone]) -> None:
    found = [path for path in ran[0].folder.path.rglob("*") if path.is_file()]
    tensors = [path for path in found if path.suffix == ".safetensors"]
    assert {path.suffix for path in found if "tensorboard" not in path.parts} == {
        ".safetensors",
        ".json",
        ".jsonl",
        ".png",
    }
    assert len(tensors) >= 3
    for path in tensors:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        assert json.loads(content[8 : 8 + size])


# --- writing ---


def test_values_beyond_float16_stay_float32_and_integers_stay_integers(tmp_path: Path) -> None:
    state = {
        "large": torch.tensor([1e6, 1.0]),
        "small": torch.tensor([0.5, 1.0]),
        "count": torch.tensor(7),
        "none": torch.zeros(0),
    }
    write_distilled(state, tmp_path / "m.safetensors", {"backbone": {"name": "a"}})
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == state.keys()
    assert (found["large"].dtype, found["small"].dtype) == (torch.float32, torch.float16)
    for name, value in state.items():
        assert torch.equal(found[name].to(value.dtype), value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_not_written(tmp_path: Path, value: float) -> None:
    state = {"good": torch.ones(2), "bad": torch.tensor([1.0, value])}
    with pytest.raises(TrainError, match=r"m\.safetensors: bad has values that are not finite; the run diverged"):
        write_distilled(state, tmp_path / "m.safetensors", {})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_existing_file_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    write_distilled({"a": torch.ones(2)}, path, {})
    before = path.read_bytes()

    def full(*_args: Any, **_more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(TrainError, match=r"m\.safetensors: the model could not be written .*No space left.*--resume"):
        write_distilled({"a": torch.zeros(2)}, path, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_run_stopped_by_a_full_disk_can_be_resumed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = tiny.options(held_out=1)
    tiny.distilled(photos, tmp_path / "straight", training=training)
    save, calls = distil.write_tensors, iter(range(9))

    def full(*args: Any, **more: Any) -> None:
        if next(calls):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(distil, "write_tensors", full)
        with pytest.raises(TrainError, match="the model could not be written"):
            tiny.distilled(photos, tmp_path / "run", training=training)
    assert tiny.rows(tmp_path / "run", "train")[-1]["step"] == 6
    tiny.distilled(photos, tmp_path / "run", training=training, resume=True)
    assert tiny.results(tmp_path / "run") == tiny.results(tmp_path / "straight")
