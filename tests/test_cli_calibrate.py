"""`dvit calibrate`, and `dvit denoise` and `dvit fit` with its artifact: files, metrics, exit codes, messages."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import denoising_vit.maps
import tiny_artifact as tiny
import tiny_fit
from command import Dvit, in_process
from denoising_vit import Artifact, Decomposition
from denoising_vit import artifact as known
from denoising_vit.artifact import artifact_digest
from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli import denoise_job as verb
from denoising_vit.data import spread
from denoising_vit.store import FeatureStore

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def real(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    """Runs `dvit ...` in this process; an exit by the parser is returned as an exit code."""
    monkeypatch.setattr(denoising_vit.maps, "draw_panel", draw_dot)
    return in_process(capsys, monkeypatch)


@pytest.fixture
def dvit(real: Dvit, monkeypatch: pytest.MonkeyPatch) -> Dvit:
    """The same, with the planted backbone for any model name."""
    monkeypatch.setattr(BackboneSpec, "load", lambda _spec: tiny.backbone())
    return real


def draw_dot(_photo: np.ndarray, _result: Decomposition, path: Path, **_options: Any) -> None:
    Image.new("RGB", (1, 1)).save(path, format="PNG")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_photos(tmp_path_factory.mktemp("photos"), 8)


@pytest.fixture
def data(photos: Path, tmp_path: Path) -> Path:
    """A copy of the photos."""
    return Path(shutil.copytree(photos, tmp_path / "data"))


@pytest.fixture
def calibrated(tmp_path: Path) -> Path:
    """The planted artifact as a file, without calibrating."""
    tiny.artifact_of(tiny.backbone()).save(tmp_path / "planted.safetensors")
    return tmp_path / "planted.safetensors"


# --- calibrate: success ---


def test_success_writes_the_artifact_and_prints_its_stability(dvit: Dvit, photos: Path, tmp_path: Path) -> None:
    done = dvit("calibrate", photos, "-o", tmp_path / "g.safetensors")
    assert (done.code, done.out) == (0, ""), done.err
    lines = done.err.splitlines()
    assert lines[0].startswith("backbone Planted, patch 8")
    assert lines[1].startswith("split-half correlation (photos): 0.9") and lines[1].endswith("(8)")
    assert lines[2].startswith("reliability of the artifact from 8 photos: 0.9")
    assert lines[-1] == f"artifact written to {tmp_path / 'g.safetensors'}"
    assert "warning" not in done.err
    found = Artifact.load(tmp_path / "g.safetensors")
    assert tiny.correlation(found.values, tiny.pattern(*tiny.GRID)) > 0.98
    assert found.info["photos"] == [f"{number:02}.png" for number in range(8)]


def test_command_and_python_give_the_same_artifact(dvit: Dvit, photos: Path, tmp_path: Path) -> None:
    dvit("calibrate", photos, "-o", tmp_path / "g.safetensors", "--views", 12, "--seed", 3)
    expected = denoising_vit.calibrate(tiny.backbone(), sorted(photos.iterdir()), views=12, seed=3)
    torch.testing.assert_close(
        Artifact.load(tmp_path / "g.safetensors").values, expected.values.half().float(), rtol=0, atol=1e-6
    )


def test_same_command_again_writes_the_same_bytes(dvit: Dvit, photos: Path, tmp_path: Path) -> None:
    written = []
    for _ in range(2):
        assert dvit("calibrate", photos, "-o", tmp_path / "g.safetensors").code == 0
        written.append((tmp_path / "g.safetensors").read_bytes())
    assert written[0] == written[1]


def test_json_prints_one_line_of_metrics(dvit: Dvit, photos: Path, tmp_path: Path) -> None:
    done = dvit("calibrate", photos, "-o", tmp_path / "g.safetensors", "--json")
    (row,) = done.rows
    assert done.code == 0
    assert (row["photos"], row["skipped"]) == (8, [])
    assert row["reliability"] > 0.95
    assert row["suggested"] >= 4
    assert set(row["split_half_by_photos"]) == {"4", "8"}
    assert row["output"] == str(tmp_path / "g.safetensors")


def test_unstable_artifact_is_written_with_a_warning(
    dvit: Dvit, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BackboneSpec, "load", lambda _spec: tiny.backbone(0.0))
    done = dvit("calibrate", photos, "-o", tmp_path / "g.safetensors")
    assert done.code == 0
    assert "warning: 8 photos have hardly any artifact in common" in done.err
    assert (tmp_path / "g.safetensors").is_file()


def test_list_of_photos_is_accepted_as_data(dvit: Dvit, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted(photos.iterdir())[:5]))
    done = dvit("calibrate", tmp_path / "list.txt", "-o", tmp_path / "g.safetensors", "--json")
    assert done.rows[0]["photos"] == 5


def test_artifact_of_the_same_data_is_replaced(dvit: Dvit, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "g.safetensors"
    out.parent.mkdir()
    assert dvit("calibrate", photos, "-o", out).code == 0
    before = out.read_bytes()
    assert dvit("calibrate", photos, "-o", out, "--photos", 6).code == 0
    assert out.read_bytes() != before
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_file_not_written_by_calibrate_is_not_overwritten(dvit: Dvit, photos: Path, calibrated: Path) -> None:
    before = calibrated.read_bytes()
    done = dvit("calibrate", photos, "-o", calibrated)
    assert done.code == 2
    assert f"{calibrated} exists and was not written by this command" in done.err
    assert calibrated.read_bytes() == before


# --- calibrate: choice of photos ---


def test_photos_are_spread_evenly_over_the_data(dvit: Dvit, photos: Path, tmp_path: Path) -> None:
    dvit("calibrate", photos, "-o", tmp_path / "g.safetensors", "--photos", 4)
    assert Artifact.load(tmp_path / "g.safetensors").info["photos"] == ["01.png", "03.png", "05.png", "07.png"]


@pytest.mark.parametrize("wanted", [0, 8, 9, 1000])
def test_all_photos_are_used_if_no_more_are_available(dvit: Dvit, photos: Path, tmp_path: Path, wanted: int) -> None:
    done = dvit("calibrate", photos, "-o", tmp_path / "g.safetensors", "--photos", wanted, "--json")
    assert done.rows[0]["photos"] == 8


@pytest.mark.parametrize(("count", "wanted"), [(100, 7), (64, 64), (65, 64), (1000, 64), (3, 2), (101, 100)])
def test_spread_gives_distinct_evenly_spaced_indices(count: int, wanted: int) -> None:
    places = spread(count, wanted)
    steps = np.diff(places)
    assert len(set(places)) == wanted
    assert set(places) <= set(range(count))
    assert steps.max() - steps.min() <= 1
    assert abs(places[0] - (count - 1 - places[-1])) <= 1  # as far from one end as from the other


# --- calibrate: unusable photos ---


def test_bad_photos_are_skipped_with_reasons_and_exit_code_1(dvit: Dvit, data: Path, tmp_path: Path) -> None:
    (data / "02.png").write_text("words")
    Image.fromarray(tiny.flat()).save(data / "03.png")
    shutil.copy(data / "04.png", data / "05.png")
    done = dvit("calibrate", data, "-o", tmp_path / "g.safetensors", "--json")
    assert done.code == 1
    assert done.rows[0]["skipped"] == ["02.png", "03.png", "05.png"]
    assert done.rows[0]["photos"] == 5
    assert "skipped: 02.png: not an image file" in done.err
    assert "skipped: 03.png: no content" in done.err
    assert "skipped: 05.png: a duplicate of 04.png" in done.err
    assert (tmp_path / "g.safetensors").is_file()


def test_broken_links_count_as_skipped(dvit: Dvit, data: Path, tmp_path: Path) -> None:
    """As for `dvit fit`, the exit code is 1 if a requested item cannot be used."""
    (data / "08.png").symlink_to(data / "gone.png")
    done = dvit("calibrate", data, "-o", tmp_path / "g.safetensors")
    assert "skipped: 08.png: a broken link" in done.err
    assert done.code == 1


def test_too_few_photos_are_refused_and_nothing_is_written(dvit: Dvit, data: Path, tmp_path: Path) -> None:
    for path in sorted(data.iterdir())[3:]:
        path.write_text("words")
    done = dvit("calibrate", data, "-o", tmp_path / "g.safetensors")
    assert done.code == 2
    assert "3 usable photos (5 skipped; first: 03.png: not an image file" in done.err
    assert "needs at least 4" in done.err
    assert not (tmp_path / "g.safetensors").exists()


def test_single_image_is_refused(dvit: Dvit, data: Path, tmp_path: Path) -> None:
    done = dvit("calibrate", data / "00.png", "-o", tmp_path / "g.safetensors")
    assert done.code == 2
    assert not (tmp_path / "g.safetensors").exists()


# --- calibrate: wrong usage ---


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes loading a model an error: wrong usage must be reported first."""

    def refuse(_spec: BackboneSpec) -> None:
        raise AssertionError("no model was to be loaded")

    monkeypatch.setattr(BackboneSpec, "load", refuse)


