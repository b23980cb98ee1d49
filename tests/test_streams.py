"""Standard output of `dvit ... --json` has only JSON lines; log messages of the package are shown."""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from typing import Any

import pytest

from command import Dvit, in_process
from denoising_vit.cli import app
from denoising_vit.cli.streams import logged, only_json, print_json


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    return in_process(capsys, monkeypatch)


def test_library_prints_go_to_stderr_with_json(dvit: Dvit, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_standard_output_is_restored_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), only_json():
        raise ValueError("broken")
    print("back")
    print_json([1])
    assert capsys.readouterr().out == "back\n[1]\n"


def calls_of(name: str, tree: ast.AST) -> list[ast.Call]:
    """All calls of a function or method of this name."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if name in (getattr(call.func, "id", None), getattr(call.func, "attr", None))]


def test_only_the_streams_module_prints_json() -> None:
    found = [
        f"{file.name}:{call.lineno}"
        for file in Path(app.__file__).parent.glob("*.py")
        for call in calls_of("print", ast.parse(file.read_text()))
        if file.name != "streams.py" and calls_of("dumps", call)
    ]
    assert found == []


def test_ignored_files_of_a_folder_are_reported(dvit: Dvit, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.heic").touch()
    found = dvit("denoise", tmp_path / "photos", "-o", tmp_path / "out")
    assert f"{tmp_path / 'photos'}: 1 file ignored, without an image extension (1 .heic)" in found.err


def test_logs_are_shown_only_while_a_command_runs() -> None:
    logger, shown = logging.getLogger("denoising_vit.anything"), list[str]()
    with logged(shown.append):
        logger.info("%d things", 2)
    logger.info("later")
    assert shown == ["2 things"] and not logging.getLogger("denoising_vit").handlers
