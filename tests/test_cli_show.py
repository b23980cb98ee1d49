"""`dvit show` from the command line: sheets, skipped photos and errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import planted
import tiny_export as tiny
from command import Dvit, Outcome, in_process
from denoising_vit.data.photos import is_panel
from denoising_vit.denoiser import write_denoiser
from denoising_vit.errors import OutputError
from denoising_vit.maps import read_palette

pytestmark = pytest.mark.usefixtures("one_thread")

Show = Callable[..., Outcome]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.distilled(tmp_path_factory.mktemp("weights") / "plain.safetensors", None)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, pixels in zip(("a", "b"), planted.photos(2), strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, weights: Path, tmp_path: Path) -> Show:
    """Runs `dvit show ...` with the tiny model and small images in an empty folder."""
    monkeypatch.chdir(tmp_path)
    dvit: Dvit = in_process(capsys, monkeypatch)
    model = ("--backbone", tiny.MODEL, "--weights", weights, "--size", 64, "--views", 6, "--device", "cpu")
    return lambda *more: dvit("show", *model, *more)


def test_one_sheet_of_all_photos(show: Show, photos: Path, tmp_path: Path) -> None:
    done = show(photos, "-o", "sheets/all.png")
    assert done.code == 0, done.words
    assert "features raw, exact; maps pca, kmeans, norm, similarity" in done.words  # no denoiser comes with this model
    assert "2 of 2 photos shown; sheets/all.png" in done.words
    assert is_panel(tmp_path / "sheets" / "all.png")


def test_tiles_of_a_large_photo_and_wrong_tiles(show: Show, tmp_path: Path) -> None:
    Image.fromarray(planted.photos(1)[0]).resize((160, 96)).save(tmp_path / "large.png")
    tiles = ("large.png", "-o", "sheet.png", "--features", "raw,average", "--size", 96, 160, "--tile")
    done = show(*tiles, 64)
    assert done.code == 0, done.words
    assert "1 of 1 photos shown; sheet.png" in done.words and "tiles of 64 px" in done.words
    wrong = show(*tiles, 64, "--overlap", 40)
    assert wrong.code == 2 and "overlap must be 0 to 32 pixels (half a tile), got 40" in wrong.words
    alone = show("large.png", "-o", "sheet.png", "--overlap", 8)
    assert alone.code == 2 and "also set tile, the side of a tile" in alone.words


def test_one_sheet_per_photo_with_unique_names(show: Show, photos: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    (again / "a.png").write_bytes((photos / "b.png").read_bytes())
    done = show(photos, again, "-o", "sheets", "--features", "raw", "--maps", "pca", "--format", "svg")
    assert done.code == 0, done.words
    assert {path.name for path in (tmp_path / "sheets").iterdir()} == {"a.svg", "b.svg", "a-2.svg"}


def test_saved_palette_gives_the_same_colours(show: Show, photos: Path, tmp_path: Path) -> None:
    shown = ("--features", "raw", "--maps", "pca,kmeans,norm,foreground-pca")
    assert show(photos, "-o", "both", *shown, "--colours", "together", "--save-palette", "p.safetensors").code == 0
    assert read_palette(tmp_path / "p.safetensors").backbone is not None
    assert show(photos / "b.png", "-o", "one", *shown, "--palette", "p.safetensors").code == 0
    assert show(photos / "b.png", "-o", "own", *shown).code == 0
    with (
        Image.open(tmp_path / "both" / "b.png") as both,
        Image.open(tmp_path / "one" / "b.png") as one,
        Image.open(tmp_path / "own" / "b.png") as own,
    ):
        maps = (0, 0, one.width, one.height - 60)  # without the caption, which names the source of the colours
        assert one.crop(maps).tobytes() == both.crop(maps).tobytes() != own.crop(maps).tobytes()


def test_given_denoiser_is_shown(show: Show, photos: Path, weights: Path, tmp_path: Path) -> None:
    write_denoiser(tiny.denoiser(tiny.backbone(weights=str(weights))), tmp_path / "d.safetensors")
    done = show(photos / "a.png", "-o", "a.png", "--denoiser", "d.safetensors", "--dtype", "float32")
    assert done.code == 0 and "features raw, denoiser" in done.words


def test_bad_photos_are_skipped_and_reported(show: Show, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("no photo")
    done = show("bad.jpg", photos, "missing.png", "-o", "s.pdf", "--features", "raw", "--maps", "norm")
    assert done.code == 1
    assert "bad.jpg: not an image file" in done.words and "missing.png: no such file" in done.words
    assert "2 of 4 photos shown, 2 skipped" in done.words
    assert (tmp_path / "s.pdf").read_bytes().startswith(b"%PDF")


def test_no_sheet_is_written_without_usable_photos(show: Show, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("no photo")
    done = show("bad.jpg", "-o", "s.png", "--features", "raw")
    assert done.code == 1 and "0 of 1 photos shown, 1 skipped" in done.words
    assert not (tmp_path / "s.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--maps", "pac"), "unknown maps: 'pac'; choose from pca"),
        (("--features", "raw,rwa"), "unknown features: 'rwa'; choose from raw"),
        (("--features", "distilled"), "the package has no distilled weights for vit_tiny"),
        (("--features", "denoiser"), "no denoiser for vit_tiny_patch16_224"),
        (("--palette", "none.safetensors"), "no such palette"),
        (("--palette", "p", "--colours", "together"), "cannot be combined with"),
        (("--save-palette", "colours.png"), "expected a name ending in .safetensors"),
        (("--at", "2", "0"), "at must be two fractions"),
        (("--size", "65"), "does not fit the patch grid"),
        (("--features", "exact", "--views", "2"), "views"),
    ],
)
def test_wrong_arguments_exit_2_and_write_nothing(
    arguments: tuple[str, ...], message: str, show: Show, photos: Path, tmp_path: Path
) -> None:
    done = show(photos, "-o", "s.png", *arguments)
    assert done.code == 2 and message in done.words
    assert not (tmp_path / "s.png").exists()


def test_no_input_is_refused(show: Show) -> None:
    done = show("-o", "s.png")
    assert done.code == 2 and "no input" in done.words


def test_unwritable_folder_is_reported(show: Show, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = show(photos, "-o", "file/s.png")
    assert done.code == 2 and "cannot write to file (Not a directory)" in done.words


def test_an_error_while_drawing_ends_the_command(show: Show, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error must not be mistaken for a name in use, after which the next name would be tried."""

    def fail(*_: object, **_more: object) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr("denoising_vit.show.sheets.draw_sheet", fail)
    done = show(photos, "-o", "sheets")
    assert done.code == 2 and "the disk is full" in done.words
