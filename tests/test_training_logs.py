"""The log of a run: complete JSON lines, also on a full disk."""

from __future__ import annotations

import errno
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from denoising_vit.errors import DenoisingVitWarning, TrainError
from denoising_vit.training.loop import Log


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    """A log without TensorBoard, whose import takes seconds."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    return Log(tmp_path / "log.jsonl", 0)


def test_line_is_written_at_once_with_step_kind_and_metrics(log: Log, tmp_path: Path) -> None:
    log.write(3, "train", {"loss": 0.5, "rate": math.nan, "gradient": math.inf})
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3, "kind": "train", "loss": 0.5, "rate": None, "gradient": None}
    log.close()


def test_lines_are_appended_to_existing_ones(log: Log, tmp_path: Path) -> None:
    log.write(1, "train", {})
    log.close()
    again = Log(tmp_path / "log.jsonl", 1)
    again.write(2, "held_out", {"cosine": 1.0})
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [(1, "train"), (2, "held_out")]


class Full:
    """A file on a full disk."""

    name = "log.jsonl"

    def write(self, _line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        return


def test_full_disk_is_reported(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    full: Any = Full()
    monkeypatch.setattr(log, "_file", full)
    with pytest.raises(TrainError, match=r"log.jsonl: cannot be written to \(.*No space left.*continue with --resume"):
        log.write(1, "train", {"loss": 1.0})


@pytest.mark.slow
def test_unwritable_tensorboard_file_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record_writer = pytest.importorskip("tensorboard.summary.writer.record_writer")

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = Log(tmp_path / "log.jsonl", 0)
    monkeypatch.setattr(record_writer.RecordWriter, "write", full)  # in a thread
    with pytest.warns(DenoisingVitWarning, match=r"tensorboard: .*logging stopped .*No space left.*log.jsonl has all"):
        for step in range(1, 4):
            log.write(step, "train", {"loss": 1.0})
            time.sleep(0.1)
        log.close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert "Traceback" not in capsys.readouterr().err
