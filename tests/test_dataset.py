"""Finding photos by files, folders and globs: which files are found, their order, and missing inputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from denoising_vit.data import Skipped, find_photos


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of empty files, also the current directory; only names matter here."""
    for name in ("b.jpg", "a.PNG", "notes.txt", ".hidden.jpg", "deep/er/c.webp", "deep/d.tiff", "other/e.jpeg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(found: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in found]


def test_files_keep_the_order_they_were_given_in(tree: Path) -> None:
    found, skipped = find_photos([tree / "b.jpg", str(tree / "a.PNG")])
    assert names(found, tree) == ["b.jpg", "a.PNG"]
    assert skipped == []


def test_file_given_by_name_is_included_with_any_extension(tree: Path) -> None:
    found, _ = find_photos([tree / "notes.txt", tree / ".hidden.jpg"])
    assert names(found, tree) == ["notes.txt", ".hidden.jpg"]


def test_folder_is_searched_recursively_in_sorted_order(tree: Path) -> None:
    found, skipped = find_photos([tree])
    assert names(found, tree) == ["a.PNG", "b.jpg", "deep/d.tiff", "deep/er/c.webp", "other/e.jpeg"]
    assert skipped == []


def test_order_does_not_depend_on_creation_order(tmp_path: Path) -> None:
    for name in ("m.jpg", "z.jpg", "a.jpg", "k.jpg"):
        (tmp_path / name).touch()
    found, _ = find_photos([tmp_path])
    assert names(found, tmp_path) == ["a.jpg", "k.jpg", "m.jpg", "z.jpg"]
    assert find_photos([tmp_path])[0] == found


def test_hidden_files_in_a_folder_are_ignored(tree: Path) -> None:
    found, _ = find_photos([tree])
    assert ".hidden.jpg" not in names(found, tree)


def test_hidden_folders_in_a_folder_are_ignored(tree: Path) -> None:
    (tree / ".thumbnails").mkdir()
    (tree / ".thumbnails" / "b.jpg").touch()
    found, _ = find_photos([tree])
    assert ".thumbnails/b.jpg" not in names(found, tree)


def test_hidden_folder_given_by_name_is_searched(tree: Path) -> None:
    (tree / ".thumbnails").mkdir()
    (tree / ".thumbnails" / "b.jpg").touch()
    found, _ = find_photos([tree / ".thumbnails"])
    assert names(found, tree) == [".thumbnails/b.jpg"]


def test_folder_named_like_an_image_is_searched(tree: Path) -> None:
    (tree / "album.jpg").mkdir()
    (tree / "album.jpg" / "inside.png").touch()
    found, _ = find_photos([tree])
    assert names(found, tree)[:2] == ["a.PNG", "album.jpg/inside.png"]
    assert "album.jpg" not in names(found, tree)


def test_glob_matches_in_sorted_order(tree: Path) -> None:
    (tree / "aa.jpg").touch()
    found, skipped = find_photos([str(tree / "*.jpg")])
    assert names(found, tree) == ["aa.jpg", "b.jpg"]
    assert skipped == []


def test_relative_glob(tree: Path) -> None:
    found, _ = find_photos(["other/*"])
    assert found == [Path("other/e.jpeg")]


def test_double_star_reaches_every_depth(tree: Path) -> None:
    found, _ = find_photos([str(tree / "**" / "*.webp")])
    assert names(found, tree) == ["deep/er/c.webp"]
    everywhere, _ = find_photos([str(tree / "**" / "*.*p*g")])
    assert names(everywhere, tree) == ["b.jpg", "other/e.jpeg"]


def test_folder_matched_by_a_glob_is_searched(tree: Path) -> None:
    found, _ = find_photos([str(tree / "d*")])
    assert names(found, tree) == ["deep/d.tiff", "deep/er/c.webp"]


def test_duplicates_are_kept_once_at_their_first_position(tree: Path) -> None:
    found, skipped = find_photos([tree / "b.jpg", tree, tree / "a.PNG", str(tree / "*.jpg"), tree / "b.jpg"])
    assert names(found, tree) == ["b.jpg", "a.PNG", "deep/d.tiff", "deep/er/c.webp", "other/e.jpeg"]
    assert skipped == []


@pytest.mark.parametrize("again", ["./b.jpg", "deep/../b.jpg", "{tree}/b.jpg"])
def test_same_file_under_two_spellings_is_kept_once(tree: Path, again: str) -> None:
    found, _ = find_photos(["b.jpg", again.format(tree=tree)])
    assert found == [Path("b.jpg")]


def test_empty_folder_is_skipped_naming_the_expected_extensions(tree: Path) -> None:
    (tree / "empty").mkdir()
    found, skipped = find_photos([tree / "empty"])
    assert found == []
    (entry,) = skipped
    assert entry.item == str(tree / "empty")
    assert "no image files in this folder" in entry.reason
    assert ".jpg" in entry.reason and ".png" in entry.reason


def test_folder_without_images_is_skipped(tree: Path) -> None:
    (tree / "texts").mkdir()
    (tree / "texts" / "a.txt").touch()
    found, skipped = find_photos([tree / "texts", tree / "b.jpg"])
    assert names(found, tree) == ["b.jpg"]
    assert [entry.item for entry in skipped] == [str(tree / "texts")]


def test_missing_path_is_skipped_and_the_others_are_kept(tree: Path) -> None:
    found, skipped = find_photos(["nowhere.jpg", tree / "b.jpg"])
    assert names(found, tree) == ["b.jpg"]
    assert skipped == [Skipped("nowhere.jpg", "no such file or folder")]


def test_glob_without_matches_is_skipped(tree: Path) -> None:
    found, skipped = find_photos(["*.gif"])
    assert found == []
    assert skipped == [Skipped("*.gif", "the pattern matches no files")]


@pytest.mark.parametrize("name", ["photo[1].jpg", "really?.jpg", "star*.jpg"])
def test_existing_file_with_glob_characters_is_taken_literally(tree: Path, name: str) -> None:
    (tree / name).touch()
    (tree / "photo1.jpg").touch()
    (tree / "stars.jpg").touch()
    found, skipped = find_photos([tree / name])
    assert names(found, tree) == [name]
    assert skipped == []


def test_empty_name_is_not_the_current_directory(tree: Path) -> None:
    """`dvit denoise "$UNSET" -o out` must not process everything below the current directory."""
    found, skipped = find_photos([""])
    assert found == []
    assert len(skipped) == 1


def test_name_too_long_for_the_file_system_is_skipped(tree: Path) -> None:
    long = "a" * 300 + ".jpg"
    found, skipped = find_photos([long, tree / "b.jpg"])
    assert names(found, tree) == ["b.jpg"]
    assert [entry.item for entry in skipped] == [long]


def test_no_inputs_find_nothing() -> None:
    assert find_photos([]) == ([], [])
