"""Tables of training runs: contents of run folders, and errors for other folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command import Dvit, in_process
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.tables.runs import run_section

HEAD = {"format": "denoising-vit/run", "version": 1, "stage": "distillation", "backbone": {"name": "vit", "layer": 11}}

ABOUT = {"command": "dvit distill photos -o run", "hardware": "2 CPU cores", "software": {"torch": "2.15"}}

RESULT = {
    **{"task": "knn", "features": "raw", "metrics": {"mIoU": 50.0, "mAcc": 60.0, "aAcc": 70.0}, "classes": {}},
    **{"seeds": [{"seed": 0, "mIoU": 50.0, "mAcc": 60.0, "aAcc": 70.0}], "paired": None, "curve": [], "absent": []},
    **{"images": {"train": 1, "val": 1}, "skipped": [], "failed": None, "seconds": 1.0, "published": None},
    "settings": {
        "data": {"name": "data", "layout": "folders", "digest": "0"},
        "backbone": {"name": "vit", "weights": "random", "dtype": "float32"},
        **{"size": "native", "crops": "whole"},
    },
    "run": ABOUT,
}


def look(step: int, cosine: float, **more: float) -> dict[str, Any]:
    figures = {"cosine": cosine, "raw_cosine": 0.5, "ratio": 0.7, "rank": 9.0, "raw_rank": 10.0, "target_rank": 8.0}
    return {"step": step, "kind": "held_out", **figures, **more}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [{"step": 1, "kind": "train", "loss": 1.0}, look(10, 0.8), look(20, 0.9, class_drift=0.25), look(30, 0.85)]
    (folder / "run.json").write_text(json.dumps(HEAD))
    (folder / "about.json").write_text(json.dumps(ABOUT))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "ki')
    return folder


def text_of(folder: Path) -> list[str]:
    return [line for block in run_section(folder) for line in block]


def test_each_evaluation_is_a_row_and_the_best_is_marked(run: Path) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text_of(run) if line.startswith("|")]
    assert rows[0] == ["step", "cosine", "1 - cosine of raw's", "effective rank", "class token, 1 - cosine"]
    assert rows[2:] == [
        ["10", "0.8000 (0.5000)", "0.7", "9 (10)", "-"],
        ["**20**", "0.9000 (0.5000)", "0.7", "9 (10)", "0.25"],
        ["30", "0.8500 (0.5000)", "0.7", "9 (10)", "-"],
        ["target", "-", "-", "8", "-"],
    ]


def test_command_hardware_and_settings_are_shown(run: Path) -> None:
    text = "\n".join(text_of(run))
    assert "### Distilled ViT: run, vit" in text
    assert "Command: `dvit distill photos -o run`. Hardware: 2 CPU cores. Software: torch 2.15." in text
    assert "backbone.layer 11" in text and "format" not in text


def test_missing_command_is_shown_as_not_recorded(run: Path) -> None:
    (run / "about.json").unlink()
    assert "Command: not recorded. Hardware: not recorded. Software: not recorded." in "\n".join(text_of(run))


@pytest.mark.parametrize("name", ["run.json", "log.jsonl"])
def test_folder_without_a_record_is_rejected(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(EvaluationError, match=f"{name}: expected"):
        run_section(run)


@pytest.mark.parametrize(("name", "content"), [("run.json", "{}"), ("log.jsonl", ""), ("run.json", "[1]")])
def test_invalid_records_are_rejected(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(EvaluationError, match="expected"):
        run_section(run)


def test_the_report_has_a_section_of_runs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dvit: Dvit = in_process(capsys, monkeypatch)
    (tmp_path / "results.jsonl").write_text(json.dumps(RESULT) + "\n")
    done = dvit("report", tmp_path / "results.jsonl", "--runs", run, "-o", tmp_path / "results.md")
    assert done.code == 0, done.err
    text = (tmp_path / "results.md").read_text()
    assert (
        text.index("## Nearest neighbours") < text.index("## Training runs") < text.index("## Published and measured")
    )
    assert "| **20** | 0.9000 (0.5000) |" in text
    wrong = dvit("report", tmp_path / "results.jsonl", "--runs", tmp_path, "-o", tmp_path / "other.md")
    assert wrong.code == 2
    assert "run.json: expected a record of a run" in wrong.err
