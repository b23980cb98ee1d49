"""The app without a browser: files, pictures and metrics for a photo and settings."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import denoising_vit as dv
import tiny_app as tiny
from denoising_vit.backbones import SEEDS, BackboneSpec
from denoising_vit.data.photos import is_panel, read_photo
from denoising_vit.errors import AppError, BackboneError, DenoiserError, PhotoError, SizeError
from denoising_vit.maps import Palette
from denoising_vit.maps.kinds import SIMILARITY
from denoising_vit.show.app import answers
from denoising_vit.show.app.answers import Answer, Keep, Settings, answer, draw_sheet
from denoising_vit.show.app.models import KEPT, Models
from denoising_vit.show.app.scene import LEGENDS, MAPS, NONE, Scene, figures
from denoising_vit.show.app.serving import find_samples

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = {"method": "exact", "views": 8, "size": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return tiny.models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def keep() -> Iterator[Keep]:
    with Keep() as found:
        yield found


def settings(models: Models, **changes: object) -> Settings:
    return Settings(models.spec.backbone, **({"method": "denoiser"} | changes))  # pyright: ignore[reportArgumentType]


def scene(raw: torch.Tensor, clean: torch.Tensor, photo: tuple[int, int] = (120, 90)) -> Scene:
    arrays = raw.numpy(), clean.numpy()
    return Scene(np.zeros((*photo, 3), np.uint8), *arrays, Palette(arrays))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def colours(picture: np.ndarray) -> set[int]:
    """The colours of a picture (height, width, 3) uint8, as numbers of 24 bits."""
    return set(np.unique(picture.astype(int) @ (1 << 16, 1 << 8, 1)).tolist())


# Samples


def test_package_includes_a_sample_photo_with_its_licence() -> None:
    cat = find_samples()["cat"]
    assert cat.is_relative_to(Path(answers.__file__).parent)
    assert cat.stat().st_size < 100_000
    assert "CC0" in (cat.parent / "README.txt").read_text()
    assert read_photo(cat).shape == (300, 451, 3)


def test_photos_of_a_folder_come_first(tmp_path: Path) -> None:
    tiny.photo(tmp_path, 20, 30, name="mine.png")
    assert next(iter(find_samples(tmp_path))) == "mine.png"
    assert "cat" in find_samples(tmp_path)


def test_a_folder_without_photos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AppError, match=r"must be a folder with photos, got .* has none"):
        find_samples(tmp_path)


# Backbones


def test_methods_depend_on_backbone_and_layer(models: Models) -> None:
    assert models.get(models.spec.backbone).methods == ("denoiser", "exact", "subtract", "project", "average")
    assert models.get(models.spec.backbone, 5).methods == (
        "exact",
        "project",
        "average",
    )  # the given denoiser and artifact are for the last layer
    assert models.get(models.spec.backbone, 5).backbone.layer == 5


def test_the_page_starts_with_the_method_of_a_given_cleaner(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("denoising_vit.backbones.loading", "denoising_vit.show.app.models"):
        monkeypatch.setattr(f"{module}.find_distilled", lambda _: Path("distilled.safetensors"))

    def first(**given: str | None) -> str:
        chosen = {"denoiser": None, "artifact": None} | given
        return Models(models.spec, **chosen).get(models.spec.backbone).methods[0]

    assert first() == "distilled"
    assert first(artifact=models._artifact) == "exact"
    assert first(denoiser=models._denoiser, artifact=models._artifact) == "denoiser"


def test_missing_weights_are_reported_with_the_command_to_run(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    name = "vit_base_patch14_dinov2.lvd142m"
    assert name in models.names
    assert not models.at_hand(name)
    with pytest.raises(AppError, match=f"weights of {name} are not on this computer: dvit app --backbone {name}"):
        models.get(name)


def test_weights_in_the_hub_cache_are_available(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def cached(repository: str, file: str) -> str | None:
        asked.append(repository)
        return f"/cache/{file}" if file == "pytorch_model.bin" else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert models.at_hand("vit_base_patch16_224.dino")
    assert set(asked) == {"timm/vit_base_patch16_224.dino"}


def test_unknown_backbone_names_are_rejected(models: Models) -> None:
    with pytest.raises(AppError, match=r"unknown backbone '../../secret'"):
        models.get("../../secret")


def test_layer_out_of_range_is_rejected(models: Models) -> None:
    with pytest.raises(BackboneError, match="12"):
        models.get(models.spec.backbone, 99)


def test_only_the_last_backbones_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Models(tiny.spec(tmp_path))
    own, loads = found.spec.load(), []
    monkeypatch.setattr(BackboneSpec, "load", lambda spec: loads.append(spec.backbone) or own)
    monkeypatch.setattr(Models, "at_hand", lambda self, name: True)
    first, *last = list(SEEDS)[: KEPT + 1]
    for name in (first, *last, *last, first):
        found.get(name)
    assert loads == [first, *last, first]


@pytest.mark.parametrize("changes", [{"weights": "random"}, {"layer": 3}], ids=["other weights", "another layer"])
def test_denoiser_of_another_backbone_is_rejected_at_startup(
    models: Models, tmp_path: Path, changes: dict[str, Any]
) -> None:
    other = Models(replace(tiny.spec(tmp_path), **changes), models._denoiser)
    with pytest.raises(DenoiserError, match=r"the denoiser was trained for .*Use the backbone that it was trained for"):
        other.require_given()


# Answers


def test_features_file_matches_denoise_image(models: Models, keep: Keep) -> None:
    found = answer(models, keep, tiny.SAMPLE, settings(models))
    model = models.get(models.spec.backbone)
    expected = dv.denoise_image(model.backbone, tiny.SAMPLE, method="denoiser", denoiser=model.denoiser)
    assert found.features.name == "cat.safetensors"
    written = dv.Decomposition.load(found.features)
    torch.testing.assert_close(written.semantic, expected.semantic, atol=5e-3, rtol=1e-3)  # float16
    assert written.info["photo"] == expected.info["photo"]
    assert written.info["upsample"] == 1
    assert set(written.info) == {*expected.info, "upsample"}


def test_exact_reports_progress_and_stores_upsampled_features(models: Models, keep: Keep) -> None:
    reported = []
    few = settings(models, **FEW, scale=3)
    found = answer(models, keep, tiny.SAMPLE, few, lambda done, total: reported.append((done, total)))
    assert reported[0] == (0, 16)
    assert reported[-1] == (16, 16)
    with safe_open(found.features, framework="pt") as file:
        assert file.get_tensor("upsampled").shape == (12, 12, 192)
    assert Scene.of(found).clean.shape == (12, 12, 192)
    assert found.result.heldout_r2 is not None


def test_subtract_uses_the_given_artifact(models: Models, keep: Keep) -> None:
    found = answer(models, keep, tiny.SAMPLE, settings(models, method="subtract", size=224))
    artifact = models.get(models.spec.backbone).artifact
    assert artifact is not None
    torch.testing.assert_close(found.result.raw - found.result.semantic, artifact.at((14, 14)), atol=1e-4, rtol=1e-4)


def test_answer_can_be_loaded_until_it_is_deleted(models: Models, keep: Keep) -> None:
    found = answer(models, keep, tiny.SAMPLE, settings(models))
    again = Answer.load(found.folder)
    torch.testing.assert_close(again.result.raw, found.result.raw, atol=5e-3, rtol=1e-3)
    np.testing.assert_array_equal(again.photo, found.photo)
    keep.forget(found.folder)
    with pytest.raises(AppError, match="has been deleted; denoise the photo again"):
        Answer.load(found.folder)


def test_sheet_is_a_panel_and_drawn_once(models: Models, keep: Keep) -> None:
    sheet = draw_sheet(answer(models, keep, tiny.SAMPLE, settings(models)))
    assert is_panel(sheet)
    assert sheet.stat().st_mtime_ns == draw_sheet(Answer.load(sheet.parent)).stat().st_mtime_ns  # drawn once


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"I am text", "^photo.jpg: not an image file"),
        (b"", "^photo.jpg: the file is empty"),
        (tiny.SAMPLE.read_bytes()[:9000], "^photo.jpg: damaged"),
    ],
)
def test_errors_for_unreadable_photos_do_not_name_the_folder(
    models: Models, keep: Keep, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(PhotoError, match=message):
        answer(models, keep, tmp_path / "photo.jpg", settings(models))


def test_too_many_pixels_are_refused_before_they_are_decoded(
    models: Models, keep: Keep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MAX_PIXELS", 999)
    with pytest.raises(
        PhotoError,
        match=r"^photo.png: 50 x 20 pixels exceed the limit of 999; shrink it first",
    ):
        answer(models, keep, tiny.photo(tmp_path, 20, 50), settings(models))


def test_a_photo_of_one_pixel_is_refused(models: Models, keep: Keep, tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="1 x 1 pixels are less than one patch of 16 pixels"):
        answer(models, keep, tiny.photo(tmp_path, 1, 1), settings(models))


@pytest.mark.parametrize(("height", "width", "colour"), [(40, 40, 128), (16, 2000, None), (2000, 16, None)])
def test_uniform_and_very_elongated_photos_are_denoised(
    models: Models, keep: Keep, tmp_path: Path, height: int, width: int, colour: int | None
) -> None:
    found = answer(models, keep, tiny.photo(tmp_path, height, width, colour), settings(models, **FEW))
    shown = Scene.of(found)
    for kind in LEGENDS:
        for side in shown.maps(kind, shown.centre):
            assert side.shape == (*shown.shape, 3)
    assert max(shown.shape) <= 4 * min(shown.shape) + 1  # drawn at 4:1 at most
    assert all("nan" not in f"{line.raw} {line.clean}" for line in figures(found))


def test_wide_crops_use_the_known_artifact(models: Models, keep: Keep) -> None:
    model = models.get(models.spec.backbone)
    found = answer(models, keep, tiny.SAMPLE, settings(models, **FEW, wide=True))
    options = {"views": 8, "held_out": found.result.info["held_out"], "size": 64, "area": (0.4, 1.0)}
    expected = dv.denoise_image(model.backbone, tiny.SAMPLE, method="exact", artifact=model.artifact, **options)
    torch.testing.assert_close(found.result.semantic, expected.semantic, atol=1e-2, rtol=1e-2)  # float16
    assert found.result.info["area"] == [0.4, 1.0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "exact", "views": 0}, AppError, "views must be between 1 and 128"),
        ({"method": "exact", "scale": 9}, AppError, "scale must be between 1 and 4"),
        ({"size": 3200}, AppError, "size must be at most 768 pixels"),
        ({"size": 225}, SizeError, "225"),
        ({"method": "neural-field"}, AppError, "does not support method 'neural-field'"),
        ({"layer": 3}, AppError, "at layer 3 does not support method 'denoiser'; available: exact"),
        ({"layer": -13}, BackboneError, "-13"),
    ],
)
def test_settings_out_of_range_are_refused(
    models: Models, keep: Keep, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        answer(models, keep, tiny.SAMPLE, settings(models, **changes))


def test_error_in_the_progress_callback_stops_and_leaves_no_files(models: Models, keep: Keep) -> None:
    calls = []

    def leave(done: int, total: int) -> None:
        calls.append(done)
        if done:
            raise KeyError

    with pytest.raises(KeyError):
        answer(models, keep, tiny.SAMPLE, settings(models, method="exact", views=64), leave)
    assert len(calls) == 2
    assert not list(keep._answers.iterdir())


# Pictures


def test_both_sides_have_the_same_colours() -> None:
    raw = noise(5, 7, 16)
    shown = scene(raw, raw.flip(1))
    for kind in LEGENDS:
        if kind != SIMILARITY:
            left, right = shown.maps(kind, (0, 0))
            assert colours(left) == colours(right), kind


def test_maps_have_the_photos_aspect_and_sharp_patches() -> None:
    shown = scene(noise(5, 7, 16), noise(10, 14, 16), photo=(150, 300))
    left, right = shown.maps("pca", (0, 0))
    assert left.shape == right.shape
    assert left.shape[1] / left.shape[0] == pytest.approx(2, abs=0.01)
    assert len(colours(left)) <= 35
    assert (np.diff(left.astype(int), axis=1) != 0).any(-1).sum(1).max() <= 6  # 7 columns meet at 6 edges
    assert left.shape[1] % 14 == 0


def test_patch_at_returns_the_patch_of_a_pixel() -> None:
    shown = scene(noise(5, 7, 16), noise(5, 7, 16), photo=(150, 300))
    height, width = shown.shape
    assert shown.patch_at(0, 0) == (0, 0)
    assert shown.patch_at(width - 1, height - 1) == (4, 6)
    assert shown.patch_at(width * 1.5 / 7, height * 3.5 / 5) == (3, 1)
    assert shown.patch_at(width + 9, -9) == (0, 6)


def test_similarity_is_one_at_the_patch_itself() -> None:
    shown = scene(noise(5, 7, 16), noise(5, 7, 16, seed=1))
    height, width = shown.shape
    for at in ((0, 0), (3, 5)):
        for side in shown.maps(SIMILARITY, at):
            y, x = int((at[0] + 0.5) * height / 5), int((at[1] + 0.5) * width / 7)
            assert tuple(side[y, x]) == (103, 0, 31)  # the last colour of the scale


def test_selected_patch_is_marked_in_the_photo() -> None:
    shown = scene(noise(5, 7, 16), noise(5, 7, 16))
    rows, columns = np.nonzero(shown.marked((2, 3)).any(-1))
    height, width = shown.shape
    assert rows.min() < 2 * height / 5 < 3 * height / 5 < rows.max()
    assert rows.min() > height / 5
    assert columns.min() > 2 * width / 7


def test_unknown_patches_and_maps_are_rejected() -> None:
    shown = scene(noise(5, 7, 16), noise(5, 7, 16))
    for at in ((5, 0), (0, 7), (-1, 0)):
        with pytest.raises(AppError, match="row must be 0 to 4 and column 0 to 6"):
            shown.maps("pca", at)
    with pytest.raises(AppError, match="unknown map 'aura'"):
        shown.maps("aura", (0, 0))


def test_every_map_has_a_legend() -> None:
    assert set(MAPS.values()) == set(LEGENDS)


# Figures


def test_figures_compare_raw_and_denoised_features(models: Models, keep: Keep) -> None:
    found = answer(models, keep, tiny.SAMPLE, settings(models, **FEW))
    lines = {line.name: line for line in figures(found)}
    assert lines["held-out R²"].clean == f"{found.result.heldout_r2:.3f}"
    cosine = torch.nn.functional.cosine_similarity(found.result.raw, found.result.semantic, dim=-1).mean()
    assert lines["cosine of raw and denoised"].clean == f"{cosine:.3f}"
    assert lines["effective rank"].raw != NONE
    assert all(line.words.endswith(".") for line in lines.values())


def test_held_out_figures_need_the_exact_method(models: Models, keep: Keep) -> None:
    found = answer(models, keep, tiny.SAMPLE, settings(models))
    assert not [line.name for line in figures(found) if line.name.startswith("held-out")]


# Stored answers


def test_answer_folders_are_private_and_deleted_on_exit() -> None:
    with Keep() as keep:
        folder = keep.new()
        for private in (folder, keep.served.parent):
            assert private.stat().st_mode & 0o077 == 0
        (folder / "file").touch()
    assert not keep.served.parent.exists()


def test_old_and_surplus_answers_are_deleted(keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    old, young = keep.new(), keep.new()
    os.utime(old, (0, time.time() - answers.LIFETIME - 9))
    newest = keep.new()
    assert (old.exists(), young.exists(), newest.exists()) == (False, True, True)
    monkeypatch.setattr(answers, "MOST", 2)
    os.utime(young, (0, time.time() - 9))
    keep.new()
    assert (young.exists(), newest.exists()) == (False, True)


def test_forget_deletes_only_answers(keep: Keep, tmp_path: Path) -> None:
    keep.forget(tmp_path)
    keep.forget(None)
    assert tmp_path.exists()


def test_stored_photo_has_sides_of_at_most_1200_pixels(models: Models, keep: Keep, tmp_path: Path) -> None:
    found = answer(models, keep, tiny.photo(tmp_path, 30, 2500), settings(models, **FEW))
    with Image.open(found.folder / "photo.png") as image:
        assert max(image.size) <= 1200
