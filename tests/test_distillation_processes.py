"""Distillation with two processes: equal to one process with the doubled batch, and runs in which a process dies."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny_distillation as tiny
import tiny_fit
from denoising_vit.errors import TrainError
from denoising_vit.training.loop import gradient_norm
from denoising_vit.training.samples import Sampler, split
from forks import Ended, dvit, fork, run_together

pytestmark = pytest.mark.usefixtures("one_thread")

PHOTOS, HELD_OUT, STEPS = 7, 2, 4

#: High enough for weights to change by more than a thousandth.
RATE = 0.01


@pytest.fixture(scope="module", autouse=True)
def blank_panels() -> Iterator[None]:
    with tiny.blank_panels():
        yield


class Given(NamedTuple):
    """Inputs that all runs share."""

    photos: Path
    weights: Path
    denoiser: Path


@pytest.fixture(scope="module")
def given(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("given")
    weights = tiny_fit.write_weights(folder / "tiny.safetensors")
    denoiser = tiny.write(tiny.denoiser(tiny_fit.spec_of(weights).load()), folder / "denoiser.safetensors")
    return Given(tiny_fit.write_photos(folder / "photos", PHOTOS), weights, denoiser)


OPTIONS = {"steps": STEPS, "learning_rate": RATE, "held_out": HELD_OUT, "evaluate_every": 4, "checkpoint_every": 1}
SHOWN = {"sizes": "48,32x64", "whole": 0.5}


def arguments(given: Given, run: Path, *more: str, batch: int = 2) -> list[str]:
    options = [text for name, value in OPTIONS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    shown = [text for name, value in SHOWN.items() for text in (f"--views.{name}", str(value))]
    return [
        *("distill", str(given.photos), "--denoiser", str(given.denoiser), "-o", str(run), "--batch-size", str(batch)),
        *("--backbone", tiny.MODEL, "--weights", str(given.weights), "--device", "cpu", "--dtype", "float32"),
        *("--precision", "float32", *options, *shown, *more),
    ]


def dying_dvit(arguments: list[str]) -> None:
    """`dvit`, whose second process is killed in its third step."""
    step, calls = torch.optim.AdamW.step, iter(range(9))

    def dying(self: torch.optim.AdamW, *args: Any) -> Any:
        if next(calls) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    torch.optim.AdamW.step = dying  # pyright: ignore[reportAttributeAccessIssue]
    dvit(arguments)


@pytest.fixture(scope="module")
def one(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, with batches twice as large."""
    run = tmp_path_factory.mktemp("one") / "run"
    training, shown = tiny.options(**OPTIONS, batch_size=4), tiny.views(**SHOWN)
    with tiny.blank_panels():
        tiny.distilled(given.photos, run, tiny_fit.spec_of(given.weights), training, shown, denoiser=given.denoiser)
    return run


