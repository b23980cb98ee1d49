"""Panels of held-out images: one row per image, consistent colours, written completely or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_training as tiny
from denoising_vit.errors import TrainError
from denoising_vit.maps.sheet import CELL, GAP, LEFT
from denoising_vit.training.held_out import draw_panel

pytestmark = pytest.mark.usefixtures("one_thread")

Rows = list[tuple[str, np.ndarray, list[torch.Tensor]]]


def rows(count: int, *, same: bool = False) -> Rows:
    """Images of noise with two maps each, which are equal with `same`."""
    chance = torch.Generator().manual_seed(0)
    photo = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    maps = [torch.randn(6, 8, 12, generator=chance) for _ in range(2)]
    return [(f"{number}.png", photo, [maps[0], maps[0] if same else maps[1]]) for number in range(count)]


def drawn(folder: Path, found: Rows) -> np.ndarray:
    draw_panel(folder, 7, ("raw", "clean"), found)
    assert [path.name for path in folder.iterdir()] == ["step-0000007.png"]
    with Image.open(folder / "step-0000007.png") as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_a_run_draws_its_held_out_images_at_each_evaluation(tmp_path: Path) -> None:
    data = tiny.fitted(tmp_path / "data")
    tiny.trained(data.stored, tmp_path / "run", None, tiny.options(steps=4, evaluate_every=2))
    panels = sorted((tmp_path / "run" / "panels").iterdir())
    assert [path.name for path in panels] == ["step-0000002.png", "step-0000004.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in panels)
    first, second = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in panels)
    assert first.std() > 20  # not a blank picture
    assert (first != second).any()  # the denoiser has learnt


def test_more_images_make_a_taller_picture(tmp_path: Path) -> None:
    assert drawn(tmp_path / "two", rows(2)).shape[0] > 1.5 * drawn(tmp_path / "one", rows(1)).shape[0]


def test_equal_features_have_equal_colours(tmp_path: Path) -> None:
    """The last two of three columns match if the features match, apart from the headings."""
    alike, unlike = (columns(drawn(tmp_path / str(same), rows(1, same=same))) for same in (True, False))
    assert alike[1] == alike[2]
    assert unlike[1] != unlike[2]
    assert len(alike[1]) > 8  # patches with different colours


def columns(picture: np.ndarray) -> list[set[tuple[int, ...]]]:
    """Colours in the middle of each of three columns."""
    height = picture.shape[0]
    rows = slice(int(height * 0.4), int(height * 0.6))
    lefts = [LEFT + column * (CELL + GAP) for column in range(3)]
    spans = [slice(left + CELL // 5, left + CELL * 4 // 5) for left in lefts]
    return [{tuple(colour) for colour in picture[rows, span].reshape(-1, 3).tolist()} for span in spans]


def test_folder_that_cannot_be_created_raises(tmp_path: Path) -> None:
    (tmp_path / "panels").write_text("in the way")
    with pytest.raises(TrainError, match=r"panels: a panel cannot be written .*continue with --resume"):
        draw_panel(tmp_path / "panels", 1, ("raw", "clean"), rows(1))


def test_the_same_rows_give_the_same_picture(tmp_path: Path) -> None:
    assert np.array_equal(drawn(tmp_path / "one", rows(2)), drawn(tmp_path / "two", rows(2)))
