"""The benchmark for accelerators, at a tiny size on the CPU: every part is measured and written."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

import tiny_fit

pytestmark = pytest.mark.usefixtures("one_thread")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_all_parts_run_and_are_reported_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tiny_fit.write_photos(tmp_path / "photos", 4)
    small = ("--size", "32", "--views", "6", "--held-out", "2", "--count", "4", "--runs", "1")
    published = ("--published-views", "8", "--timed-steps", "2", "--no-compile", "--device", "cpu")
    arguments = ["--model", "vit_tiny_patch16_224", "--weights", "random", "--photos", photos, "-o", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments), *small, *published])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found["problems"] == {}
    parts = ["pieces", "single", "stage_two", "stream", "roofline", "published"]
    printed = [line.split(" s: ")[1].split()[0] for line in capsys.readouterr().out.splitlines() if " s: " in line]
    assert printed == parts and all(found[part] for part in parts)
    assert "| what | figure |" in (tmp_path / "out" / "gpu.md").read_text()
