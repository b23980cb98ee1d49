"""Existing files are never destroyed: every writing verb, into the folder of its input and onto foreign files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tiny_export
import tiny_fit
import tiny_labelled
from command import Dvit, Outcome, in_process
from denoising_vit import Decomposition
from denoising_vit.cli.app import VERBS, run
from denoising_vit.data.photos import photo_digest, read_photo
from denoising_vit.denoise import Denoising
from denoising_vit.denoiser import write_denoiser
from denoising_vit.errors import OutputError
from denoising_vit.files import Mark, atomic_path, clipped, digest_of, owned_path, plain_stem, require_ours
from denoising_vit.show import sheets
from denoising_vit.show.video.parts import Parts, recorded_in

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ("--backbone", tiny_fit.MODEL, "--device", "cpu", "--dtype", "float32")
SEEN = ("--size", tiny_fit.SIZE, "--views", tiny_fit.VIEWS)
FOREIGN = b"what somebody worked on for years"


@dataclass(frozen=True)
class Place:
    """A folder with everything that the verbs read, to which they also write.

    Attributes:
        folder: with photos `00.png` and others, a clip of frames, a store, weights, a denoiser and results.
        dvit: runs a verb with the tiny model.
    """

    folder: Path
    dvit: Callable[..., Outcome]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_fit.write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def filled(one_thread: None, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that each test gets a copy of."""
    folder = tmp_path_factory.mktemp("filled")
    tiny_fit.write_photos(folder, 6)
    tiny_fit.write_photos(folder / "clip", 4, seed=1)
    for number in range(4):  # names that frames of the output would have
        (folder / "clip" / f"{number:02}.png").rename(folder / "clip" / f"{number:06}.png")
    tiny_fit.prepare(folder / "clip", folder / "store", tiny_fit.spec_of(weights)).run()
    shutil.copy(weights, folder / "weights.safetensors")
    write_denoiser(tiny_export.denoiser(tiny_fit.spec_of(weights).load()), folder / "denoiser.safetensors")
    labelled = tmp_path_factory.mktemp("labelled")
    tiny_labelled.write_labelled(labelled, tiny_labelled.coloured(2, 0), tiny_labelled.coloured(2, 1))
    shutil.copytree(labelled, folder / ".labelled")  # hidden: its photos are not part of the data set
    knn = ("evaluate", "knn", "--data", folder / ".labelled", "-o", folder / "results.jsonl", "--features", "raw")
    assert run([*map(str, (*knn, "--k", 3, "--cache", folder / ".cache", *MODEL, "--weights", weights))]) == 0
    return folder


