"""Backbones from Hugging Face transformers: tokens, positions, normalisation, and rejected models."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_huggingface as tiny
from denoising_vit import Backbone, BackboneError, SizeError, WeightsError, load_backbone
from denoising_vit.backbones import runtime as model_hub
from denoising_vit.errors import DenoisingVitWarning

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = list(tiny.FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory of each family."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        tiny.write(folder, kind)
    return made


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A DINOv2 directory that a test may modify."""
    return shutil.copytree(folders["dinov2"], tmp_path / "model")


def load(model: object, **options: Any) -> Backbone:
    return load_backbone(str(model), **{"dtype": "float32", "device": "cpu", **options})


def picture(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * width))


def by_transformers(kind: str, folder: Path, image: Tensor, block: int = tiny.DEPTH - 1) -> tuple[Tensor, Tensor]:
    """Tokens of transformers after a block, before and after the final norm of the model."""
    model = getattr(transformers, tiny.FAMILIES[kind][2]).from_pretrained(folder).eval()
    sizes = {} if "dino" in kind else {"interpolate_pos_encoding": True}
    states = model(pixel_values=image, output_hidden_states=True, **sizes).hidden_states
    norm = next(module for name, module in model.named_children() if "norm" in name and "pre" not in name)
    return states[block + 1], norm(states[block + 1])


# Tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (48, 8)], ids=str)
def test_features_are_the_normed_patch_tokens_on_the_grid(
    folders: dict[str, Path], kind: str, size: tuple[int, int]
) -> None:
    backbone, image = load(folders[kind]), picture(*size, batch=2)
    features, prefix = backbone.forward_with_prefix(image)
    _, tokens = by_transformers(kind, folders[kind], image)
    count, h, w = tiny.FAMILIES[kind][0], size[0] // 8, size[1] // 8
    assert features.shape == (2, h, w, tiny.WIDTH)
    assert prefix.shape == (2, count, tiny.WIDTH)
    assert torch.allclose(prefix, tokens[:, :count], atol=1e-5)
    assert torch.allclose(features, tokens[:, count:].unflatten(1, (h, w)), atol=1e-5)
    assert float((features - features.mean((1, 2), keepdim=True)).abs().max()) > 0.1  # not the same vector everywhere


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("clip_vision_model",)])
def test_features_are_what_the_model_returns(folders: dict[str, Path], kind: str) -> None:
    """Except for CLIP, which applies its final norm to the class token only."""
    model = getattr(transformers, tiny.FAMILIES[kind][2]).from_pretrained(folders[kind]).eval()
    found = model(pixel_values=picture(32, 32)).last_hidden_state
    features, prefix = load(folders[kind]).forward_with_prefix(picture(32, 32))
    assert torch.allclose(torch.cat([prefix, features.flatten(1, 2)], dim=1), found, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [True, False])
