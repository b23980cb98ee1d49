"""Weights from local files and from the hub: what loads, and which errors are raised."""

from __future__ import annotations

import builtins
import pickle
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from denoising_vit import Backbone, WeightsError, load_backbone
from denoising_vit.backbones import loading
from denoising_vit.backbones import runtime as model_hub

NAME = "test_vit"  # timm's small ViT: patch 16, width 64, 6 blocks, grid 10 x 10
DINOV2 = "vit_small_patch14_dinov2.lvd142m"
REGISTERS = "vit_small_patch14_reg4_dinov2.lvd142m"

State = dict[str, Tensor]


def load(weights: str | Path, name: str = NAME) -> Backbone:
    return load_backbone(name, weights=weights, dtype="float32", device="cpu")


def make(name: str, **options: Any) -> State:
    """State dict of a model whose weights differ from those of ``weights="random"``."""
    torch.manual_seed(11)
    return timm.create_model(name, **options).state_dict()


def variant(**options: Any) -> State:
    """State dict of the model ``NAME`` with other settings."""
    settings: dict[str, Any] = {
        "img_size": 160,
        "patch_size": 16,
        "embed_dim": 64,
        "depth": 6,
        "num_heads": 2,
        "mlp_ratio": 3,
    }
    return VisionTransformer(**{**settings, **options}, num_classes=0).state_dict()  # fmt: skip


@pytest.fixture(scope="module")
def source() -> VisionTransformer:
    """The timm model whose weights the files contain, with a classifier of ten classes."""
    torch.manual_seed(11)
    model = timm.create_model(NAME, num_classes=10).eval()
    assert isinstance(model, VisionTransformer)
    return model


@pytest.fixture(scope="module")
def state(source: VisionTransformer) -> State:
    return source.state_dict()


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def write(content: object, name: str = "weights.pth", **options: Any) -> Path:
        path = tmp_path / name
        if path.suffix == ".safetensors":
            assert isinstance(content, dict)
            save_file(content, path)
        else:
            torch.save(content, path, **options)
        return path

    return write


def assert_same_features(backbone: Backbone, source: VisionTransformer) -> None:
    image = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    tokens = source.forward_features(image)[:, 1:]
    torch.testing.assert_close(backbone(image), tokens.unflatten(1, (10, 10)))  # (B, h w, C) -> (B, h, w, C)


# What loads


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights.pt", "weights.bin"])
def test_features_from_a_file_match_the_saved_model(
    name: str, file: Callable[..., Path], source: VisionTransformer, state: State
) -> None:
    path = file(state, name)
    backbone = load(path)
    assert_same_features(backbone, source)
    assert backbone.weights == str(path)


