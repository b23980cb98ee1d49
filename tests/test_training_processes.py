"""Training with two processes matches one process with twice the batch size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_fit
import tiny_training as tiny
from denoising_vit.cli import app
from denoising_vit.denoiser import read_denoiser
from forks import dvit, run_together
from tiny_distillation import blank_panels

pytestmark = pytest.mark.usefixtures("one_thread")

PHOTOS, STEPS = 7, 3


@pytest.fixture(scope="module")
def data(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Photos, the store of their fields, and the weights of the model."""
    folder = tmp_path_factory.mktemp("data")
    weights = tiny_fit.write_weights(folder / "tiny.safetensors")
    photos = tiny_fit.write_photos(folder / "photos", PHOTOS)
    tiny_fit.prepare(photos, folder / "store", tiny_fit.spec_of(weights)).run()
    return photos, folder / "store", weights


def arguments(data: tuple[Path, Path, Path], run: Path, batch: int) -> list[str]:
    photos, store, weights = data
    return [
        *("train", str(store), "--photos", str(photos), "-o", str(run)),
        *("--backbone", tiny_fit.MODEL, "--weights", str(weights), "--device", "cpu", "--dtype", "float32"),
        *("--precision", "float32", "--steps", str(STEPS), "--batch-size", str(batch), "--learning-rate", "1e-3"),
        *("--held-out", "2", "--evaluate-every", "2", "--checkpoint-every", "1", "--pairs.keep", "3"),
    ]


@pytest.fixture(scope="module")
def one(data: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    with blank_panels():
        assert app.run(arguments(data, run, 4)) == 0
    return run


@pytest.fixture(scope="module")
def two(data: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("two") / "run"
    done = run_together(dvit, arguments(data, run, 2), folder=run.parent)
    assert done.codes == (0, 0), done.err
    assert done.err.count("images to train on") == 1  # only the first process prints
    assert "2 process(es)" in done.err
    return run


def test_gradients_and_rates_match_the_doubled_batch(one: Path, two: Path) -> None:
    for alone, together in zip(tiny.rows(one, "train"), tiny.rows(two, "train"), strict=True):
        assert together["rate"] == alone["rate"]
        assert together["gradient"] == pytest.approx(alone["gradient"], rel=1e-4)


def test_weights_match_the_doubled_batch(one: Path, two: Path) -> None:
    for step in (STEPS - 1, STEPS):
        name = f"checkpoints/step-{step:07}.safetensors"
        alone, together = (tiny.weights_of(run / name) for run in (one, two))
        assert alone.keys() == together.keys()
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, atol=2e-5, rtol=1e-4, msg=key)


def test_held_out_metrics_match_and_the_last_step_is_saved(one: Path, two: Path) -> None:
    alone, together = (tiny.rows(run, "held_out") for run in (one, two))
    assert [row["step"] for row in together] == [2, 3]
    for there, here in zip(alone, together, strict=True):
        assert here["cosine"] == pytest.approx(there["cosine"], abs=1e-4)
    assert read_denoiser(two / "last.safetensors").info["step"] == STEPS


def test_the_logged_loss_is_that_of_the_whole_batch(one: Path, two: Path) -> None:
    for alone, together in zip(tiny.rows(one, "train"), tiny.rows(two, "train"), strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def test_two_processes_write_the_same_pairs(one: Path, two: Path) -> None:
    written = {path.name: path.read_bytes() for path in (one / "pairs").iterdir()}
    assert {"pairs.json", "state.u8"} < written.keys()
    assert len(written) == 4  # and the raw features and targets of one size
    assert written["state.u8"] == bytes([1] * PHOTOS)
    for name, content in written.items():
        assert (two / "pairs" / name).read_bytes() == content, name
