"""Exports of tiny models: every format, every kind of features, and errors."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import denoising_vit as dv
import tiny_export as tiny
import tiny_huggingface
from denoising_vit import (
    Backbone,
    DenoisedViT,
    ExportError,
    ExportOptions,
    FormatError,
    export_extractor,
    load_extractor,
    verify_export,
)
from denoising_vit.export import traceable
from denoising_vit.export.graphs import refuse_pickles
from denoising_vit.export.options import Format as Form

pytestmark = pytest.mark.usefixtures("one_thread")

#: Batch, height and width: two images of 48 x 80, one smaller and one larger than the position embedding.
SIZES = [(2, 48, 80), (1, 16, 16), (1, 256, 240)]

Exported = Callable[[str, Form], Path]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


@pytest.fixture(scope="module")
def shallow() -> Backbone:
    return tiny.shallow()


@pytest.fixture(scope="module")
def extractors(shallow: Backbone) -> dict[str, Backbone | DenoisedViT]:
    """Extractors of a model with two blocks, by kind of features; one adds position features."""
    return {
        "raw": shallow,
        "subtract": DenoisedViT(shallow, tiny.artifact(shallow), positions=0.5),
        "denoiser": DenoisedViT(shallow, tiny.denoiser(shallow)),
    }


@pytest.fixture(scope="module")
def whole(backbone: Backbone) -> dict[str, Backbone | DenoisedViT]:
    """Extractors of a model that timm can build by name."""
    return {
        "subtract": DenoisedViT(backbone, tiny.artifact(backbone), positions=0.5),
        "denoiser": DenoisedViT(backbone, tiny.denoiser(backbone)),
    }


@pytest.fixture(scope="module")
def exported(extractors: dict[str, Backbone | DenoisedViT], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Returns the folder of a graph by kind of features and format; each graph is exported once."""
    made: dict[tuple[str, str], Path] = {}

    def folder(kind: str, form: Form) -> Path:
        if (kind, form) not in made:
            made[kind, form] = tmp_path_factory.mktemp(f"{kind}-{form}") / "out"
            options = ExportOptions(format=form, licence="the house's own")
            assert export_extractor(extractors[kind], made[kind, form], options).difference < 1e-4
        return made[kind, form]

    return folder


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def by_onnx(path: Path, image: Tensor) -> list[Tensor]:
    return [torch.from_numpy(np.asarray(part)) for part in session(path).run(None, {"image": image.numpy()})]


def meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export.json").read_text())


# Graphs


@pytest.mark.parametrize("kind", ["raw", "subtract", "denoiser"])
def test_graphs_match_pytorch_at_any_size(
    extractors: dict[str, Backbone | DenoisedViT], exported: Exported, kind: str
) -> None:
    onnx, program = exported(kind, "onnx"), exported(kind, "program")
    assert meta(onnx)["features"] == meta(program)["features"] == kind
    module = torch.export.load(str(program / "model.pt2")).module()
    for batch, height, width in SIZES:
        image = tiny.picture(height, width, batch)
        expected = extractors[kind](image)
        (features,) = by_onnx(onnx / "model.onnx", image)
        assert features.shape == (batch, height // 16, width // 16, tiny.WIDTH)
        assert torch.allclose(features, expected, atol=1e-4)
        assert torch.allclose(module(image), expected, atol=1e-4)


def test_pixels_and_prefix(extractors: dict[str, Backbone | DenoisedViT], shallow: Backbone, tmp_path: Path) -> None:
    pixels = torch.rand(1, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (shallow.mean, shallow.std))
    kinds: dict[Form, str] = {"onnx": "raw", "program": "denoiser"}
    for form, kind in kinds.items():
        options = ExportOptions(format=form, pixels=True, prefix=True)
        export_extractor(extractors[kind], tmp_path / form, options)
    program = torch.export.load(str(tmp_path / "program" / "model.pt2")).module()
    given = {"onnx": by_onnx(tmp_path / "onnx" / "model.onnx", pixels), "program": program(pixels)}
    for form, kind in kinds.items():
        expected = extractors[kind].forward_with_prefix((pixels - mean) / std)
        assert len(given[form]) == 2
        for part, whole in zip(given[form], expected, strict=True):
            assert torch.allclose(part, whole, atol=1e-4)
    assert axes(session(tmp_path / "onnx" / "model.onnx"))["prefix"] == ["batch", 1, tiny.WIDTH]


def axes(opened: onnxruntime.InferenceSession) -> dict[str, list[int | str]]:
    """Names and axes of inputs and outputs."""
    return {value.name: value.shape for value in (*opened.get_inputs(), *opened.get_outputs())}


def test_names_and_axes_of_onnx(exported: Exported) -> None:
    opened = session(exported("raw", "onnx") / "model.onnx")
    assert axes(opened) == {"image": ["batch", 3, "height", "width"], "features": ["batch", "h", "w", tiny.WIDTH]}
    about = json.loads(opened.get_modelmeta().custom_metadata_map["denoising_vit"])
    assert about["backbone"]["name"] == tiny.MODEL


def test_other_layers_and_overlapping_patches(tmp_path: Path) -> None:
    dense = tiny.shallow(stride=8, layer=0, norm=False)
    export_extractor(dense, tmp_path / "out")
    for height, width in ((48, 80), (16, 24), (40, 40)):
        image = tiny.picture(height, width)
        (features,) = by_onnx(tmp_path / "out" / "model.onnx", image)
        assert torch.allclose(features, dense(image), atol=1e-4)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "deit3_small_patch16_224"])
