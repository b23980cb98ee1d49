"""`dvit denoise` with a denoiser: choice of the method, output, comparison pictures and existing results."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import denoising_vit as dv
import denoising_vit.maps
import tiny_artifact
import tiny_denoiser as tiny
from command import Dvit, in_process
from denoising_vit import Decomposition
from denoising_vit.backbones import BackboneSpec
from denoising_vit.denoise import Denoising
from denoising_vit.denoiser.loading import denoiser_digest
from denoising_vit.maps.sheet import CELL, GAP, LEFT, RIGHT

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = ("--views", "8", "--held-out", "2")

Drawn = list[tuple[Decomposition, Decomposition | None]]


@pytest.fixture(autouse=True)
def nothing_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ship no denoiser, whatever the package contains."""
    tiny.ship(tmp_path / "shipped", monkeypatch)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ship a denoiser of the planted backbone, and one of the same backbone with other weights."""
    other = tiny.backbone(seed=1)
    tiny.ship(tmp_path / "package", monkeypatch, a=tiny.denoiser(other, seed=1), b=tiny.denoiser(tiny.backbone()))


@pytest.fixture
def whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    """Runs `dvit denoise ...` with the planted backbone."""
    monkeypatch.setattr(BackboneSpec, "load", lambda _spec: tiny.backbone())
    run = in_process(capsys, monkeypatch)
    return lambda *arguments: run("denoise", *FEW, *arguments)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """The results passed to drawing, each with that of exact or None; single dots are drawn instead."""
    seen: Drawn = []

    def draw_dot(
        _photo: np.ndarray, result: Decomposition, path: Path, *, exact: Decomposition | None = None, **_more: Any
    ) -> None:
        seen.append((result, exact))
        Image.new("RGB", (1, 1)).save(path, format="PNG")

    monkeypatch.setattr(denoising_vit.maps, "draw_panel", draw_dot)
    return seen


@pytest.fixture
def dvit(whole: Dvit, drawn: Drawn) -> Dvit:
    """The same, with single dots as pictures."""
    return whole


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return tiny_artifact.write_photos(tmp_path / "photos", 1) / "00.png"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A denoiser of the planted backbone, different from the shipped one."""
    return tiny.write(tmp_path / "secret", tiny.denoiser(tiny.backbone(), seed=2), "mine.safetensors")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that were run, in order."""
    real, methods = Denoising.__call__, []

    def run(*arguments: Any, **options: Any) -> Decomposition:
        methods.append(arguments[0].options.method)
        return real(*arguments, **options)

    monkeypatch.setattr(Denoising, "__call__", run)
    return methods


@pytest.fixture
def no_computing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to forbid denoising from here on."""

    def never(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("this must not be called")

    return lambda: monkeypatch.setattr(Denoising, "__call__", never)


def result_of(folder: Path) -> Decomposition:
    return Decomposition.load(folder / "00.safetensors")


# --- which method ---


@pytest.mark.usefixtures("shipped")
def test_shipped_denoiser_is_the_default_and_is_reported(dvit: Dvit, photo: Path, tmp_path: Path) -> None:
    done = dvit(photo, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    digest = denoiser_digest(tiny.denoiser())
    (line,) = [line for line in done.err.splitlines() if line.startswith("backbone Planted")]
    assert line.endswith(f"; method denoiser (in the package, {digest[:8]})")
    info = result_of(tmp_path / "out").info
    assert (info["method"], info["denoiser"]) == ("denoiser", {"source": "shipped", "digest": digest})


def test_exact_is_the_default_without_a_shipped_denoiser(dvit: Dvit, photo: Path, tmp_path: Path, drawn: Drawn) -> None:
    done = dvit(photo, "-o", tmp_path / "out")
    assert done.code == 0
    assert "; method exact\n" in done.err and "denoiser" not in done.err
    assert result_of(tmp_path / "out").info["method"] == "exact"
    assert [exact for _, exact in drawn] == [None]


@pytest.mark.usefixtures("shipped")
def test_exact_is_the_default_for_other_weights(
    dvit: Dvit, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, other in enumerate((tiny.backbone(seed=2), tiny.backbone(stride=4))):
        monkeypatch.setattr(BackboneSpec, "load", lambda _spec, other=other: other)
        assert "; method exact\n" in dvit(photo, "-o", tmp_path / f"out{number}").err


@pytest.mark.usefixtures("shipped")
def test_method_option_overrides_the_default(dvit: Dvit, photo: Path, tmp_path: Path, ran: list[str]) -> None:
    assert "; method exact\n" in dvit(photo, "-o", tmp_path / "out", "--method", "exact").err
    assert ran == ["exact"]


@pytest.mark.usefixtures("shipped")
def test_given_denoiser_replaces_the_shipped_one(dvit: Dvit, photo: Path, tmp_path: Path, file: Path) -> None:
    done = dvit(photo, "-o", tmp_path / "out", "--denoiser", file)
    digest = denoiser_digest(dv.load_denoiser(file))
    assert f"; method denoiser (mine.safetensors, {digest[:8]})" in done.err
    assert result_of(tmp_path / "out").info["denoiser"] == {"source": "mine.safetensors", "digest": digest}
    assert b"secret" not in (tmp_path / "out" / "00.safetensors").read_bytes()


@pytest.mark.usefixtures("shipped")
def test_given_artifact_selects_exact(dvit: Dvit, photo: Path, tmp_path: Path) -> None:
    """As before denoisers were shipped with the package: only stage 1 uses an artifact."""
    artifact = tiny_artifact.artifact_of(tiny.backbone())
    artifact.save(tmp_path / "g.safetensors")
    assert "; method exact\n" in dvit(photo, "-o", tmp_path / "out", "--artifact", tmp_path / "g.safetensors").err
    result = result_of(tmp_path / "out")
    assert result.info["method"] == "exact"
    torch.testing.assert_close(result.artifact, artifact.values, rtol=2e-3, atol=2e-3)


# --- the result ---


def test_result_matches_the_library_and_is_reproducible(dvit: Dvit, photo: Path, tmp_path: Path, file: Path) -> None:
    for folder in ("one", "two"):
        assert dvit(photo, "-o", tmp_path / folder, "--denoiser", file).code == 0
    expected = dv.denoise_image(tiny.backbone(), photo, method="denoiser", denoiser=file)
    torch.testing.assert_close(result_of(tmp_path / "one").semantic, expected.semantic, rtol=2e-3, atol=2e-3)
    one, two = (load_file(tmp_path / folder / "00.safetensors") for folder in ("one", "two"))
    assert set(one) == {"field", "semantic", "artifact", "raw"}  # only those of a denoiser
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not one["artifact"].any()


def test_result_does_not_depend_on_the_comparison(dvit: Dvit, photo: Path, tmp_path: Path, file: Path) -> None:
    dvit(photo, "-o", tmp_path / "with", "--denoiser", file, "--compare")
    dvit(photo, "-o", tmp_path / "without", "--denoiser", file)
    one, two = (result_of(tmp_path / folder) for folder in ("with", "without"))
    assert torch.equal(one.field, two.field)
    assert one.info | {"seconds": 0} == two.info | {"seconds": 0}


def test_table_and_json_have_no_held_out_metrics(dvit: Dvit, photo: Path, tmp_path: Path, file: Path) -> None:
    done = dvit(photo, "-o", tmp_path / "out", "--denoiser", file)
    assert re.match(r"00\.png +00\.safetensors +1 +- +- +\d+\.\d", done.out.splitlines()[1])
    (row,) = dvit(photo, "-o", tmp_path / "other", "--denoiser", file, "--json").rows
    assert (row["status"], row["views"], row["heldout_r2"], row["heldout_cosine"]) == ("done", 1, None, None)
    assert row["seconds"] >= result_of(tmp_path / "other").info["seconds"] >= 0


def test_upsampled_features_are_stored(dvit: Dvit, photo: Path, tmp_path: Path, file: Path) -> None:
    assert dvit(photo, "-o", tmp_path / "out", "--denoiser", file, "--upsample", "2").code == 0
    assert load_file(tmp_path / "out" / "00.safetensors")["upsampled"].shape == (14, 14, 64)


# --- the picture ---


def test_picture_compares_with_exact_of_the_given_options(
    dvit: Dvit, photo: Path, tmp_path: Path, file: Path, drawn: Drawn, ran: list[str]
) -> None:
    done = dvit(photo, "-o", tmp_path / "out", "--denoiser", file, "--compare", "--seed", "3", "--views", "9")
    assert "pictures also show exact, which takes 11 more passes per photo" in done.err
    assert ran == ["denoiser", "exact"]
    ((result, exact),) = drawn
    assert result.info["method"] == "denoiser"
    expected = dv.denoise_image(tiny.backbone(), photo, views=9, held_out=2, seed=3)
    assert exact is not None and torch.equal(exact.field, expected.field)
    assert (exact.info["method"], exact.info["seed"], exact.heldout_r2) == ("exact", 3, expected.heldout_r2)


def test_exact_is_not_computed_without_compare(
    dvit: Dvit, photo: Path, tmp_path: Path, file: Path, drawn: Drawn, ran: list[str]
) -> None:
    done = dvit(photo, "-o", tmp_path / "out", "--denoiser", file, "--views", "4")  # too few for exact
    assert done.code == 0 and "compare" not in done.err
    assert ran == ["denoiser"]
    assert [exact for _, exact in drawn] == [None]


def test_artifact_given_with_a_denoiser_is_used_by_the_comparison(
    dvit: Dvit, photo: Path, tmp_path: Path, file: Path, drawn: Drawn
) -> None:
    artifact = tiny_artifact.artifact_of(tiny.backbone())
    artifact.save(tmp_path / "g.safetensors")
    more = ("--denoiser", file, "--compare", "--artifact", tmp_path / "g.safetensors")
    assert dvit(photo, "-o", tmp_path / "out", *more).code == 0
    ((result, exact),) = drawn
    assert not result.artifact.any() and result.info["artifact"] is None
    assert exact is not None
    torch.testing.assert_close(exact.artifact, artifact.values, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("more", "columns"), [(("--compare",), 4), ((), 3)], ids=["exact", "no exact"])
def test_comparison_adds_a_column_to_the_picture(
    whole: Dvit, photo: Path, tmp_path: Path, file: Path, more: tuple[str, ...], columns: int
) -> None:
    assert whole(photo, "-o", tmp_path / "out", "--denoiser", file, *more).code == 0
    with Image.open(tmp_path / "out" / "00.png") as panel:
        assert panel.width == LEFT + columns * CELL + (columns - 1) * GAP + RIGHT


def test_comparison_next_to_features_without_a_denoiser(whole: Dvit, photo: Path, tmp_path: Path) -> None:
    done = whole(photo, "-o", tmp_path / "out", "--method", "project", "--compare", "--artifact", "none")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "out" / "00.png") as panel:
        assert panel.width == LEFT + 4 * CELL + 3 * GAP + RIGHT


# --- existing results ---


def test_result_is_kept_on_the_second_run(
    dvit: Dvit, photo: Path, tmp_path: Path, file: Path, no_computing: Callable[[], None]
) -> None:
    command = (photo, "-o", tmp_path / "out", "--denoiser", file, "--json")
    dvit(*command)
    before = (tmp_path / "out" / "00.safetensors").read_bytes()
    no_computing()
    for more in ((), ("--compare",), ("--views", "9"), ("--seed", "4")):  # options of the picture only
        (row,) = dvit(*command, *more).rows
        assert (row["status"], row["note"], row["heldout_r2"]) == ("kept", "kept", None)
    assert (tmp_path / "out" / "00.safetensors").read_bytes() == before


def test_renaming_the_denoiser_keeps_the_result(
    dvit: Dvit, photo: Path, tmp_path: Path, file: Path, no_computing: Callable[[], None]
) -> None:
    dvit(photo, "-o", tmp_path / "out", "--denoiser", file)
    no_computing()
    (row,) = dvit(photo, "-o", tmp_path / "out", "--denoiser", file.rename(tmp_path / "r.safetensors"), "--json").rows
    assert row["note"] == "kept"


@pytest.mark.usefixtures("shipped")
def test_other_denoisers_and_methods_count_as_other_settings(
    dvit: Dvit, photo: Path, tmp_path: Path, file: Path
) -> None:
    ways = {"shipped": (), "given": ("--denoiser", file), "exact": ("--method", "exact")}
    for name, way in ways.items():
        assert dvit(photo, "-o", tmp_path / name, *way).code == 0
        for other, theirs in ways.items():
            (row,) = dvit(photo, "-o", tmp_path / name, *theirs, "--json").rows
            note = "kept" if other == name else "kept, made with other settings; use --overwrite to redo it"
            assert (row["status"], row["note"]) == ("kept", note), (name, other)
    assert dvit(photo, "-o", tmp_path / "exact", "--overwrite").code == 0
    assert result_of(tmp_path / "exact").info["method"] == "denoiser"


def test_deleted_picture_is_redrawn_computing_only_exact(
    dvit: Dvit, photo: Path, tmp_path: Path, file: Path, drawn: Drawn, ran: list[str]
) -> None:
    dvit(photo, "-o", tmp_path / "out", "--denoiser", file, "--compare")
    before = (tmp_path / "out" / "00.safetensors").read_bytes()
    (tmp_path / "out" / "00.png").unlink()
    dvit(photo, "-o", tmp_path / "out", "--denoiser", file, "--compare")
    assert ran == ["denoiser", "exact", "exact"]
    assert len(drawn) == 2 and all(exact is not None for _, exact in drawn)
    assert (tmp_path / "out" / "00.safetensors").read_bytes() == before


def test_kept_result_of_another_method_is_drawn_without_comparison(
    dvit: Dvit, photo: Path, tmp_path: Path, file: Path, drawn: Drawn, ran: list[str]
) -> None:
    dvit(photo, "-o", tmp_path / "out")
    (tmp_path / "out" / "00.png").unlink()
    (row,) = dvit(photo, "-o", tmp_path / "out", "--denoiser", file, "--compare", "--json").rows
    assert "other settings" in row["note"]
    assert ran == ["exact"]
    assert [(result.info["method"], exact) for result, exact in drawn] == [("exact", None), ("exact", None)]


def test_no_pictures_draws_none_and_gives_the_same_result(
    dvit: Dvit, photo: Path, tmp_path: Path, file: Path, drawn: Drawn
) -> None:
    command = (photo, "--denoiser", file, "--json", "-o")
    dvit(*command, tmp_path / "drawn")
    (row,) = dvit(*command, tmp_path / "plain", "--no-pictures").rows
    assert (row["status"], row["panel"]) == ("done", None)
    assert len(drawn) == 1 and [path.name for path in (tmp_path / "plain").iterdir()] == ["00.safetensors"]
    assert torch.equal(result_of(tmp_path / "plain").semantic, result_of(tmp_path / "drawn").semantic)
    (row,) = dvit(*command, tmp_path / "plain", "--no-pictures", "--upsample", "2").rows
    assert row["note"] == "kept, upsampled features added" and len(drawn) == 1
    (row,) = dvit(*command, tmp_path / "plain").rows  # and drawn later when requested
    assert row["status"] == "kept" and row["panel"] == str(tmp_path / "plain" / "00.png") and len(drawn) == 2


def test_overwriting_a_result_removes_its_old_picture(dvit: Dvit, photo: Path, tmp_path: Path, file: Path) -> None:
    dvit(photo, "-o", tmp_path / "out")
    dvit(photo, "-o", tmp_path / "out", "--no-pictures")
    assert (tmp_path / "out" / "00.png").exists()  # it shows the result that is kept
    dvit(photo, "-o", tmp_path / "out", "--denoiser", file, "--no-pictures", "--overwrite")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00.safetensors"]


# --- rejected options ---


@pytest.mark.parametrize("method", ["exact", "neural-field", "subtract"])
def test_denoiser_with_another_method_is_refused_naming_both(
    dvit: Dvit, photo: Path, tmp_path: Path, file: Path, method: str
) -> None:
    done = dvit(photo, "-o", tmp_path / "out", "--denoiser", file, "--method", method)
    assert done.code == 2
    assert f"a denoiser (mine.safetensors) is given, but method '{method}' does not use one" in done.err
    assert not (tmp_path / "out").exists()


def test_method_denoiser_without_one_says_how_to_train_it(dvit: Dvit, photo: Path, tmp_path: Path) -> None:
    done = dvit(photo, "-o", tmp_path / "out", "--method", "denoiser")
    assert done.code == 2
    assert "; train one with dvit train and pass it with --denoiser FILE" in done.err
    assert not (tmp_path / "out").exists()


def test_unusable_denoiser_is_rejected_before_any_photo(dvit: Dvit, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "words.safetensors").write_text("words")
    other = tiny.write(tmp_path, tiny.denoiser(tiny.backbone(seed=1)), "other.safetensors")
    for given, message in (
        (tmp_path / "none.safetensors", "no such denoiser file"),
        (tmp_path / "words.safetensors", "not a denoiser, or damaged"),
        (other, "the denoiser was trained for Planted"),
        ("voc_denoised", "no voc_denoised was published for Planted"),
    ):
        done = dvit(photo, "-o", tmp_path / "out", "--denoiser", given)
        assert done.code == 2 and message in done.err
        assert not (tmp_path / "out").exists()


def test_too_few_views_for_the_comparison_are_refused_before_any_photo(
    dvit: Dvit, photo: Path, tmp_path: Path, file: Path
) -> None:
    done = dvit(photo, "-o", tmp_path / "out", "--denoiser", file, "--compare", "--views", "4")
    assert done.code == 2 and "4 views" in done.err
    assert not (tmp_path / "out").exists()


def test_a_comparison_of_stage_one_with_itself_is_refused(dvit: Dvit, photo: Path, tmp_path: Path) -> None:
    done = dvit(photo, "-o", tmp_path / "out", "--method", "exact", "--compare")
    assert done.code == 2
    assert "such as denoiser, got exact; choose another --method, or omit --compare" in done.err
    assert not (tmp_path / "out").exists()


def test_compare_without_pictures_or_report_is_rejected(dvit: Dvit, photo: Path, tmp_path: Path, file: Path) -> None:
    command = (photo, "-o", tmp_path / "out", "--denoiser", file, "--compare", "--no-pictures")
    done = dvit(*command)
    assert done.code == 2 and "omit --no-pictures, or give --report" in done.err
    assert not (tmp_path / "out").exists()
    assert dvit(*command, "--report", tmp_path / "page.html").code == 0
    assert (tmp_path / "page.html").exists() and not (tmp_path / "out" / "00.png").exists()


def test_help_names_the_options(dvit: Dvit) -> None:
    words = dvit("--help").words
    for option in ("--denoiser", "--compare", "--method", "neural-field is the published", "auto is the method"):
        assert option in words


# --- drawing while the next photo is computed ---


def test_a_picture_is_drawn_while_the_next_photo_is_computed(
    whole: Dvit, shipped: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tiny_artifact.write_photos(tmp_path / "photos", 3)
    computed = [threading.Event() for _ in range(3)]
    number = itertools.count()
    real = Denoising.__call__

    def compute(*arguments: Any, **options: Any) -> Decomposition:
        computed[next(number)].set()
        return real(*arguments, **options)

    def draw(_photo: np.ndarray, _result: Decomposition, path: Path, **_more: Any) -> None:
        first = not list((tmp_path / "out").glob("*.png"))
        assert not first or computed[1].wait(60), "the second photo waits for the picture of the first"
        Image.new("RGB", (1, 1)).save(path, format="PNG")

    monkeypatch.setattr(Denoising, "__call__", compute)
    monkeypatch.setattr(denoising_vit.maps, "draw_panel", draw)
    done = whole(photos, "-o", tmp_path / "out", "--json")
    assert done.code == 0
    assert [Path(row["image"]).name for row in done.rows] == ["00.png", "01.png", "02.png"]  # in order
    assert all((tmp_path / "out" / f"0{place}.safetensors").is_file() for place in range(3))


def test_result_of_a_concurrent_run_is_drawn_without_exact(
    dvit: Dvit, photo: Path, file: Path, tmp_path: Path, drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Denoising.__call__

    def other_run_first(*arguments: Any, **options: Any) -> Decomposition:
        monkeypatch.setattr(Denoising, "__call__", real)
        assert dvit(photo, "-o", tmp_path / "out", "--method", "exact").code == 0
        return real(*arguments, **options)

    monkeypatch.setattr(Denoising, "__call__", other_run_first)
    done = dvit(photo, "-o", tmp_path / "out", "--denoiser", file, "--compare", "--upsample", "2", "--json")
    assert [row["status"] for row in done.rows] == ["kept"]
    result, exact = drawn[-1]  # the other run's result, drawn again because of --upsample
    assert (result.info["method"], exact) == ("exact", None)