@pytest.fixture
def place(filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Place:
    folder = Path(shutil.copytree(filled, tmp_path / "place"))
    dvit: Dvit = in_process(capsys, monkeypatch)
    monkeypatch.chdir(folder)
    return Place(folder, dvit)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and "leases" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def own(*more: object) -> tuple[object, ...]:
    return ("--weights", "weights.safetensors", *MODEL, *more)


TRAINING = ("--on-the-fly", "--steps", 2, "--batch-size", 1, "--held-out", 1, "--pairs.keep", 1, "--pairs.whole", 1)
DISTILLING = ("--denoiser", "denoiser.safetensors", "--steps", 2, "--held-out", 1)
FITTING = ("--exact.size", tiny_fit.SIZE, "--exact.views", tiny_fit.VIEWS)

#: Commands whose output is the folder that they read, or is in it.
INTO_OWN_FOLDER: dict[str, tuple[object, ...]] = {
    "denoise": ("denoise", ".", "-o", ".", *own(*SEEN, "--held-out", 0, "--method", "exact")),
    "denoise again": ("denoise", ".", "-o", ".", "--overwrite", *own(*SEEN, "--held-out", 0, "--method", "exact")),
    "show": ("show", ".", "-o", ".", *own("--size", tiny_fit.SIZE, "--features", "raw", "--maps", "pca")),
    "show together": ("show", ".", "-o", ".", "--colours", "together", *own("--features", "raw", "--maps", "pca")),
    "video": ("video", "clip", "-o", ".", "--frames", *own("--size", 48, "--panel-size", 80, "--features", "raw")),
    "fit": ("fit", ".", "-o", ".", *own(*SEEN)),
    "fit beside": ("fit", "clip", "-o", "store", *own(*SEEN)),
    "export": ("export", "-o", ".", *own("--format", "timm")),
    "store export": ("store", "export", "store", "-o", "store"),
    "train": ("train", ".", "-o", ".", *TRAINING, *FITTING, *own()),
    "distill": ("distill", ".", "-o", ".", *DISTILLING, *own()),
    "diagnose": ("diagnose", ".", "-o", ".", *own("--size", 48, "--views", 8)),
    "reproduce": ("reproduce", "--list", "-o", "store/manifest.json"),
    "evaluate": ("evaluate", "knn", "--data", ".labelled", "-o", "00.png", "--features", "raw", *own()),
}


#: Errors of those commands that write nothing; the others succeed.
REFUSED = {
    "fit": "expected an empty or new folder for a feature store",
    "fit beside": "the store has other settings: images_per_shard: the store has 3, this run has 16",
    "export": "already exists; choose another folder",
    "train": "exists and is not a run of this program",
    "distill": "exists and is not a run of this program",
    "reproduce": "store/manifest.json, line 1: not a result of `dvit evaluate`",
    "evaluate": "00.png, line 1: not a result of `dvit evaluate`",
}


@pytest.mark.parametrize("name", INTO_OWN_FOLDER)
def test_no_input_file_changes(place: Place, name: str) -> None:
    before = contents(place.folder)
    first = place.dvit(*INTO_OWN_FOLDER[name])
    after = contents(place.folder)
    assert {file: after.get(file) for file in before} == before, first.err
    second = place.dvit(*INTO_OWN_FOLDER[name])  # finds the output of the first
    again = contents(place.folder)
    assert {file: again.get(file) for file in before} == before
    assert first.code == second.code == (2 if name in REFUSED else 0), first.err + second.err
    assert REFUSED.get(name, "") in first.err
    assert (after.keys() == before.keys()) == (name in REFUSED)  # the others write something


#: Commands that would write to a foreign file, and that file.
ONTO_FOREIGN_FILES: dict[str, tuple[tuple[object, ...], str]] = {
    "report of denoise": (
        ("denoise", "00.png", "-o", "out", "--report", "theirs.html", *own(*SEEN, "--method", "exact")),
        "theirs.html",
    ),
    "sheet": (("show", "00.png", "-o", "theirs.png", *own("--features", "raw")), "theirs.png"),
    "sheet as pdf": (("show", "00.png", "-o", "theirs.pdf", *own("--features", "raw")), "theirs.pdf"),
    "sheet onto its photo": (("show", "00.png", "-o", "00.png", *own("--features", "raw")), "00.png"),
    "palette": (
        ("show", "00.png", "-o", "out", "--save-palette", "weights.safetensors", *own("--features", "raw")),
        "weights.safetensors",
    ),
    "calibrate": (("calibrate", "clip", "-o", "weights.safetensors", *own(*SEEN)), "weights.safetensors"),
    "diagnose": (("diagnose", ".", "-o", "out", *own("--size", 48, "--views", 8)), "out/diagnosis.json"),
    "diagnose, page": (("diagnose", ".", "-o", "out", *own("--size", 48, "--views", 8)), "out/diagnosis.html"),
    "diagnose, artifact": (("diagnose", ".", "-o", "out", *own()), "out/artifact.safetensors"),
    "report": (("report", "results.jsonl", "-o", "theirs.md"), "theirs.md"),
    "store export": (("store", "export", "store", "-o", "out"), "out/000001.png.npy"),
    "store export with records": (
        ("store", "export", "store", "-o", "out", "--kind", "safetensors"),
        "out/000001.png.safetensors",
    ),
    "evaluate": (
        ("evaluate", "knn", "--data", ".labelled", "-o", "theirs.jsonl", "--features", "raw", *own()),
        "theirs.jsonl",
    ),
    "reproduce": (("reproduce", "--list", "-o", "theirs.jsonl"), "theirs.jsonl"),
    "export": (("export", "-o", "out", *own("--format", "timm")), "out/model.safetensors"),
    "train": (("train", ".", "-o", "out", *TRAINING, *FITTING, *own()), "out/run.json"),
    "distill": (("distill", ".", "-o", "out", *DISTILLING, *own()), "out/log.jsonl"),
    "pairs of train": (("train", ".", "-o", "new", "--cache", "out", *TRAINING, *FITTING, *own()), "out/state.u8"),
    "ids of fit": (("fit", "clip", "-o", "out", *own(*SEEN)), "out/ids.json"),
    "field of fit": (("fit", "clip", "-o", "out", *own(*SEEN)), "out/field/photo.png"),
}


@pytest.mark.parametrize("name", ONTO_FOREIGN_FILES)
def test_foreign_files_are_rejected_by_name_and_unchanged(place: Place, name: str) -> None:
    command, file = ONTO_FOREIGN_FILES[name]
    path = place.folder / file
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FOREIGN)
    before = contents(place.folder)
    done = place.dvit(*command)
    assert done.code == 2, done.words
    assert path.name in done.err or str(path.parent.name) in done.err
    after = contents(place.folder)
    assert {name: after.get(name) for name in before} == before


