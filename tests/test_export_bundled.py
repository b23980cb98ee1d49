"""Every format on the bundled DINOv2, with the artifact and the denoiser that the package ships."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor

import denoising_vit as dv
import tiny_export as tiny
from denoising_vit import Backbone, DenoisedViT, ExportOptions, export_extractor, load_extractor, verify_export
from denoising_vit.export import exporting

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

#: Batch, height and width: three sizes that the check of the export itself does not use.
SIZES = [(1, 56, 112), (2, 126, 70), (3, 84, 84)]

CLEAN = ["subtract", "denoiser"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return dv.load_backbone("vit_small_patch14_dinov2.lvd142m", weights="bundled", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def extractors(backbone: Backbone) -> dict[str, DenoisedViT]:
    return {
        "subtract": DenoisedViT(backbone, dv.load_artifact("shipped", backbone)),
        "denoiser": DenoisedViT(backbone, dv.load_denoiser("shipped", backbone=backbone)),
    }


def differences(extractor: Any, run: Any) -> list[float]:
    """The largest difference at each size; fails if shapes differ."""
    found = []
    for batch, height, width in SIZES:
        image = tiny.picture(height, width, batch)
        with torch.no_grad():
            expected, features = extractor(image), run(image)
        assert features.shape == expected.shape == (batch, height // 14, width // 14, 384)
        found.append(float((features - expected).abs().max()))
    return found


# Graphs of the other kinds are tested on tiny models in test_export.py.


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """Cache of `one_conversion`."""
    return {}


@pytest.fixture
def one_conversion(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ONNX files are made from one graph of the denoiser: tracing and converting it take most of their time."""

    def once(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if name not in made:
                made[name] = function(*args, **options)
            return made[name]

        return call

    for place, name in ((exporting, "trace"), (torch.onnx, "export")):
        monkeypatch.setattr(place, name, once(name, getattr(place, name)))


@pytest.mark.usefixtures("one_conversion")
def test_onnx(extractors: dict[str, DenoisedViT], tmp_path: Path) -> None:
    export_extractor(extractors["denoiser"], tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(["features"], {"image": image.numpy()})[0]))

    assert max(differences(extractors["denoiser"], run)) < 1e-3


def test_program(extractors: dict[str, DenoisedViT], tmp_path: Path) -> None:
    export_extractor(extractors["subtract"], tmp_path / "out", ExportOptions(format="program"))
    module = torch.export.load(str(tmp_path / "out" / "model.pt2")).module()
    assert max(differences(extractors["subtract"], module)) < 1e-4


@pytest.mark.parametrize("kind", CLEAN)
def test_safetensors(extractors: dict[str, DenoisedViT], tmp_path: Path, kind: str) -> None:
    export_extractor(extractors[kind], tmp_path / "out", ExportOptions(format="safetensors"))
    again = load_extractor(tmp_path / "out", device="cpu", dtype="float32")
    assert max(differences(extractors[kind], again)) == 0
    assert verify_export(tmp_path / "out").problems == ()


def test_timm(backbone: Backbone, tmp_path: Path) -> None:
    export_extractor(backbone, tmp_path / "out", ExportOptions(format="timm"))
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()

    def run(image: Tensor) -> Tensor:
        tokens = model.forward_features(image)[:, 1:]
        return tokens.unflatten(1, (image.shape[2] // 14, image.shape[3] // 14))

    assert max(differences(backbone, run)) < 1e-5
    assert verify_export(tmp_path / "out").problems == ()


@pytest.mark.usefixtures("one_conversion")
def test_int8(extractors: dict[str, DenoisedViT], tmp_path: Path) -> None:
    found = export_extractor(extractors["denoiser"], tmp_path / "out", ExportOptions(int8=True))
    assert found.cosine > 0.995
    assert (tmp_path / "out" / "model.int8.onnx").stat().st_size < 40e6  # of 98 MB
    assert verify_export(tmp_path / "out").problems == ()
