"""Content-free images in stages 2 and 3: their targets, their share of a batch, resuming, and their effect."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny_distillation
import tiny_fit
import tiny_training as tiny
from denoising_vit.errors import TrainError
from denoising_vit.training.blanks import BLANKS, Blanks, blank_loss

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (64, 64)


@pytest.fixture(scope="module")
def data(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tiny.Fitted:
    return tiny.fitted(tmp_path_factory.mktemp("data"))


def test_targets_are_constant_and_keep_the_mean() -> None:
    blanks = Blanks.of(tiny.backbone(), [SIZE, (32, 64)], seed=3)
    assert [tuple(raw.shape[:3]) for raw in blanks.raw] == [(BLANKS, 8, 8), (BLANKS, 4, 8)]
    raw, clean = blanks.draw(1, step=0, first=0, count=5)
    assert raw.shape == clean.shape and raw.shape[:3] == (5, 4, 8)
    assert (clean == clean[:, :1, :1]).all() and not (raw == raw[:, :1, :1]).all()
    torch.testing.assert_close(clean.mean((1, 2)), raw.mean((1, 2)))


def test_images_of_a_step_are_split_between_batches_and_processes() -> None:
    blanks = Blanks.of(tiny.backbone(), [SIZE], seed=3)
    whole, _ = blanks.draw(0, step=4, first=0, count=6)
    parts = [blanks.draw(0, step=4, first=first, count=2)[0] for first in (0, 2, 4)]
    assert (torch.cat(parts) == whole).all()
    assert not (blanks.draw(0, step=5, first=0, count=6)[0] == whole).all()
    assert not (Blanks.of(tiny.backbone(), [SIZE], seed=4).draw(0, 4, 0, 6)[0] == whole).all()


@pytest.mark.parametrize(
    ("share", "batch", "blanks"), [(0.5, 16, 8), (0.2, 4, 1), (0.9, 4, 3), (0.5, 1, 0), (0.0, 8, 0)]
)
def test_batch_has_its_share_of_blanks_and_at_least_one_photo(share: float, batch: int, blanks: int) -> None:
    options = tiny.options(blank=share, batch_size=batch)
    assert (options.blanks, options.photos) == (blanks, batch - blanks)


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(TrainError, match=r"blank must be a fraction in \[0, 1\), got"):
        tiny.options(blank=share).validate()


@pytest.mark.parametrize("keep", [0, 4])
def test_resumed_run_matches_an_uninterrupted_one(data: tiny.Fitted, tmp_path: Path, keep: int) -> None:
    training, views = tiny.options(steps=8, evaluate_every=4, blank=0.5, accumulate=2), tiny.views(keep=keep)
    tiny.trained(data.stored, tmp_path / "straight", None, training, views)
    tiny.trained(data.stored, tmp_path / "stopped", None, tiny.stopped(training, 3), views)
    tiny.trained(data.stored, tmp_path / "stopped", None, training, views, resume=True)
    there, here = (tiny.results(tmp_path / run) for run in ("straight", "stopped"))
    assert there["log"] == here["log"] and there["last.safetensors"] == here["last.safetensors"]


def test_resuming_with_another_share_of_blanks_is_rejected(data: tiny.Fitted, tmp_path: Path) -> None:
    tiny.trained(data.stored, tmp_path / "run", None, tiny.options(steps=2, evaluate_every=2, stop_at=1))
    with pytest.raises(TrainError, match=r"blank"):
        tiny.prepared(
            data.stored, tmp_path / "run", None, tiny.options(steps=2, evaluate_every=2, blank=0.5), resume=True
        )


def test_blanks_reduce_the_variance_on_content_free_images(data: tiny.Fitted, tmp_path: Path) -> None:
    found = {}
    for share in (0.0, 0.5):
        training = tiny.options(steps=150, evaluate_every=150, batch_size=8, blank=share)
        tiny.trained(data.stored, tmp_path / f"{share}", None, training)
        (found[share],) = tiny.rows(tmp_path / f"{share}", "held_out")
    assert found[0.5]["blank_variance"] < 0.5 * found[0.0]["blank_variance"]
    assert found[0.5]["cosine"] > found[0.0]["cosine"] - 0.01  # with half as many photos


# --- stage 3 ---


def test_loss_is_the_variance_left_of_each_image() -> None:
    pattern = torch.tensor([-1.0, 1.0, 1.0, -1.0]).reshape(1, 2, 2, 1)
    raw = 5 + torch.cat([pattern, 10 * pattern])
    left = 3 + torch.cat([0.5 * pattern, -2 * pattern])  # the mean has no effect
    assert blank_loss(raw, raw).item() == pytest.approx(1)
    assert blank_loss(torch.ones_like(raw), raw).item() == 0
    assert blank_loss(left, raw).item() == pytest.approx((0.25 + 0.04) / 2)


def test_loss_is_bounded_where_raw_features_hardly_vary() -> None:
    raw, pattern = torch.full((1, 2, 2, 1), 3.0), torch.tensor([-0.3, 0.3, 0.3, -0.3]).reshape(1, 2, 2, 1)
    for flat in (raw, raw + 1e-5 * pattern):
        assert blank_loss(flat + pattern, flat).item() == pytest.approx(0.09 / (1e-3 * 9), rel=1e-3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_fit.write_photos(tmp_path_factory.mktemp("photos"), tiny_distillation.PHOTOS)


@pytest.mark.filterwarnings("error")
def test_student_is_trained_on_blanks_and_photos(photos: Path, tmp_path: Path) -> None:
    training = tiny_distillation.options(batch_size=3, blank=0.7)
    with tiny_distillation.blank_panels():
        run = tiny_distillation.prepared(photos, tmp_path / "run", None, training).training()
    batch = next(run._batches(0))
    images, usable, lesson = run._lesson(batch, 0, 0)
    assert len(batch.images) == 1 and len(images) == len(usable) == 3 and bool(usable.all())
    assert (images[:1] == batch.images).all() and not (images[1] == images[2]).all()
    raw, target = lesson.raw[0], lesson.features[0]
    torch.testing.assert_close(target[:1], run.teacher(batch).features[0])
    assert (target[1:] == target[1:, :1, :1]).all()
    torch.testing.assert_close(target[1:].mean((1, 2)), raw[1:].mean((1, 2)))
    again, _, _ = run._lesson(batch, 0, 1)
    assert (again[1] == images[2]).all()  # the second image of the step, for the second process
    other, _, _ = run._lesson(batch, 1, 0)
    assert not (other[1] == images[1]).all()


def test_loss_of_the_student_by_hand(photos: Path, tmp_path: Path) -> None:
    training = tiny_distillation.options(batch_size=3, blank=0.7, hold_prefix=0.3)
    run = tiny_distillation.prepared(photos, tmp_path / "run", None, training).training()
    batch = next(run._batches(0))
    images, usable, lesson = run._lesson(batch, 0, 0)
    features, prefixes = run.student(images + 0.1)  # the student has the teacher's weights
    (clean,), (target,), (raw,), (prefix,), (frozen,) = features, lesson.features, lesson.raw, prefixes, lesson.prefixes

    def published(one: Tensor, other: Tensor) -> Tensor:
        return (one - other).square().mean() + 1 - F.cosine_similarity(one, other, dim=-1).mean()

    def variance(one: Tensor) -> Tensor:
        return one[1:].var((1, 2), correction=0).mean(-1)

    left = (variance(clean) / torch.maximum(variance(raw), 1e-3 * raw[1:].square().mean((1, 2, 3)))).mean()
    loss, parts = run._loss((features, prefixes), lesson, usable)
    torch.testing.assert_close(loss, published(clean, target) + 0.3 * published(prefix, frozen) + left)
    assert parts[3].item() == pytest.approx(left.item(), rel=1e-5) and left.item() > 1e-4
    unread, _ = run._loss((features, prefixes), lesson, torch.tensor([False, True, True]))
    photos_left_out = published(clean[1:], target[1:]) + 0.3 * published(prefix[1:], frozen[1:]) + left
    torch.testing.assert_close(unread, photos_left_out)


def test_run_with_the_published_loss_on_blanks_is_not_resumed(photos: Path, tmp_path: Path) -> None:
    """Runs of earlier versions; those without blanks are resumed as before."""
    for share, fits in ((0.5, False), (0.0, True)):
        training = tiny_distillation.options(blank=share, stop_at=1)
        with tiny_distillation.blank_panels():
            tiny_distillation.distilled(photos, tmp_path / f"{share}", None, training)
            path = tmp_path / f"{share}" / "run.json"
            earlier = json.loads(path.read_text())
            assert (earlier.pop("loss on content-free images", None) is None) == fits
            path.write_text(json.dumps(earlier))
            if fits:
                tiny_distillation.prepared(photos, tmp_path / f"{share}", None, training, resume=True)
                continue
            with pytest.raises(TrainError, match=r"loss on content-free images was null, now \"relative to raw\""):
                tiny_distillation.prepared(photos, tmp_path / f"{share}", None, training, resume=True)


def test_student_is_cleaner_on_content_free_images_with_the_loss(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for run in ("with", "without"):
        training = tiny_distillation.options(steps=40, batch_size=4, blank=0.5, evaluate_every=40)
        with tiny_distillation.blank_panels():
            tiny_distillation.distilled(photos, tmp_path / run, None, training)
        found += tiny_distillation.rows(tmp_path / run, "held_out")
        monkeypatch.setattr("denoising_vit.distilled.train.blank_loss", lambda features, _: features.sum() * 0)
    assert found[0]["blank_variance"] < 0.7 * found[1]["blank_variance"]


def test_resumed_distillation_matches_an_uninterrupted_one(photos: Path, tmp_path: Path) -> None:
    training = tiny_distillation.options(batch_size=2, blank=0.5, accumulate=2)
    runs = tmp_path / "straight", tmp_path / "stopped"
    with tiny_distillation.blank_panels():
        tiny_distillation.distilled(photos, runs[0], None, training)
        tiny_distillation.distilled(photos, runs[1], None, replace(training, stop_at=3))
        tiny_distillation.distilled(photos, runs[1], None, training, resume=True)
    assert len({(run / "last.safetensors").read_bytes() for run in runs}) == 1