#: Commands that find and overwrite their own output when they are repeated.
AGAIN: dict[str, tuple[object, ...]] = {
    "denoise": ("denoise", "00.png", "-o", "out", "--report", "page.html", *own(*SEEN, "--method", "exact")),
    "sheet": ("show", "00.png", "-o", "sheet.png", *own("--features", "raw")),
    "sheet as svg": ("show", "00.png", "-o", "sheet.svg", *own("--features", "raw")),
    "sheet as pdf": ("show", "00.png", "-o", "sheet.pdf", *own("--features", "raw")),
    "sheets and palette": ("show", ".", "-o", "out", "--save-palette", "p.safetensors", *own("--features", "raw")),
    "video": ("video", "clip", "-o", "out", "--frames", "--overwrite", *own("--panel-size", 80, "--features", "raw")),
    "calibrate": ("calibrate", ".", "-o", "g.safetensors", *own(*SEEN)),
    "diagnose": ("diagnose", ".", "-o", "out", *own("--size", 48, "--views", 8)),
    "store export": ("store", "export", "store", "-o", "out"),
    "report": ("report", "results.jsonl", "-o", "results.md"),
}


@pytest.mark.parametrize("name", AGAIN)
def test_own_output_is_overwritten_and_no_file_is_added(place: Place, name: str) -> None:
    first = place.dvit(*AGAIN[name])
    assert first.code == 0, first.words
    names = set(contents(place.folder))
    again = place.dvit(*AGAIN[name])
    assert again.code == 0, again.words
    assert set(contents(place.folder)) == names


@pytest.mark.parametrize(
    ("command", "other"),
    [
        (("show", "00.png", "-o", "sheet.png", "--features", "raw"), ("show", "01.png", "-o", "sheet.png")),
        (("calibrate", ".", "-o", "g.safetensors", *SEEN), ("calibrate", "clip", "-o", "g.safetensors")),
    ],
)
def test_own_output_of_another_input_is_rejected(
    place: Place, command: tuple[object, ...], other: tuple[object, ...]
) -> None:
    assert place.dvit(*command, *own()).code == 0
    before = contents(place.folder)
    done = place.dvit(*other, *command[len(other) :], *own())
    assert done.code == 2
    assert "was made from another input" in done.err
    assert contents(place.folder) == before


def test_every_writing_verb_is_tested_above() -> None:
    """A new verb has to be added to the tests."""
    tried = {str(command[0]) for command in (*INTO_OWN_FOLDER.values(), *(c for c, _ in ONTO_FOREIGN_FILES.values()))}
    # `models` only prints and `app` writes to a private folder; `prepare`, which reports failures of each backbone,
    # is tested in test_prepare.py.
    assert set(VERBS) - tried == {"models", "app", "prepare"}


