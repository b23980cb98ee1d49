"""`dvit export`: exit codes, messages, written files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import denoising_vit as dv
import tiny_export as tiny
import tiny_fit
import tiny_huggingface
from command import Dvit, Outcome, in_process
from denoising_vit.denoiser import write_denoiser
from denoising_vit.errors import DenoisingVitWarning

pytestmark = pytest.mark.usefixtures("one_thread")

Export = Callable[..., Outcome]


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    return in_process(capsys, monkeypatch)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.distilled(tmp_path_factory.mktemp("weights") / "plain.safetensors", None)


@pytest.fixture(scope="module")
def denoiser(weights: Path) -> Path:
    path = weights.parent / "denoiser.safetensors"
    write_denoiser(tiny.denoiser(tiny.backbone(weights=str(weights))), path)
    return path


@pytest.fixture(scope="module")
def artifact(weights: Path) -> Path:
    path = weights.parent / "artifact.safetensors"
    tiny.artifact(tiny.backbone(weights=str(weights))).save(path)
    return path


@pytest.fixture
def export(dvit: Dvit, weights: Path, tmp_path: Path) -> Export:
    """Runs `dvit export -o OUT ...` with the tiny model; later options override earlier ones."""
    model = ("--backbone", tiny.MODEL, "--weights", weights)
    return lambda *more: dvit("export", "-o", tmp_path / "out", *model, *more)


def meta(folder: Path) -> dict[str, object]:
    return json.loads((folder / "export.json").read_text())


def test_exported_folder_can_be_verified(export: Export, dvit: Dvit, tmp_path: Path) -> None:
    done = export("--format", "timm")
    assert done.code == 0, done.err
    assert done.out == ""
    assert "exporting raw features of vit_tiny_patch16_224" in done.err
    assert "against PyTorch: maximum difference 0, mean cosine 1.000000" in done.err
    again = dvit("export", "--verify", tmp_path / "out", "--json")
    assert again.code == 0
    assert f"{tmp_path / 'out'}: intact" in again.err
    (row,) = again.rows
    assert row["export"] == str(tmp_path / "out")
    assert row["difference"] == 0


def test_onnx_is_the_default_and_options_are_recorded(export: Export, tmp_path: Path, weights: Path) -> None:
    """Uses the first block only, whose graph is built in a fraction of the time."""
    denoiser = tmp_path / "denoiser.safetensors"
    write_denoiser(tiny.denoiser(tiny.backbone(weights=str(weights), layer=0)), denoiser)
    done = export("--layer", 0, "--denoiser", denoiser, "--pixels", "--prefix", "--licence", "our own", "--json")
    assert done.code == 0, done.err
    assert done.rows[0]["difference"] < 1e-3
    about = meta(tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert about["features"] == "denoiser"
    assert about["options"] == {"pixels": True, "prefix": True, "int8": False}
    assert about["licence"] == "our own"


@pytest.mark.parametrize("kind", ["subtract", "denoiser"])
def test_artifact_and_denoiser_are_exported(
    export: Export, tmp_path: Path, artifact: Path, denoiser: Path, weights: Path, kind: str
) -> None:
    given = ("--artifact", artifact) if kind == "subtract" else ("--denoiser", denoiser)
    assert export("--features", kind, *given, "--format", "safetensors").code == 0
    extractor = dv.load_extractor(tmp_path / "out", device="cpu", dtype="float32")
    assert (extractor.denoiser is None) is (kind == "subtract")
    raw = tiny.backbone(weights=str(weights))(tiny.picture(48, 80))
    assert not torch.allclose(extractor(tiny.picture(48, 80)), raw, atol=0.1)


def test_model_without_a_shipped_cleaner_is_rejected(export: Export, tmp_path: Path) -> None:
    for kind, message in (("subtract", "no artifact for vit_tiny"), ("denoiser", "no denoiser for vit_tiny")):
        failed = export("--features", kind)
        assert failed.code == 2
        assert message in failed.err
    assert not (tmp_path / "out").exists()


def test_distilled_weights_are_recognised(export: Export, dvit: Dvit, tmp_path: Path) -> None:
    weights = tiny.distilled(tmp_path / "distilled.safetensors", '{"format": "denoising-vit/distilled"}')
    assert export("--weights", weights, "--format", "timm").code == 0  # the file says that it is distilled
    assert meta(tmp_path / "out")["features"] == "distilled"
    again = ("--backbone", tmp_path / "out", "--format", "timm", "--features", "distilled")
    assert dvit("export", "-o", tmp_path / "twice", *again).code == 0
    assert meta(tmp_path / "twice")["features"] == "distilled"
    failed = dvit("export", "-o", tmp_path / "no", "--backbone", tiny.MODEL, "--features", "distilled")
    assert failed.code == 2
    assert "needs the weights of stage 3; give --weights FILE" in failed.err


def test_existing_folder_is_rejected_and_unchanged(export: Export, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    failed = export("--format", "timm")
    assert failed.code == 2
    assert "error: " in failed.err
    assert "already exists; choose another folder with -o" in failed.err
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_verify_of_a_changed_export_exits_1(export: Export, dvit: Dvit, tmp_path: Path) -> None:
    export("--format", "timm")
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace("0.9", "0.8"))
    failed = dvit("export", "--verify", tmp_path / "out")
    assert failed.code == 1
    assert "failed: " in failed.err
    assert "config.json: not the file that was exported" in failed.err
    assert "intact" not in failed.err
    assert dvit("export", "--verify", tmp_path).code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give -o DIR to export, or --verify DIR to check an export"),
        (("-o", "x", "--artifact", "shipped", "--denoiser", "shipped"), "--artifact and --denoiser cannot be combined"),
        (("-o", "x", "--features", "average"), "unknown features: 'average'"),
        (("-o", "x", "--subspace", "a", "--registers", "b"), "--subspace and --registers cannot be combined"),
        (("-o", "x", "--features", "raw", "--denoiser", "shipped"), "--denoiser has no effect on --features raw"),
        (("-o", "x", "--features", "denoiser", "--artifact", "shipped"), "--artifact has no effect on --features deno"),
        (("-o", "x", "--format", "timm", "--int8"), "--int8 applies to onnx only, got timm"),
        (("-o", "x", "--format", "jpeg"), "invalid choice"),
    ],
    ids=str,
)
def test_wrong_usage_exits_2_and_writes_nothing(
    dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    failed = dvit("export", *options)
    assert failed.code == 2
    assert message in failed.words
    assert list(tmp_path.iterdir()) == []


def test_help_lists_options_and_formats(dvit: Dvit) -> None:
    shown = dvit("export", "--help")
    assert shown.code == 0
    for word in ("--verify", "--int8", "huggingface", "dv.load_extractor", "hf:ID or hf:PATH"):
        assert word in shown.words


def denoise(dvit: Dvit, tmp_path: Path, backbone: object, *more: object) -> Outcome:
    """Runs `dvit denoise` on one photo with a backbone and more options."""
    tiny_fit.write_photos(tmp_path / "photos", 1)
    return dvit("denoise", tmp_path / "photos", "-o", tmp_path / "results", "--backbone", backbone, *more)


FITTING = ("--views", 6, "--held-out", 1, "--method", "exact")


@pytest.mark.parametrize("prefix", ["hf:", ""])
def test_denoise_loads_an_exported_huggingface_directory(dvit: Dvit, tmp_path: Path, prefix: str) -> None:
    dv.export_extractor(tiny.dinov2(), tmp_path / "out", dv.ExportOptions(format="huggingface"))
    done = denoise(dvit, tmp_path, f"{prefix}{tmp_path}/out", *FITTING, "--size", 56, "--json")
    assert done.code == 0, done.err
    assert "backbone hf:out, patch 14" in done.err
    result = dv.Decomposition.load(done.rows[0]["output"])
    assert result.semantic.shape == (4, 4, 32)
    assert result.info["backbone"]["name"] == "hf:out"


def test_denoise_loads_an_exported_timm_directory(export: Export, dvit: Dvit, tmp_path: Path, denoiser: Path) -> None:
    assert export("--format", "timm").code == 0
    more = ("--denoiser", denoiser, "--size", 64, "--dtype", "float32", "--json")
    done = denoise(dvit, tmp_path, tmp_path / "out", *more)
    assert done.code == 0, done.err  # the denoiser accepts it as the backbone that it was trained for
    assert done.rows[0]["status"] == "done"


def test_processor_that_crops_prints_a_warning(dvit: Dvit, tmp_path: Path) -> None:
    tiny_huggingface.write(tmp_path / "model", "dinov2", processor={"do_center_crop": True})
    with warnings.catch_warnings():
        warnings.simplefilter("default", DenoisingVitWarning)  # as outside of tests, where warnings are not errors
        done = denoise(dvit, tmp_path, tmp_path / "model", *FITTING, "--size", 32)
    assert done.code == 0, done.err
    assert "warning: the image processor of hf:model crops the centre of photos" in done.words
    assert "UserWarning" not in done.err
