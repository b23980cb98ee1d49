from __future__ import annotations

import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from denoising_vit.decomposition.result import Decomposition
from denoising_vit.maps import draw_panel
from denoising_vit.maps import panel as panel_module
from denoising_vit.maps.colours import PCABasis
from denoising_vit.maps.panel import _caption, _compared
from denoising_vit.maps.sheet import CELL, GAP, HEADING, LEFT, RIGHT, Sheet, halved, number


def decomposition(height: int = 5, width: int = 7, channels: int = 6, **info: object) -> Decomposition:
    draw = torch.Generator().manual_seed(0)
    return Decomposition(
        field=torch.randn(2 * height, 2 * width, channels, generator=draw),
        artifact=0.1 * torch.randn(height, width, channels, generator=draw),
        raw=torch.randn(height, width, channels, generator=draw),
        size=(14 * height, 14 * width),
        patch_size=14,
        stride=14,
        info=dict(info),
    )


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


def draw(tmp_path: Path, pixels: np.ndarray, result: Decomposition, **options) -> np.ndarray:
    path = tmp_path / "panel.part"  # the caller writes under a temporary name
    draw_panel(pixels, result, path, **options)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(("height", "width"), [(30, 45), (45, 30), (40, 40), (20, 80)])
def test_panel_is_a_png_of_the_photos_aspect(tmp_path: Path, height: int, width: int):
    sheet = draw(
        tmp_path, photo(height, width), decomposition(backbone={"name": "vit"}, views=64, heldout_r2=0.7), title="a"
    )
    assert 1800 <= sheet.shape[1] <= 2400
    box = Sheet([width / height], 1).box(0)
    assert box[1] / box[0] == pytest.approx(width / height, rel=0.02)
    assert sheet.shape[0] > 2 * box[0]


def test_the_photo_and_the_maps_are_drawn_with_sharp_edges(tmp_path: Path):
    red = np.zeros((60, 60, 3), np.uint8)
    red[:, :30, 0], red[:, 30:, 2] = 255, 255
    result = decomposition(1, 2, 3)
    sheet = draw(tmp_path, red, result)
    for colour in ((255, 0, 0), (0, 0, 255)):
        count = np.all(sheet == colour, -1).sum()
        assert 0.9 * 330 * 165 < count < 1.1 * 330 * 165
    # A map of 1 x 2 patches on 330 pixels: with smoothing there would be hundreds of colours.
    cell = sheet[14 + 40 + 10 : 14 + 40 + 320, 70 + 350 + 5 : 70 + 350 + 325]
    assert len(np.unique(cell.reshape(-1, 3), axis=0)) == 2


@pytest.mark.parametrize("shape", [(2, 4000), (4000, 2), (1, 1)])
def test_extreme_aspects_are_clamped(tmp_path: Path, shape: tuple[int, int]):
    sheet = draw(tmp_path, photo(*shape), decomposition())
    assert 1800 <= sheet.shape[1] <= 2400 and 300 < sheet.shape[0] < 1500


def test_caption_lists_the_known_values():
    full = decomposition(backbone={"name": "vit_small"}, views=64, heldout_r2=0.6842, heldout_cosine=0.9)
    assert _caption(full, 1.5).split("  ·  ") == [
        "vit_small",
        "64 views",
        "98 × 70 px, 7 × 5 patches, 6 channels",
        "held-out R² 0.684",
        "held-out cosine 0.900",
    ]
    assert _caption(decomposition(), 1.0) == "98 × 70 px, 7 × 5 patches, 6 channels"
    assert _caption(decomposition(), 2000.0).endswith("photo of 2000:1 drawn at 4:1")
    assert _caption(decomposition(), 0.1).endswith("photo of 1:10 drawn at 1:4")
    assert len(_caption(decomposition(backbone={"name": "x" * 500}), 1.0)) < 120


