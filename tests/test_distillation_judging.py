"""Held-out metrics against a straightforward computation, panels, and which model is kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import tiny_distillation as tiny
import tiny_fit
from denoising_vit.data import open_dataset
from denoising_vit.data.photos import read_photo
from denoising_vit.distilled import held_out as judging
from denoising_vit.distilled import train as distil
from denoising_vit.distilled.held_out import HeldOut
from denoising_vit.distilled.models import DenoiserTeacher, Lesson, Student
from denoising_vit.distilled.train import Distillation
from denoising_vit.errors import TrainError
from denoising_vit.metrics.position import linear_position_r2
from denoising_vit.metrics.tokens import effective_rank
from denoising_vit.training.samples import Sample, whole_view
from denoising_vit.views.rendering import to_image

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_fit.write_photos(tmp_path_factory.mktemp("photos"), 11)


def changed(run: Distillation) -> Student:
    """The student, with other weights than the teacher's."""
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in run.evaluated.parameters():
            value.add_(torch.randn(value.shape, generator=chance) * 0.02)
    return run.evaluated


@torch.no_grad()
def by_hand(run: Distillation, student: Student, size: tuple[int, int]) -> list[tuple[Any, Lesson]]:
    """The student's output and the teacher's lesson, photo by photo."""
    found = []
    for image in run.held_out.images:
        photo = to_image(read_photo(Path(open_dataset(run.reader.photos.dataset.source)[image].url)))  # pyright: ignore
        view = whole_view(size, mirrored=False).render(photo, student.backbone.mean, student.backbone.std)[None]
        (batch,) = run.reader.batches([[sample_of(image, run.sampler.sizes.index(size), size)]])
        assert torch.equal(batch.images, view)
        found.append((student(view), run.teacher(batch)))
    return found


def sample_of(image: int, number: int, size: tuple[int, int]) -> Sample:
    return Sample(image, number, None, whole_view(size, mirrored=False))


def cosine(one: Tensor, other: Tensor) -> Tensor:
    one, other = one.double(), other.double()
    return (one * other).sum(-1) / one.norm(dim=-1) / other.norm(dim=-1)


def test_metrics_match_a_straightforward_computation(photos: Path, tmp_path: Path) -> None:
    backbone = tiny.backbone(3)
    also = [tiny.denoiser(backbone.at_layer(0), seed=1)]
    job = tiny.prepared(photos, tmp_path / "run", backbone, None, tiny.views(sizes="48,64x48"), also=also)
    run = job.training()
    student = changed(run)
    figures = run.held_out(student)
    both = {size: by_hand(run, student, size) for size in ((48, 48), (64, 48))}
    answers = [pair for pairs in both.values() for pair in pairs]
    assert len(answers) == 2 * 3

    def gathered(pick: Any) -> tuple[Tensor, Tensor]:
        pairs = [pick(answer, lesson) for answer, lesson in answers]
        return tuple(torch.cat([one.flatten(0, -2) for one in side]) for side in zip(*pairs, strict=True))  # pyright: ignore

    clean, target = gathered(lambda answer, lesson: (answer[0][0], lesson.features[0]))
    assert len(clean) == 3 * (9 + 12)
    assert figures["cosine"] == pytest.approx(float(cosine(clean, target).mean()), abs=1e-4)
    assert figures["mse"] == pytest.approx(float((clean - target).double().square().mean()), rel=1e-3)
    raw, target = gathered(lambda _, lesson: (lesson.raw[0], lesson.features[0]))
    assert figures["raw_cosine"] == pytest.approx(float(cosine(raw, target).mean()), abs=1e-4)
    assert figures["raw_mse"] == pytest.approx(float((raw - target).double().square().mean()), rel=1e-3)
    assert figures["ratio"] == pytest.approx((1 - figures["cosine"]) / (1 - figures["raw_cosine"]))
    deep, target = gathered(lambda answer, lesson: (answer[0][1], lesson.features[1]))
    assert figures["layer_0_cosine"] == pytest.approx(float(cosine(deep, target).mean()), abs=1e-4)
    prefix, frozen = gathered(lambda answer, lesson: (answer[1][0], lesson.prefixes[0]))
    assert figures["class_drift"] == pytest.approx(float(1 - cosine(prefix, frozen).mean()), abs=1e-4)
    assert figures["class_drift"] > 0.001
    assert figures["prefix_drift"] == figures["class_drift"]  # the class token is the only prefix token
    first = both[(48, 48)]
    assert figures["rank"] == pytest.approx(effective_rank(torch.cat([a[0][0] for a, _ in first])), rel=1e-3)
    assert figures["raw_rank"] == pytest.approx(effective_rank(torch.cat([x.raw[0] for _, x in first])), rel=1e-3)
    assert figures["target_rank"] == pytest.approx(
        effective_rank(torch.cat([x.features[0] for _, x in first])), rel=1e-3
    )
    assert "place" not in figures  # three photos are too few