@pytest.fixture(scope="module")
def two(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("two") / "run"
    done = run_together(dvit, arguments(given, run), folder=run.parent)
    assert done.codes == (0, 0), done.err
    assert "2 process(es)" in done.err
    assert done.err.count("photos to train on") == 1  # only the first process prints
    return run


@pytest.fixture(scope="module")
def shared(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights sharded between the processes, and activation checkpointing."""
    run = tmp_path_factory.mktemp("shared") / "run"
    more = ("--shard", "--checkpointing", "--ema", "0.5")
    done = run_together(dvit, arguments(given, run, *more), folder=run.parent)
    assert done.codes == (0, 0), done.err
    return run


@pytest.fixture(params=["two", "shared"])
def together(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def tensors(run: Path, kind: str, step: int = STEPS) -> dict[str, Tensor]:
    """Tensors of a checkpoint: the model and one part of the optimiser's state."""
    found = load_file(run / "checkpoints" / f"step-{step:07}.safetensors")
    return {name: value for name, value in found.items() if name.startswith("model.") or kind == name.rsplit(".", 1)[1]}


def weights(run: Path, step: int = STEPS) -> dict[str, Tensor]:
    return {name: value for name, value in tensors(run, "model", step).items() if name.startswith("model.")}


# --- two processes ---


def test_losses_gradient_norms_and_rates_match_the_doubled_batch(one: Path, together: Path) -> None:
    for alone, both in zip(tiny.rows(one, "train"), tiny.rows(together, "train"), strict=True):
        assert both["rate"] == alone["rate"]
        for figure in ("loss", "mse", "cosine", "held", "gradient"):
            assert both[figure] == pytest.approx(alone[figure], rel=1e-5, abs=1e-6), figure


def test_every_gradient_matches_the_doubled_batch(one: Path, together: Path) -> None:
    """Compared by the moving averages of gradients that AdamW keeps."""
    alone, both = (tensors(run, "exp_avg") for run in (one, together))
    assert alone.keys() == both.keys()
    averages = [name for name in alone if name.endswith("exp_avg")]
    assert len(averages) == len(weights(one))
    for name in averages:
        torch.testing.assert_close(both[name], alone[name], rtol=0, atol=1e-5, msg=name)


def test_weights_match_the_doubled_batch(given: Given, one: Path, together: Path) -> None:
    """Except a few weights whose gradients are so close to zero that AdamW amplifies rounding errors."""
    before = tiny_fit.spec_of(given.weights).load().state_dict()
    moved = max(
        float((v - before[name.removeprefix("model.backbone.")]).abs().max()) for name, v in weights(one).items()
    )
    assert moved > 1e-3
    alone, both = (tiny.without_key_biases(weights(run)) for run in (one, together))
    assert alone.keys() == both.keys()
    apart = torch.cat([(both[name] - value).abs().flatten() for name, value in alone.items()])
    assert int((apart > 1e-5).sum()) <= 1e-5 * len(apart)
    assert float(apart.max()) < 0.2 * moved
    assert float(apart.norm()) < 1e-3 * moved * len(apart) ** 0.5


def test_held_out_metrics_and_written_models_match(one: Path, two: Path) -> None:
    alone, both = (tiny.rows(run, "held_out") for run in (one, two))
    assert [row["step"] for row in both] == [STEPS]
    for there, here in zip(alone, both, strict=True):
        assert here["cosine"] == pytest.approx(there["cosine"], abs=1e-5)
        assert here["class_drift"] == pytest.approx(there["class_drift"], abs=1e-5)
    for name in ("distilled.safetensors", "last.safetensors"):
        there, here = (load_file(run / name) for run in (one, two))
        for key, value in there.items():
            torch.testing.assert_close(here[key], value, rtol=1e-3, atol=1e-3, msg=key)


def test_moving_average_of_sharded_weights_is_complete(one: Path, shared: Path) -> None:
    kept = load_file(shared / "checkpoints" / f"step-{STEPS:07}.safetensors")
    last = load_file(shared / "last.safetensors")
    for name, value in last.items():
        raw, average = (kept[f"{kind}.backbone.model.{name}"] for kind in ("model", "more"))
        assert raw.shape == average.shape == value.shape
        assert torch.equal(average.half(), value)
    assert last.keys() == load_file(one / "last.safetensors").keys()


def test_run_of_two_processes_cannot_be_resumed_by_one(given: Given, two: Path) -> None:
    training, shown = tiny.options(**OPTIONS, batch_size=2), tiny.views(**SHOWN)
    spec = tiny_fit.spec_of(given.weights)
    with pytest.raises(TrainError, match="processes was 2, now 1"):
        tiny.prepared(given.photos, two, spec, training, shown, denoiser=given.denoiser, resume=True)


# --- accelerate's launcher, and a photo that one process cannot read ---

#: With --cpu it would start one process, whatever --num_processes is; the device is an option of the program.
ACCELERATE = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
ACCELERATE += ["--dynamo_backend", "no", "--main_process_port"]


def launch(arguments: list[str]) -> None:
    """`accelerate launch` with these arguments."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    launch_command(launch_command_parser().parse_args(arguments))


def launched(command: list[str], folder: Path) -> Ended:
    """`dvit` in two processes of accelerate's launcher, which needs the number of a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    whole = [*ACCELERATE, port, "-m", "denoising_vit", *command]
    started = fork(launch, whole, folder=folder, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    code = started.end()
    return Ended((code,), started.err.read_text())


def test_accelerate_run_continues_if_one_process_cannot_read_its_photo(given: Given, tmp_path: Path) -> None:
    """Gradients are means over processes: half of those of the process that has a photo."""
    trained = split(range(PHOTOS), HELD_OUT, 0)[0]
    first, second = Sampler(trained, ((48, 48), (32, 64)), tiny.views(**SHOWN), 0, 2).step(0)
    photos = tmp_path / "photos"
    damaged = Given(tiny_fit.write_photos(photos, PHOTOS), given.weights, given.denoiser)
    (photos / f"{second.image:02}.png").write_text("words")
    done = launched(arguments(damaged, tmp_path / "run", "--stop-at", "2", batch=1), tmp_path)
    assert done.codes == (1,), done.err
    assert done.err.count(f"skipped: {second.image:02}.png: not an image file") == 1
    assert f"2 of {STEPS} steps done" in done.err
    training, spec = tiny.options(**OPTIONS), tiny_fit.spec_of(given.weights)
    run = tiny.prepared(
        photos, tmp_path / "alone", spec, training, tiny.views(**SHOWN), denoiser=given.denoiser
    ).training()
    (batch,) = run.reader.batches([[first]])
    loss, _ = run._loss(run.student(batch.images), run.teacher(batch), batch.usable)
    loss.backward()
    row, _ = tiny.rows(tmp_path / "run", "train")
    assert row["loss"] == pytest.approx(loss.item() / 2, rel=1e-5)
    assert row["gradient"] == pytest.approx(gradient_norm(run.student).item() / 2, rel=1e-5)


# --- a process that dies ---


def test_killed_process_ends_the_command_and_leaves_a_checkpoint(given: Given, tmp_path: Path) -> None:
    """The run can be resumed from it, as after any crash."""
    run = tmp_path / "run"
    first, second = run_together(dying_dvit, arguments(given, run), folder=tmp_path).codes
    assert (first, second) == (1, -signal.SIGKILL)
    assert not (run / "last.safetensors").exists()
    left = max((run / "checkpoints").iterdir())
    # The first process may have been one step ahead.
    assert left.name in ("step-0000002.safetensors", "step-0000003.safetensors")
    assert all(torch.isfinite(value).all() for value in load_file(left).values())
