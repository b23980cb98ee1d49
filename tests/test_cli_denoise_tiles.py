"""`dvit denoise --tile`: pictures larger than the backbone's input, kept results, wrong options."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import denoising_vit as dv
import planted
from command import Dvit, in_process
from denoising_vit.backbones import BackboneSpec
from denoising_vit.data.pictures import open_picture
from denoising_vit.extractors import Cleaners
from denoising_vit.tiling import denoising

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    """Runs `dvit denoise ... --method average` with the planted backbone."""
    monkeypatch.setattr(BackboneSpec, "load", lambda _spec: planted.backbone())
    run = in_process(capsys, monkeypatch)
    return lambda *arguments: run("denoise", "--method", "average", "--json", *arguments)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_result_and_panel_are_kept_for_the_same_tiles(dvit: Dvit, photo: Path, tmp_path: Path) -> None:
    tiles = photo, "-o", tmp_path / "out", "--tile", 88
    (row,) = dvit(*tiles).rows
    assert row["status"] == "done" and Path(row["panel"]).exists()
    result = dv.Decomposition.load(row["output"])
    assert result.size == (152, 200) and tuple(result.semantic.shape) == (19, 25, planted.CHANNELS)
    extractor, _ = Cleaners().extractor("average", planted.backbone())
    expected = dv.tiled_features(extractor, photo, tile=88)
    torch.testing.assert_close(result.semantic, expected, atol=2e-2, rtol=1e-2)  # float16
    assert dvit(*tiles).rows[0]["note"] == "kept"
    for other in (("--overlap", 0), ("--size", 160, 208)):
        assert "made with other settings" in dvit(*tiles, *other).rows[0]["note"]
    assert "made with other settings" in dvit(photo, "-o", tmp_path / "out").rows[0]["note"]
    (again,) = dvit(*tiles, "--size", 96, 128, "--overwrite").rows
    assert dv.Decomposition.load(again["output"]).size == (96, 128)


def test_reading_by_regions_matches_decoding_the_whole_picture(
    dvit: Dvit, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tifffile")
    large = tmp_path / "a.tif"
    Image.open(photo).save(large)
    results = []
    for folder, whole in (("whole", 10**6), ("regions", 1000)):
        monkeypatch.setattr(
            denoising, "open_picture", lambda path, whole=whole, **k: open_picture(path, whole=whole, **k)
        )
        (row,) = dvit(large, "-o", tmp_path / folder, "--tile", 88).rows
        assert row["status"] == "done" and Path(row["panel"]).exists()
        results.append(dv.Decomposition.load(row["output"]))
    torch.testing.assert_close(results[0].semantic, results[1].semantic)


def test_larger_pictures_are_read_when_allowed(dvit: Dvit, photo: Path, tmp_path: Path) -> None:
    for tiles in ((), ("--tile", 88)):
        (row,) = dvit(photo, "-o", tmp_path / "out", "--max-pixels", 29_999, *tiles).rows
        assert row["status"] == "failed"
        assert "200 x 150 pixels exceed the limit of 29,999" in row["note"] and "--max-pixels" in row["note"]
    assert dvit(photo, "-o", tmp_path / "out", "--max-pixels", 30_000, "--tile", 88).rows[0]["status"] == "done"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tile", 81), "a side of 81 pixels does not fit the patch grid"),
        (("--tile", 88, "--overlap", 60), "overlap must be 0 to 44 pixels (half a tile), got 60"),
        (("--overlap", 16), "there are no tiles; also set tile, the side of a tile"),
    ],
    ids=str,
)
def test_wrong_tile_options_exit_2(
    dvit: Dvit, photo: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    refused = dvit(photo, "-o", tmp_path / "out", *options)
    assert refused.code == 2 and message in refused.words