WRAPPINGS: dict[str, Callable[[State], object]] = {
    "under model": lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3},
    "under state_dict": lambda state: {"state_dict": state, "arch": "vit"},
    "under teacher": lambda state: {"teacher": state, "student": {}},
    "under model under state_dict": lambda state: {"state_dict": {"model": state}},
    "prefix module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "prefix model.": lambda state: {f"model.{key}": value for key, value in state.items()},
    "prefix backbone.": lambda state: {f"backbone.{key}": value for key, value in state.items()},
    "prefixes module.model.": lambda state: {"model": {f"module.model.{key}": v for key, v in state.items()}},
    # As in training checkpoints of DINO and DINOv2: one network for features, one for the loss.
    "teacher with its own head": lambda state: {
        "teacher": {**{f"backbone.{key}": v for key, v in state.items()}, "head.mlp.0.weight": torch.ones(3, 3)},
    },
    "teacher with a DINOv2 head": lambda state: {
        "teacher": {**{f"backbone.{key}": v for key, v in state.items()}, "dino_head.mlp.0.weight": torch.ones(3, 3)},
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_published_checkpoint_layouts_load(
    wrapping: str, file: Callable[..., Path], source: VisionTransformer, state: State
) -> None:
    headless = {key: value for key, value in state.items() if not key.startswith("head.")}
    assert_same_features(load(file(WRAPPINGS[wrapping](headless))), source)


@pytest.mark.parametrize("classes", [0, 3, 1000])
def test_a_classifier_in_the_file_is_ignored(
    classes: int, file: Callable[..., Path], source: VisionTransformer, state: State
) -> None:
    body = {key: value for key, value in state.items() if not key.startswith("head.")}
    head = (
        {"head.weight": torch.ones(classes, 64), "head.bias": torch.full((classes,), float("nan"))} if classes else {}
    )
    backbone = load(file({**body, **head}))
    assert_same_features(backbone, source)
    assert not any("head" in key for key in backbone.state_dict())


def test_files_in_half_precision_load(file: Callable[..., Path], source: VisionTransformer, state: State) -> None:
    backbone = load(file({key: value.half() for key, value in state.items()}, "half.safetensors"))
    assert backbone.dtype == torch.float32
    torch.testing.assert_close(backbone.state_dict()["model.norm.bias"], source.norm.bias)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_eva_models_load_their_own_files(name: str, file: Callable[..., Path]) -> None:
    state = make(name, num_classes=0)
    loaded = load(file(state, "eva.safetensors"), name).state_dict()
    assert all(torch.equal(loaded[f"model.{key}"], value) for key, value in state.items())


def test_files_with_parameter_names_of_the_dinov2_release_load(file: Callable[..., Path]) -> None:
    state = make(REGISTERS, num_classes=0)
    released = {"register_tokens" if key == "reg_token" else key: value for key, value in state.items()}
    position_of_class = torch.full((1, 1, 384), 0.5)  # timm adds it to the class token itself
    released["pos_embed"] = torch.cat([position_of_class, state["pos_embed"]], dim=1)
    released["mask_token"] = torch.zeros(1, 384)
    loaded = load(file(released), REGISTERS).state_dict()
    torch.testing.assert_close(loaded["model.cls_token"], state["cls_token"] + 0.5)
    for key in ("pos_embed", "reg_token", "blocks.11.mlp.fc2.weight"):
        assert torch.equal(loaded[f"model.{key}"], state[key])


# Weights of another model


@pytest.mark.parametrize(
    ("other", "misfit"),
    [
        ({"embed_dim": 96}, r"\(96, 3, 16, 16\) instead of \(64, 3, 16, 16\)"),
        ({"patch_size": 8, "img_size": 80}, r"\(64, 3, 8, 8\) instead of \(64, 3, 16, 16\)"),
        ({"in_chans": 1}, r"\(64, 1, 16, 16\) instead of \(64, 3, 16, 16\)"),
        ({"depth": 8}, r"24 unexpected \(blocks\.6\.[a-z0-9.]+, .*, \.\.\.\)"),
        ({"depth": 5}, r"12 missing \(blocks\.5\.[a-z0-9.]+, .*, \.\.\.\)"),
        ({"mlp_ratio": 4}, r"18 of another shape \(blocks\.0\.mlp\.fc1\.weight \(256, 64\) instead of \(192, 64\)"),
        ({"init_values": 1.0}, r"12 unexpected \(blocks\.0\.ls1\.gamma"),
        ({"qkv_bias": False}, r"6 missing \(blocks\.0\.attn\.qkv\.bias"),
        ({"pre_norm": True}, r"unexpected \(norm_pre\.bias, norm_pre\.weight\)"),
    ],
)
def test_weights_of_another_model_are_refused_with_the_mismatch(
    other: dict[str, Any], misfit: str, file: Callable[..., Path]
) -> None:
    path = file(variant(**other), "other.safetensors")
    with pytest.raises(WeightsError, match=f"^{re.escape(str(path))}: .*{NAME}.*{misfit}"):
        load(path)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        (DINOV2, REGISTERS),
        (REGISTERS, DINOV2),
        ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
    ],
)
def test_weights_with_other_prefix_tokens_are_refused_with_the_mismatch(
    name: str, other: str, file: Callable[..., Path]
) -> None:
    path = file(make(other, num_classes=0))
    with pytest.raises(WeightsError, match=f"^{re.escape(str(path))}: .*{name}") as caught:
        load(path, name)
    words = str(caught.value).replace(str(path), "").replace(name, "")
    assert re.search("pos_embed|reg_token|dist_token|prefix|register", words)


def test_weights_of_another_family_are_refused(file: Callable[..., Path]) -> None:
    with pytest.raises(WeightsError, match=rf"do not fit {NAME}: .* missing \(.*unexpected \(conv1\.weight"):
        load(file(make("resnet18", num_classes=0)))


@pytest.mark.parametrize("shape", [(), (64,), (1, 64), (1, 101, 64, 1)])
def test_position_embedding_of_wrong_shape_is_refused(
    shape: tuple[int, ...], file: Callable[..., Path], state: State
) -> None:
    path = file({**state, "pos_embed": torch.zeros(shape)})
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        load(path)


# Weights that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["blocks.3.attn.proj.bias", "patch_embed.proj.weight", "pos_embed", "cls_token"])
def test_weights_that_are_not_finite_are_refused_with_the_parameter(
    key: str, value: float, file: Callable[..., Path], state: State
) -> None:
    broken = state[key].clone()
    broken.view(-1)[7] = value
    path = file({**state, key: broken})
    message = rf"^{re.escape(str(path))}: 1 of {broken.numel()} values of {key} are NaN or infinite"
    with pytest.raises(WeightsError, match=message):
        load(path)