def test_other_layers_and_no_norm(folders: dict[str, Path], kind: str, norm: bool) -> None:
    image, count = picture(24, 32), tiny.FAMILIES[kind][0]
    for layer in (0, -1):
        plain, normed = by_transformers(kind, folders[kind], image, layer % tiny.DEPTH)
        tokens = (normed if norm else plain)[:, count:].unflatten(1, (3, 4))
        assert torch.allclose(load(folders[kind], layer=layer, norm=norm)(image), tokens, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_intermediates_are_the_features_of_these_layers(folders: dict[str, Path], kind: str) -> None:
    backbone, image = load(folders[kind]), picture(24, 32)
    found = backbone.forward_intermediates(image, [0, -1, 1])
    assert torch.allclose(found.features, backbone(image), atol=1e-6)
    for layer, features in zip((0, 2, 1), found.layers, strict=True):
        assert torch.allclose(features, load(folders[kind], layer=layer)(image), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_come_from_configuration_and_processor(folders: dict[str, Path], kind: str) -> None:
    backbone = load(folders[kind])
    assert (backbone.patch_size, backbone.stride, backbone.embed_dim, backbone.depth) == (8, 8, tiny.WIDTH, tiny.DEPTH)
    assert (backbone.mean, backbone.std, backbone.default_size) == (tiny.MEAN, tiny.STD, tiny.SIDE)
    assert backbone.name == f"hf:{folders[kind].name}"
    assert not any(value.requires_grad for value in backbone.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_need_only_the_configuration(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(folders[kind] / name, tmp_path)
    before = torch.random.get_rng_state()
    first, second = (load(tmp_path, weights="random") for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.weights == "random"
    assert torch.equal(first(picture(24, 40)), second(picture(24, 40)))


@pytest.mark.parametrize(("kind", "whole"), [("clip_vision_model", "CLIP"), ("siglip_vision_model", "Siglip")])
def test_image_tower_is_taken_from_a_model_with_a_text_tower(tmp_path: Path, kind: str, whole: str) -> None:
    vision = tiny.config(kind)
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    settings = getattr(transformers, f"{whole}Config")(
        vision_config=vision.to_dict(), text_config=text | {"vocab_size": 50}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{whole}Model")(settings).eval()
    model.save_pretrained(tmp_path)
    tiny.write_processor(tmp_path, {})
    tower = model.vision_model
    expected = tower(pixel_values=picture(32, 32)).last_hidden_state
    expected = tower.post_layernorm(expected) if whole == "CLIP" else expected
    count = tiny.FAMILIES[kind][0]
    found = load(f"hf:{tmp_path}")(picture(32, 32))
    assert torch.allclose(found, expected[:, count:].unflatten(1, (4, 4)), atol=1e-5)


def test_hf_prefix_and_plain_path_load_the_same_model(folder: Path) -> None:
    assert torch.equal(load(f"hf:{folder}")(picture(24, 40)), load(folder)(picture(24, 40)))
    assert load(f"hf:{folder}").fingerprint.matches(load(folder).fingerprint)


def test_features_are_float32_in_bfloat16(folder: Path) -> None:
    plain, rounded = load(folder)(picture(24, 40)), load(folder, dtype="bfloat16")(picture(24, 40))
    assert rounded.dtype == torch.float32
    assert 1e-4 < float((plain - rounded).abs().max()) < 0.3


def test_sizes_off_the_grid_are_rejected(folder: Path) -> None:
    with pytest.raises(SizeError, match="Nearest: 24 or 32"):
        load(folder)(picture(28, 32))


def test_given_normalisation_and_size_take_precedence(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    backbone = load(folder, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), default_size=64)
    assert (backbone.mean, backbone.std, backbone.default_size) == ((0.5,) * 3, (0.2,) * 3, 64)


def test_a_processor_that_does_not_normalise(folder: Path) -> None:
    tiny.write_processor(folder, {"do_normalize": False})
    assert (load(folder).mean, load(folder).std) == ((0.0,) * 3, (1.0,) * 3)


# Loaded models


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_model_becomes_a_backbone(folders: dict[str, Path], kind: str) -> None:
    model = getattr(transformers, tiny.FAMILIES[kind][2]).from_pretrained(folders[kind]).train()
    backbone = load_backbone(model, mean=tiny.MEAN, std=tiny.STD)
    assert torch.equal(backbone(picture(24, 40)), load(folders[kind])(picture(24, 40)))
    assert (backbone.patch_size, backbone.default_size, backbone.depth) == (8, tiny.SIDE, tiny.DEPTH)
    assert not model.training
    assert load_backbone(model).mean == (0.485, 0.456, 0.406)


def test_vit_is_taken_from_a_model_with_a_head() -> None:
    whole = transformers.Dinov2ForImageClassification(tiny.config("dinov2")).eval()
    found = load_backbone(whole, layer=0)(picture(24, 40))
    assert torch.equal(found, load_backbone(whole.dinov2, layer=0)(picture(24, 40)))
    with pytest.raises(BackboneError, match="weights, stride and layout do not apply"):
        load_backbone(whole, stride=4)
    other = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]))
    with pytest.raises(BackboneError, match="ResNetModel has model type 'resnet'; expected one of dinov2"):
        load_backbone(other)


# Errors and warnings


def test_processor_that_crops_gives_a_warning(folder: Path) -> None:
    tiny.write_processor(folder, {"do_center_crop": True, "crop_size": {"height": 16, "width": 16}})
    with pytest.warns(
        DenoisingVitWarning, match=r"crops the centre of photos \(16 x 16\); denoising-vit uses whole photos"
    ):
        backbone = load(folder)
    assert backbone.default_size == tiny.SIDE


def test_a_configuration_without_patch_size(folder: Path) -> None:
    """The default of transformers would be 14."""
    tiny.edit_config(folder, without=("patch_size",))
    with pytest.raises(BackboneError, match=r"hf:model: config.json has no patch_size, so its grid is unknown"):
        load(folder)


def test_patches_that_are_not_square(folder: Path) -> None:
    tiny.edit_config(folder, patch_size=[8, 16])
    with pytest.raises(BackboneError, match=r"patch_size must be a positive whole number, or two .*\[8, 16\]"):
        load(folder, weights="random")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "wrong tensor shapes"),
        ({"patch_size": 4}, "wrong tensor shapes"),
        ({"num_hidden_layers": 5}, r"missing \(encoder\.layer\.3"),
        ({"num_hidden_layers": 2}, r"for blocks that it does not have \(encoder\.layer\.2"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_the_configuration(folder: Path, change: dict[str, int], message: str) -> None:
    tiny.edit_config(folder, without=("stage_names", "out_features", "out_indices"), **change)
    with pytest.raises(WeightsError, match=rf"weights of hf:model:? do not fit its config\.json: .*{message}"):
        load(folder)


def test_weights_that_are_damaged_or_missing(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    state["layernorm.weight"][3] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"hf:model: 1 of 32 values of layernorm.weight are NaN"):
        load(folder)
    path.write_bytes(b"words")
    with pytest.raises(WeightsError, match="the weights of hf:model could not be loaded"):
        load(folder)
    path.unlink()
    with pytest.raises(WeightsError, match="the weights of hf:model could not be loaded"):
        load(folder)


def test_unsupported_model_type(folder: Path) -> None:
    tiny.edit_config(folder, model_type="resnet")
    with pytest.raises(
        BackboneError, match=r"hf:model has model type 'resnet'; expected one of dinov2, .*To use another model"
    ):
        load(folder)


def test_missing_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(BackboneError, match=r"expected an image processor with the normalisation .* give mean and std"):
        load(folder)


def test_invalid_normalisation(folder: Path) -> None:
    tiny.write_processor(folder, {"image_mean": [0.5]})
    with pytest.raises(BackboneError, match=r"image_mean of preprocessor_config\.json must be three numbers"):
        load(folder)


@pytest.mark.parametrize("name", ["hf:nothing", "hf:/no/such/place", "hf:"])
def test_no_such_directory(name: str) -> None:
    with pytest.raises(BackboneError, match="expected a directory, or a hub id such as hf:facebook/dinov2-small"):
        load(name)


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_hub, "_reachable", lambda url: False)
    with pytest.raises(BackboneError, match=r"config.json of hf:nobody/no-such-model could not be read or downloaded"):
        load("hf:nobody/no-such-model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 4}, "has its own stride"),
        ({"patch_size": 8}, "has its own stride, patch_size"),
        ({"weights": "weights.safetensors"}, "has its own weights; weights must be auto, hub or random"),
        ({"layer": 3}, "has 3 blocks: layer must be -3 to 2, got 3"),
    ],
    ids=str,
)
def test_options_that_do_not_apply_to_a_directory(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackboneError, match=re.escape(message)):
        load(folder, **options)


def test_without_transformers_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackboneError, match=r"need transformers: install the extra `hf`"):
        load(folder)


def test_code_shipped_with_a_model_is_never_run(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    remote = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    tiny.edit_config(folder, auto_map=remote)
    load(folder)
    tiny.edit_config(folder, auto_map=remote, model_type="other")
    with pytest.raises(BackboneError, match="'other'"):
        load(folder)
    assert not marker.exists()