def test_other_architectures(tmp_path: Path, name: str) -> None:
    """Rotary embeddings are computed in the graph as well."""
    backbone: Any = tiny.shallow(name)
    for name, value in backbone.named_parameters():
        value.mul_(10 if "qkv.weight" in name or "q_proj.weight" in name else 1)  # so that positions matter
    export_extractor(backbone, tmp_path / "out", ExportOptions(format="program"))
    program = torch.export.load(str(tmp_path / "out" / "model.pt2")).module()
    for rows, columns in ((3, 5), (1, 1), (17, 2)):
        image = tiny.picture(rows * backbone.patch_size, columns * backbone.patch_size)
        assert torch.allclose(program(image), backbone(image), atol=1e-4)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "dinov3_vit", "clip_vision_model"])
def test_hugging_face_models(tmp_path: Path, kind: str) -> None:
    tiny_huggingface.write(tmp_path / "model", kind)
    backbone = dv.load_backbone(str(tmp_path / "model"), dtype="float32", device="cpu")
    export_extractor(backbone, tmp_path / "out", ExportOptions(format="program"))
    program = torch.export.load(str(tmp_path / "out" / "model.pt2")).module()
    for height, width in ((32, 32), (24, 40), (8, 64)):  # including its own size
        image = tiny.picture(height, width)
        assert torch.allclose(program(image), backbone(image), atol=1e-4)


def test_sizes_off_the_grid_are_refused_by_graphs(exported: Exported) -> None:
    opened = session(exported("raw", "onnx") / "model.onnx")
    program = torch.export.load(str(exported("raw", "program") / "model.pt2")).module()
    for height, width in ((60, 64), (64, 63), (12, 64), (31, 16)):
        image = torch.zeros(1, 3, height, width)
        with pytest.raises(Exception, match="height_and_width_must_be_multiples_of_16_pixels"):
            opened.run(None, {"image": image.numpy()})
        with pytest.raises(Exception, match=r"of the form 16\*|% 16 == 0"):
            program(image)


def test_bfloat16_extractor_is_exported_in_float32(backbone: Backbone, tmp_path: Path) -> None:
    rounded = tiny.backbone(dtype="bfloat16")
    export_extractor(rounded, tmp_path / "out", ExportOptions(format="timm"))
    assert rounded.dtype == torch.bfloat16  # unchanged
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    weight = state["blocks.0.attn.qkv.weight"]
    assert torch.equal(weight, backbone.get_parameter("model.blocks.0.attn.qkv.weight").bfloat16().float())


