"""Serving the page: addresses, errors and warnings before it opens, and cleanup."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_app as tiny
from command import Dvit, in_process
from denoising_vit.errors import AppError
from denoising_vit.show.app import serving
from denoising_vit.show.app.scene import Figure
from denoising_vit.show.app.serving import require_free
from denoising_vit.show.options import AppOptions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    return in_process(capsys, monkeypatch)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that is in use."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def test_port_in_use_suggests_the_next_free_one(dvit: Dvit, taken: int) -> None:
    done = dvit("app", "--port", taken)
    assert done.code == 2
    assert f"port {taken} of 127.0.0.1 is in use; the next free one is" in done.words
    free = int(done.words.rpartition("--port ")[2])
    assert free > taken
    require_free("127.0.0.1", free)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--port", 0), "port must be 1 to 65535, got 0"),
        (("--max-upload", 0), "max_upload must be more than 0"),
        (("--max-upload", "nan"), "max_upload must be more than 0"),
        (("--examples", "nowhere"), "examples must be a folder with photos, got nowhere"),
        (("--host", "no.such.host.invalid"), "cannot listen on host"),
    ],
)
def test_invalid_options_are_rejected(dvit: Dvit, options: tuple[object, ...], message: str) -> None:
    done = dvit("app", *options)
    assert done.code == 2
    assert message in done.words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "warning: --host 0.0.0.0 opens the page to the network"),
        (("--share",), "warning: --share opens a public address"),
    ],
)
def test_page_open_to_others_prints_a_warning(dvit: Dvit, taken: int, options: tuple[str, ...], message: str) -> None:
    done = dvit("app", *options, "--port", taken)  # in use, so that the command stops there
    assert done.code == 2
    assert message in done.words
    assert "warning" not in dvit("app", "--port", taken).words


def test_missing_gradio_is_reported_with_its_extra(dvit: Dvit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    done = dvit("app")
    assert done.code == 2
    assert "install the extra `app` (pip install '.[app]' in a clone of denoising-vit)" in done.words


def test_missing_weights_file_exits_2(dvit: Dvit, tmp_path: Path) -> None:
    done = dvit("app", "--weights", tmp_path / "none.safetensors")
    assert done.code == 2
    assert "no such weights file" in done.words


def test_page_is_open_when_ready_is_printed_and_leaves_no_files(
    dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny.spec(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seen: list[object] = []
    ended = threading.Event()

    def end() -> None:
        """Request the page once the command waits, and terminate it as a service manager would."""
        until = time.monotonic() + 60
        while time.monotonic() < until and not ended.is_set():
            if signal.getsignal(signal.SIGTERM) is signal.default_int_handler:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
                    seen.extend([answer.status, *tmp_path.glob("dvit-app-*")])
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.1)

    ending = threading.Thread(target=end)
    ending.start()
    done = dvit("app", "--backbone", spec.backbone, "--weights", spec.weights, "--port", port)
    ended.set()
    ending.join()
    assert done.code == 130, done.err
    assert f"ready: http://127.0.0.1:{port}/" in done.words
    assert len(seen) == 2
    assert seen[0] == 200
    assert not list(tmp_path.glob("dvit-app-*"))


# Handlers


@pytest.fixture
def handlers() -> Any:
    """The module, imported only where it is used: importing Gradio takes seconds."""
    return importlib.import_module("denoising_vit.show.app.handlers")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AppError("<b>row</b> must be 0"), "&lt;b&gt;row&lt;/b&gt; must be 0"),
        (MemoryError(), "not enough memory; use"),
        (ZeroDivisionError("secret"), "unexpected error \\(ZeroDivisionError\\); see the terminal"),
    ],
)
def test_errors_are_shown_on_the_page_as_plain_text(handlers: Any, error: Exception, words: str) -> None:
    @handlers.plainly
    def fails() -> None:
        raise error

    with pytest.raises(handlers.gr.Error, match=words) as found:
        fails()
    assert "secret" not in str(found.value)


def test_closing_a_tab_stops_its_work(handlers: Any) -> None:
    visitors, counts = handlers.Visitors(), []
    watched = visitors.watched("a", lambda done, total: counts.append(done))
    other = visitors.watched("b", lambda done, total: counts.append(-done))
    watched(1, 9)
    visitors.leaves("a")
    with pytest.raises(handlers.Gone):
        watched(2, 9)
    other(2, 9)
    visitors.served("a")
    visitors.watched("a", lambda done, total: counts.append(done))(3, 9)  # the same tab, later
    assert counts == [1, -2, 3]


def test_closing_the_page_stops_all_work(handlers: Any) -> None:
    visitors = handlers.Visitors()
    watched = visitors.watched("a", lambda done, total: None)
    threading.Timer(0.2, visitors.served, ["a"]).start()
    visitors.all_leave(5)
    with pytest.raises(handlers.Gone):
        watched(1, 9)


def test_figures_are_shown_as_a_table_with_headings(handlers: Any) -> None:
    html = handlers.table([Figure("norm", "1", "2", "says it."), Figure("time", None, "3 s", "of both.")])
    assert "<th scope='row'>norm</th><td class='raw'>1</td><td class='denoised'>2</td><td>says it.</td>" in html
    assert "<th scope='row'>time</th><td colspan='2'>3 s</td><td>of both.</td>" in html


@pytest.mark.parametrize(
    ("host", "share", "local"),
    [
        ("127.0.0.1", False, True),
        ("localhost", False, True),
        ("::1", False, True),
        ("0.0.0.0", False, False),
        ("example.org", False, False),
        ("127.0.0.1", True, False),
    ],
)
def test_page_is_local_only_on_loopback_without_sharing(host: str, share: bool, local: bool) -> None:
    assert AppOptions(host=host, share=share).local == local
