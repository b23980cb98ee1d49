"""Faults at some writes of `dvit export`; `python tests/faults.py` tries all writes of all commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import faults


@pytest.mark.skipif(shutil.which("cc") is None, reason="the shim that makes calls fail needs a C compiler")
def test_repeating_the_command_recovers_from_a_fault_at_a_write(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, faults.__file__, "--verbs", "export", "--every", "8", "--result", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    rows = json.loads(result.read_text())
    assert [row["fault"] for row in rows] == ["power cut", *faults.FAULTS]
    assert sum(row["tried"] for row in rows) > len(faults.FAULTS)
    assert done.returncode == 0 and not any(row["problems"] for row in rows), done.stdout
