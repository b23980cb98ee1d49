"""`dvit prepare`: files of each backbone, resumed runs, and backbones that fail."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import denoising_vit as dv
import tiny_artifact
import tiny_distillation
import tiny_fit
import tiny_hub
from command import Dvit, in_process
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.recorded import describe
from denoising_vit.data import open_dataset
from denoising_vit.errors import PlanError
from denoising_vit.preparation import prepare as preparing
from denoising_vit.preparation.options import PrepareOptions
from denoising_vit.progress import no_progress

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = tiny_fit.MODEL

#: Fewest photos for a diagnosis.
PHOTOS = 8


@pytest.fixture(scope="module", autouse=True)
def registers_found() -> Iterator[None]:
    """Fake register neurons, because a random model has no outlier tokens."""

    def found(backbone: Backbone, photos: list[Any], size: tuple[int, int]) -> dv.Registers:
        assert len(photos) == PHOTOS and size == (tiny_fit.SIZE, tiny_fit.SIZE)
        return dv.Registers(((0, 3), (1, 5)), describe(backbone), {"before": 0.02, "after": 0.0})

    with tiny_distillation.blank_panels(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "find_registers", found)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_fit.write_photos(tmp_path_factory.mktemp("photos"), PHOTOS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_fit.write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def options(weights: Path, **changes: Any) -> PrepareOptions:
    values: dict[str, Any] = {"size": tiny_fit.SIZE, "steps": 4, "batch_size": 2}
    values |= {"weights": str(weights), "device": "cpu", "dtype": "float32"} | changes
    return PrepareOptions(**values)


@pytest.fixture(scope="module")
def prepared(one_thread: None, photos: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one backbone, prepared without interruption after another backbone failed."""
    out = tmp_path_factory.mktemp("prepared")
    failed = preparing.prepare(["no_such_model", MODEL], open_dataset(str(photos)), out, options(weights))
    assert failed.keys() == {"no_such_model"}
    return out / MODEL


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, weights: Path, photos: Path) -> Dvit:
    """Runs `dvit prepare` with the options of these tests."""
    run = in_process(capsys, monkeypatch)
    small = ("--size", tiny_fit.SIZE, "--steps", 4, "--batch-size", 2, "--device", "cpu", "--dtype", "float32")
    return lambda *more: run("prepare", "--photos", photos, "--weights", weights, *small, *more)


def no_loading(_spec: BackboneSpec) -> Backbone:
    raise AssertionError("what is finished needs no backbone")