def test_int8_export_records_its_cosine_similarity(
    extractors: dict[str, Backbone | DenoisedViT], tmp_path: Path
) -> None:
    found = export_extractor(extractors["denoiser"], tmp_path / "out", ExportOptions(int8=True))
    assert [path.name for path in sorted((tmp_path / "out").glob("*.onnx*"))] == ["model.int8.onnx"]
    assert 0.98 < found.least_cosine <= found.cosine < 0.99999
    assert meta(tmp_path / "out")["check"]["cosine"] == found.cosine
    assert f"mean cosine {found.cosine:.6f}" in (tmp_path / "out" / "README.md").read_text()
    features = by_onnx(tmp_path / "out" / "model.int8.onnx", tiny.picture(48, 80))[0]
    expected = extractors["denoiser"](tiny.picture(48, 80))
    assert float(torch.cosine_similarity(features, expected, dim=-1).min()) > 0.98
    assert verify_export(tmp_path / "out").problems == ()


# Checkpoints


def test_plain_timm_loads_the_export(backbone: Backbone, tmp_path: Path) -> None:
    found = export_extractor(backbone, tmp_path / "out", ExportOptions(format="timm"))
    assert found.difference == 0
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    for height, width in ((48, 80), (224, 224), (256, 240)):
        image = tiny.picture(height, width)
        tokens = model.forward_features(image)[:, 1:].unflatten(1, (height // 16, width // 16))
        assert torch.allclose(tokens, backbone(image), atol=1e-5)
    with pytest.raises(AssertionError, match="divisible by patch size"):
        model(torch.zeros(1, 3, 60, 64))
    plain = timm.create_model(tiny.MODEL, num_classes=0)
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))  # strict


def test_position_embedding_of_another_size_is_kept(tmp_path: Path) -> None:
    """By default timm would build the embedding of 224 pixels and resample to it."""
    backbone = dv.load_backbone("vit_small_patch14_dinov2.lvd142m", weights="random", dtype="float32", device="cpu")
    export_extractor(backbone, tmp_path / "out", ExportOptions(format="timm"))
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert torch.equal(model.pos_embed, backbone.get_parameter("model.pos_embed"))


def test_models_with_the_norm_after_pooling(tmp_path: Path) -> None:
    backbone = tiny.backbone("eva02_tiny_patch14_224")
    assert export_extractor(backbone, tmp_path / "out", ExportOptions(format="timm")).difference < 1e-5


def test_timm_export_loads_as_a_backbone(backbone: Backbone, tmp_path: Path) -> None:
    export_extractor(backbone, tmp_path / "out", ExportOptions(format="timm"))
    again = dv.load_backbone(str(tmp_path / "out"), dtype="float32", device="cpu")
    assert again.name == backbone.name
    assert torch.equal(again(tiny.picture(48, 80)), backbone(tiny.picture(48, 80)))
    with pytest.raises(dv.WeightsError, match="has its own weights; omit weights"):
        dv.load_backbone(str(tmp_path / "out"), weights="random")


@pytest.mark.parametrize("form", ["timm", "huggingface"])
@pytest.mark.parametrize("change", [{"layer": 1}, {"norm": False}, {"stride": 8}], ids=str)
def test_checkpoints_refuse_layer_norm_and_stride_options(tmp_path: Path, form: Any, change: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match=f"{form} stores only weights.*use onnx or program"):
        export_extractor(tiny.backbone(**change), tmp_path / "out", ExportOptions(format=form))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["timm", "huggingface"])
@pytest.mark.parametrize("kind", ["subtract", "denoiser"])
def test_checkpoints_refuse_extractors_with_a_cleaner(
    extractors: dict[str, Backbone | DenoisedViT], tmp_path: Path, form: Any, kind: str
) -> None:
    with pytest.raises(ExportError, match=f"{form} stores only the weights of a ViT.*use onnx, program or safetensors"):
        export_extractor(extractors[kind], tmp_path / "out", ExportOptions(format=form))


# The package's own file format


@pytest.mark.parametrize("kind", ["subtract", "denoiser"])
def test_safetensors_export_loads_as_the_same_extractor(
    whole: dict[str, Backbone | DenoisedViT], tmp_path: Path, kind: str
) -> None:
    found = export_extractor(whole[kind], tmp_path / "out", ExportOptions(format="safetensors"))
    assert found.difference == 0
    for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        again = load_extractor(path, device="cpu", dtype="float32")
        for batch, height, width in SIZES:
            image = tiny.picture(height, width, batch)
            assert torch.equal(again(image), whole[kind](image))
    assert load_extractor(tmp_path / "out", device="cpu", dtype="bfloat16").backbone.dtype == torch.bfloat16


