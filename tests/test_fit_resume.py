"""Resuming a killed fit: no finished photo is lost or fitted again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

import tiny_fit as tiny
from denoising_vit.store import FeatureStore
from forks import Fork, dvit, fork

PHOTOS = 12

#: Photos that may be processed but not yet stored when a process dies: three waiting to be written, one whose views are
#: being processed, and one that starts in the same batch.
IN_FLIGHT = 5

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


def fit_and_count(arguments: list[str], counter: str) -> None:
    """Run `dvit fit` in a process of its own and write one byte per processed image.

    Images of other sizes (the fingerprint's) and those that time the estimate are not counted.
    """
    import torch

    from denoising_vit.backbones.timm_vit import TimmBackbone
    from denoising_vit.cli import app
    from denoising_vit.fit import job

    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell inherit that it is ignored
    forward = TimmBackbone.forward
    file = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def count(self: TimmBackbone, image: torch.Tensor) -> torch.Tensor:
        if tuple(image.shape[2:]) == (tiny.SIZE, tiny.SIZE):
            os.write(file, b"." * len(image))
        return forward(self, image)

    job.seconds_per_pass = lambda _stage: 0.01
    TimmBackbone.forward = count  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(app.run(arguments))


@dataclass
class Run:
    """A process that runs a fit, and its progress."""

    fork: Fork
    counter: Path
    before: int

    @property
    def process(self) -> ForkServerProcess:
        return self.fork.process

    @property
    def passes(self) -> int:
        """Number of images that this process has processed."""
        return counted(self.counter) - self.before

    def wait_for(self, passes: int) -> None:
        """Wait until that many images were processed or the process has ended."""
        while self.passes < passes and self.process.is_alive():
            time.sleep(0.002)

    def end(self) -> int:
        return self.fork.end()


def counted(counter: Path) -> int:
    return counter.stat().st_size if counter.exists() else 0


@dataclass(frozen=True)
class Place:
    photos: Path
    weights: Path
    store: Path
    counter: Path


Start = Callable[[Place], Run]


@pytest.fixture(scope="module")
def start() -> Start:
    """A function that starts `dvit fit` for a place."""

    def run(place: Place) -> Run:
        arguments = [*tiny.command(place.photos, place.store, place.weights), "--batch-size", str(tiny.PASSES)]
        before = counted(place.counter)
        started = fork(fit_and_count, arguments, str(place.counter), folder=place.counter.parent)
        return Run(started, place.counter, before)

    return run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return tiny.write_photos(folder / "photos", PHOTOS), tiny.write_weights(folder / "tiny.safetensors")


@dataclass(frozen=True)
class Undisturbed:
    contents: dict[str, bytes]
    seconds: float
    passes: int


@pytest.fixture(scope="module")
def undisturbed(start: Start, inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Store contents, duration and forward passes of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    warm_up = Place(*inputs, folder / "first", folder / "first passes")
    assert start(warm_up).end() == 0
    place = Place(*inputs, folder / "store", folder / "passes")
    started = time.perf_counter()
    run = start(place)
    assert run.end() == 0
    return Undisturbed(tiny.contents(place.store), time.perf_counter() - started, run.passes)


@pytest.fixture
def place(inputs: tuple[Path, Path], tmp_path: Path) -> Place:
    return Place(*inputs, tmp_path / "store", tmp_path / "passes")


def done_in(store: Path) -> int:
    """Number of finished photos; 0 if the process ended before it created the store."""
    return len(FeatureStore.open(store).done()) if (store / "manifest.json").exists() else 0


def kill(run: Run) -> None:
    assert run.process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(run.process.pid, signal.SIGKILL)
    assert run.end() in (-signal.SIGKILL, 0)  # it may have just finished


def test_uninterrupted_run_processes_every_view_once(undisturbed: Undisturbed) -> None:
    assert undisturbed.passes == PHOTOS * tiny.PASSES


def test_kills_during_work_lose_only_photos_in_flight(start: Start, place: Place, undisturbed: Undisturbed) -> None:
    chance = random.Random(4)
    killed = 0
    for _ in range(4):
        before = done_in(place.store)
        run = start(place)
        run.wait_for(chance.randint(1, 4 * tiny.PASSES))
        time.sleep(chance.uniform(0, 0.05))
        kill(run)
        killed += run.process.exitcode != 0
        after = done_in(place.store)
        assert after >= before  # nothing is lost, and finished photos are not fitted again:
        assert run.passes <= (after - before + IN_FLIGHT) * tiny.PASSES
        assert not (place.store / "manifest.json").exists() or list(FeatureStore.open(place.store).verify()) == []
    assert killed >= 2
    left = PHOTOS - done_in(place.store)
    last = start(place)
    assert last.end() == 0
    assert last.passes == left * tiny.PASSES
    assert tiny.contents(place.store) == undisturbed.contents
    tiny.assert_whole(place.store)
    assert counted(place.counter) <= undisturbed.passes + killed * IN_FLIGHT * tiny.PASSES


def test_kills_at_any_time_lose_nothing(start: Start, place: Place, undisturbed: Undisturbed) -> None:
    """While the model is loaded, the store is created, photos are read, shards are sealed, ..."""
    chance = random.Random(5)
    for _ in range(6):
        run = start(place)
        run.process.join(chance.uniform(0, undisturbed.seconds))
        kill(run)
    assert start(place).end() == 0
    assert tiny.contents(place.store) == undisturbed.contents
    tiny.assert_whole(place.store)


def test_repeating_the_command_of_a_finished_fit_is_a_no_op(
    start: Start, place: Place, undisturbed: Undisturbed
) -> None:
    run = start(place)
    run.wait_for(3 * tiny.PASSES)
    kill(run)
    assert start(place).end() == 0
    before = tiny.contents(place.store)
    again = start(place)
    assert again.end() == 0
    assert again.passes == 0
    assert tiny.contents(place.store) == before == undisturbed.contents


def test_second_fit_is_rejected_while_the_first_one_runs(start: Start, place: Place, undisturbed: Undisturbed) -> None:
    first = start(place)
    first.wait_for(1)
    assert first.process.pid is not None
    os.kill(first.process.pid, signal.SIGSTOP)  # it holds its shard and cannot end before the second starts
    try:
        assert start(place).end() == 2
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    assert first.end() == 0
    assert tiny.contents(place.store) == undisturbed.contents


def test_ctrl_c_exits_130_and_the_same_command_resumes(start: Start, place: Place, undisturbed: Undisturbed) -> None:
    run = start(place)
    run.wait_for(2 * tiny.PASSES)
    assert run.process.pid is not None
    os.kill(run.process.pid, signal.SIGINT)
    assert run.end() == 130
    left = PHOTOS - done_in(place.store)
    assert left > 0
    again = start(place)
    assert again.end() == 0
    assert again.passes == left * tiny.PASSES
    assert tiny.contents(place.store) == undisturbed.contents


def test_ctrl_c_of_the_installed_command(inputs: tuple[Path, Path], tmp_path: Path, undisturbed: Undisturbed) -> None:
    store = tmp_path / "store"
    # More views than in the other tests, so that the fit is still running when the signal arrives.
    arguments = [*tiny.command(inputs[0], store, inputs[1]), "--views", "300"]
    run = fork(dvit, arguments, folder=tmp_path)
    while run.process.is_alive() and not any((store / "staged").glob("*.safetensors")):
        time.sleep(0.01)
    assert run.process.pid is not None
    os.kill(run.process.pid, signal.SIGINT)
    assert run.end() == 130
    err = run.err.read_text()
    assert run.out.read_text() == ""
    assert "interrupted; finished photos are kept, run the command again to resume" in err
    assert "Traceback" not in err
    assert 0 < done_in(store) < PHOTOS
