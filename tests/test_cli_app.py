"""The command itself: verbs, version, and help without slow imports."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from command import Dvit, in_process
from denoising_vit.cli import app

#: Modules that take seconds to import.
HEAVY = ("torch", "torchvision", "timm", "matplotlib", "sklearn", "scipy")


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    return in_process(capsys, monkeypatch)


def verbs(places: Mapping[str, Any] = app.VERBS, *above: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Path of each verb, and the place of its function."""
    for name, place in places.items():
        if isinstance(place, str):
            yield (*above, name), place
        else:
            yield from verbs(place, *above, name)


@pytest.mark.parametrize(("path", "place"), list(verbs()), ids=[" ".join(path) for path, _ in verbs()])
def test_help_shows_the_docstring_summary_of_each_verb(dvit: Dvit, path: tuple[str, ...], place: str) -> None:
    module, _, function = place.partition(":")
    found = getattr(importlib.import_module(f"denoising_vit.cli.{module}"), function or module)
    summary = " ".join(found.__doc__.split("\n\n")[0].split())
    above = dvit(*path[:-1], "--help")
    assert above.code == 0
    assert f"• {path[-1]} {summary}" in above.words
    assert summary in dvit(*path, "--help").words  # also in the verb's own help


@pytest.mark.parametrize("name", [name for name, place in app.VERBS.items() if isinstance(place, Mapping)])
def test_groups_of_verbs_are_described(dvit: Dvit, name: str) -> None:
    words = dvit("--help").words
    (described,) = [entry for entry in words.split("• ") if entry.startswith(f"{name} ")]
    assert len(described.split()) > 5


def test_version_is_that_of_the_package(dvit: Dvit) -> None:
    done = dvit("--version")
    assert (done.code, done.out) == (0, f"dvit {importlib.metadata.version('denoising-vit')}\n")
    assert "--version" in dvit("--help").words


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("store",), ("store", "nonsense")])
def test_unknown_verb_exits_2_and_lists_the_verbs(dvit: Dvit, arguments: tuple[str, ...]) -> None:
    done = dvit(*arguments)
    assert done.code == 2
    assert done.out == ""
    for name in app.VERBS["store"] if arguments[:1] == ("store",) else app.VERBS:
        assert name in done.words


@pytest.mark.parametrize(
    "program",
    [
        "import denoising_vit",
        "import denoising_vit.cli as cli; cli.main(['--help'])",
        "import denoising_vit.cli as cli; cli.main(['evaluate', '--help'])",
        "import denoising_vit.cli as cli; cli.main(['--version'])",
        "import denoising_vit.cli as cli; cli.main(['denoize', 'cat.jpg'])",
    ],
)
def test_help_and_early_errors_import_nothing_heavy(program: str) -> None:
    ending = f"import atexit, sys; atexit.register(lambda: print('heavy:', [n for n in {HEAVY} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{ending}\n{program}"], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


#: Runs each verb of a JSON list twice, for its help and with a wrong option, and rejects imports of heavy modules.
PARSE_ALL = """
import importlib.abc, json, sys

heavy, verbs = json.loads(sys.argv[1])

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in heavy, f"{verb}: {name} is imported before any work"

sys.meta_path.insert(0, Refuse())
from denoising_vit.cli import app

for verb in verbs:
    for option, code in (("--help", 0), ("--no-such-option", 2)):
        try:
            app.run([*verb, option])
        except SystemExit as ended:
            assert ended.code == code, (verb, option, ended.code)
        else:
            raise AssertionError(f"{verb} {option} did not end")
"""


def test_no_verb_imports_anything_heavy_for_help_or_a_wrong_option() -> None:
    arguments = json.dumps([HEAVY, [path for path, _ in verbs()]])
    done = subprocess.run([sys.executable, "-c", PARSE_ALL, arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: dvit") == len(list(verbs()))