# Files without weights


def test_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path / "none.pth", tmp_path):
        with pytest.raises(WeightsError, match=f"{re.escape(str(path))}: no such weights file"):
            load(path)


@pytest.mark.parametrize("name", ["empty.safetensors", "empty.pth"])
def test_empty_file_is_refused_with_a_complete_message(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.touch()
    with pytest.raises(WeightsError, match=re.escape(str(path))) as caught:
        load(path)
    assert "()" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.5, 0.95, 0.9999])
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "old.pth"])
def test_truncated_file_is_refused_with_its_path(
    name: str, share: float, file: Callable[..., Path], state: State
) -> None:
    """``old.pth`` is in the format that PyTorch wrote before version 1.6."""
    path = file(state, name, **({"_use_new_zipfile_serialization": False} if name == "old.pth" else {}))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22\nsize 12345\n",
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        b"hello",
        b"\x80\x02",
        b"PK\x03\x04" + bytes(100),
        bytes(1000),
        bytes(range(256)) * 8,
    ],
    ids=["git-lfs pointer", "web page", "text", "start of a pickle", "start of a zip", "zeros", "bytes"],
)
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_file_without_weights_is_refused_with_its_path(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        load(path)


@pytest.mark.parametrize(
    "content", [{}, {"epoch": 3}, {"model": {}}, [torch.ones(3)], torch.ones(3), None, {"optimizer": {}}]
)
def test_file_without_tensors_is_refused_with_the_expected_keys(content: object, file: Callable[..., Path]) -> None:
    path = file(content)
    with pytest.raises(
        WeightsError, match=rf"{re.escape(str(path))}: no tensors found; expected .* model or state_dict"
    ):
        load(path)


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return builtins.open, (str(self.trace), "w")


@pytest.mark.parametrize("name", ["weights.pth", "weights.bin", "weights.safetensors"])
@pytest.mark.parametrize("how", ["zip", "old", "pickle"])
def test_code_in_a_pickle_is_refused_and_never_run(how: str, name: str, tmp_path: Path, state: State) -> None:
    trace, path = tmp_path / "trace", tmp_path / name
    content = {"model": state, "extra": Evil(trace)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        load(path)
    assert not trace.exists()


def test_unpickling_the_file_of_the_previous_test_runs_its_code(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "trace"))).close()
    assert (tmp_path / "trace").exists()


# The hub and the bundled model


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, nothing in the hub's cache, and none of the packages of the extra ``offline``."""
    monkeypatch.setattr(loading, "bundled_available", lambda name: False)
    monkeypatch.setattr(model_hub, "_reachable", lambda url: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("weights", ["auto", "hub"])
def test_offline_error_names_the_extra_with_the_bundled_model(weights: str) -> None:
    with pytest.raises(WeightsError, match=rf"{re.escape(DINOV2)} could not be downloaded .*extra `offline`"):
        load(weights, DINOV2)


@pytest.mark.usefixtures("no_network")
def test_offline_error_suggests_the_bundled_model() -> None:
    with pytest.raises(WeightsError, match=rf"could not be downloaded .*or use {re.escape(DINOV2)}.*extra `offline`"):
        load("hub", "vit_tiny_patch16_224.augreg_in21k")


@pytest.mark.usefixtures("no_network")
def test_offline_setting_of_the_hub_is_restored() -> None:
    with pytest.raises(WeightsError):
        load("hub", DINOV2)
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_concurrent_threads_restore_the_offline_setting_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(model_hub, "_reachable", lambda url: False)

    second, first_left = threading.Event(), threading.Event()

    def later() -> None:
        with model_hub.offline_if_unreachable():
            second.set()
            first_left.wait(10)

    with ThreadPoolExecutor(1) as pool:
        with model_hub.offline_if_unreachable():
            asked = pool.submit(later)
            second.wait(0.1)  # the other thread is inside as well, unless it has to wait
        first_left.set()
        asked.result()
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_random_weights_are_the_same_in_concurrent_threads() -> None:
    expected = load("random").state_dict()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: load("random").state_dict(), range(8)):
            assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_bundled_weights_of_another_model_are_refused() -> None:
    with pytest.raises(WeightsError, match=rf"{NAME} has no bundled weights; only {re.escape(DINOV2)} has"):
        load("bundled")


def test_bundled_weights_without_their_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("denoising_vit.backbones.bundled.bundled_available", lambda name: False)
    with pytest.raises(WeightsError, match=r"not installed: install the extra `offline`"):
        load("bundled", DINOV2)