# --- marks and atomic writing ---


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg", ".html", ".md"])
def test_a_mark_is_read_back(tmp_path: Path, suffix: str) -> None:
    path, mark = tmp_path / f"file{suffix}", Mark("sheet", digest_of("photo"))
    with owned_path(path, mark) as temporary:
        temporary.write_bytes(b"x" * 100_000)
    assert Mark.read(path) == mark
    assert require_ours(path, mark)
    with pytest.raises(OutputError, match=r"is a sheet, not a page"):
        require_ours(path, Mark("page", mark.source))
    with pytest.raises(OutputError, match="made from another input"):
        require_ours(path, Mark("sheet", digest_of("another")))
    with pytest.raises(OutputError, match="is an input file"):
        require_ours(path, mark, [path])


def test_marked_png_is_still_a_valid_png(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (9, 7), "red").save(path)
    mark = Mark("panel", digest_of("photo"))
    mark.add(path, ".png")
    with Image.open(path) as image:
        image.load()
        assert image.text["Source"] == str(mark)  # type: ignore[attr-defined]
        assert image.getpixel((3, 3)) == (255, 0, 0)


def test_second_writer_of_a_new_file_gets_an_error(tmp_path: Path) -> None:
    target = tmp_path / "result.bin"
    with pytest.raises(FileExistsError), atomic_path(target, new=True) as late:
        late.write_bytes(b"second")
        with atomic_path(target, new=True) as early:
            early.write_bytes(b"first")
    assert target.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [target]


def test_names_fit_the_file_system_and_are_utf_8() -> None:
    assert plain_stem("ü" * 300).encode() == ("ü" * 110).encode()
    assert plain_stem("caf\udce9") == "caf_"
    assert clipped("aü", 2) == "a"
    assert len((plain_stem("x" * 255) + "-99999.safetensors").encode()) <= 255


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 255)
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"whole")
    assert target.read_bytes() == b"whole"


def test_digest_distinguishes_paths_from_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert digest_of(Path("a")) == digest_of(tmp_path / "a")
    assert digest_of("a") != digest_of(Path("a"))
    assert json.loads(json.dumps(str(Mark("page", digest_of())))).startswith("denoising-vit page of ")


# --- names ---


def denoised(place: Place, *arguments: object) -> list[dict[str, Any]]:
    done = place.dvit("denoise", *arguments, "-o", "out", "--json", *own(*SEEN, "--held-out", 0, "--method", "exact"))
    assert done.code == 0, done.err
    return done.rows


def two_of_one_name(place: Place) -> tuple[Path, Path]:
    """Different photos called `same.png`."""
    paths = place.folder / "a" / "same.png", place.folder / "b" / "same.png"
    for path, photo in zip(paths, ("00.png", "01.png"), strict=True):
        path.parent.mkdir()
        shutil.copy(place.folder / photo, path)
    return paths