def test_photo_names_are_not_exported(
    whole: dict[str, Backbone | DenoisedViT], exported: Exported, tmp_path: Path
) -> None:
    export_extractor(whole["subtract"], tmp_path / "safetensors", ExportOptions(format="safetensors"))
    for path in (*tmp_path.rglob("*.*"), *exported("subtract", "program").iterdir()):
        assert path.is_dir() or b"holiday" not in path.read_bytes(), path
    load_extractor(tmp_path / "safetensors").artifact.save(tmp_path / "g.safetensors")  # pyright: ignore


def test_damaged_safetensors_exports_are_refused(whole: dict[str, Backbone | DenoisedViT], tmp_path: Path) -> None:
    export_extractor(whole["denoiser"], tmp_path / "out", ExportOptions(format="safetensors"))
    path = tmp_path / "out" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        head, tensors = json.loads(file.metadata()["denoising_vit"]), load_file(path)

    def refused(message: str, changed: dict[str, Any], **more: Tensor) -> None:
        kept = {key: value for key, value in (tensors | more).items() if value.numel()}
        save_file(kept, tmp_path / "bad.safetensors", metadata={"denoising_vit": json.dumps(head | changed)})
        with pytest.raises(FormatError, match=message):
            load_extractor(tmp_path / "bad.safetensors")

    refused("expected a safetensors file with an extractor", {"format": "other"})
    refused("format version 1 or lower, got 9", {"format_version": 9})
    refused("expected a number as format_version, got 'one'", {"format_version": "one"})
    refused(r"damaged extractor \(.*do not fit", {}, **{"backbone.norm.weight": torch.zeros(3)})
    refused(r"damaged extractor \(.*1 missing", {}, **{"backbone.norm.weight": torch.zeros(0)})
    refused(r"damaged extractor \(RuntimeError", {}, **{"denoiser.pos_embed": torch.zeros(0)})
    refused("damaged extractor .*NaN", {}, **{"backbone.norm.weight": torch.full((192,), float("nan"))})
    refused("damaged extractor .*trained for", {}, **{"backbone.norm.weight": torch.linspace(-1, 1, 192)})
    with pytest.raises(FormatError, match="no such file"):
        load_extractor(tmp_path / "none")
    path.write_bytes(b"words")
    with pytest.raises(FormatError, match="not an extractor, or damaged"):
        load_extractor(path)


def test_safetensors_format_refuses_raw_features(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="raw and distilled models as timm"):
        export_extractor(backbone, tmp_path / "out", ExportOptions(format="safetensors"))


# Model card and record


def test_card_and_record(exported: Exported) -> None:
    folder = exported("denoiser", "onnx")
    text, about = (folder / "README.md").read_text(), meta(folder)
    assert text.startswith("---\nlibrary_name: onnx\n")
    assert "dvit export --verify" in text
    assert "Weights of the backbone: the house's own." in text
    for digest in (about["backbone"]["weights_digest"], about["cleaner"]["digest"], about["files"]["model.onnx"]):
        assert len(digest) == 64
        assert digest in text
    assert about["backbone"]["name"] == tiny.MODEL
    assert about["made_with"]["torch"] == torch.__version__.split("+")[0]
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "check.safetensors",
        "export.json",
        "model.onnx",
    ]


@pytest.mark.parametrize("head", ['{"format": "denoising-vit/distilled", "steps": 7}', None])
def test_distilled_weights_are_recorded_as_distilled(tmp_path: Path, head: str | None) -> None:
    weights = tiny.distilled(tmp_path / "distilled.safetensors", head)
    backbone = tiny.backbone(weights=str(weights))
    form = ExportOptions(format="timm")
    export_extractor(backbone, tmp_path / "out", form, weights=weights, distilled=head is None)
    about = meta(tmp_path / "out")
    assert about["features"] == "distilled"
    assert about["distilled"].get("steps") == (7 if head else None)
    assert about["backbone"]["weights"] == "distilled.safetensors"  # without its folder
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
    # The record is stored with the weights: exported again, they are still distilled.
    again = dv.load_backbone(str(tmp_path / "out"), dtype="float32", device="cpu")
    export_extractor(again, tmp_path / "twice", form, weights=tmp_path / "out" / "model.safetensors")
    assert meta(tmp_path / "twice")["features"] == "distilled"


