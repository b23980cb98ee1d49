"""The page of `dvit app` under load: several visitors at once, uploads of the largest allowed size, and Ctrl-C.

    python benchmarks/load.py [--visitors 8] [--clicks 50] [--megabytes 20]

The page runs in a separate process. Visitors use its HTTP interface, as browsers do: each uploads a photo, clicks
"Denoise" repeatedly with changing methods and sizes, and one in four closes the tab while it waits. Every second
upload has the largest allowed size; one file is too large, one is not an image. Prints the result of every click, the
memory before, at its peak, and after, and the time that Ctrl-C takes during an exact run of many views. Exits with 1 if
a click got no answer, or the page did not stop in time. Needs the extra `app`.
"""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import psutil
import tyro
from PIL import Image

#: Maximum seconds to an answer, including all answers before it.
PATIENCE = 900.0

#: Maximum seconds that Ctrl-C may take.
BAR = 5.0


def main(visitors: int = 8, clicks: int = 50, megabytes: int = 20) -> int:
    """Puts the page under load.

    Args:
        visitors: number of visitors at once.
        clicks: number of clicks on "Denoise", over all visitors.
        megabytes: largest allowed upload.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "denoising_vit", "app", "--port", str(port), "--max-upload", str(megabytes)]
    # A shell that starts this in the background makes it, and the page, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    server = subprocess.Popen(command)
    page = Page(f"http://127.0.0.1:{port}")
    try:
        page.wait(server)
        memory = Memory(server.pid)
        small, large = photo(512, 384), largest(megabytes)
        outcomes: Counter[str] = Counter()
        started = time.perf_counter()
        with ThreadPoolExecutor(visitors) as pool:
            shares = [clicks // visitors + (number < clicks % visitors) for number in range(visitors)]
            for part in pool.map(
                lambda number: visit(page, number, shares[number], large if number % 2 else small), range(visitors)
            ):
                outcomes += part
        outcomes += refused(page, megabytes)
        print(f"{clicks} clicks of {visitors} visitors in {time.perf_counter() - started:.0f} s:")
        for words, count in outcomes.most_common():
            print(f"  {count:3d} {words}")
        print(memory)
        stopped = stop(page, server)
        print(f"Ctrl-C during an exact run: {stopped:.1f} s (at most {BAR:g})")
    finally:
        server.kill()
    return int(stopped > BAR or any(words.startswith("no answer") for words in outcomes))


@dataclass
class Page:
    """The HTTP interface of the page.

    Attributes:
        url: its address.
        events: number of each event, by component and trigger.
    """

    url: str
    events: dict[tuple[str, str], int] = field(default_factory=dict)

    def wait(self, server: subprocess.Popen[bytes]) -> None:
        """Waits until the page answers, and reads its events."""
        while True:
            if server.poll() is not None:
                raise SystemExit("dvit app ended before it answered")
            with suppress(httpx.HTTPError):
                config = httpx.get(f"{self.url}/config", timeout=10).json()
                break
            time.sleep(0.5)
        names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
        for event in config["dependencies"]:
            for target, trigger in event["targets"]:
                self.events[names.get(target) or "", trigger] = event["id"]

    def upload(self, content: bytes, name: str) -> dict[str, Any]:
        """Sends a file; raises httpx.HTTPStatusError if it is rejected."""
        sent = httpx.post(f"{self.url}/gradio_api/upload", files={"files": (name, content)}, timeout=PATIENCE)
        sent.raise_for_status()
        return {"path": sent.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def send(self, session: str, event: tuple[str, str], data: list[Any], leave: float | None = None) -> str:
        """Triggers an event and returns its result; a visitor may close the tab after ``leave`` seconds."""
        number = self.events[event]
        order = {"data": data, "fn_index": number, "trigger_id": None, "session_hash": session}
        joined = httpx.post(f"{self.url}/gradio_api/queue/join", json=order, timeout=PATIENCE)
        if joined.status_code != 200:
            return f"refused by the queue: {joined.text[:100]}"
        started = time.perf_counter()
        address = f"{self.url}/gradio_api/queue/data?session_hash={session}"
        timeout = httpx.Timeout(PATIENCE, read=PATIENCE if leave is None else leave)
        try:
            with httpx.stream("GET", address, timeout=timeout) as stream:
                for line in stream.iter_lines():
                    if leave is not None and time.perf_counter() - started > leave:
                        return "tab closed by the visitor"
                    if not line.startswith("data:"):
                        continue
                    message = json.loads(line.removeprefix("data:"))
                    if message["msg"] == "process_completed":
                        return "answered" if message["success"] else f"refused: {_words(message['output'])}"
                    if message["msg"] == "unexpected_error":
                        return f"refused: {message.get('message')}"
        except httpx.ReadTimeout:
            return "tab closed by the visitor" if leave is not None else f"no answer in {PATIENCE:.0f} s"
        except httpx.HTTPError as error:
            return f"no answer: {error!r}"
        return "no answer: the stream ended"


def _words(output: Any) -> str:
    return str(output.get("error") or "no words")[:120] if isinstance(output, dict) else str(output)[:120]


def visit(page: Page, number: int, clicks: int, content: bytes) -> Counter[str]:
    """One visitor: uploads a photo, then clicks on "Denoise"."""
    session = f"visitor{number}"
    outcomes: Counter[str] = Counter()
    file = page.upload(content, f"{number}.png")
    sent = page.send(session, ("upload", "upload"), [file, None])
    outcomes[f"upload {sent}"] += 1
    for click in range(clicks):
        exact = (number + click) % 5 == 0
        leave = 1.0 if number % 4 == 3 and click == clicks // 2 else None
        outcomes[page.send(session, ("run", "click"), asked(exact, 280 if click % 2 else 518, 8), leave)] += 1
        if leave is not None:  # a new tab: the photo is chosen again
            session += "again"
            outcomes[f"upload {page.send(session, ('upload', 'upload'), [file, None])}"] += 1
    return outcomes


def asked(exact: bool, size: int, views: int) -> list[Any]:
    """Inputs of a click on "Denoise": photo, backbone, method, layer, size, views, wide, scale, map, earlier answer."""
    method = "exact" if exact else "denoiser"
    return [None, "vit_small_patch14_dinov2.lvd142m", method, -1, size, views, False, 1, "pca", None]


def refused(page: Page, megabytes: int) -> Counter[str]:
    """Results of uploading a file that is too large, and one that is not an image."""
    outcomes: Counter[str] = Counter()
    try:
        page.upload(bytes(megabytes * 1_000_000 + 1_000_000), "large.png")
        outcomes["no answer: a file that is too large was taken"] += 1
    except httpx.HTTPStatusError as error:
        outcomes[f"too large: refused with status {error.response.status_code}"] += 1
    sent = page.send("text", ("upload", "upload"), [page.upload(b"words", "words.png"), None])
    outcomes[f"no image: {sent}"] += 1
    return outcomes


class Memory:
    """Resident memory of the server, monitored in a thread."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.before = self.most = self._now()
        threading.Thread(target=self._watch, daemon=True).start()

    def _now(self) -> int:
        return self._process.memory_info().rss

    def _watch(self) -> None:
        with suppress(psutil.NoSuchProcess):
            while True:
                self.most = max(self.most, self._now())
                time.sleep(0.1)

    def __str__(self) -> str:
        time.sleep(2)
        before, most, after = (value / 2**20 for value in (self.before, self.most, self._now()))
        return f"memory: {before:.0f} MiB before, at most {most:.0f}, {after:.0f} after"


def stop(page: Page, server: subprocess.Popen[bytes]) -> float:
    """Seconds from Ctrl-C to the end of the process, during an exact run of many views."""
    file = page.upload(photo(512, 384), "last.png")
    page.send("last", ("upload", "upload"), [file, None])
    threading.Thread(target=page.send, args=("last", ("run", "click"), asked(True, 518, 128)), daemon=True).start()
    time.sleep(4)
    started = time.perf_counter()
    server.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        server.wait(60)
    return time.perf_counter() - started


def photo(width: int, height: int) -> bytes:
    """A PNG of noise over a gradient."""
    chance = np.random.default_rng(0)
    pixels = np.linspace(60, 180, width)[None, :, None] + chance.normal(0, 20, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def largest(megabytes: int) -> bytes:
    """A PNG of noise just below the upload limit: noise does not compress."""
    side = int((megabytes * 1_000_000 / 3 * 0.98) ** 0.5)
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG", compress_level=1)
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
