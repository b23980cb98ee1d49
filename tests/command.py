"""Runs `dvit ...` in this process, for tests of the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from denoising_vit.cli import app


@dataclass(frozen=True)
class Outcome:
    """Result of a command.

    Attributes:
        code: its exit code.
        out: its standard output.
        err: its standard error.
    """

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The JSON lines of standard output; fails if there is anything else."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def words(self) -> str:
        """All printed text, in one line without the frames of the help."""
        return " ".join((self.out + self.err).translate({ord(edge): " " for edge in "│╭╮╰╯─"}).split())


Dvit = Callable[..., Outcome]


def in_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    """A function that runs `dvit` with arguments of any kind; the parser's own exit is an exit code as well."""
    monkeypatch.setenv("COLUMNS", "240")  # no wrapped lines

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = app.run([*map(str, arguments)])
        except SystemExit as ended:
            assert isinstance(ended.code, int)
            code = ended.code
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call