def test_numbers_are_short():
    assert [number(value) for value in (0.0, -1, 4.3567, 53.71, 1234.5, 2e7)] == [
        "0",
        "−1",
        "4.36",
        "53.7",
        "1234",
        "2e+07",
    ]


def test_upsample_draws_the_lower_row_finer(tmp_path: Path):
    coarse = draw(tmp_path, photo(40, 40), decomposition())
    fine = draw(tmp_path, photo(40, 40), decomposition(), upsample=2)
    assert coarse.shape == fine.shape
    assert np.any(coarse[coarse.shape[0] // 2 :] != fine[coarse.shape[0] // 2 :])


def test_degenerate_features_and_odd_titles_draw_without_warnings(tmp_path: Path):
    still = decomposition(3, 4, 2)
    still = Decomposition(
        torch.ones_like(still.field), torch.zeros_like(still.artifact), torch.ones_like(still.raw), (42, 56), 14, 14
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(tmp_path, photo(30, 40), still, title="costs $5 to $6_0^ \\frac\n 写真" + "x" * 300)


def test_large_photo_and_model_make_a_small_file(tmp_path: Path):
    ramp = np.linspace(0, 255, 6000).astype(np.uint8)
    large = np.broadcast_to(ramp[None, :, None], (4000, 6000, 3))
    draw_panel(large, decomposition(37, 37, 64), tmp_path / "panel.png")
    assert (tmp_path / "panel.png").stat().st_size < 600_000


def test_threads_draw_the_same_picture_without_pyplot(tmp_path: Path):
    result = decomposition()
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    threads = [threading.Thread(target=draw_panel, args=(photo(30, 40), result, path)) for path in paths]
    loaded = "matplotlib.pyplot" in sys.modules
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path.read_bytes() for path in paths}) == 1
    assert ("matplotlib.pyplot" in sys.modules) == loaded


# A denoiser's result: comparison columns.


def of_denoiser(height: int = 5, width: int = 7, channels: int = 6) -> Decomposition:
    record = {"source": "mine.safetensors", "digest": "0123456789abcdef"}
    return decomposition(height, width, channels, method="denoiser", denoiser=record)


def cells(sheet: np.ndarray) -> int:
    """Number of picture columns of a sheet."""
    columns = (sheet.shape[1] - LEFT - RIGHT + GAP) / (CELL + GAP)
    assert columns == int(columns)
    return int(columns)


def test_denoiser_is_drawn_beside_photo_raw_and_exact(tmp_path: Path):
    exact = decomposition(method="exact", views=64)
    assert cells(draw(tmp_path, photo(40, 40), of_denoiser(), exact=exact)) == 4
    assert cells(draw(tmp_path, photo(40, 40), of_denoiser())) == 3


def test_columns_and_rows_are_named_and_share_one_basis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pictures: dict[tuple[int, int], tuple[str, np.ndarray]] = {}
    labels, bases = [], []
    fit = PCABasis.fit

    def picture(_sheet: Sheet, row: int, column: int, pixels: np.ndarray, heading: str, **_more: Any) -> None:
        pictures[row, column] = heading, pixels

    monkeypatch.setattr(Sheet, "picture", picture)
    monkeypatch.setattr(Sheet, "row_label", lambda _sheet, _row, label: labels.append(label))
    monkeypatch.setattr(
        panel_module.PCABasis, "fit", lambda *maps, **more: bases.append((maps, fit(*maps, **more))) or bases[-1][1]
    )
    result, exact = of_denoiser(), decomposition(method="exact", views=64)
    draw(tmp_path, photo(40, 40), result, exact=exact)
    assert labels == ["PCA", "norm", "k-means", "similarity to ○"]
    for row in range(4):
        assert [pictures[row, column][0] for column in range(4)] == ["photo", "raw", "denoiser", "exact"]
    ((maps, basis),) = bases  # one basis for all
    expected = result.raw, result.semantic, exact.semantic
    assert all(np.array_equal(found, wanted) for found, wanted in zip(maps, expected, strict=True))
    for column, features in enumerate(expected, 1):
        assert np.array_equal(pictures[0, column][1], basis.colours(features))


def test_upsample_draws_denoised_columns_finer(tmp_path: Path):
    exact = decomposition(method="exact", views=64)
    coarse, fine = (draw(tmp_path, photo(40, 40), of_denoiser(), exact=exact, upsample=n) for n in (1, 2))
    assert coarse.shape == fine.shape
    top = slice(60, HEADING + CELL)
    raw, denoised = slice(LEFT + CELL + GAP, LEFT + 2 * CELL), slice(LEFT + 2 * (CELL + GAP), LEFT + 3 * CELL)
    assert np.array_equal(coarse[top, raw], fine[top, raw])
    assert not np.array_equal(coarse[top, denoised], fine[top, denoised])


def test_caption_names_the_denoiser_and_the_metrics_of_exact():
    exact = decomposition(method="exact", views=64, heldout_r2=0.6842, heldout_cosine=0.9)
    (line,) = _compared(of_denoiser(), exact)
    assert line.split("  ·  ") == [
        "denoiser mine.safetensors, 01234567",
        "exact of 64 views, held-out R² 0.684, held-out cosine 0.900",
    ]
    assert _compared(of_denoiser(), None) == ["denoiser mine.safetensors, 01234567"]
    assert _compared(decomposition(views=64), None) == []
    assert _compared(decomposition(method="distilled", distilled="89abcdef0123"), None) == ["distilled 89abcdef"]


def test_long_caption_lines_are_split_between_their_parts():
    assert halved("one  ·  two  ·  three", 40) == ["one  ·  two  ·  three"]
    assert halved("one  ·  two  ·  three", 20) == ["one  ·  two", "three"]
    assert halved("x" * 50, 20) == ["x" * 50]


@pytest.mark.parametrize("shape", [(2, 4000), (4000, 2), (1, 1)])
def test_extreme_aspects_are_clamped_in_columns_too(tmp_path: Path, shape: tuple[int, int]):
    sheet = draw(tmp_path, photo(*shape), of_denoiser(), exact=decomposition(method="exact"), title="a")
    assert cells(sheet) == 4 and 600 < sheet.shape[0] < 2600


def test_exact_is_not_drawn_next_to_a_result_of_stage_one(tmp_path: Path):
    with pytest.raises(ValueError, match="next to features that do not separate an artifact, got exact"):
        draw(tmp_path, photo(4, 4), decomposition(method="exact"), exact=decomposition())


def test_wrong_arguments(tmp_path: Path):
    path = tmp_path / "panel.png"
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8 array, got float64"):
        draw_panel(np.zeros((4, 4, 3)), decomposition(), path)
    with pytest.raises(ValueError, match=r"got uint8 of shape \(4, 4\)"):
        draw_panel(np.zeros((4, 4), np.uint8), decomposition(), path)
    with pytest.raises(ValueError, match="factor must be a whole number"):
        draw_panel(photo(4, 4), decomposition(), path, upsample=0)
    broken = decomposition()
    broken.raw[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 of 210 values are not"):
        draw_panel(photo(4, 4), broken, path)
    assert not path.exists()


@pytest.mark.parametrize("method", ["exact", "subtract", "project", "average"])
def test_artifact_is_drawn_only_for_methods_that_separate_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    headings: list[str] = []
    real = Sheet.picture

    def noted(self: Sheet, row: int, column: int, pixels: np.ndarray, heading: str = "", **more: Any) -> None:
        headings.append(heading)
        real(self, row, column, pixels, heading, **more)

    monkeypatch.setattr(Sheet, "picture", noted)
    draw(tmp_path, photo(30, 45), decomposition(method=method))
    assert any("artifact G" in heading for heading in headings) == (method in ("exact", "subtract"))
    assert (method in headings) == (method in ("project", "average"))
