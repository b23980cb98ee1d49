"""Distillation runs: exact resuming, gradient accumulation, and features that move closer to the teacher."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import tiny_distillation as tiny
import tiny_fit
import tiny_training
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.loading import with_weights
from denoising_vit.distilled.job import DistillJob
from denoising_vit.distilled.models import DenoiserTeacher, trained_groups
from denoising_vit.distilled.options import DistillOptions
from denoising_vit.distilled.train import Distillation
from denoising_vit.distilled.weights import DistilledWeights
from denoising_vit.errors import FormatError, PlanError, SizeError, TrainError
from denoising_vit.training.loop import learning_rate, peak_rate
from denoising_vit.training.samples import Sample
from tiny_training import weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def blank_panels() -> Iterator[None]:
    with tiny.blank_panels():
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_fit.write_photos(tmp_path_factory.mktemp("photos"), tiny.PHOTOS)


def all_on(**changes: Any) -> DistillOptions:
    """Options with accumulation, a weight average, layer decay and weight decay."""
    values: dict[str, Any] = {"accumulate": 2, "ema": 0.7, "layer_decay": 0.8, "weight_decay": 0.01}
    return tiny.options(**(values | changes))


@pytest.fixture(scope="module")
def straight(one_thread: None, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of six steps with the options of `all_on`."""
    run = tmp_path_factory.mktemp("straight") / "run"
    with tiny.blank_panels():
        tiny.distilled(photos, run, None, all_on())
    return run


def resumed(photos: Path, run: Path, *, start: Path | None = None, **changes: Any) -> dict[str, Any]:
    tiny.distilled(photos, run, None, all_on(**changes), start=start, resume=True)
    return tiny.results(run)


def last_weights(run: Path) -> dict[str, Tensor]:
    return weights_of(max((run / "checkpoints").iterdir()))


# --- resume ---


def test_same_run_is_bitwise_reproducible(photos: Path, straight: Path, tmp_path: Path) -> None:
    tiny.distilled(photos, tmp_path / "run", None, all_on())
    assert tiny.results(tmp_path / "run") == tiny.results(straight)


def test_other_seed_gives_another_loss(photos: Path, straight: Path, tmp_path: Path) -> None:
    tiny.distilled(photos, tmp_path / "run", None, all_on(seed=1, steps=1))
    there, here = (tiny.rows(run, "train")[0] for run in (straight, tmp_path / "run"))
    assert here["loss"] != there["loss"]


@pytest.mark.parametrize("stop", [3, 4])
def test_stopped_run_resumes_to_identical_results(photos: Path, straight: Path, tmp_path: Path, stop: int) -> None:
    _, progress = tiny.distilled(photos, tmp_path / "run", None, all_on(stop_at=stop))
    assert progress.step == stop
    assert not (tmp_path / "run" / "last.safetensors").exists()
    assert resumed(photos, tmp_path / "run") == tiny.results(straight)


def test_run_stopped_several_times_resumes_to_identical_results(photos: Path, straight: Path, tmp_path: Path) -> None:
    for stop in (1, 2, 5):
        tiny.distilled(photos, tmp_path / "run", None, all_on(stop_at=stop), resume=stop > 1)
    assert resumed(photos, tmp_path / "run") == tiny.results(straight)


