"""How long the page of `dvit app` takes to answer: from the click until the browser shows the pictures.

    python benchmarks/app.py [--photo astronaut] [--answers 5]

In one process: the page is served on this machine, a headless Chromium opens it, and a photo of 512 x 512 pixels is
denoised by the shipped denoiser. Prints the time of the first answer after the start, of the following ones, and of the
backbone and denoiser alone. Needs the extra `app`, playwright, scikit-image and a Chromium.
"""

from __future__ import annotations

import shutil
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from skimage import data

import denoising_vit as dv
from denoising_vit.backbones import BackboneSpec
from denoising_vit.show.app.models import Models
from denoising_vit.show.app.serving import serve
from denoising_vit.show.options import AppOptions

#: Maximum time of the first answer, in seconds.
BAR = 5.0


def main(photo: str = "astronaut", answers: int = 5) -> None:
    """Measures the time to an answer.

    Args:
        photo: name of a photo in scikit-image.
        answers: number of answers to time.
    """
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        raise SystemExit("no Chromium found: expected chromium, chromium-browser or google-chrome on PATH")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        Image.fromarray(getattr(data, photo)()[..., :3]).save(Path(folder) / "a.png")
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        models = Models(BackboneSpec(), "shipped", None)
        with serve(models, AppOptions(port=port, examples=Path(folder))) as opened:
            times = _answers(executable, opened.url, answers)
        passes = _passes()
    print(f"first answer {times[0]:.2f} s (at most {BAR:.0f}), then {statistics.median(times[1:]):.2f} s")
    print(f"the pass of backbone and denoiser alone {passes:.2f} s: first answer {times[0] / passes:.1f} times that")


def _answers(executable: str, url: str, count: int) -> list[float]:
    """Seconds from click to pictures, for each answer in turn."""
    from playwright.sync_api import sync_playwright

    times = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page: Any = browser.new_page()
        for _ in range(count):
            page.goto(url)  # a new page, because the same page keeps the pictures of the last answer
            page.wait_for_selector("#photo img")
            started = time.perf_counter()
            page.click("#run")
            page.wait_for_selector("#compare img")
            page.wait_for_selector("#similar-denoised img")
            times.append(time.perf_counter() - started)
        browser.close()
    return times


@torch.no_grad()
def _passes(repeats: int = 5) -> float:
    """The median time of the forward passes that every answer needs."""
    backbone = dv.load_backbone("vit_small_patch14_dinov2.lvd142m")
    extractor = dv.DenoisedViT(backbone, dv.load_denoiser("shipped", backbone=backbone))
    image = torch.randn(1, 3, backbone.default_size, backbone.default_size)
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        extractor(image)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


if __name__ == "__main__":
    tyro.cli(main)
