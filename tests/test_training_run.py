"""Training runs from a store to a denoiser: resumed bit for bit, evaluated on held-out images."""

from __future__ import annotations

import errno
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import tiny_artifact
import tiny_distillation
import tiny_training as tiny
from denoising_vit import DenoisedViT, load_denoiser
from denoising_vit.backbones.recorded import describe
from denoising_vit.denoiser import read_denoiser
from denoising_vit.denoiser.job import TrainJob
from denoising_vit.denoiser.pairs import KeptPairs
from denoising_vit.denoiser.train import Training
from denoising_vit.errors import SizeError, TrainError
from denoising_vit.metrics.tokens import effective_rank
from denoising_vit.progress import no_progress
from denoising_vit.training import checkpoints
from denoising_vit.training.checkpoints import Checkpoints
from denoising_vit.training.samples import Sample, whole_view

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def blank_panels() -> Iterator[None]:
    with tiny_distillation.blank_panels():
        yield


@pytest.fixture(scope="module")
def data(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tiny.Fitted:
    return tiny.fitted(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def straight(data: tiny.Fitted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 20 steps."""
    run = tmp_path_factory.mktemp("straight") / "run"
    tiny.trained(data.stored, run)
    return run


def resumed(data: tiny.Fitted, run: Path, **more: Any) -> Path:
    tiny.trained(data.stored, run, resume=True, **more)
    return run


# --- resume ---


def test_repeated_run_gives_identical_results(data: tiny.Fitted, straight: Path, tmp_path: Path) -> None:
    tiny.trained(data.stored, tmp_path / "run")
    assert tiny.results(tmp_path / "run") == tiny.results(straight)


def test_other_seed_gives_another_log(data: tiny.Fitted, straight: Path, tmp_path: Path) -> None:
    tiny.trained(data.stored, tmp_path / "run", None, tiny.options(seed=1))
    assert tiny.rows(tmp_path / "run") != tiny.rows(straight)


def test_resuming_at_step_10_gives_the_same_results(data: tiny.Fitted, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _, progress = tiny.trained(data.stored, run, None, tiny.options(stop_at=10))
    assert progress.step == 10
    assert not (run / "last.safetensors").exists()
    resumed(data, run)
    assert tiny.results(run) == tiny.results(straight)


@pytest.mark.parametrize("keep", [0, 4])
def test_stopping_between_checkpoints_changes_nothing(data: tiny.Fitted, tmp_path: Path, keep: int) -> None:
    training = tiny.options(steps=10, evaluate_every=1, checkpoint_every=4)
    runs = tmp_path / "straight", tmp_path / "stopped"
    tiny.trained(data.stored, runs[0], None, training, tiny.views(keep=keep))
    for stop in (3, 7, None):
        tiny.trained(
            data.stored,
            runs[1],
            None,
            replace(training, stop_at=stop),
            tiny.views(keep=keep),
            resume=runs[1].exists(),
        )
    there, here = (tiny.results(run) for run in runs)
    assert there["log"] == here["log"]
    assert there["last.safetensors"] == here["last.safetensors"]
    assert there["denoiser.safetensors"] == here["denoiser.safetensors"]
    assert there["step-0000010.safetensors"] == here["step-0000010.safetensors"]


def test_stopping_early_adds_no_evaluation(data: tiny.Fitted, tmp_path: Path) -> None:
    training = tiny.options(steps=10, evaluate_every=10)
    tiny.trained(data.stored, tmp_path / "straight", None, training)
    tiny.trained(data.stored, tmp_path / "run", None, tiny.stopped(training, 7))
    tiny.trained(data.stored, tmp_path / "run", None, training, resume=True)
    assert tiny.rows(tmp_path / "run") == tiny.rows(tmp_path / "straight")


class Interrupt:
    """Raises an error, such as Ctrl-C or a crash, at the given call."""

    def __init__(self, calls: int, error: type[BaseException]) -> None:
        self.left, self.error = calls, error

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


class Crash(Exception):
    """Stands for any sudden end of the process."""


@pytest.mark.parametrize("step", [1, 7, 19])
def test_ctrl_c_after_a_step_loses_nothing(data: tiny.Fitted, straight: Path, tmp_path: Path, step: int) -> None:
    job = tiny.prepared(data.stored, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        job.training().run(on_step=Interrupt(step, KeyboardInterrupt))
    assert job.folder.checkpoints.step == step
    there, here = tiny.results(straight), tiny.results(resumed(data, tmp_path / "run"))
    assert here["log"] == there["log"]
    for name in ("step-0000020.safetensors", "denoiser.safetensors", "last.safetensors"):
        assert here[name] == there[name]


@pytest.mark.parametrize("look", [1, 2])
def test_ctrl_c_during_an_evaluation_loses_nothing(
    data: tiny.Fitted, straight: Path, tmp_path: Path, look: int
) -> None:
    """The second evaluation is at the last step; without it there would be no denoiser."""
    training = tiny.prepared(data.stored, tmp_path / "run").training()
    judge, interrupt = training.held_out, Interrupt(look, KeyboardInterrupt)

    def judged(denoiser: Callable[[Tensor], Tensor]) -> dict[str, float]:
        interrupt()
        return judge(denoiser)

    setattr(judged, "draw", judge.draw)  # noqa: B010
    setattr(training, "held_out", judged)  # noqa: B010, the type differs
    with pytest.raises(KeyboardInterrupt):
        training.run()
    there, here = tiny.results(straight), tiny.results(resumed(data, tmp_path / "run"))
    assert here["log"] == there["log"]
    assert here["last.safetensors"] == there["last.safetensors"]


def test_ctrl_c_during_an_optimizer_step_loses_nothing(
    data: tiny.Fitted, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, interrupt = torch.optim.AdamW.step, Interrupt(7, KeyboardInterrupt)

    def interrupted(self: torch.optim.AdamW, *args: Any) -> Any:
        done = step(self, *args)
        interrupt()
        return done

    job = tiny.prepared(data.stored, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            job.training().run()
    run = resumed(data, tmp_path / "run")
    assert tiny.results(run) == tiny.results(straight)


@pytest.mark.parametrize("step", [3, 8, 13])
def test_steps_after_the_last_checkpoint_are_repeated_after_a_crash(
    data: tiny.Fitted, straight: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    job = tiny.prepared(data.stored, run)
    with pytest.raises(Crash):
        job.training().run(on_step=Interrupt(step, Crash))
    assert job.folder.checkpoints.step == step // 5 * 5
    assert tiny.rows(run)[-1]["step"] == step
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "kind": "tr')
    assert tiny.results(resumed(data, run)) == tiny.results(straight)


def test_crash_while_filling_pairs_loses_those_of_one_image(
    data: tiny.Fitted, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves, crash = KeptPairs._halves, Interrupt(5, Crash)

    def crashing(self: KeptPairs, *args: Any) -> Any:
        crash()
        return halves(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(KeptPairs, "_halves", crashing)
        with pytest.raises(Crash):
            tiny.prepared(data.stored, tmp_path / "run")
    job = TrainJob.prepare(data.stored, tmp_path / "run", tiny.backbone(), tiny.options(), tiny.views(), resume=True)
    job.kept.open(create=True)
    assert len(job.kept.todo()) == tiny.PHOTOS - 4
    assert tiny.results(resumed(data, tmp_path / "run")) == tiny.results(straight)


def test_resuming_a_finished_run_changes_nothing(data: tiny.Fitted, straight: Path) -> None:
    before = tiny.results(straight)
    _, progress = tiny.trained(data.stored, straight, resume=True)
    best = max(tiny.rows(straight, "held_out"), key=lambda row: row["cosine"])
    assert (progress.step, progress.best_step) == (20, best["step"])
    assert tiny.results(straight) == before


def test_resuming_with_other_options_names_each_difference(data: tiny.Fitted, straight: Path) -> None:
    with pytest.raises(TrainError, match="cannot resume with other options") as caught:
        tiny.trained(
            data.stored, straight, None, tiny.options(learning_rate=0.02), tiny.views(keep=5, flip=0.1), resume=True
        )
    for part in ("options.learning_rate was 0.01, now 0.02", "views.keep was 4, now 5", "views.flip was 0.5, now 0.1"):
        assert part in str(caught.value)


def test_resuming_with_another_backbone_is_rejected(data: tiny.Fitted, straight: Path, tmp_path: Path) -> None:
    tiny.fit(data.photos, tmp_path / "store", tiny.backbone(seed=1))
    other = tiny.Fitted(data.photos, tmp_path / "store")
    with pytest.raises(TrainError, match=r"backbone.fingerprint was .*, now "):
        tiny.trained(other.stored, straight, tiny.backbone(seed=1), resume=True)


def test_fresh_pairs_need_disk_space_for_held_out_images_only(
    data: tiny.Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 3 * 3 * 49 * tiny.CHANNELS * 2 * 2  # three images, three views
    tiny.leave_free(2 * needed, monkeypatch)
    tiny.prepared(data.stored, tmp_path / "run", pairs=tiny.views(keep=0))


def test_run_without_disk_space_can_start_with_fewer_views(
    data: tiny.Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        tiny.leave_free(0, patch)
        with pytest.raises(TrainError, match="keep fewer views"):
            tiny.prepared(data.stored, run)
    job = tiny.prepared(data.stored, run, pairs=tiny.views(keep=3))
    assert (job.views.keep, len(job.kept.usable())) == (3, tiny.PHOTOS)
    with pytest.raises(TrainError, match="already has a run"):
        tiny.prepared(data.stored, run)


def test_run_without_disk_space_resumes_when_space_is_available(
    data: tiny.Fitted, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full, raising=False)
        with pytest.raises(TrainError, match="keep fewer views"):
            tiny.prepared(data.stored, tmp_path / "run")
    assert tiny.results(resumed(data, tmp_path / "run")) == tiny.results(straight)


# --- training data ---


def test_held_out_images_are_never_trained_on(
    data: tiny.Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Sample] = []
    for keep in (0, 4):
        training = tiny.prepared(data.stored, tmp_path / f"run-{keep}", pairs=tiny.views(keep=keep)).training()

        def watched(start: int, batches: Any = training._batches) -> Iterator[Any]:
            for batch in batches(start):
                read.extend(batch[0])
                yield batch

        read.clear()
        monkeypatch.setattr(training, "_batches", watched)
        training.run()
        assert len(read) == 80
        assert len(training.held_out.images) == 3
        assert not {sample.image for sample in read} & set(training.held_out.images)
        assert {sample.image for sample in read} | set(training.held_out.images) == set(range(tiny.PHOTOS))


def test_resumed_run_has_the_same_split(data: tiny.Fitted, straight: Path) -> None:
    first, again = (tiny.prepared(data.stored, straight, resume=True).training() for _ in range(2))
    assert first.held_out.images == again.held_out.images
    assert first.sampler == again.sampler
    assert set(first.held_out.images).isdisjoint(first.sampler.images)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_loss_or_gradient_stops_the_run_and_names_images(
    data: tiny.Fitted, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny.prepared(data.stored, tmp_path / "run")
    training = job.training()
    samples = training.sampler.step(6)
    batches = training._batches
    calls = iter(range(100))

    def damaged(start: int) -> Iterator[tuple[list[Sample], Tensor, Tensor]]:
        for number, (wanted, raw, target) in enumerate(batches(start)):
            if number == 6:
                raw[0, 0, 0, 0] = torch.nan
            yield wanted, raw, target

    if where == "loss":
        monkeypatch.setattr(training, "_batches", damaged)
    else:
        backward = training.accelerator.backward

        def exploding(loss: Tensor) -> None:
            backward(loss)
            if next(calls) == 6:
                training.denoiser.pos_embed.grad.fill_(torch.inf)  # pyright: ignore[reportOptionalMemberAccess]

        monkeypatch.setattr(training.accelerator, "backward", exploding)
    with pytest.raises(
        TrainError, match=rf"step 7: the {where} is not finite \((nan|inf)\).*Lower --learning-rate"
    ) as caught:
        training.run()
    for sample in samples:
        assert data.store.ids[sample.image] in str(caught.value)
    assert job.folder.checkpoints.step == 5
    kept = tiny.weights_of(job.folder.path / "checkpoints" / "step-0000005.safetensors")
    assert all(torch.isfinite(value).all() for value in kept.values())


def test_store_with_too_few_images_is_rejected(tmp_path: Path) -> None:
    small = tiny.fitted(tmp_path, 1)
    with pytest.raises(TrainError, match="expected more than 1 images, because 1 are held out"):
        tiny.prepared(small.stored, tmp_path / "run", training=tiny.options(held_out=None))
    assert not (tmp_path / "run").exists()


def test_sizes_off_the_patch_grid_are_rejected(data: tiny.Fitted, tmp_path: Path) -> None:
    with pytest.raises(SizeError, match="57"):
        tiny.prepared(data.stored, tmp_path / "run", pairs=tiny.views(sizes="56,57x64"))
    assert not (tmp_path / "run").exists()


def test_fresh_pairs_need_a_store(data: tiny.Fitted, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="need the fields of a store: run dvit fit first"):
        tiny.prepared(data.unfitted, tmp_path / "run", pairs=tiny.views(keep=0))


def test_run_trains_on_several_sizes(data: tiny.Fitted, tmp_path: Path) -> None:
    job, progress = tiny.trained(data.stored, tmp_path / "run", pairs=tiny.views(sizes="56,40x72"))
    assert progress.step == 20
    assert job.sizes == ((56, 56), (40, 72))
    assert {sample.size for step in range(20) for sample in job.training().sampler.step(step)} == {0, 1}


def test_fresh_pairs_train_and_are_evaluated_on_kept_ones(data: tiny.Fitted, tmp_path: Path) -> None:
    job, _ = tiny.trained(data.stored, tmp_path / "run", None, tiny.options(steps=60), tiny.views(keep=0))
    rows = tiny.rows(job.folder.path, "held_out")
    assert rows[-1]["ratio"] < 0.85
    assert job.kept.usable() == tuple(job.training().held_out.images)


def test_photos_without_a_store_train_and_unusable_ones_are_reported(data: tiny.Fitted, tmp_path: Path) -> None:
    photos = Path(shutil.copytree(data.photos, tmp_path / "photos"))
    (photos / "04.png").write_text("words")
    source = tiny.Fitted(photos, tmp_path / "none").unfitted
    job, progress = tiny.trained(source, tmp_path / "run")
    assert progress.step == 20
    assert list(job.skipped) == ["04.png"]
    training = job.training()
    assert 4 not in (*training.sampler.images, *training.held_out.images)
    assert len(training.sampler.images) == tiny.PHOTOS - 1 - 3


def test_unusable_photos_are_reported_again_on_resume(data: tiny.Fitted, tmp_path: Path) -> None:
    photos = Path(shutil.copytree(data.photos, tmp_path / "photos"))
    (photos / "04.png").write_text("words")
    source = tiny.Fitted(photos, tmp_path / "none").unfitted
    tiny.trained(source, tmp_path / "run", None, tiny.options(stop_at=10))
    job, _ = tiny.trained(source, tmp_path / "run", resume=True)
    assert list(job.skipped) == ["04.png"]


def test_cache_is_shared_by_runs_with_other_learning_rates(data: tiny.Fitted, tmp_path: Path) -> None:
    planted = tiny.module()
    extractor = tiny_artifact.plain(planted)
    tiny.prepared(data.stored, tmp_path / "one", extractor, cache=tmp_path / "cache")
    passes = planted.passes
    slower = tiny.options(learning_rate=1e-3, steps=7)
    job, progress = tiny.trained(data.stored, tmp_path / "two", extractor, slower, cache=tmp_path / "cache")
    # The blank-image test: 8 blank images, 3 blurred photos, and these 3 with each of 3 shifts, in batches of 4.
    blank = 6
    assert (planted.passes, progress.step) == (passes + blank, 7)
    assert not (tmp_path / "two" / "pairs").exists()
    assert len(job.training().sampler.images) == tiny.PHOTOS - 3
    with pytest.raises(TrainError, match=r"has pairs of other settings: seed was 0, now 1; views.keep was 4, now 5"):
        tiny.prepared(
            data.stored, tmp_path / "3", extractor, tiny.options(seed=1), tiny.views(keep=5), cache=tmp_path / "cache"
        )


def test_crops_that_are_never_drawn_are_not_computed(data: tiny.Fitted, tmp_path: Path) -> None:
    planted = tiny.module()
    extractor = tiny_artifact.plain(planted)
    assert extractor.fingerprint
    before = planted.passes
    job = tiny.prepared(data.stored, tmp_path / "run", extractor, pairs=tiny.views(keep=64, whole=1))
    assert job.views.keep == 2
    assert planted.passes - before <= tiny.PHOTOS


# --- output of a run ---


def test_denoiser_with_the_best_held_out_cosine_is_kept(
    data: tiny.Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny.prepared(data.stored, tmp_path / "run", training=tiny.options(evaluate_every=2))
    training = job.training()
    states: dict[int, dict[str, Tensor]] = {}
    evaluate = Training._evaluate

    def watched(self: Training, progress: Any, *args: Any) -> Any:
        states[progress.step] = {name: value.clone() for name, value in self.denoiser.state_dict().items()}
        return evaluate(self, progress, *args)

    judge = training.held_out
    cosines = iter([0.1, 0.2, 0.9, 0.3, 0.9, 0.4, 0.5, 0.6, 0.7, 0.8])
    monkeypatch.setattr(Training, "_evaluate", watched)

    def judged(denoiser: Callable[[Tensor], Tensor]) -> dict[str, float]:
        return judge(denoiser) | {"cosine": next(cosines)}

    setattr(judged, "draw", judge.draw)  # noqa: B010
    monkeypatch.setattr(training, "held_out", judged)
    progress = training.run()
    assert (progress.step, progress.best, progress.best_step) == (20, 0.9, 6)
    for path, step in ((job.folder.denoiser, 6), (job.folder.last, 20)):
        kept = read_denoiser(path)
        for name, value in kept.state_dict().items():
            torch.testing.assert_close(value, states[step][name], atol=1e-4, rtol=1e-3)
        assert (kept.info["step"], kept.info["held_out"]["cosine"]) == (step, 0.9 if step == 6 else 0.8)


def test_the_denoiser_loads_and_works(data: tiny.Fitted, straight: Path) -> None:
    extractor = tiny.backbone()
    denoiser = load_denoiser(str(straight / "denoiser.safetensors"))
    assert denoiser.grid == (7, 7)
    assert denoiser.trained_for == json.loads(json.dumps(describe(extractor)))
    assert denoiser.info["images"] == tiny.PHOTOS - 3
    assert denoiser.info["options"] == json.loads(json.dumps(tiny.options().recorded()))
    assert denoiser.info["views"]["keep"] == 4
    assert denoiser.info["targets"]["ids"] == data.store.manifest.ids_digest
    rows = tiny.rows(straight, "held_out")
    best = max(rows, key=lambda row: row["cosine"])
    assert denoiser.info["step"] == best["step"]
    assert denoiser.info["held_out"]["cosine"] == pytest.approx(best["cosine"], abs=1e-6)
    image = torch.randn(2, 3, 40, 72)
    with torch.no_grad():
        clean = DenoisedViT(extractor, denoiser)(image)
        torch.testing.assert_close(clean, denoiser(extractor(image)))
    assert clean.shape == (2, 5, 9, tiny.CHANNELS)


def test_log(straight: Path) -> None:
    log = tiny.rows(straight)
    assert [row["step"] for row in log if row["kind"] == "train"] == list(range(1, 21))
    assert [row["step"] for row in log if row["kind"] == "held_out"] == [10, 20]
    for row in tiny.rows(straight, "train"):
        assert row["loss"] == pytest.approx(row["mse"] + 1 - row["cosine"], rel=1e-5)
        assert row["gradient"] > 0
    assert [path.name for path in sorted((straight / "panels").iterdir())] == ["step-0000010.png", "step-0000020.png"]


def test_tensorboard_matches_the_log(straight: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(straight / "tensorboard"))
    board.Reload()
    losses = {row["step"]: row["loss"] for row in tiny.rows(straight, "train")}
    events = board.Scalars("train/loss")
    assert {event.step: event.value for event in events} == pytest.approx(losses, rel=1e-5)
    assert [event.step for event in board.Scalars("held_out/cosine")] == [10, 20]


def test_log_is_written_without_tensorboard(
    data: tiny.Fitted, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    tiny.trained(data.stored, tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert tiny.rows(tmp_path / "run") == tiny.rows(straight)


def test_without_accelerate_the_extra_is_named(
    data: tiny.Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(TrainError, match="training needs accelerate: install the extra `train`"):
        tiny.prepared(data.stored, tmp_path / "run")


def full(*_args: Any, **_more: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_at_a_checkpoint_stops_the_run_and_it_can_resume(
    data: tiny.Fitted, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny.prepared(data.stored, tmp_path / "run")
    with monkeypatch.context() as patch:
        save, calls = checkpoints.write_tensors, iter(range(10))
        patch.setattr(checkpoints, "write_tensors", lambda *a, **b: save(*a, **b) if next(calls) < 2 else full())
        with pytest.raises(TrainError, match=r"step-0000015.*No space left.*step-0000010.safetensors is intact"):
            job.training().run()
    assert tiny.results(resumed(data, tmp_path / "run")) == tiny.results(straight)


def test_damaged_checkpoint_is_reported_and_the_previous_one_resumes(
    data: tiny.Fitted, straight: Path, tmp_path: Path
) -> None:
    tiny.trained(data.stored, tmp_path / "run", None, tiny.options(stop_at=15))
    there = Checkpoints(tmp_path / "run" / "checkpoints")
    assert there.last is not None
    there.last.write_bytes(there.last.read_bytes()[:-100])
    with pytest.raises(TrainError, match=r"step-0000015.safetensors: damaged checkpoint"):
        resumed(data, tmp_path / "run")
    there.last.unlink()
    assert there.step == 10
    run = resumed(data, tmp_path / "run")
    first, here = tiny.results(straight), tiny.results(run)
    assert here["last.safetensors"] == first["last.safetensors"]


# --- metrics and learning ---


def test_metrics_match_a_direct_computation(data: tiny.Fitted, tmp_path: Path) -> None:
    job = tiny.prepared(data.stored, tmp_path / "run", pairs=tiny.views(sizes="56,40x72"))
    judge = job.training().held_out

    def denoiser(raw: Tensor) -> Tensor:
        return 0.5 * raw + 0.1

    figures = judge(denoiser)

    def pairs(size: int, number: int) -> list[tuple[Tensor, Tensor]]:
        view = whole_view(job.sizes[size], mirrored=False)
        read = [job.kept.read([Sample(image, size, number, view)]) for image in judge.images]
        return [(raw[0], target[0]) for raw, target in read]

    def agreement(number: int, made: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        both = [*pairs(0, number), *pairs(1, number)]
        clean = torch.cat([made(raw).flatten(0, 1) for raw, _ in both]).double()
        target = torch.cat([target.flatten(0, 1) for _, target in both]).double()
        cosine = (clean * target).sum(1) / clean.norm(dim=1) / target.norm(dim=1)
        return float(cosine.mean()), float((clean - target).square().mean())

    for prefix, number, made in (("", 0, denoiser), ("crop_", 2, denoiser), ("raw_", 0, lambda raw: raw)):
        cosine, squared = agreement(number, made)
        assert figures[f"{prefix}cosine"] == pytest.approx(cosine, abs=1e-6)
        assert figures[f"{prefix}mse"] == pytest.approx(squared, rel=1e-5)
    assert figures["ratio"] == pytest.approx((1 - figures["cosine"]) / (1 - figures["raw_cosine"]))
    raw, target = (torch.stack(kind) for kind in zip(*pairs(0, 0), strict=True))
    assert figures["raw_rank"] == pytest.approx(effective_rank(raw), rel=1e-6)
    assert figures["target_rank"] == pytest.approx(effective_rank(target), rel=1e-6)
    assert figures["rank"] == pytest.approx(effective_rank(denoiser(raw)), rel=1e-5)
    assert "place" not in figures  # needs more than three images
    for name in ("blank_variance", "blank_detail", "blurred_detail", "shift_change", "photo_variance"):
        assert figures[name] == pytest.approx(0.25, rel=1e-4)  # the denoiser halves the raw features


@pytest.mark.parametrize(("views", "crop"), [({"flip": 0, "keep": 2}, 1), ({"keep": 2, "whole": 1}, None)])
def test_crop_metrics_use_the_first_crop(
    data: tiny.Fitted, tmp_path: Path, views: dict[str, Any], crop: int | None
) -> None:
    job = tiny.prepared(data.stored, tmp_path / "run", pairs=tiny.views(**views))
    judge = job.training().held_out
    figures = judge(lambda raw: raw)
    assert ("crop_mse" in figures) == (crop is not None)
    if crop is not None:
        view = whole_view(job.sizes[0], mirrored=False)
        raw, target = job.kept.read([Sample(image, 0, crop, view) for image in judge.images])
        assert figures["crop_mse"] == pytest.approx(float((raw - target).square().mean()), rel=1e-5)


def test_position_metrics_with_enough_images(data: tiny.Fitted, tmp_path: Path) -> None:
    job = tiny.prepared(data.stored, tmp_path / "run", training=tiny.options(held_out=8))
    figures = job.training().held_out(lambda raw: raw)
    assert figures["place"] == figures["raw_place"]
    assert figures["raw_place"] > figures["target_place"]  # the planted pattern depends on position
    assert math.isfinite(figures["place_neighbours"])


def test_denoiser_starts_as_raw_features_plus_position_embedding(data: tiny.Fitted, tmp_path: Path) -> None:
    denoiser = tiny.prepared(data.stored, tmp_path / "run").training().denoiser
    raw = torch.randn(2, 7, 7, tiny.CHANNELS)
    torch.testing.assert_close(denoiser(raw), raw + denoiser.pos_embed.view(1, 7, 7, -1))


def test_random_start_uses_default_initialisation(data: tiny.Fitted, tmp_path: Path) -> None:
    run = tiny.prepared(data.stored, tmp_path / "run", None, tiny.options(start="random")).training()
    last = dict(run.denoiser.named_parameters())["denoiser.mlp.fc2.weight"].detach()
    bound = last.shape[1] ** -0.5  # default initialisation of a torch layer
    assert 0.95 * bound < float(last.abs().max()) <= bound


def test_accumulated_batches_match_one_large_batch(data: tiny.Fitted, tmp_path: Path) -> None:
    for name, batch, accumulate in (("one", 4, 1), ("two", 2, 2), ("four", 1, 4)):
        training = tiny.options(batch_size=batch, accumulate=accumulate, steps=4)
        tiny.trained(data.stored, tmp_path / name, None, training)
    one = tiny.rows(tmp_path / "one", "train")
    assert one[0]["rate"] == pytest.approx(0.01 * (4 / 256) ** 0.5)  # depends on the views of a step, not of a batch
    weights = load_file(tmp_path / "one" / "last.safetensors")
    for name in ("two", "four"):
        for there, here in zip(one, tiny.rows(tmp_path / name, "train"), strict=True):
            for figure in ("loss", "mse", "cosine", "gradient", "rate"):
                assert here[figure] == pytest.approx(there[figure], rel=1e-4, abs=1e-6), figure
        for key, value in load_file(tmp_path / name / "last.safetensors").items():
            torch.testing.assert_close(value, weights[key], rtol=0, atol=1e-4, msg=key)


def test_training_removes_a_planted_artifact(data: tiny.Fitted, tmp_path: Path) -> None:
    training = tiny.options(steps=300, learning_rate=0.02, evaluate_every=150, checkpoint_every=300)
    job, progress = tiny.trained(data.stored, tmp_path / "run", None, training)
    last = tiny.rows(job.folder.path, "held_out")[-1]
    assert last["ratio"] < 0.5
    assert last["cosine"] > last["raw_cosine"] + 0.05
    assert last["crop_cosine"] > last["raw_crop_cosine"] + 0.05
    assert progress.best == pytest.approx(max(row["cosine"] for row in tiny.rows(job.folder.path, "held_out")))
    first, second = (tiny.rows(job.folder.path, "train")[at]["loss"] for at in (0, -1))
    assert second < 0.5 * first


def test_denoiser_with_two_blocks_trains(data: tiny.Fitted, tmp_path: Path) -> None:
    job, _ = tiny.trained(data.stored, tmp_path / "run", None, tiny.options(steps=2, blocks=2))
    assert read_denoiser(job.folder.last).blocks == 2


def test_loss_of_the_first_step_by_hand(data: tiny.Fitted, straight: Path) -> None:
    job = tiny.prepared(data.stored, straight, resume=True)
    training = job.training()
    raw, target = job.kept.read(training.sampler.step(0))
    with torch.no_grad():
        clean = training.denoiser(raw)
    expected = F.mse_loss(clean, target) + 1 - F.cosine_similarity(clean, target, dim=-1).mean()
    assert tiny.rows(straight, "train")[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_progress_counts_each_image_once(data: tiny.Fitted, tmp_path: Path) -> None:
    seen: list[tuple[str, int | None]] = []

    def watch(what: str, total: int | None) -> Any:
        seen.append((what, total))
        return no_progress(what, total)

    job = TrainJob.prepare(data.stored, tmp_path / "run", tiny.backbone(), tiny.options(), tiny.views())
    job.fill(watch)
    assert seen == [("images processed", tiny.PHOTOS)]
