"""Every kind of image file becomes (H, W, 3) uint8, or an error that names the file and what is wrong with it."""

from __future__ import annotations

import ast
import io
import random
import re
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, features
from skimage import data

import denoising_vit
from denoising_vit.data.photos import (
    FORMATS,
    IMAGE_SUFFIXES,
    is_panel,
    photo_digest,
    read_photo,
    read_photo_bytes,
)
from denoising_vit.errors import DenoisingVitWarning, EvaluationError, PhotoError
from denoising_vit.evaluation.depth.data import read_depth
from denoising_vit.evaluation.masks import Coding, read_mask

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def small_cat() -> np.ndarray:
    return np.ascontiguousarray(data.chelsea()[100:140, 200:260])  # (40, 60, 3), textured


def refuses(path: str | Path, reason: str, **options: Any) -> None:
    """The error names the file and, after it, the reason."""
    with pytest.raises(PhotoError, match=f"{re.escape(str(path))}.*{reason}"):
        read_photo(path, **options)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_declaring(path: Path, width: int, height: int) -> Path:
    """A PNG of a hundred bytes whose header declares width x height pixels of 8-bit grayscale."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    content = png_chunk(b"IDAT", zlib.compress(b"\0" * 64))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + content + png_chunk(b"IEND", b""))
    return path


# --- files that are not photos ---


def test_missing_path(tmp_path: Path) -> None:
    refuses(tmp_path / "nothing.jpg", "no such file")


def test_directory_given_as_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder.jpg"
    folder.mkdir()
    refuses(folder, "is a directory, expected an image file")


def test_text_renamed_to_jpg(tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_text("these are only words\n" * 50)
    refuses(path, "not an image file that can be read")


def test_zero_bytes(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    refuses(path, r"empty \(0 bytes\)")


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_truncated_file(tmp_path: Path, ending: str, kept: float) -> None:
    path = tmp_path / f"cut.{ending}"
    Image.fromarray(small_cat()).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    refuses(path, "damaged or unreadable image")


def test_truncated_open_image_is_a_photo_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.fromarray(small_cat()).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with Image.open(path) as image, pytest.raises(PhotoError, match="damaged or unreadable"):
        read_photo(image)


def test_name_too_long_for_the_file_system_is_a_photo_error(tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="name too long"):
        read_photo(tmp_path / ("a" * 300 + ".jpg"))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_file_of_any_format_gives_pixels_or_a_photo_error(tmp_path: Path, kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF decoder")
    buffer = io.BytesIO()
    Image.fromarray(small_cat()).save(buffer, kind)
    content = buffer.getvalue()
    path = tmp_path / "damaged"
    generator = random.Random(0)
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 4))):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            pixels = read_photo(path)
        except PhotoError as error:
            assert "damaged" in str(error)  # the file's name
        else:
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3 and pixels.shape[2] == 3


# --- formats ---


def encapsulated_postscript(path: Path) -> Path:
    """An EPS file, which Pillow passes to Ghostscript, a program that executes the file."""
    Image.fromarray(small_cat()).save(path, "EPS")
    return path


@pytest.mark.parametrize("name", ["photo.eps", "photo.jpg", "photo"])
def test_postscript_is_refused_and_no_program_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def started(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a program was started")

    for call in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, call, started)
    path = encapsulated_postscript(tmp_path / name)
    refuses(path, "not an image file that can be read")
    with pytest.raises(PhotoError, match="not an image file that can be read"):
        read_photo_bytes(path.read_bytes(), "upload.png")
    with pytest.raises(EvaluationError, match="not an image file that can be read"):
        read_mask(path, Coding(2, "a list"))
    with pytest.raises(EvaluationError, match="not an image file that can be read"):
        read_depth(path)
    assert not is_panel(path) and not is_panel(path.read_bytes())


def test_every_image_is_opened_with_explicit_formats() -> None:
    trees = [ast.parse(file.read_text()) for file in Path(denoising_vit.__file__).parent.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imports = [
        name for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "PIL" for name in node.names
    ]
    assert all(name.asname is None for name in imports)  # else the calls below would have another name
    assert not any(isinstance(node, ast.ImportFrom) and node.module == "PIL.Image" for node in nodes)
    opened = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"]
    assert opened and all("formats" in {given.arg for given in call.keywords} for call in opened)


def test_suffixes_are_all_that_pillow_registers_for_the_formats() -> None:
    Image.init()
    found = {ending for ending, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")}
    assert found == IMAGE_SUFFIXES


# --- metadata ---


def large_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    return info


def test_png_with_large_text_is_read(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    Image.fromarray(small_cat()).save(path, pnginfo=large_text())
    np.testing.assert_array_equal(read_photo(path), small_cat())
    np.testing.assert_array_equal(read_photo_bytes(path.read_bytes(), "text.png"), small_cat())


def test_mask_and_depth_map_with_large_text_are_read(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(values).save(tmp_path / "mask.png", pnginfo=large_text())
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", Coding(12, "a list")), values)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "depth.png", pnginfo=large_text())
    np.testing.assert_array_equal(read_depth(tmp_path / "depth.png"), values)


def test_png_with_damaged_metadata_is_read(tmp_path: Path) -> None:
    Image.fromarray(small_cat()).save(tmp_path / "plain.png")
    content = (tmp_path / "plain.png").read_bytes()
    head, rest = content[:33], content[33:]  # signature and IHDR
    for kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"tIME", b"gAMA"):
        broken = bytearray(png_chunk(kind, b"Comment\0\0" + bytes(range(60))))
        broken[-1] ^= 255  # its checksum
        np.testing.assert_array_equal(read_photo_bytes(head + bytes(broken) + rest, "broken.png"), small_cat())


def test_png_with_large_text_and_damaged_pixels_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    Image.fromarray(small_cat()).save(path, pnginfo=large_text())
    path.write_bytes(path.read_bytes()[:-600])
    refuses(path, "damaged or unreadable image")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_photo_with_damaged_exif_is_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"cat.{ending}"
    Image.fromarray(small_cat()).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\x08broken", quality=100)
    assert read_photo(path).shape == (40, 60, 3)


def test_orientation_is_applied_despite_a_damaged_exif_tag(tmp_path: Path) -> None:
    entries = struct.pack(">HHHIHH", 2, 0x0112, 3, 1, 6, 0) + struct.pack(">HHII", 0x8769, 4, 1, 0xFFFFFF)
    path = tmp_path / "cat.jpg"
    Image.fromarray(small_cat()).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08" + entries + b"\0\0\0\0")
    assert read_photo(path).shape == (60, 40, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_every_orientation_is_applied_as_in_pillow(tmp_path: Path, orientation: int, ending: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"cat.{ending}"
    Image.fromarray(small_cat()).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_photo(path), expected)


# --- too large ---


def never_decode(*_arguments: Any, **_options: Any) -> None:
    raise AssertionError("the pixels were decoded")


@pytest.mark.parametrize("side", [12_000, 40_000])  # within and beyond Pillow's own limit
def test_decompression_bomb_is_refused_before_decoding(
    tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", never_decode)
    bomb = png_declaring(tmp_path / "bomb.png", side, side)
    assert bomb.stat().st_size < 200
    refuses(bomb, "(exceed the limit of|over) 100,000,000")


def test_bomb_message_gives_size_limit_and_remedy(tmp_path: Path) -> None:
    bomb = png_declaring(tmp_path / "bomb.png", 12_000, 9_000)
    refuses(bomb, r"12,000 x 9,000 pixels exceed the limit of 100,000,000; shrink it first, or raise the limit")


def test_max_pixels_is_inclusive(tmp_path: Path) -> None:
    path = tmp_path / "small.png"
    Image.fromarray(small_cat()).save(path)
    assert read_photo(path, max_pixels=2400).shape == (40, 60, 3)
    refuses(path, "60 x 40 pixels exceed the limit of 2,399", max_pixels=2399)


def test_max_pixels_applies_to_pil_images() -> None:
    with pytest.raises(PhotoError, match="the image: 60 x 40 pixels exceed the limit of 100;"):
        read_photo(Image.fromarray(small_cat()), max_pixels=100)


def test_max_pixels_overrides_the_limit_of_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Like a photo of 200 million pixels with max_pixels=10**9, without using that much memory.
    path = tmp_path / "large.png"
    Image.fromarray(small_cat()).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_photo(path, max_pixels=10_000).shape == (40, 60, 3)


# --- pixel formats ---


@pytest.mark.parametrize("ending", ["png", "bmp", "ppm", "tif"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"cat.{ending}"
    Image.fromarray(small_cat()).save(path)
    np.testing.assert_array_equal(read_photo(path), small_cat())


def test_path_may_be_a_string(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    Image.fromarray(small_cat()).save(path)
    np.testing.assert_array_equal(read_photo(str(path)), small_cat())


def test_pil_image_is_read_like_its_file() -> None:
    np.testing.assert_array_equal(read_photo(Image.fromarray(small_cat())), small_cat())


def test_grayscale_is_repeated_in_three_channels(tmp_path: Path) -> None:
    gray = np.array([[0, 100], [200, 255]], dtype=np.uint8)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    pixels = read_photo(tmp_path / "gray.png")
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], gray)


def test_one_bit_image_is_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "bits.png")
    assert read_photo(tmp_path / "bits.png").tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_alpha_is_composited_over_white(tmp_path: Path) -> None:
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51], [0, 100, 200, 255]]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    pixels = read_photo(tmp_path / "alpha.png")
    # Black at 51 / 255 = 0.2 over white is 0.8 * 255 = 204.
    assert pixels.tolist() == [[list(RED), list(WHITE), [204, 204, 204], [0, 100, 200]]]


def test_grayscale_with_alpha_is_composited_over_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[0, 51], [10, 255]]], dtype=np.uint8), "LA").save(tmp_path / "la.png")
    assert read_photo(tmp_path / "la.png").tolist() == [[[204] * 3, [10] * 3]]


def palette_image() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *BLUE, 0, 255, 0])
    image.putdata([0, 1, 2])
    return image


def test_palette_becomes_its_colours(tmp_path: Path) -> None:
    palette_image().save(tmp_path / "palette.png")
    assert read_photo(tmp_path / "palette.png").tolist() == [[list(RED), list(BLUE), [0, 255, 0]]]


def test_transparent_palette_entry_becomes_white(tmp_path: Path) -> None:
    palette_image().save(tmp_path / "palette.png", transparency=1)
    assert read_photo(tmp_path / "palette.png").tolist() == [[list(RED), list(WHITE), [0, 255, 0]]]


def test_transparent_colour_of_an_rgb_file_becomes_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[RED, BLUE]], dtype=np.uint8))
    image.save(tmp_path / "key.png", transparency=BLUE)
    assert read_photo(tmp_path / "key.png").tolist() == [[list(RED), list(WHITE)]]


def test_cmyk_jpeg_has_its_colours(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)  # no cyan: red
    pixels = read_photo(tmp_path / "cmyk.jpg")
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels.astype(int) - RED).max() <= 3


def test_sixteen_bit_grayscale_is_scaled_to_eight_bits(tmp_path: Path) -> None:
    # value / 257, rounded: 128 / 257 = 0.498, 129 / 257 = 0.502
    deep = np.array([[0, 128, 129, 257], [514, 32896, 65278, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    pixels = read_photo(tmp_path / "deep.png")
    expected = np.array([[0, 0, 1, 1], [2, 128, 254, 255]], dtype=np.uint8)
    np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize(("largest", "white"), [(200, 255), (1000, 1023), (4095, 4095), (9000, 16383)])
def test_fewer_bits_in_16_are_inferred_from_the_maximum_with_a_warning(
    tmp_path: Path, largest: int, white: int
) -> None:
    path = tmp_path / "deep.tif"
    Image.fromarray(np.array([[0, largest // 2, largest]], dtype=np.uint16)).save(path)
    with pytest.warns(
        DenoisingVitWarning, match=rf"deep.tif: no 16-bit value is above {largest:,}; .*\({white:,} is white"
    ):
        pixels = read_photo(path)
    assert pixels[0, :, 0].tolist() == [round(value * 255 / white) for value in (0, largest // 2, largest)]


def test_declared_maximum_is_white(tmp_path: Path) -> None:
    path = tmp_path / "deep.tif"
    image = Image.fromarray(np.array([[0, 500, 1000]], dtype=np.uint16))
    image.save(path, tiffinfo={281: 4095})
    assert read_photo(path)[0, :, 0].tolist() == [0, 31, 62]


def test_black_16_bit_photo_gives_no_warning(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((2, 3), dtype=np.uint16)).save(tmp_path / "black.png")
    assert not read_photo(tmp_path / "black.png").any()


@pytest.mark.parametrize(("largest", "refused"), [(4095, True), (16383, True), (40_000, False), (0, False)])
def test_16_bit_colours_that_would_be_nearly_black_are_rejected(tmp_path: Path, largest: int, *, refused: bool) -> None:
    rows = np.linspace(0, largest, 12).astype(">u2").reshape(1, 4, 3)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, 16, 2, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(b"\0" + rows.tobytes()))
    path = tmp_path / "colours.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + png_chunk(b"IEND", b""))
    if refused:
        refuses(path, "16-bit colour values are below")
    else:
        assert int(read_photo(path).max()) == largest // 256


def test_float_tiff_from_zero_to_one_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.2, 1.0]], dtype=np.float32)).save(tmp_path / "float.tif")
    assert read_photo(tmp_path / "float.tif").tolist() == [[[0] * 3, [51] * 3, [255] * 3]]


@pytest.mark.parametrize(("values", "message"), [([0.0, 2.0], "0 to 2"), ([-0.5, 1.0], "-0.5 to 1")])
def test_float_tiff_out_of_range_is_refused(tmp_path: Path, values: list[float], message: str) -> None:
    path = tmp_path / "float.tif"
    Image.fromarray(np.array([values], dtype=np.float32)).save(path)
    refuses(path, rf"float32 grayscale with values {message}; expected 0 to 65535, or 0 to 1 for floats")


def test_float_tiff_with_nan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "float.tif"
    Image.fromarray(np.array([[0.5, np.nan]], dtype=np.float32)).save(path)
    refuses(path, "values nan to nan")


def test_integers_beyond_16_bits_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "int.tif"
    Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)).save(path)
    refuses(path, "int32 grayscale with values 0 to 70000")


def test_animated_gif_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    pixels = read_photo(tmp_path / "moving.gif")
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.array(RED), (8, 8, 3)))


def test_exif_orientation_turns_the_photo_upright(tmp_path: Path) -> None:
    stored = np.zeros((2, 4, 3), dtype=np.uint8)  # 4 wide, 2 high
    stored[0, 0] = RED
    stored[1, 3] = BLUE
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored first row is the right side, the stored first column is the top
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    pixels = read_photo(tmp_path / "turned.png")
    assert pixels.shape == (4, 2, 3)
    assert pixels[0, 1].tolist() == list(RED)
    assert pixels[3, 0].tolist() == list(BLUE)
    assert int(pixels.sum()) == 510  # no other pixel is coloured


# --- arrays ---


def test_valid_array_is_returned_without_a_copy() -> None:
    pixels = small_cat()
    assert read_photo(pixels) is pixels


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 5), dtype=np.uint8), r"shape \(4, 5\) of uint8"),
        (np.zeros((4, 5, 4), dtype=np.uint8), r"shape \(4, 5, 4\) of uint8"),
        (np.zeros((3, 4, 5), dtype=np.uint8), r"shape \(3, 4, 5\) of uint8"),
        (np.zeros((1, 4, 5, 3), dtype=np.uint8), r"shape \(1, 4, 5, 3\) of uint8"),
        (np.zeros((4, 5, 3), dtype=np.float32), r"shape \(4, 5, 3\) of float32"),
        (np.zeros((4, 5, 3), dtype=np.int64), r"shape \(4, 5, 3\) of int64"),
    ],
)
def test_wrong_array_is_rejected_with_its_shape_and_dtype(pixels: np.ndarray, message: str) -> None:
    with pytest.raises(PhotoError, match=rf"expected an \(H, W, 3\) uint8 array, got {message}"):
        read_photo(pixels)


# --- digests ---


def test_digest_is_of_the_pixels_not_of_the_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.bmp"):
        Image.fromarray(small_cat()).save(tmp_path / name)
    assert photo_digest(read_photo(tmp_path / "a.png")) == photo_digest(read_photo(tmp_path / "b.bmp"))


def test_digest_depends_on_pixels_and_shape() -> None:
    pixels = small_cat()
    changed = pixels.copy()
    changed[3, 4, 1] ^= 1
    assert photo_digest(pixels) != photo_digest(changed)
    assert photo_digest(pixels) != photo_digest(pixels.reshape(60, 40, 3))


def test_digest_ignores_memory_layout() -> None:
    pixels = small_cat()
    assert photo_digest(np.asfortranarray(pixels)) == photo_digest(pixels)
