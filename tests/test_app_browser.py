"""The page in a real browser: tests of every control."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import denoising_vit as dv
import tiny_app as tiny
from denoising_vit.backbones import BackboneSpec
from denoising_vit.data.photos import is_panel
from denoising_vit.show.app.models import Models
from denoising_vit.show.app.serving import serve
from denoising_vit.show.options import AppOptions

pytestmark = pytest.mark.slow

BUNDLED = "vit_small_patch14_dinov2.lvd142m"
MEGABYTES = 2.0


@dataclass
class Site:
    """The served page, and the connections of its server and its visitors.

    Attributes:
        url: address of the page.
        asked: addresses of all browser requests.
        reached: hosts that this process connected to.
    """

    url: str
    asked: list[str] = field(default_factory=list)
    reached: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def site(chromium: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("examples")
    tiny.photo(folder, 60, 90, name="noise.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        options = AppOptions(port=free.getsockname()[1], max_upload=MEGABYTES, examples=folder)
    reached: list[str] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            reached.append(address[0])
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        patch.setenv("HF_HUB_OFFLINE", "1")
        with serve(Models(BackboneSpec(BUNDLED, weights="bundled")), options) as opened:
            yield Site(opened.url, reached=reached)


class Visitor:
    """One browser tab, with the actions of a user."""

    def __init__(self, browser: Any, site: Site, **context: Any) -> None:
        self.context = browser.new_context(accept_downloads=True, **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("request", lambda request: site.asked.append(request.url))
        self.page.goto(site.url)
        self.page.locator("#photo").scroll_into_view_if_needed()  # pictures load when they are near the viewport
        self.page.wait_for_selector("#photo img")

    def shown(self, name: str) -> str:
        """Address of the picture of a component."""
        return self.page.locator(f"#{name} img").last.get_attribute("src")

    def pixels(self, name: str) -> np.ndarray:
        """Pixels of the picture of a component."""
        return np.array(Image.open(io.BytesIO(self.context.request.get(self.shown(name)).body())))

    def changes(self, name: str, act: Callable[[], Any]) -> None:
        """Runs ``act``, and waits until the component shows another picture."""
        before = self.shown(name)
        act()
        self.page.wait_for_function(
            "([name, before]) => { const all = document.querySelectorAll(`#${name} img`);"
            " return all.length && all[all.length - 1].src != before }",
            arg=[name, before],
        )

    def run(self) -> None:
        """Presses the button and waits for the pictures."""
        self.page.click("#run")
        self.page.wait_for_selector("#compare img")
        self.page.wait_for_selector("#similar-denoised img")

    def choose(self, name: str, value: str) -> None:
        """Selects a radio button."""
        self.page.locator(f'#{name} input[value="{value}"]').check()

    def pick(self, name: str, option: str) -> None:
        """Selects an option of a drop-down list."""
        self.page.click(f"#{name} input")
        self.page.get_by_role("option", name=option).first.click()

    def type(self, name: str, value: object) -> None:
        """Enters a number."""
        number = self.page.locator(f"#{name} input[type=number]")
        number.fill(str(value))
        number.blur()

    def upload(self, path: Path) -> None:
        self.page.set_input_files("input[type=file]", path)

    def error(self) -> str:
        """Text of the error message on the page; closes the message."""
        body = self.page.locator("[data-testid=toast-body]")
        body.wait_for()
        words = body.inner_text()
        self.page.locator(".toast-close").click()
        body.wait_for(state="detached")
        return words

    def download(self, name: str, folder: Path) -> Path:
        """Downloads the file of a button; returns its path."""
        self.page.wait_for_selector(f"#{name}:not([disabled])")
        with self.page.expect_download() as found:
            self.page.click(f"#{name}")
        path = folder / found.value.suggested_filename
        found.value.save_as(path)
        return path


@pytest.fixture
def visit(chromium: object, site: Site) -> Iterator[Callable[..., Visitor]]:
    visitors: list[Visitor] = []

    def come(**context: Any) -> Visitor:
        visitors.append(Visitor(chromium, site, **{"viewport": {"width": 1280, "height": 900}} | context))
        return visitors[-1]

    yield come
    for visitor in visitors:
        visitor.context.close()


def test_sample_photo_gives_pictures_and_downloads(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    visitor = visit()
    assert "noise.png, 90 × 60 pixels" in visitor.page.inner_text("#about-photo")  # photos of --examples come first
    visitor.changes("photo", lambda: visitor.pick("sample", "astronaut"))
    assert "astronaut.png, 512 × 512 pixels" in visitor.page.inner_text("#about-photo")
    visitor.run()
    assert visitor.page.locator("#compare img").count() == 2  # raw and denoised
    assert "cosine of raw and denoised" in visitor.page.inner_text("#figures")
    assert "time" in visitor.page.inner_text("#figures")
    result = dv.Decomposition.load(visitor.download("features", tmp_path))
    assert (tmp_path / "astronaut.safetensors").exists()
    assert result.semantic.shape == (37, 37, 384)
    assert result.info["photo"]["name"] == "astronaut.png"
    assert "/" not in str(result.info["photo"])  # contains no path on the server
    sheet = visitor.download("sheet", tmp_path)
    assert is_panel(sheet)
    with Image.open(sheet) as image:
        assert image.width > 1000


def test_patches_maps_and_divider(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    page = visitor.page
    visitor.changes("photo", lambda: visitor.pick("sample", "cat"))
    page.locator("#photo img").click()  # before denoising
    assert "denoise the photo first" in visitor.error()
    visitor.run()

    height, width = visitor.pixels("similar-raw").shape[:2]
    assert width / height == pytest.approx(451 / 300, abs=0.01)

    def click_at(name: str, across: float, down: float) -> None:
        box = page.locator(f"#{name} img").bounding_box()
        page.locator(f"#{name} img").click(position={"x": box["width"] * across, "y": box["height"] * down})

    for name, across, down in (("photo", 0.9, 0.2), ("similar-raw", 0.1, 0.6), ("similar-denoised", 0.5, 0.95)):
        act: Callable[[], Any] = partial(click_at, name, across, down)
        for changing in ("similar-raw", "similar-denoised", "photo"):  # waits until all three have changed
            act = partial(visitor.changes, changing, act)
        act()
        place = [int(page.locator(f"#{axis} input").input_value()) for axis in ("row", "column")]
        assert place == [int(37 * down), int(37 * across)]
    visitor.changes("similar-raw", lambda: visitor.type("row", 0))  # with the number fields
    visitor.changes("similar-raw", lambda: visitor.type("column", 36))
    red = (visitor.pixels("similar-raw")[3, -3], visitor.pixels("similar-denoised")[3, -3])
    assert all(tuple(pixel[:3]) == (103, 0, 31) for pixel in red)  # the patch itself: maximal similarity
    visitor.type("row", 99)
    assert "row must be 0 to 36" in visitor.error()
    visitor.type("row", 2)
    legends = {page.inner_text("#legend")}
    for kind in ("kmeans", "norm", "first", "second", "third", "foreground-pca", "foreground", "similarity", "pca"):
        visitor.changes("compare", lambda kind=kind: visitor.choose("map", kind))
        legends.add(page.inner_text("#legend"))
    assert len(legends) == 9
    handle = page.locator("#compare .inner").bounding_box()
    visitor.type("divide", 10)
    page.wait_for_function(
        "x => document.querySelector('#compare .inner').getBoundingClientRect().x < x - 99", arg=handle["x"]
    )


def test_exact_method_with_few_views_shows_held_out_r2(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    visitor = visit()
    assert visitor.page.locator("#views input[type=number]").is_disabled()  # only used by the exact method
    visitor.choose("method", "exact")
    visitor.page.wait_for_selector("#views input[type=number]:not([disabled])")
    visitor.type("views", 0)
    assert int(visitor.page.locator("#views input[type=number]").input_value()) == 8  # the minimum
    for name, value in (("views", 8), ("scale", 2), ("size", 168)):
        visitor.type(name, value)
    visitor.page.check("#wide input")
    visitor.run()
    assert "held-out R²" in visitor.page.inner_text("#figures")
    result = dv.Decomposition.load(visitor.download("features", tmp_path))
    assert (result.info["views"], result.info["upsample"], result.size) == (8, 2, (168, 168))
    assert result.info["area"] == [0.4, 1.0]
    visitor.choose("method", "subtract")
    visitor.changes("compare", lambda: visitor.page.click("#run"))
    assert "held-out R²" not in visitor.page.inner_text("#figures")


def test_unavailable_layers_and_backbones_are_explained(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.type("layer", 99)
    assert "99" in visitor.error()
    visitor.type("layer", 5)
    # The denoiser is only available for the last layer.
    visitor.page.wait_for_selector("#method label:has-text('denoiser')", state="detached")
    assert "exact needs none" in visitor.page.inner_text("#about-backbone")
    visitor.pick("backbone", "vit_base_patch14_dinov2.lvd142m")
    assert "the weights of vit_base_patch14_dinov2.lvd142m are not on this computer" in visitor.error()
    visitor.pick("backbone", BUNDLED)
    visitor.page.wait_for_selector("#method label:has-text('denoiser')")
    visitor.run()


def test_bad_uploads_are_explained_and_the_page_keeps_working(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    visitor = visit()
    (tmp_path / "text.jpg").write_text("I am text")
    visitor.upload(tmp_path / "text.jpg")
    assert "text.jpg: not an image file" in visitor.error()
    (tmp_path / "cut.jpg").write_bytes(tiny.SAMPLE.read_bytes()[:9000])
    visitor.upload(tmp_path / "cut.jpg")
    assert "cut.jpg: damaged" in visitor.error()
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(200_000_000)
    visitor.upload(tmp_path / "large.png")
    assert "exceed the maximum allowed size" in visitor.error()
    Image.new("1", (10_000, 9_000)).save(tmp_path / "many.png")
    visitor.upload(tmp_path / "many.png")
    assert "10000 x 9000 pixels exceed the limit" in visitor.error().replace(",", "")
    visitor.changes("photo", lambda: visitor.upload(tiny.photo(tmp_path, 1, 1, name="one.png")))
    visitor.page.click("#run")
    assert "1 x 1 pixels are less than one patch" in visitor.error()
    visitor.changes("photo", lambda: visitor.upload(tiny.photo(tmp_path, 40, 60, 90, name="<i>flat.png")))
    assert "flat.png, 60 × 40 pixels" in visitor.page.inner_text("#about-photo")
    visitor.run()


def test_server_rejects_requests_that_the_page_would_not_send(visit: Callable[..., Visitor], site: Site) -> None:
    request = visit().context.request
    large = {"name": "large.png", "mimeType": "image/png", "buffer": b"x" * 3_000_000}
    assert request.post(f"{site.url}gradio_api/upload", multipart={"files": large}).status == 413
    for path in ("/etc/passwd", str(Path(dv.__file__)), str(tiny.SAMPLE)):
        assert request.get(f"{site.url}gradio_api/file={path}").status == 403


def test_second_visitor_waits_for_the_first(visit: Callable[..., Visitor]) -> None:
    first, second = visit(), visit()
    first.choose("method", "exact")
    first.page.wait_for_selector("#views input[type=number]:not([disabled])")
    first.type("size", 378)
    first.type("views", 128)  # enough that it still runs when the queue appears on a busy machine
    first.page.click("#run")
    first.page.wait_for_selector("#compare :text('views')")  # progress
    second.page.click("#run")
    second.page.wait_for_selector("#compare :text('queue: 1/1')")
    first.context.close()  # leaving stops the running work, so the second run starts
    second.page.wait_for_selector("#compare img")


def test_a_second_click_waits_for_the_first(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    visitor = visit()
    page = visitor.page
    visitor.choose("method", "exact")
    page.wait_for_selector("#views input[type=number]:not([disabled])")
    visitor.type("size", 280)
    visitor.type("views", 32)
    page.click("#run")
    page.wait_for_selector("#compare :text('views')")
    visitor.choose("method", "denoiser")
    page.click("#run")
    page.wait_for_selector("#compare :text('queue: 1/1')")
    page.wait_for_selector("#figures:has-text('held-out R²')", timeout=90_000)  # result of the first click
    page.wait_for_selector("#figures:not(:has-text('held-out R²'))")  # result of the second click
    assert dv.Decomposition.load(visitor.download("features", tmp_path)).info["method"] == "denoiser"


def test_every_control_is_reachable_by_keyboard(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    page = visitor.page
    page.focus("#run")
    page.keyboard.press("Enter")
    page.wait_for_selector("#compare img")
    page.wait_for_selector("#sheet:not([disabled])")
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('[id]:not([id^=component])')?.id"))
    wanted = {"sample", "upload", "backbone", "method", "layer", "size", "run", "map", "divide", "row", "column"}
    assert wanted | {"features", "sheet"} <= reached
    page.focus("#map input[value=pca]")
    page.keyboard.press("Tab")
    visitor.changes("compare", lambda: page.keyboard.press("Space"))
    assert page.locator("#map input:checked").get_attribute("value") == "kmeans"


def test_page_is_readable_on_a_phone(visit: Callable[..., Visitor]) -> None:
    visitor = visit(viewport={"width": 400, "height": 800}, color_scheme="light")
    page = visitor.page
    visitor.run()
    page.wait_for_selector("#sheet:not([disabled])")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    for name in ("sample", "upload", "backbone", "method", "size", "run", "map", "compare", "photo", "row", "sheet"):
        page.locator(f"#{name}").scroll_into_view_if_needed()
        box = page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= 400, name
    assert page.evaluate(LOW_CONTRAST) == []
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("body.dark")
    page.wait_for_timeout(400)  # colours change gradually
    assert page.evaluate(LOW_CONTRAST) == []


def test_page_and_server_make_no_external_requests(visit: Callable[..., Visitor], site: Site) -> None:
    visit()
    assert site.asked
    beyond = [url for url in site.asked if not url.startswith((site.url, "data:", f"blob:{site.url}"))]
    assert beyond == []
    assert set(site.reached) <= {"127.0.0.1"}


#: Finds visible text whose contrast with its background is below WCAG AA (4.5, for large text 3).
LOW_CONTRAST = """() => {
  const parse = (text) => (text.match(/[0-9.]+/g) || []).map(Number);
  const linear = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const over = (top, below) => { const a = top[3] ?? 1; return [0, 1, 2].map((i) => a * top[i] + (1 - a) * below[i]) };
  const behind = (node) => {
    const layers = [];
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if ((colour[3] ?? 1) > 0) layers.push(colour);
      if ((colour[3] ?? 1) === 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, style = getComputedStyle(node);
    const box = node.getBoundingClientRect();
    if (!/[\\p{L}\\d]/u.test(walker.currentNode.data) || !box.width || !box.height) continue;
    if (style.visibility !== "visible" || node.closest("[disabled], .hide, script, style")) continue;
    const ground = behind(node), ink = over(parse(style.color), ground);
    const [dark, bright] = [ink, ground].map(luminance).sort((a, b) => a - b);
    const size = parseFloat(style.fontSize), large = size >= 24;
    const ratio = (bright + 0.05) / (dark + 0.05);
    if (ratio < (large ? 3 : 4.5)) low.push(`${walker.currentNode.data.trim().slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return low;
}"""