def test_other_weights_are_recorded_as_raw(tmp_path: Path) -> None:
    weights = tiny.distilled(tmp_path / "plain.safetensors", '{"format": "denoising-vit/denoiser"}')
    plain = tiny.backbone(weights=str(weights))
    export_extractor(plain, tmp_path / "out", ExportOptions(format="timm"), weights=weights)
    assert meta(tmp_path / "out")["features"] == "raw"


# Refused exports


def test_existing_files_and_folders_are_not_overwritten(backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in ("mine", "file"):
        with pytest.raises(ExportError, match=f"{out} already exists; choose another folder with -o"):
            export_extractor(backbone, tmp_path / out, ExportOptions(format="timm"))
    assert (tmp_path / "mine" / "file").read_text() == (tmp_path / "file").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_empty_folder_is_used_and_missing_folders_are_created(backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        export_extractor(backbone, out, ExportOptions(format="timm"))
        assert (out / "model.safetensors").is_file()
        mode = stat.S_IMODE((out / "model.safetensors").stat().st_mode)
        assert mode == stat.S_IMODE((out / "README.md").stat().st_mode)


def test_unwritable_output_folder_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"cannot write to .*file/out \(Not a directory\); choose another"):
        export_extractor(backbone, tmp_path / "file" / "out", ExportOptions(format="timm"))
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ExportError, match=r"cannot write to .*Permission denied"):
            export_extractor(backbone, tmp_path / "locked" / "out", ExportOptions(format="timm"))


def test_export_that_differs_from_pytorch_is_not_written(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from denoising_vit.export import checkpoints

    def damaged(module: torch.nn.Module) -> dict[str, Tensor]:
        state = {key: value.clone() for key, value in module.state_dict().items()}
        state["blocks.3.mlp.fc2.bias"][5] += 0.3
        return state

    monkeypatch.setattr(checkpoints, "float_state", damaged)
    with pytest.raises(ExportError, match=r"the export differs from PyTorch: features differ by up to"):
        export_extractor(backbone, tmp_path / "out", ExportOptions(format="timm"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "format must be one of timm, huggingface, onnx, program, safetensors, got 'tflite'"),
        ({"format": "timm", "pixels": True}, "--pixels applies to formats with a graph .*, got timm"),
        ({"format": "safetensors", "prefix": True}, "--prefix applies to formats with a graph"),
        ({"format": "program", "int8": True}, "--int8 applies to onnx only, got program"),
    ],
    ids=str,
)
def test_incompatible_options_are_refused(
    backbone: Backbone, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_extractor(backbone, tmp_path / "out", ExportOptions(**options))


@pytest.mark.parametrize(("package", "form"), [("onnx", "onnx"), ("onnxscript", "onnx"), ("onnxruntime", "onnx")])
def test_a_missing_package_is_named_with_its_extra(
    shallow: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, form: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"this needs {package}: install the extra `{form}`"):
        export_extractor(shallow, tmp_path / "out", ExportOptions(format=form))
    assert list(tmp_path.iterdir()) == []


def test_model_for_a_single_size_is_refused(tmp_path: Path) -> None:
    """A Python number computed from a size would be fixed in the graph."""

    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Conv2d(3, 8, 16, 16)

        def forward(self, image: Tensor) -> Tensor:
            grid = self.project(image).permute(0, 2, 3, 1)
            return grid + torch.zeros(int(grid.shape[1]) if grid.shape[1] > 4 else 1, 1, 8)

    backbone = dv.load_backbone(Fixed(), patch_size=16, default_size=64)
    with pytest.raises(
        ExportError, match=r"Fixed cannot be traced for arbitrary image sizes|does not run on images of"
    ):
        export_extractor(backbone, tmp_path / "out", ExportOptions(format="program"))


@pytest.mark.parametrize("indexing", ["ij", "xy"])
def test_silently_fixed_size_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indexing: str) -> None:
    """timm's rotary embedding turns the grid into Python numbers, which the tracer fixes for every grid."""
    monkeypatch.setattr(traceable, "PLAIN_ROPE", None)
    backbone: Any = tiny.shallow("vit_small_patch16_dinov3")
    backbone.model.rope.grid_indexing = indexing
    for block in backbone.model.blocks:
        block.attn.qkv.weight.mul_(20)  # so that positions matter, as with trained weights
    with pytest.raises(
        ExportError, match=r"cannot be traced for arbitrary image sizes|the export differs from PyTorch"
    ):
        export_extractor(backbone, tmp_path / "out", ExportOptions(format="program"))
    assert list(tmp_path.iterdir()) == []