@pytest.mark.parametrize("name", ["g.pt", "g", "none/g.safetensors", "folder.safetensors"])
def test_invalid_output_path_is_refused_at_once(
    dvit: Dvit, no_model: None, photos: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    done = dvit("calibrate", photos, "-o", tmp_path / name)
    assert done.code == 2
    assert f"-o {tmp_path / name}: expected a .safetensors file in an existing folder" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--photos", "-1"], "--photos must be at least 0 (all), got -1"),
        (["--photos", "some"], "some"),
        (["--views", "1"], "views must be at least 2, got 1"),
        (["--smoothness", "nan"], "smoothness must be at least 0"),
        (["--held-out", "4"], "held-out"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_at_once(
    dvit: Dvit, no_model: None, photos: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = dvit("calibrate", photos, "-o", tmp_path / "g.safetensors", *options)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "g.safetensors").exists()


def test_missing_data_is_refused_at_once(dvit: Dvit, no_model: None, tmp_path: Path) -> None:
    done = dvit("calibrate", tmp_path / "none", "-o", tmp_path / "g.safetensors")
    assert done.code == 2
    assert str(tmp_path / "none") in done.err


def test_folder_without_photos_is_refused_at_once(dvit: Dvit, no_model: None, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = dvit("calibrate", tmp_path / "empty", "-o", tmp_path / "g.safetensors")
    assert done.code == 2
    assert not (tmp_path / "g.safetensors").exists()


def test_size_off_the_patch_grid_is_refused(dvit: Dvit, photos: Path, tmp_path: Path) -> None:
    done = dvit("calibrate", photos, "-o", tmp_path / "g.safetensors", "--size", 60)
    assert done.code == 2
    assert "Nearest: 56 or 64" in done.err


def test_interrupt_writes_nothing(dvit: Dvit, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny.Planted()
    extractor = tiny.plain(module)
    _ = extractor.fingerprint

    def interrupted(*_arguments: Any) -> Tensor:
        raise KeyboardInterrupt

    module.register_forward_pre_hook(interrupted)
    monkeypatch.setattr(BackboneSpec, "load", lambda _spec: extractor)
    done = dvit("calibrate", photos, "-o", tmp_path / "g.safetensors")
    assert done.code == 130
    assert "interrupted; nothing was written" in done.err
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_reported_and_leaves_no_file(
    dvit: Dvit, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    done = dvit("calibrate", photos, "-o", tmp_path / "g.safetensors")
    assert done.code == 2
    assert f"cannot write {tmp_path / 'g.safetensors'} (No space left on device)" in done.err
    assert list(tmp_path.iterdir()) == []


# --- denoise with an artifact ---

FEW = ("--views", "8", "--held-out", "2")


@pytest.mark.parametrize("method", ["exact", "subtract"])
def test_denoise_uses_the_artifact_of_a_file(
    dvit: Dvit, photos: Path, calibrated: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "out"
    done = dvit("denoise", photos / "00.png", "-o", out, "--artifact", calibrated, "--method", method, *FEW)
    assert done.code == 0, done.err
    result, values = Decomposition.load(out / "00.safetensors"), Artifact.load(calibrated).values
    assert torch.equal(result.artifact, values)
    assert result.info["artifact"] == artifact_digest(values)
    assert result.info["method"] == method
    assert "resampled" not in done.err


@pytest.mark.parametrize("method", ["exact", "subtract"])
def test_denoise_says_that_the_artifact_is_resampled(
    dvit: Dvit, photos: Path, calibrated: Path, tmp_path: Path, method: str
) -> None:
    more = ("--artifact", calibrated, "--method", method, "--size", "40")
    done = dvit("denoise", photos / "00.png", "-o", tmp_path / "out", *more, *FEW)
    assert done.code == 0
    assert "the artifact was calibrated on 7 x 7 patches and is resampled to 5 x 5" in done.err


def test_table_of_subtract_has_no_held_out_metrics(dvit: Dvit, photos: Path, calibrated: Path, tmp_path: Path) -> None:
    more = ("--artifact", calibrated, "--method", "subtract")
    done = dvit("denoise", photos / "00.png", "-o", tmp_path / "out", *more)
    assert done.out.splitlines()[1].split()[:5] == ["00.png", "00.safetensors", "1", "-", "-"]


def test_json_of_subtract_has_null_held_out_metrics(dvit: Dvit, photos: Path, calibrated: Path, tmp_path: Path) -> None:
    more = ("--artifact", calibrated, "--method", "subtract", "--json")
    (row,) = dvit("denoise", photos / "00.png", "-o", tmp_path / "out", *more).rows
    assert (row["status"], row["views"], row["heldout_r2"], row["heldout_cosine"]) == ("done", 1, None, None)


@pytest.fixture
def no_computing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function that makes stage 1 an error from then on."""

    def never(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("this must not be called")

    return lambda: monkeypatch.setattr(verb.Denoising, "__call__", never)


@pytest.mark.parametrize("method", ["exact", "subtract"])
def test_result_is_kept_on_the_second_run(
    dvit: Dvit, photos: Path, calibrated: Path, tmp_path: Path, no_computing: Callable[[], None], method: str
) -> None:
    command = ("denoise", photos / "00.png", "-o", tmp_path / "out", "--artifact", calibrated, "--method", method)
    assert dvit(*command, *FEW).code == 0
    no_computing()
    again = dvit(*command, *FEW, "--json")
    assert again.code == 0
    assert (again.rows[0]["status"], again.rows[0]["note"]) == ("kept", "kept")


@pytest.mark.parametrize("method", ["exact", "subtract"])
def test_result_with_another_artifact_counts_as_other_settings(
    dvit: Dvit, photos: Path, calibrated: Path, tmp_path: Path, method: str
) -> None:
    other = tmp_path / "other.safetensors"
    tiny.artifact_of(tiny.backbone(), tiny.pattern(*tiny.GRID) * 1.1).save(other)
    command = ("denoise", photos / "00.png", "-o", tmp_path / "out", "--method", method, *FEW)
    assert dvit(*command, "--artifact", calibrated).code == 0
    (row,) = dvit(*command, "--artifact", other, "--json").rows
    assert (row["status"], row["note"]) == ("kept", "kept, made with other settings; use --overwrite to redo it")


@pytest.mark.parametrize("first_known", [True, False])
def test_fitted_and_known_artifact_count_as_other_settings(
    dvit: Dvit, photos: Path, calibrated: Path, tmp_path: Path, first_known: bool
) -> None:
    command = ("denoise", photos / "00.png", "-o", tmp_path / "out", *FEW, "--json")
    one, other = (("--artifact", calibrated), ()) if first_known else ((), ("--artifact", calibrated))
    assert dvit(*command, *one).code == 0
    assert "made with other settings" in dvit(*command, *other).rows[0]["note"]


def test_overwrite_uses_the_new_artifact(dvit: Dvit, photos: Path, calibrated: Path, tmp_path: Path) -> None:
    command = ("denoise", photos / "00.png", "-o", tmp_path / "out", *FEW)
    assert dvit(*command).code == 0
    assert dvit(*command, "--artifact", calibrated, "--overwrite").code == 0
    found = Decomposition.load(tmp_path / "out" / "00.safetensors").artifact
    assert torch.equal(found, Artifact.load(calibrated).values)


@pytest.mark.parametrize(
    ("artifact", "message"),
    [
        ("none.safetensors", "no such file"),
        ("words.safetensors", "not an artifact, or damaged"),
        ("shipped", "dvit cal"),
    ],
)
def test_artifact_that_cannot_be_used_is_refused_before_any_photo(
    dvit: Dvit, photos: Path, tmp_path: Path, artifact: str, message: str
) -> None:
    (tmp_path / "words.safetensors").write_text("words")
    given = artifact if artifact == "shipped" else tmp_path / artifact
    done = dvit("denoise", photos, "-o", tmp_path / "out", "--artifact", given)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_subtraction_without_any_artifact_is_refused(dvit: Dvit, photos: Path, tmp_path: Path) -> None:
    done = dvit("denoise", photos, "-o", tmp_path / "out", "--method", "subtract")
    assert done.code == 2
    assert "create one with dvit calibrate PHOTOS -o FILE, and pass it with --artifact FILE" in done.err


def test_resampling_of_the_shipped_artifact_is_reported(
    dvit: Dvit, photos: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shipped").mkdir()
    shutil.copy(calibrated, tmp_path / "shipped" / "Planted.safetensors")
    monkeypatch.setattr(known, "_FOLDER", tmp_path / "shipped")
    done = dvit("denoise", photos / "00.png", "-o", tmp_path / "out", "--method", "subtract", "--size", "40")
    assert done.code == 0, done.err
    assert "resampled to 5 x 5" in done.err


# --- layers of a real model ---


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_fit.write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture
def vit(weights: Path) -> list[str]:
    """The options of a tiny ViT on a grid of 3 x 3."""
    model = ["--backbone", tiny_fit.MODEL, "--weights", str(weights), "--device", "cpu", "--dtype", "float32"]
    return [*model, "--size", str(tiny_fit.SIZE)]


def test_artifact_of_another_layer_is_refused_with_both_named(
    real: Dvit, photos: Path, vit: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "g.safetensors"
    assert real("calibrate", photos, "-o", file, *vit, "--layer", 5).code == 0
    assert Artifact.load(file).backbone["layer"] == 5
    own = real("denoise", photos / "00.png", "-o", tmp_path / "own", "--artifact", file, *vit, *FEW, "--layer", 5)
    assert own.code == 0, own.err
    done = real("denoise", photos / "00.png", "-o", tmp_path / "out", "--artifact", file, *vit, *FEW)
    assert done.code == 2
    assert f"calibrated for {tiny_fit.MODEL} (layer 5, " in done.err
    assert f"got {tiny_fit.MODEL} (layer 11, " in done.err
    assert not (tmp_path / "out").exists()


# --- fit with an artifact ---


@pytest.fixture
def fit(dvit: Dvit) -> Dvit:
    """Runs `dvit fit DATA -o STORE` with the planted backbone."""
    return lambda data, store, *more: dvit("fit", data, "-o", store, *FEW, "--images-per-shard", "3", *more)


def test_fit_records_the_artifact_in_the_manifest(fit: Dvit, photos: Path, calibrated: Path, tmp_path: Path) -> None:
    assert fit(photos, tmp_path / "store", "--artifact", calibrated).code == 0
    manifest = FeatureStore.open(tmp_path / "store").manifest
    assert manifest.options["artifact"] == artifact_digest(Artifact.load(calibrated).values)


def test_fit_with_an_artifact_gives_the_fields_of_denoise(
    fit: Dvit, photos: Path, calibrated: Path, tmp_path: Path
) -> None:
    fit(photos, tmp_path / "store", "--artifact", calibrated)
    store = FeatureStore.open(tmp_path / "store")
    found = torch.from_numpy(np.asarray(store.read(2)[0], dtype=np.float32))
    expected = denoising_vit.denoise_image(
        tiny.backbone(), photos / store.ids[2], artifact=calibrated, views=8, held_out=2
    )
    torch.testing.assert_close(found, expected.field, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("first_known", [True, False])
def test_fit_refuses_a_store_made_with_another_artifact_or_none(
    fit: Dvit, photos: Path, calibrated: Path, tmp_path: Path, first_known: bool
) -> None:
    one, other = (("--artifact", calibrated), ()) if first_known else ((), ("--artifact", calibrated))
    assert fit(photos, tmp_path / "store", *one).code == 0
    refused = fit(photos, tmp_path / "store", *other)
    assert refused.code == 2
    digest = artifact_digest(Artifact.load(calibrated).values)
    sides = (digest, "none") if first_known else ("none", digest)
    assert f"option artifact: the store has {sides[0]}, this run has {sides[1]}" in refused.err


def test_fit_resumes_with_the_same_artifact(fit: Dvit, photos: Path, calibrated: Path, tmp_path: Path) -> None:
    assert fit(photos, tmp_path / "store", "--artifact", calibrated).code == 0
    again = fit(photos, tmp_path / "store", "--artifact", calibrated, "--json")
    assert (again.code, again.out) == (0, "")


def test_fit_says_that_the_artifact_is_resampled(fit: Dvit, photos: Path, calibrated: Path, tmp_path: Path) -> None:
    done = fit(photos, tmp_path / "store", "--artifact", calibrated, "--size", "40")
    assert done.code == 0
    assert "resampled to 5 x 5" in done.err


def test_fit_refuses_the_artifact_of_another_backbone(fit: Dvit, photos: Path, tmp_path: Path) -> None:
    tiny.artifact_of(tiny.backbone(seed=1)).save(tmp_path / "other.safetensors")
    done = fit(photos, tmp_path / "store", "--artifact", tmp_path / "other.safetensors")
    assert done.code == 2
    assert "this artifact was calibrated for Planted" in done.err
    assert not (tmp_path / "store").exists()