def once(action: Callable[[], object], real: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which runs `action` before its first call."""
    waiting = [action]

    def call(*arguments: Any, **options: Any) -> Any:
        if waiting:
            waiting.pop()()
        return real(*arguments, **options)

    return call


def test_concurrent_denoise_runs_keep_both_results(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = two_of_one_name(place)
    monkeypatch.setattr(
        Denoising, "__call__", once(lambda: denoised(place, two), Denoising.__call__)
    )  # the other run claims the name after this one, and finishes before it
    denoised(place, one)
    for name, photo in (("same", two), ("same-2", one)):
        digest = photo_digest(read_photo(photo))
        assert Decomposition.load(place.folder / "out" / f"{name}.safetensors").info["photo"]["sha256"] == digest
        assert Mark.read(place.folder / "out" / f"{name}.png") == Mark("panel", digest)
    names = {path.name for path in (place.folder / "out").iterdir()}
    assert names == {"same.safetensors", "same.png", "same-2.safetensors", "same-2.png"}


def test_concurrent_runs_of_the_same_photo_leave_one_result(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Denoising, "__call__", once(lambda: denoised(place, "00.png"), Denoising.__call__))
    assert [row["status"] for row in denoised(place, "00.png")] == ["kept"]
    assert {path.name for path in (place.folder / "out").iterdir()} == {"00.safetensors", "00.png"}


def test_concurrent_show_runs_keep_both_sheets(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = two_of_one_name(place)

    def show(photo: Path) -> Outcome:
        return place.dvit("show", photo, "-o", "out", *own("--features", "raw", "--maps", "pca"))

    draw = once(lambda: show(two), sheets.draw_sheet)
    monkeypatch.setattr(sheets, "draw_sheet", draw)
    assert show(one).code == 0
    marks = {path.name: Mark.read(path) for path in (place.folder / "out").iterdir()}
    assert marks == {"same.png": Mark("sheet", digest_of(two)), "same-2.png": Mark("sheet", digest_of(one))}


def test_concurrent_video_runs_keep_both_videos(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    other = place.folder / "other" / "clip"
    tiny_fit.write_photos(other, 3, seed=2)

    def video(clip: str | Path) -> Outcome:
        return place.dvit("video", clip, "-o", "out", *own("--panel-size", 80, "--features", "raw"))

    monkeypatch.setattr(Parts, "_begin", once(lambda: video(other), Parts._begin))
    assert video("clip").code == 0
    sources = {path.name: (recorded_in(path) or {}).get("source") for path in (place.folder / "out").iterdir()}
    assert set(sources) == {"clip.mp4", "clip-2.mp4"}
    assert len(set(sources.values())) == 2


def test_edited_photo_replaces_its_result_only_with_overwrite(place: Place) -> None:
    denoised(place, "00.png")
    Image.fromarray(255 - read_photo("00.png")).save("00.png")
    (row,) = denoised(place, "00.png", "--overwrite")
    assert (Path(row["output"]).name, row["note"]) == ("00.safetensors", None)
    assert {path.name for path in (place.folder / "out").iterdir()} == {"00.safetensors", "00.png"}
    recorded = Decomposition.load(place.folder / "out" / "00.safetensors").info["photo"]
    assert recorded["sha256"] == photo_digest(read_photo("00.png"))
    Image.fromarray(255 - read_photo("00.png")).save("00.png")
    (row,) = denoised(place, "00.png")
    assert Path(row["output"]).name == "00-2.safetensors"
    expected = "00.safetensors kept: made from an earlier version of this photo; use --overwrite to replace it"
    assert row["note"] == expected


@pytest.mark.parametrize("verb", ["denoise", "show", "video"])
@pytest.mark.parametrize(
    "stem", [pytest.param("caf\udce9", id="no UTF-8"), pytest.param("ü" * 122, id="long"), pytest.param("x" * 250)]
)
def test_photos_with_unusual_names_are_processed_once(place: Place, verb: str, stem: str) -> None:
    """Names that are not UTF-8, as written by older systems, and names that leave no room for a suffix."""
    given = place.folder / (stem if verb == "video" else f"{stem}.png")
    try:
        if verb == "video":
            shutil.copytree(place.folder / "clip", given)
        else:
            shutil.copy(place.folder / "00.png", given)
    except OSError:
        pytest.skip("this file system takes no such names")
    options = {"denoise": (*SEEN, "--method", "exact"), "show": ("--features", "raw", "--maps", "pca")}
    command = (verb, given, "-o", "out", *own(*options.get(verb, ("--panel-size", 80, "--features", "raw"))))
    first = place.dvit(*command)
    assert first.code == 0, first.err
    names = sorted(path.name for path in (place.folder / "out").iterdir())
    assert len(names) == (2 if verb == "denoise" else 1)
    assert all(name.encode() for name in names)
    second = place.dvit(*command)
    assert second.code == 0, second.err
    assert sorted(path.name for path in (place.folder / "out").iterdir()) == names
    assert "kept" in second.out or verb == "show"