def test_custom_module_can_only_be_exported_as_a_graph(tmp_path: Path) -> None:
    backbone = dv.load_backbone(torch.nn.Conv2d(3, 8, 16, 16), patch_size=16, default_size=64, layout="channels_first")
    export_extractor(backbone, tmp_path / "out")
    (features,) = by_onnx(tmp_path / "out" / "model.onnx", tiny.picture(48, 32))
    assert torch.allclose(features, backbone(tiny.picture(48, 32)), atol=1e-5)
    with pytest.raises(ExportError, match="timm supports models of timm, got Conv2d"):
        export_extractor(backbone, tmp_path / "no", ExportOptions(format="timm"))


# Verification


@pytest.fixture
def sound(exported: Exported) -> Path:
    return exported("raw", "program")


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_moved_export_passes_verification(sound: Path, tmp_path: Path) -> None:
    moved = copied(sound, tmp_path / "moved")
    for path in (moved, moved / "model.pt2"):
        verdict = verify_export(path)
        assert verdict.problems == ()
        assert verdict.comparison is not None and verdict.comparison.difference < 1e-5


def test_verification_reports_changed_and_missing_files(sound: Path, tmp_path: Path) -> None:
    folder = copied(sound, tmp_path / "out")
    (folder / "model.pt2").write_bytes((sound / "model.pt2").read_bytes() + b"0")
    (folder / "check.safetensors").unlink()
    verdict = verify_export(folder)
    assert verdict.comparison is None  # the changed model was not loaded
    assert len(verdict.problems) == 2
    assert "model.pt2: not the file that was exported" in verdict.problems[0]
    assert "check.safetensors: missing" in verdict.problems[1]


def test_verification_reports_differing_features(sound: Path, tmp_path: Path) -> None:
    """They are reported even if the recorded digest matches."""
    import hashlib

    folder = copied(sound, tmp_path / "out")
    kept = load_file(folder / "check.safetensors")
    kept["features_1"][0, 2, 3, 5] += 0.01
    save_file(kept, folder / "check.safetensors")
    about = meta(folder)
    about["check"]["digest"] = hashlib.sha256((folder / "check.safetensors").read_bytes()).hexdigest()
    (folder / "export.json").write_text(json.dumps(about))
    (problem,) = verify_export(folder).problems
    assert re.fullmatch(r"features differ by up to 0\.0\d+ of their scale, expected at most 0\.0001", problem)


def test_pickled_parts_of_a_program_are_refused(sound: Path, tmp_path: Path) -> None:
    assert not [name for name in zipfile.ZipFile(sound / "model.pt2").namelist() if name.endswith(".pkl")]
    refuse_pickles(sound / "model.pt2")
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), path)
    with pytest.raises(ExportError, match=r"rejected: .* is pickled"):
        refuse_pickles(path)  # its example inputs are pickled
    path.write_bytes(b"words")
    with pytest.raises(ExportError, match=r"not a torch\.export program, or damaged"):
        refuse_pickles(path)


def test_verification_refuses_other_folders_and_damaged_records(sound: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not an export, or damaged: expected a folder of `dvit export`"):
        verify_export(tmp_path)
    for changes, message in (
        ({"format": "other"}, "not the record of an export"),
        ({"format_version": 9}, "format version 1 or lower, got 9"),
        ({"check": None}, "damaged record: check missing"),
    ):
        (tmp_path / "export.json").write_text(json.dumps(meta(sound) | changes))
        with pytest.raises(ExportError, match=message):
            verify_export(tmp_path)