def files(folder: Path) -> dict[str, bytes]:
    """Files of a folder by name, bit for bit; without the diagnosis, which records how long it took."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".md")}


def interrupted(at: str, after: int) -> Callable[..., Any]:
    """Progress that is interrupted after that many items of one label."""

    @contextlib.contextmanager
    def watch(label: str, _total: int | None) -> Iterator[Callable[[], None]]:
        left = [after if label == at else 10_000]

        def advance() -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        yield advance

    return watch


def test_all_files_exist_and_match_their_backbone(prepared: Path, weights: Path) -> None:
    backbone = tiny_fit.spec_of(weights).load()
    for piece in (dv.Artifact, dv.Subspace, dv.Registers, dv.Denoiser):
        piece.from_pretrained(prepared).require_of(backbone)
    assert "Test-time registers" in (card := (prepared / "README.md").read_text())
    assert "| registers, neurons | 2 |" in card and "| artifact, photos | 8 |" in card
    assert "<html" in (prepared / "diagnosis.html").read_text()
    assert "denoiser" in json.loads((prepared / "diagnosis.json").read_text())["metrics"]
    assert (prepared / "run" / "log.jsonl").is_file()
    assert list((prepared / "run" / "pairs").iterdir()) == []  # pairs of the training are removed
    assert "failed" not in json.loads((prepared / "prepared.json").read_text())


def test_reason_of_a_failure_is_recorded(prepared: Path) -> None:
    record = json.loads((prepared.parent / "no_such_model" / "prepared.json").read_text())
    assert "no_such_model" in record["failed"] and record["stages"] == {}


def test_interrupted_run_resumes_to_the_same_files(prepared: Path, photos: Path, weights: Path, tmp_path: Path) -> None:
    dataset = open_dataset(str(photos))
    messages: list[str] = []

    def run(watch: Any = no_progress, **changes: Any) -> list[str]:
        messages.clear()
        asked = options(weights, **changes)
        assert preparing.prepare([MODEL], dataset, tmp_path, asked, watch=watch, say=messages.append) == {}
        return [text.removeprefix(f"{MODEL}: ") for text in messages]

    with pytest.raises(KeyboardInterrupt):
        run(interrupted("photos", 3), denoiser=False)
    assert run(denoiser=False) == ["artifact", "subspace", "registers", "diagnosis"]
    with pytest.raises(KeyboardInterrupt):
        run(interrupted("steps", 2))
    assert run() == ["denoiser", "diagnosis"]  # the diagnosis again, with the denoiser
    assert files(tmp_path / MODEL) == files(prepared)


def test_command_reports_failures_and_keeps_finished_files(
    dvit: Dvit, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared, tmp_path / MODEL)
    before = files(tmp_path / MODEL)
    done = dvit("--models", MODEL, "no_such_model", "-o", tmp_path)
    assert done.code == 1
    assert "failed: no_such_model: " in done.err
    assert f"1 of 2 backbones prepared in {tmp_path}" in done.err
    monkeypatch.setattr(BackboneSpec, "load", no_loading)
    assert dvit("--models", MODEL, "-o", tmp_path).code == 0
    assert files(tmp_path / MODEL) == before


def test_other_options_are_refused(dvit: Dvit, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / MODEL)
    done = dvit("--models", MODEL, "-o", tmp_path, "--steps", 5)
    assert done.code == 1
    assert "was prepared with other options: options.steps was 4, now 5. Use the same" in done.err
    assert dvit("--models", MODEL, "-o", tmp_path, "--steps", 5, "--no-denoiser").code == 0  # nothing is trained
    assert dvit("--models", MODEL, "-o", tmp_path, "--steps", 0).code == 2


def test_folder_with_other_contents_is_not_touched(dvit: Dvit, tmp_path: Path) -> None:
    (tmp_path / MODEL).mkdir()
    (tmp_path / MODEL / "notes.txt").write_text("mine")
    done = dvit("--models", MODEL, "-o", tmp_path)
    assert done.code == 1
    assert f"{tmp_path / MODEL} exists and was not written by dvit prepare" in done.err
    assert [path.name for path in (tmp_path / MODEL).iterdir()] == ["notes.txt"]


def test_folders_are_uploaded(dvit: Dvit, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tiny_hub.installed(tmp_path / "hub", monkeypatch)
    shutil.copytree(prepared, tmp_path / MODEL)
    done = dvit("--models", MODEL, "-o", tmp_path, "--push", "owner")
    assert done.code == 0
    assert f"{MODEL}: uploaded to https://hub/owner/{MODEL}" in done.err
    assert {*hub.list_repo_files(f"owner/{MODEL}")} == {*files(prepared), ".gitattributes"}
    assert dv.Subspace.from_pretrained(f"owner/{MODEL}").rank == dv.Subspace.from_pretrained(prepared).rank


def test_unsupported_registers_are_recorded_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "find_registers", dv.find_registers)
    photos = open_dataset(str(tiny_artifact.write_photos(tmp_path / "photos", 4)))
    work = preparing._Work(tiny_artifact.backbone(), photos, tmp_path, PrepareOptions(), no_progress, {})
    assert "test-time registers need a timm VisionTransformer" in preparing._registers(work)["none"]
    assert not (tmp_path / "registers.safetensors").exists()


def test_model_name_becomes_a_folder_name(tmp_path: Path) -> None:
    assert preparing.folder_name("hf:facebook/dinov2-small") == "hf-facebook-dinov2-small"
    assert preparing.folder_name("vit_small_patch14_dinov2.lvd142m") == "vit_small_patch14_dinov2.lvd142m"
    with pytest.raises(PlanError, match="expected models with different folder names, got a/b, a-b"):
        preparing.prepare(
            ["a/b", "a-b"], open_dataset(str(tiny_artifact.write_photos(tmp_path, 1))), tmp_path, PrepareOptions()
        )