class Interrupt:
    """A callback that raises KeyboardInterrupt (Ctrl-C) or another error at the given call."""

    def __init__(self, calls: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.left, self.error = calls, error

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


class Crash(Exception):
    """Stands for anything that ends a process at once."""


@pytest.mark.parametrize("step", [1, 5])
def test_ctrl_c_after_a_step_loses_nothing(photos: Path, straight: Path, tmp_path: Path, step: int) -> None:
    job = tiny.prepared(photos, tmp_path / "run", None, all_on())
    with pytest.raises(KeyboardInterrupt):
        job.training().run(on_step=Interrupt(step))
    assert job.folder.checkpoints.step == step
    assert resumed(photos, tmp_path / "run") == tiny.results(straight)


@pytest.mark.parametrize("call", [3, 4])
def test_ctrl_c_during_a_step_loses_only_that_step(
    photos: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """In the first of the step's two batches, before any gradients, or in the second, with those of the first."""
    run = tiny.prepared(photos, tmp_path / "run", None, all_on()).training()
    teach, interrupt = run.teacher, Interrupt(call)

    def teacher(batch: Any) -> Any:
        interrupt()
        return teach(batch)

    run.teacher = teacher  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert run.folder.checkpoints.step == 1
    assert resumed(photos, tmp_path / "run") == tiny.results(straight)


@pytest.mark.parametrize("where", ["torch.optim.AdamW.step", "denoising_vit.distilled.train.Average.update"])
def test_ctrl_c_during_an_update_resumes_from_the_last_checkpoint(
    photos: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    import denoising_vit.distilled.train as module

    owner: Any = torch.optim.AdamW if "AdamW" in where else module.Average
    name, interrupt = where.rsplit(".", 1)[1], Interrupt(4)
    change = getattr(owner, name)

    def changing(self: Any, *args: Any) -> Any:
        done = change(self, *args)
        interrupt()
        return done

    job = tiny.prepared(photos, tmp_path / "run", None, all_on())
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, changing)
        with pytest.raises(KeyboardInterrupt):
            job.training().run()
    assert job.folder.checkpoints.step == 2
    assert resumed(photos, tmp_path / "run") == tiny.results(straight)


@pytest.mark.parametrize("look", [1, 2])
def test_ctrl_c_during_evaluation_resumes_from_the_last_checkpoint(
    photos: Path, straight: Path, tmp_path: Path, look: int
) -> None:
    run = tiny.prepared(photos, tmp_path / "run", None, all_on()).training()
    with pytest.raises(KeyboardInterrupt):
        run.run(on_look=Interrupt(look))
    assert run.folder.checkpoints.step == 2 * look
    assert resumed(photos, tmp_path / "run") == tiny.results(straight)


class Two:
    """The accelerator of one process that reports two processes."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator, self.num_processes = accelerator, 2

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


@pytest.mark.parametrize("shard", [False, True])
def test_ctrl_c_saves_only_if_one_process_has_all_weights(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: bool
) -> None:
    job = tiny.prepared(photos, tmp_path / "run", None, tiny.options(shard=shard, checkpoint_every=6))
    run = job.training()
    run.accelerator = Two(run.accelerator)
    monkeypatch.setattr("denoising_vit.distilled.train.shard", lambda *_: None)
    monkeypatch.setattr("denoising_vit.distilled.train.synchronised", lambda *_: contextlib.nullcontext())
    with pytest.raises(KeyboardInterrupt):
        run.run(on_step=Interrupt(1))
    assert job.folder.checkpoints.step == (0 if shard else 1)


@pytest.mark.parametrize("step", [1, 5])
def test_steps_after_the_last_checkpoint_are_repeated_after_a_crash(
    photos: Path, straight: Path, tmp_path: Path, step: int
) -> None:
    job = tiny.prepared(photos, tmp_path / "run", None, all_on())
    with pytest.raises(Crash):
        job.training().run(on_step=Interrupt(step, Crash))
    assert job.folder.checkpoints.step == step // 2 * 2
    assert tiny.rows(tmp_path / "run")[-1]["step"] == step
    assert resumed(photos, tmp_path / "run") == tiny.results(straight)


def test_resuming_a_finished_run_changes_nothing(photos: Path, straight: Path) -> None:
    before = tiny.results(straight)
    assert resumed(photos, straight) == before


def test_damaged_checkpoint_is_reported_and_previous_one_is_usable(
    photos: Path, straight: Path, tmp_path: Path
) -> None:
    job, _ = tiny.distilled(photos, tmp_path / "run", None, all_on(stop_at=4))
    last = job.folder.checkpoints.last
    assert last is not None
    whole = load_file(last)
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(TrainError, match=r"step-0000004.safetensors: damaged checkpoint"):
        resumed(photos, tmp_path / "run")
    last.unlink()
    assert resumed(photos, tmp_path / "run") == tiny.results(straight)
    assert {name.split(".")[0] for name in whole} == {"model", "optimiser", "more"}


@pytest.mark.parametrize(
    ("training", "views", "message"),
    [
        ({"ema": 0.5}, {}, "options.ema was 0.7, now 0.5"),
        ({"hold_prefix": 0}, {}, r"options.hold_prefix was 1.0, now 0"),
        ({"layer_decay": 1}, {}, "options.layer_decay was 0.8, now 1"),
        ({"accumulate": 1, "batch_size": 4}, {}, "options.accumulate was 2, now 1; options.batch_size was 2, now 4"),
        ({"steps": 7}, {}, "options.steps was 6, now 7"),
        ({"seed": 1}, {}, "options.seed was 0, now 1"),
        ({}, {"flip": 0.1, "sizes": "64"}, 'views.flip was 0.5, now 0.1; views.sizes was "48", now "64"'),
    ],
)
def test_error_for_changed_options_names_them(
    photos: Path, straight: Path, training: dict[str, Any], views: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainError, match=f"resume with other options: {message}. Use the options of the run, or start"):
        tiny.prepared(photos, straight, None, all_on(**training), tiny.views(**views), resume=True)


def test_resume_rejects_another_teacher_backbone_or_photos(photos: Path, straight: Path, tmp_path: Path) -> None:
    backbone = tiny.backbone()
    with pytest.raises(TrainError, match=r"teacher.denoisers was .*, now "):
        tiny.prepared(photos, straight, backbone, all_on(), denoiser=tiny.denoiser(backbone, seed=1), resume=True)
    with pytest.raises(TrainError, match=r"backbone.fingerprint was .*, now "):
        tiny.prepared(photos, straight, tiny.backbone(seed=1), all_on(), resume=True)
    others = tiny_fit.write_photos(tmp_path / "others", tiny.PHOTOS + 1)
    with pytest.raises(TrainError, match=r"photos.ids was .*, now .*photos.images was 11, now 12"):
        tiny.prepared(others, straight, None, all_on(), resume=True)


def test_run_of_another_stage_cannot_be_resumed(photos: Path, tmp_path: Path) -> None:
    backbone = tiny.backbone()
    store = tiny_training.fit(photos, tmp_path / "store", backbone, size=tiny.SIZE)
    source = tiny_training.Stored(store, tiny_training.open_dataset(photos))
    tiny_training.trained(source, tmp_path / "denoiser", backbone, tiny_training.options(steps=1))
    with pytest.raises(
        TrainError, match=r"cannot resume with other options: .*stage was \"denoiser\", now \"distillation\""
    ):
        tiny.prepared(photos, tmp_path / "denoiser", resume=True)
    with pytest.raises(TrainError, match="already has a run"):
        tiny.prepared(photos, tmp_path / "denoiser")


def test_existing_run_and_missing_run_to_resume_are_rejected(photos: Path, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="already has a run; use --resume to continue it, or choose another folder"):
        tiny.prepared(photos, straight, None, all_on())
    with pytest.raises(TrainError, match="no run to resume; start it without --resume"):
        tiny.prepared(photos, tmp_path / "none", None, all_on(), resume=True)


# --- contrast ---


def test_written_weights_have_the_contrast_of_raw_features(photos: Path, tmp_path: Path) -> None:
    without, _ = tiny.distilled(photos, tmp_path / "without", None, tiny.options())
    job, _ = tiny.distilled(photos, tmp_path / "with", None, tiny.options(contrast=True))
    assert [row["loss"] for row in tiny.rows(tmp_path / "with", "train")] == [
        row["loss"] for row in tiny.rows(tmp_path / "without", "train")
    ]
    raw = job.teacher.backbone
    held_out = [part for size in job.training().held_out.kept for part in size]
    images = torch.cat([part.images.float() for part in held_out])

    def moments(backbone: Backbone) -> tuple[Tensor, Tensor]:
        patches = backbone(images).flatten(0, 2)
        return patches.mean(0), patches.std(0)

    before, after = (with_weights(raw, one.folder.last) for one in (without, job))
    assert all((found - wanted).abs().max() > 0.02 for found, wanted in zip(moments(before), moments(raw), strict=True))
    torch.testing.assert_close(moments(after), moments(raw), rtol=5e-3, atol=5e-3)
    assert DistilledWeights.load(job.folder.last).record["contrast"]["photos"] == 3


def test_contrast_needs_a_final_norm(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"contrast is restored in a final norm.* got none"):
        tiny.prepared(photos, tmp_path / "run", tiny.backbone(norm=False), tiny.options(contrast=True))
    with pytest.raises(PlanError, match="in the final norm of a timm model; got"):
        tiny.prepared(photos, tmp_path / "run", tiny.tokens(), tiny.options(contrast=True))
    assert not (tmp_path / "run").exists()


# --- weights of an earlier run ---


def test_start_from_distilled_weights(photos: Path, straight: Path, tmp_path: Path) -> None:
    start, raw = straight / "last.safetensors", tiny.backbone()
    job = tiny.prepared(photos, tmp_path / "run", start=start)
    expected = with_weights(raw, start)
    tiny.assert_same(job.student.backbone.state_dict(), expected.state_dict())
    tiny.assert_same(job.teacher.backbone.state_dict(), raw.state_dict())
    assert job.started == expected.digest
    trained = [name for name, value in job.student.named_parameters() if value.requires_grad]
    assert trained == [
        name
        for name, value in tiny.prepared(photos, tmp_path / "other").student.named_parameters()
        if value.requires_grad
    ]


def test_resume_a_run_that_started_from_distilled_weights(photos: Path, straight: Path, tmp_path: Path) -> None:
    start = straight / "last.safetensors"
    tiny.distilled(photos, tmp_path / "whole", None, all_on(), start=start)
    tiny.distilled(photos, tmp_path / "run", None, all_on(stop_at=2), start=start)
    assert resumed(photos, tmp_path / "run", start=start) == tiny.results(tmp_path / "whole")
    with pytest.raises(TrainError, match=r"cannot resume with other options: start was .*, now null"):
        tiny.prepared(photos, tmp_path / "run", None, all_on(), resume=True)


def test_distilled_weights_of_another_backbone_are_refused(photos: Path, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"weights trained from .*Start from weights that were distilled from this"):
        tiny.prepared(photos, tmp_path / "run", tiny.backbone(seed=1), start=straight / "last.safetensors")
    assert not (tmp_path / "run").exists()


# --- the arithmetic of a step ---


def test_accumulated_batches_equal_one_large_batch(photos: Path, tmp_path: Path) -> None:
    """With random crops, so that all views differ."""
    shown = tiny.views(whole=0.5)
    for name, batch, accumulate in (("one", 4, 1), ("two", 2, 2), ("four", 1, 4)):
        training = tiny.options(batch_size=batch, accumulate=accumulate, learning_rate=0.01, steps=4)
        tiny.distilled(photos, tmp_path / name, None, training, shown)
    one = last_weights(tmp_path / "one")
    before = tiny.copied(tiny.backbone())
    moved = max(
        float((value - before[name.removeprefix("model.backbone.")]).abs().max()) for name, value in one.items()
    )
    assert moved > 1e-3
    for name in ("two", "four"):
        for there, here in zip(tiny.rows(tmp_path / "one", "train"), tiny.rows(tmp_path / name, "train"), strict=True):
            for figure in ("loss", "mse", "cosine", "held", "gradient", "rate"):
                assert here[figure] == pytest.approx(there[figure], rel=2e-5, abs=1e-6), figure
        for key, value in tiny.without_key_biases(last_weights(tmp_path / name)).items():
            # Adam amplifies rounding errors of gradients near zero: depending on the processor, a few values in 100,000
            # differ by more.
            difference = (value - tiny.without_key_biases(one)[key]).abs()
            assert float((difference > 1e-5).double().mean()) < 1e-4, key
            assert float(difference.max()) < 1e-4, key


def test_loss_and_gradient_of_the_first_step_by_hand(photos: Path, tmp_path: Path) -> None:
    backbone = tiny.backbone(3)
    also = [tiny.denoiser(backbone.at_layer(0), seed=1)]
    training = tiny.options(steps=1, hold_prefix=0.3)
    run = tiny.prepared(photos, tmp_path / "run", backbone, training, also=also).training()
    (batch,) = run.reader.batches([run.sampler.step(0)])
    student = tiny.backbone(3)
    student.requires_grad_(True)
    found, lesson = student.forward_intermediates(batch.images, (0,)), run.teacher(batch)
    squared, cosine, held = (torch.zeros(()) for _ in range(3))
    for clean, target in zip((found.features, found.layers[0]), lesson.features, strict=True):
        squared = squared + ((clean - target) ** 2).mean() / 2
        cosine = cosine + F.cosine_similarity(clean, target, dim=-1).mean() / 2
    for token, frozen in zip((found.prefix, found.layer_prefixes[0]), lesson.prefixes, strict=True):
        held = held + (((token - frozen) ** 2).mean() + 1 - F.cosine_similarity(token, frozen, dim=-1).mean()) / 2
    loss = squared + 1 - cosine + 0.3 * held
    loss.backward()
    norm = math.sqrt(sum(float(value.square().sum()) for value in tiny.gradients(student).values()))
    run.run()
    (row,) = tiny.rows(tmp_path / "run", "train")
    for name, value in {"loss": loss, "mse": squared, "cosine": cosine, "held": held}.items():
        assert row[name] == pytest.approx(float(value.detach()), rel=1e-5, abs=1e-6), name
    assert row["gradient"] == pytest.approx(norm, rel=1e-4)


def test_the_optimiser_is_adamw_at_the_published_rates(photos: Path, tmp_path: Path) -> None:
    training = tiny.options(steps=3, learning_rate=5e-3, weight_decay=0.1, hold_prefix=0)
    run = tiny.prepared(photos, tmp_path / "run", None, training).training()
    student = tiny.backbone().requires_grad_(True)
    optimiser = torch.optim.AdamW(student.parameters(), weight_decay=0.1)
    for step in range(3):
        (batch,) = run.reader.batches([run.sampler.step(step)])
        (target,) = run.teacher(batch).features
        clean = student(batch.images)
        (F.mse_loss(clean, target) + 1 - F.cosine_similarity(clean, target, dim=-1).mean()).backward()
        rate = learning_rate(step, 3, peak_rate(5e-3, 2), 1e-6, 0.15)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        optimiser.zero_grad()
        assert step == 0 or rate < 5e-3 * math.sqrt(2 / 256)
    run.run()
    found = last_weights(tmp_path / "run")
    for name, value in student.state_dict().items():
        torch.testing.assert_close(found[f"model.backbone.{name}"], value, rtol=0, atol=1e-5, msg=name)
    rates = [row["rate"] for row in tiny.rows(tmp_path / "run", "train")]
    assert rates == [learning_rate(step, 3, peak_rate(5e-3, 2), 1e-6, 0.15) for step in range(3)]


def test_learning_rate_scales_with_all_views_of_a_step(photos: Path, tmp_path: Path) -> None:
    training = tiny.options(steps=1, batch_size=2, accumulate=3, learning_rate=0.01)
    tiny.distilled(photos, tmp_path / "run", None, training)
    (row,) = tiny.rows(tmp_path / "run", "train")
    assert row["rate"] == pytest.approx(0.01 * math.sqrt(6 / 256))


def first_gradients(photos: Path, run: Path, depth: int = 3, **training: Any) -> tuple[dict[str, Tensor], Distillation]:
    """Gradients of the student for the loss of the first batch, and the run."""
    made = tiny.prepared(photos, run, tiny.backbone(depth), tiny.options(**training)).training()
    (batch,) = made.reader.batches([made.sampler.step(0)])
    loss, _ = made._loss(made.student(batch.images), made.teacher(batch), batch.usable)
    loss.backward()
    return tiny.gradients(made.student), made


def test_activation_checkpointing_gives_the_same_gradients(photos: Path, tmp_path: Path) -> None:
    passes: list[int] = []
    kept, plain = first_gradients(photos, tmp_path / "kept")
    job = tiny.prepared(photos, tmp_path / "again", tiny.backbone(3), tiny.options(checkpointing=True))
    run = job.training()
    blocks: Any = run.student.backbone.get_submodule("model.blocks")
    blocks[1].register_forward_pre_hook(lambda *_: passes.append(1))
    (batch,) = run.reader.batches([run.sampler.step(0)])
    loss, _ = run._loss(run.student(batch.images), run.teacher(batch), batch.usable)
    assert len(passes) == 1
    loss.backward()
    assert len(passes) == 2  # recomputed, not kept
    again = tiny.gradients(run.student)
    assert again.keys() == kept.keys()
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=1e-7, msg=name)
    assert not getattr(plain.student.backbone.get_submodule("model"), "grad_checkpointing")  # noqa: B009
    assert not getattr(run.teacher.backbone.get_submodule("model"), "grad_checkpointing")  # noqa: B009


def test_activation_checkpointing_gives_the_same_weights(photos: Path, tmp_path: Path) -> None:
    for name, again in (("kept", False), ("again", True)):
        tiny.distilled(photos, tmp_path / name, None, tiny.options(checkpointing=again, learning_rate=2e-3))
    kept, again = (last_weights(tmp_path / name) for name in ("kept", "again"))
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=1e-6, msg=name)


def test_layer_decay_gives_earlier_blocks_smaller_steps(photos: Path, tmp_path: Path) -> None:
    """The size of AdamW's first step is the learning rate, whatever the gradient."""
    backbone = tiny.backbone(4)
    before = tiny.copied(backbone)
    training = tiny.options(steps=1, layer_decay=0.5, weight_decay=0, learning_rate=0.01)
    tiny.distilled(photos, tmp_path / "run", backbone, training)
    (row,) = tiny.rows(tmp_path / "run", "train")
    after = last_weights(tmp_path / "run")

    def step(name: str) -> float:
        return float((after[f"model.backbone.model.{name}"] - before[f"model.{name}"]).abs().median())

    assert step("norm.weight") == pytest.approx(row["rate"], rel=0.02)
    for block in range(4):
        assert step(f"blocks.{block}.mlp.fc2.weight") == pytest.approx(row["rate"] * 0.5 ** (3 - block), rel=0.02)
    assert step("patch_embed.proj.weight") == pytest.approx(row["rate"] * 0.5**4, rel=0.05)


def test_weight_decay_applies_to_all_parameters_with_layer_decay(photos: Path, tmp_path: Path) -> None:
    job = tiny.prepared(photos, tmp_path / "run")
    trained = {id(value) for value in job.student.parameters() if value.requires_grad}
    groups = trained_groups(job.student, weight_decay=0.3, layer_decay=0.5)
    assert {id(value) for group in groups for value in group["params"]} == trained
    assert {group["weight_decay"] for group in groups} == {0.3}


@pytest.mark.parametrize(
    "option",
    [
        "layer_decay",
        "checkpointing",
        "shard",
    ],
)
def test_options_that_need_timm_blocks_reject_other_modules(photos: Path, tmp_path: Path, option: str) -> None:
    training = tiny.options(**{option: 0.5 if option == "layer_decay" else True})
    with pytest.raises(TrainError, match=f"--{option.replace('_', '-')} needs a timm model.*; got Tokens"):
        tiny.prepared(photos, tmp_path / "run", tiny.tokens(), training)
    assert not (tmp_path / "run").exists()


def test_custom_module_can_be_trained(photos: Path, tmp_path: Path) -> None:
    training = tiny.options(steps=20, evaluate_every=20, learning_rate=0.1)
    tiny.distilled(photos, tmp_path / "run", tiny.tokens(), training)
    (figures,) = tiny.rows(tmp_path / "run", "held_out")
    assert figures["ratio"] < 0.95
    head = [value for name, value in last_weights(tmp_path / "run").items() if name.endswith("head.weight")]
    assert torch.equal(head[0], tiny.Tokens().head.weight)


def test_bfloat16_is_close_to_float32_and_keeps_float32_weights(photos: Path, tmp_path: Path) -> None:
    for precision in ("float32", "bfloat16"):
        tiny.distilled(photos, tmp_path / precision, None, tiny.options(precision=precision, learning_rate=2e-3))
    exact, fast = (tiny.rows(tmp_path / name, "train") for name in ("float32", "bfloat16"))
    for there, here in zip(exact, fast, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=0.02)
    assert [row["loss"] for row in fast] != [row["loss"] for row in exact]
    assert {value.dtype for value in last_weights(tmp_path / "bfloat16").values()} == {torch.float32}


# --- sampled views ---


def test_held_out_photos_are_never_trained_on(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sample] = []
    run = tiny.prepared(photos, tmp_path / "run", None, tiny.options(accumulate=2)).training()
    teach = DenoiserTeacher.__call__

    def watched(self: DenoiserTeacher, batch: Any) -> Any:
        seen.extend(batch.samples)
        return teach(self, batch)

    monkeypatch.setattr(DenoiserTeacher, "__call__", watched)
    run.run()
    assert len(seen) == 6 * 4
    assert len(run.held_out.images) == 3
    assert {sample.image for sample in seen} == set(range(tiny.PHOTOS)) - set(run.held_out.images)
    assert seen == [sample for step in range(6) for sample in run.sampler.step(step)]
    assert {sample.crop.flip for sample in seen} == {True, False}
    assert {sample.crop.box for sample in seen} == {(0.0, 0.0, 1.0, 1.0)}  # as published


def test_several_sizes_are_trained_on_in_turn(photos: Path, tmp_path: Path) -> None:
    job, progress = tiny.distilled(photos, tmp_path / "run", None, tiny.options(), tiny.views(sizes="48,32x64"))
    assert progress.step == 6
    assert job.sizes == ((48, 48), (32, 64))
    assert {sample.size for step in range(6) for sample in job.training().sampler.step(step)} == {0, 1}


def test_the_backbones_own_size_is_the_default(photos: Path, tmp_path: Path) -> None:
    assert tiny.prepared(photos, tmp_path / "run", shown=tiny.views(sizes=None)).sizes == ((512, 512),)


def test_sizes_off_the_patch_grid_are_rejected_and_create_no_folder(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(SizeError, match=r"a side of 50 pixels does not fit .* Nearest: 48 or 64"):
        tiny.prepared(photos, tmp_path / "run", shown=tiny.views(sizes="48,50x64"))
    assert not (tmp_path / "run").exists()


def test_number_of_steps_follows_from_the_epochs(photos: Path, tmp_path: Path) -> None:
    job = tiny.prepared(photos, tmp_path / "run", None, tiny.options(steps=0, epochs=3, accumulate=2))
    assert job.options.steps == 3 * 8 / 4
    assert json.loads((tmp_path / "run" / "run.json").read_text())["options"]["steps"] == 6


def test_too_few_photos_are_rejected_and_create_no_folder(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="expected more than 11 images, because 11 are held out"):
        tiny.prepared(photos, tmp_path / "run", None, tiny.options(held_out=11))
    assert not (tmp_path / "run").exists()


def test_missing_accelerate_names_the_extra_to_install(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(TrainError, match="training needs accelerate: install the extra `train`"):
        tiny.prepared(photos, tmp_path / "run")


# --- non-finite values ---


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_loss_or_gradient_stops_and_names_the_photos(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    job = tiny.prepared(photos, tmp_path / "run", None, tiny.options(accumulate=2))
    run = job.training()
    samples = run.sampler.step(3)
    teach, calls, norms = run.teacher, iter(range(100)), iter([1.0, 1.0, 1.0, math.inf])

    def damaged(batch: Any) -> Any:
        lesson = teach(batch)
        if next(calls) == 7:  # the second batch of the fourth step
            lesson.features[0][0, 0, 0, 0] = math.nan
        return lesson

    if where == "loss":
        run.teacher = damaged  # pyright: ignore[reportAttributeAccessIssue]
    else:
        norm = "denoising_vit.distilled.train.gradient_norm"
        monkeypatch.setattr(norm, lambda _: torch.tensor(next(norms)))
    with pytest.raises(
        TrainError, match=rf"step 4: the {where} is not finite \((nan|inf)\).*Lower --learning-rate"
    ) as e:
        run.run()
    for sample in samples[2:] if where == "loss" else samples:
        assert f"{sample.image:02}.png (0.00 0.00 1.00 1.00{', mirrored' if sample.crop.flip else ''})" in str(e.value)
    assert job.folder.checkpoints.step == 2
    assert all(torch.isfinite(value).all() for value in last_weights(tmp_path / "run").values())


# --- learning ---


@pytest.fixture(scope="module")
def learnt(one_thread: None, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Runs that differ only in the weight of the loss that holds prefix tokens."""
    folder = tmp_path_factory.mktemp("learnt")
    training = tiny.options(steps=40, batch_size=4, learning_rate=0.024, evaluate_every=20, checkpoint_every=40)
    with tiny.blank_panels():
        for hold in (1.0, 0.0):
            tiny.distilled(photos, folder / str(hold), None, replace(training, hold_prefix=hold))
    return {hold: folder / str(hold) for hold in (1.0, 0.0)}


@pytest.mark.parametrize("hold", [1.0, 0.0])
def test_held_out_features_move_closer_to_the_teacher(learnt: dict[float, Path], hold: float) -> None:
    rows = tiny.rows(learnt[hold], "held_out")
    assert [row["step"] for row in rows] == [20, 40]
    assert rows[-1]["ratio"] < 0.5
    assert rows[-1]["cosine"] > rows[-1]["raw_cosine"] + 0.3
    first, last = (tiny.rows(learnt[hold], "train")[at]["loss"] for at in (0, -1))
    assert last < 0.7 * first


def test_held_prefix_tokens_drift_less(learnt: dict[float, Path]) -> None:
    held, free = (tiny.rows(learnt[hold], "held_out")[-1]["class_drift"] for hold in (1.0, 0.0))
    assert held < 0.5 * free
    assert {row["held"] for row in tiny.rows(learnt[0.0], "train")} == {0}
    assert min(row["held"] for row in tiny.rows(learnt[1.0], "train")[1:]) > 0


def test_several_layers_are_distilled_at_once(photos: Path, tmp_path: Path) -> None:
    backbone = tiny.backbone(3)
    also = [tiny.denoiser(backbone.at_layer(1), seed=1)]
    training = tiny.options(steps=20, learning_rate=0.03, evaluate_every=1, checkpoint_every=20, stop_at=1)
    tiny.distilled(photos, tmp_path / "run", backbone, training, also=also)
    (first,) = tiny.rows(tmp_path / "run", "held_out")
    training = replace(training, evaluate_every=20, stop_at=None)
    tiny.distilled(photos, tmp_path / "whole", backbone, training, also=also)
    (last,) = tiny.rows(tmp_path / "whole", "held_out")
    assert last["cosine"] > first["raw_cosine"] + 0.2
    assert last["layer_1_cosine"] > first["layer_1_cosine"] + 0.2


# --- files of a run ---


def test_log_and_panels(straight: Path) -> None:
    log = tiny.rows(straight)
    assert [(row["step"], row["kind"]) for row in log] == [
        *((step, "train") for step in (1, 2, 3)),
        (3, "held_out"),
        *((step, "train") for step in (4, 5, 6)),
        (6, "held_out"),
    ]
    for row in tiny.rows(straight, "train"):
        assert row.keys() == {"step", "kind", "loss", "mse", "cosine", "held", "blank", "rate", "gradient"}
        assert row["loss"] == pytest.approx(row["mse"] + 1 - row["cosine"] + row["held"] + row["blank"], rel=1e-5)
        assert row["gradient"] > 0
    raw = {name for name in log[3] if name.startswith(("raw_", "target_"))}
    blank = {"blank_variance", "blank_detail", "blurred_detail", "shift_change", "photo_variance"}
    own = {"step", "kind", "cosine", "mse", "rank", "ratio", "class_drift", "prefix_drift"}
    assert log[3].keys() - raw == own | blank
    assert sorted(path.name for path in (straight / "panels").iterdir()) == ["step-0000003.png", "step-0000006.png"]
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == [
        "step-0000004.safetensors",
        "step-0000006.safetensors",
    ]


def test_tensorboard_matches_the_log(straight: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(straight / "tensorboard"))
    board.Reload()
    losses = {row["step"]: row["loss"] for row in tiny.rows(straight, "train")}
    assert {event.step: event.value for event in board.Scalars("train/loss")} == pytest.approx(losses, rel=1e-5)
    assert [event.step for event in board.Scalars("held_out/class_drift")] == [3, 6]


def test_callbacks_get_every_step_and_evaluation(photos: Path, tmp_path: Path) -> None:
    steps: list[int] = []
    looks: list[int] = []
    job: DistillJob = tiny.prepared(photos, tmp_path / "run")
    on: Callable[[list[int]], Any] = lambda seen: lambda step, figures: seen.append(step) or figures["cosine"]  # noqa: E731
    progress = job.training().run(on(steps), on(looks))
    assert (steps, looks) == ([1, 2, 3, 4, 5, 6], [3, 6])
    best = max(tiny.rows(tmp_path / "run", "held_out"), key=lambda row: row["cosine"])
    assert (progress.best, progress.best_step) == (best["cosine"], best["step"])


def test_result_holds_the_average_and_checkpoints_hold_both_weights(straight: Path) -> None:
    checkpoint = load_file(max((straight / "checkpoints").iterdir()))
    for name, value in load_file(straight / "last.safetensors").items():
        assert torch.equal(value, checkpoint[f"more.backbone.model.{name}"].half())
    raw, average = (checkpoint[f"{kind}.backbone.model.cls_token"] for kind in ("model", "more"))
    assert not torch.allclose(raw, average, atol=1e-5)