def test_registers_affect_prefix_drift_only(photos: Path, tmp_path: Path) -> None:
    run = tiny.prepared(photos, tmp_path / "run", tiny.tokens(3)).training()
    before = run.held_out(run.evaluated)
    for name in ("blank_variance", "blank_detail", "blurred_detail", "shift_change", "photo_variance"):
        assert before[name] == pytest.approx(1, rel=1e-3)  # the student still equals the frozen backbone
    with torch.no_grad():
        run.evaluated.get_parameter("backbone.model.prefix")[:, 1:] *= -1
    figures = run.held_out(run.evaluated)
    assert figures["class_drift"] == pytest.approx(before["class_drift"], abs=1e-9)
    assert figures["prefix_drift"] > 0.5
    assert figures["cosine"] == before["cosine"]


def test_without_prefix_tokens_there_is_no_drift(photos: Path, tmp_path: Path) -> None:
    job, _ = tiny.distilled(photos, tmp_path / "run", tiny.tokens(0))
    for row in tiny.rows(tmp_path / "run", "held_out"):
        assert not [name for name in row if "drift" in name]
    assert {row["held"] for row in tiny.rows(tmp_path / "run", "train")} == {0}
    assert job.folder.last.is_file()


def test_untrained_student_scores_like_raw_features(photos: Path, tmp_path: Path) -> None:
    run = tiny.prepared(photos, tmp_path / "run").training()
    figures = run.held_out(run.evaluated)
    assert figures["ratio"] == pytest.approx(1, abs=1e-3)
    assert figures["cosine"] == pytest.approx(figures["raw_cosine"], abs=1e-4)
    assert figures["rank"] == pytest.approx(figures["raw_rank"], rel=1e-2)
    assert abs(figures["class_drift"]) < 1e-5


def test_position_metrics_need_enough_photos(photos: Path, tmp_path: Path) -> None:
    run = tiny.prepared(photos, tmp_path / "run", training=tiny.options(held_out=8)).training()
    figures = run.held_out(run.evaluated)
    student = run.evaluated
    features = torch.cat([answer[0][0] for answer, _ in by_hand(run, student, (48, 48))])
    assert figures["place"] == pytest.approx(linear_position_r2(features, train=4), abs=1e-3)
    assert math.isfinite(figures["place_neighbours"])
    assert {"raw_place", "target_place"} <= figures.keys()


