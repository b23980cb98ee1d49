"""Standard output of `dvit ... --json` holds JSON lines alone; what the package logs reaches people."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from command import Dvit, in_process
from denoising_vit.cli import app
from denoising_vit.cli.streams import logged, only_json, print_json


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    return in_process(capsys, monkeypatch)


def test_prints_of_libraries_go_to_the_error_while_json_is_asked_for(
    dvit: Dvit, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Parser:
        def cli(self, **_options: Any) -> int:
            print("a library says hello")
            print_json({"one": 1})
            return 0

    monkeypatch.setattr(app, "_app", lambda *_: Parser())
    found = dvit("denoise", "--json")
    assert (found.rows, found.err) == ([{"one": 1}], "a library says hello\n")
    plain = dvit("denoise")
    assert plain.out == 'a library says hello\n{"one": 1}\n'


def test_standard_output_is_as_before_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), only_json():
        raise ValueError("broken")
    print("back")
    print_json([1])
    assert capsys.readouterr().out == "back\n[1]\n"


def test_every_verb_prints_json_through_the_same_door() -> None:
    verbs = Path(app.__file__).parent
    found = [
        f"{file.name}: {line.strip()}"
        for file in verbs.glob("*.py")
        for line in file.read_text().splitlines()
        if re.search(r"\bprint\(.*dumps", line) and file.name != "streams.py"
    ]
    assert found == []


def test_what_is_left_out_of_a_folder_is_said(dvit: Dvit, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.heic").touch()
    found = dvit("denoise", tmp_path / "photos", "-o", tmp_path / "out")
    assert f"{tmp_path / 'photos'}: 1 file ignored, without an image extension (1 .heic)" in found.err


def test_logs_are_shown_for_as_long_as_a_command_runs() -> None:
    logger, shown = logging.getLogger("denoising_vit.anything"), list[str]()
    with logged(shown.append):
        logger.info("%d things", 2)
    logger.info("later")
    assert shown == ["2 things"] and not logging.getLogger("denoising_vit").handlers