def test_teacher_runs_once_per_held_out_photo(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    teach = DenoiserTeacher.__call__

    def counted(self: DenoiserTeacher, batch: Any) -> Lesson:
        seen.append(len(batch.samples))
        return teach(self, batch)

    monkeypatch.setattr(DenoiserTeacher, "__call__", counted)
    run = tiny.prepared(photos, tmp_path / "run", training=tiny.options(held_out=9)).training()
    assert seen == [8, 1]
    run.held_out(run.evaluated)
    run.held_out(run.evaluated)
    assert seen == [8, 1]


def test_features_beyond_float16_range_give_finite_metrics(photos: Path, tmp_path: Path) -> None:
    backbone = tiny.backbone()
    with torch.no_grad():
        backbone.get_parameter("model.norm.weight").mul_(1e5)
    denoiser = tiny.denoiser(None)
    run = tiny.prepared(photos, tmp_path / "run", backbone, denoiser=denoiser).training()
    figures = run.held_out(run.evaluated)
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["raw_cosine"] == pytest.approx(figures["cosine"], abs=1e-4)


def panel(run: Path, step: int) -> Image.Image:
    return Image.open(run / "panels" / f"step-{step:07}.png")


@pytest.mark.parametrize(("held_out", "rows"), [(1, 1), (6, 4)])
def test_panels_show_photo_raw_student_and_teacher(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: int, rows: int
) -> None:
    drawn: list[Any] = []
    draw = judging.draw_panel

    def watched(folder: Path, step: int, headings: Any, shown: Any) -> None:
        drawn.append((step, headings, shown))
        draw(folder, step, headings, shown)

    monkeypatch.setattr(judging, "draw_panel", watched)
    training = tiny.options(steps=1, held_out=held_out)
    run = tiny.prepared(photos, tmp_path / "run", training=training).training()
    run.run()
    ((step, headings, shown),) = drawn
    assert (step, headings) == (1, ("raw", "distilled, step 1", "teacher"))
    assert [name for name, _, _ in shown] == [f"{image:02}.png" for image in run.held_out.images[:rows]]
    answers = by_hand(run, run.evaluated, (48, 48))
    for (name, pixels, maps), (answer, lesson) in zip(shown, answers, strict=False):
        assert (pixels == read_photo(photos / name)).all()
        for found, expected in zip(maps, (lesson.raw[0], answer[0][0], lesson.features[0]), strict=True):
            assert float(cosine(found, expected[0]).min()) > 0.999
    assert panel(tmp_path / "run", 1).format == "PNG"


def test_unwritable_panel_ends_the_run_with_an_error(photos: Path, tmp_path: Path) -> None:
    run = tiny.prepared(photos, tmp_path / "run").training()
    (tmp_path / "run" / "panels").write_text("in the way")
    with pytest.raises(TrainError, match="panels"):
        run.run()


# --- which model is kept ---


def head(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {})["denoising_vit"]


def judged_as(run: Distillation, monkeypatch: pytest.MonkeyPatch, figures: Iterator[dict[str, float]]) -> None:
    """Overrides the metrics of successive held-out evaluations with these."""
    judge = HeldOut.__call__
    monkeypatch.setattr(HeldOut, "__call__", lambda self, student: judge(self, student) | next(figures))
    monkeypatch.setattr(HeldOut, "draw", lambda *_: None)


def test_best_by_held_out_cosine_and_last_model_are_kept(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.prepared(photos, tmp_path / "run", training=tiny.options(evaluate_every=1)).training()
    judged_as(run, monkeypatch, iter({"cosine": value, "ratio": 1.0} for value in (0.1, 0.7, 0.3, 0.7, 0.2, 0.5)))
    states: dict[int, dict[str, Tensor]] = {}
    progress = run.run(on_step=lambda step, _: states.update({step: tiny.copied(run.student)}))
    assert (progress.step, progress.best, progress.best_step) == (6, 0.7, 2)  # the first of equals
    for path, step in ((run.folder.distilled, 2), (run.folder.last, 6)):
        for name, value in load_file(path).items():
            assert torch.equal(value, states[step][f"backbone.model.{name}"].half()), (path, name)


def test_best_model_is_chosen_by_the_loss_with_content_free_images(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.prepared(photos, tmp_path / "run", training=tiny.options(evaluate_every=2, blank=0.5)).training()
    values = ((0.9, 0.2, 0.5), (0.8, 0.2, 0.3), (0.8, 0.3, 0.25))  # losses of 0.8, 0.7, 0.75
    named = (dict(zip(("cosine", "mse", "blank_variance"), one, strict=True)) for one in values)
    judged_as(run, monkeypatch, iter(one | {"ratio": 1.0} for one in named))
    progress = run.run()
    assert progress.best_step == 4 and progress.best == pytest.approx(-0.7)


def test_best_model_is_tracked_across_resumed_runs(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = tiny.options(evaluate_every=1)
    run = tiny.prepared(photos, tmp_path / "run", training=tiny.options(evaluate_every=1, stop_at=3)).training()
    judged_as(run, monkeypatch, iter({"cosine": v, "ratio": 1.0} for v in (0.1, 0.9, 0.3, 0.4, 0.5, 0.6)))
    run.run()
    before = run.folder.distilled.read_bytes()
    assert tiny.prepared(photos, tmp_path / "run", training=training, resume=True).training().run().best_step == 2
    assert run.folder.distilled.read_bytes() == before


def test_diverged_run_stops_and_keeps_the_best_model(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.prepared(photos, tmp_path / "run", training=tiny.options(evaluate_every=1)).training()
    evaluations = [(0.5, 0.9), (0.6, 0.8), (0.55, 1.9), (0.2, 2.1)]
    judged_as(run, monkeypatch, iter({"cosine": c, "raw_cosine": 0.6, "ratio": ratio} for c, ratio in evaluations))
    with pytest.raises(
        TrainError, match=r"step 4: the run diverged: .* more than 2 times .* the best model is kept"
    ) as e:
        run.run()
    assert f"({run.folder.distilled}). Lower --learning-rate, or raise --warmup" in str(e.value)
    assert run.folder.checkpoints.step == 2
    assert '"step": 2' in head(run.folder.distilled)
    assert tiny.rows(tmp_path / "run", "held_out")[-1]["ratio"] == 2.1


def test_non_finite_metrics_count_as_divergence(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.prepared(photos, tmp_path / "run", training=tiny.options(evaluate_every=1)).training()
    good = {"cosine": 0.5, "ratio": 1.0}
    judged_as(run, monkeypatch, iter([good, {"cosine": math.nan, "ratio": math.nan}]))
    with pytest.raises(TrainError, match=r"step 2: the run diverged.*the best model is kept"):
        run.run()
    assert '"step": 1' in head(run.folder.distilled)


def test_non_finite_metrics_count_as_divergence_during_warmup(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.prepared(photos, tmp_path / "run", training=tiny.options(evaluate_every=1, warmup=0.9)).training()
    judged_as(run, monkeypatch, iter([{"cosine": math.nan, "ratio": math.nan}]))
    with pytest.raises(TrainError, match=r"step 1: the run diverged.*no model was kept"):
        run.run()
    assert not run.folder.distilled.exists()


def test_high_ratio_with_a_tiny_difference_is_no_divergence(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.prepared(photos, tmp_path / "run", training=tiny.options(evaluate_every=1)).training()
    judged_as(run, monkeypatch, itertools.repeat({"cosine": 0.9999, "raw_cosine": 0.99999, "ratio": 10.0}))
    assert run.run().step == 6


def test_high_ratio_during_warmup_is_no_divergence(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = tiny.options(evaluate_every=1, warmup=0.5)
    run = tiny.prepared(photos, tmp_path / "run", training=training).training()
    evaluations = [(0.1, 5.0), (0.1, 5.0), (0.1, 5.0), (0.8, 1.0), (0.8, 1.0), (0.8, 1.0)]
    judged_as(run, monkeypatch, iter({"cosine": c, "raw_cosine": 0.8, "ratio": ratio} for c, ratio in evaluations))
    assert run.run().step == 6


def test_divergence_by_the_first_evaluation_keeps_no_model(photos: Path, tmp_path: Path) -> None:
    backbone = tiny.backbone()
    denoiser = tiny.denoiser(backbone, strength=0.02)
    training = tiny.options(learning_rate=100, evaluate_every=4)
    run = tiny.prepared(photos, tmp_path / "run", backbone, training, denoiser=denoiser).training()
    with pytest.raises(TrainError, match=r"step 4: the run diverged.*; no model was kept"):
        run.run()
    assert not run.folder.distilled.exists()


def test_too_high_learning_rate_diverges_after_keeping_the_best(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeldOut, "draw", lambda *_: None)
    backbone = tiny.backbone()
    denoiser = tiny.denoiser(backbone, strength=0.02)
    training = tiny.options(steps=12, learning_rate=3, evaluate_every=1, warmup=0.5)
    job = tiny.prepared(photos, tmp_path / "run", backbone, training, denoiser=denoiser)
    with pytest.raises(TrainError, match=r"step \d+: the run diverged.* the best model is kept"):
        job.training().run()
    rows = tiny.rows(tmp_path / "run", "held_out")
    best = max(rows, key=lambda row: row["cosine"])
    assert rows[-1]["ratio"] > distil._DIVERGED
    assert best["step"] < rows[-1]["step"]
    kept = job.training().evaluated
    kept.load_state_dict({f"backbone.model.{name}": value for name, value in load_file(job.folder.distilled).items()})
    assert job.training().held_out(kept)["cosine"] == pytest.approx(best["cosine"], abs=1e-3)
