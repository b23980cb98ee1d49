"""Handlers of the page's controls: map control values to outputs."""

from __future__ import annotations

import functools
import html
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from denoising_vit.data.photos import shrunk
from denoising_vit.errors import AppError, DenoisingVitError
from denoising_vit.maps.kinds import SIMILARITY
from denoising_vit.show.app.answers import Answer, Keep, Settings, answer, draw_sheet, largest_size, read_upload
from denoising_vit.show.app.models import Model, Models
from denoising_vit.show.app.scene import LEGENDS, LONGER, Figure, Scene, figures, scene_in
from denoising_vit.views.patch_grid import nearest_sizes

#: Seconds for which an error is shown.
_SHOWN = 20


def plainly(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a handler so that errors reach the page as text; unexpected errors are also printed to the terminal."""

    @functools.wraps(handler)
    def handle(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except DenoisingVitError as error:
            words = str(error)
        except MemoryError:
            words = "not enough memory; use a smaller photo, a smaller size or fewer views"
        except Exception as error:  # keep the page running
            traceback.print_exc()
            words = f"unexpected error ({type(error).__name__}); see the terminal that runs dvit app"
        raise gr.Error(html.escape(words), duration=_SHOWN, title="Error", print_exception=False)

    return handle


class Gone(Exception):
    """Raised to stop the work for a visitor who has left."""


class Visitors:
    """Sessions waiting for an answer, and which of them have left."""

    def __init__(self) -> None:
        self._lock, self._waiting, self._left = threading.Lock(), set[str](), set[str]()
        self._closed = False

    def leaves(self, session: str | None) -> None:
        """Cancel the work for a closed tab at the next batch of views."""
        with self._lock:
            if session in self._waiting:
                self._left.add(session)

    def all_leave(self, seconds: float) -> None:
        """Cancel all work, and wait for it to end for at most ``seconds``."""
        with self._lock:
            self._closed = True
        until = time.monotonic() + seconds
        while self._waiting and time.monotonic() < until:
            time.sleep(0.05)

    def watched(self, session: str, progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """Wrap ``progress`` to raise :class:`Gone` once the visitor has left."""

        def advance(done: int, total: int) -> None:
            if self._closed or session in self._left:
                raise Gone
            progress(done, total)

        with self._lock:
            self._waiting.add(session)
        return advance

    def served(self, session: str) -> None:
        """Remove a session that has its answer or has left."""
        with self._lock:
            self._waiting.discard(session)
            self._left.discard(session)


class Handlers:
    """The handlers of one page."""

    def __init__(self, models: Models, keep: Keep, samples: dict[str, Path]) -> None:
        self.models, self.keep, self.samples = models, keep, samples
        self.visitors = Visitors()

    @plainly
    def choose(self, sample: str, before: Path | None) -> tuple[Any, ...]:
        """Sample name -> file, description and picture of the photo; clears the previous answer."""
        return self._photo(self.samples[sample], before)

    @plainly
    def upload(self, file: str, before: Path | None) -> tuple[Any, ...]:
        """Uploaded file -> the same outputs as :meth:`choose`."""
        return self._photo(Path(file), before)

    def _photo(self, path: Path, before: Path | None) -> tuple[Any, ...]:
        pixels = read_upload(path)
        self.keep.forget(before)
        height, width = pixels.shape[:2]
        about_photo = f"**{_plain(path.name)}**, {width} × {height} pixels"
        off = gr.DownloadButton(interactive=False)
        return str(path), about_photo, shrunk(pixels, LONGER), None, None, None, None, "", off, off

    @plainly
    def choose_backbone(self, backbone: str) -> tuple[Any, ...]:
        """Backbone name -> layer, size, methods and description."""
        layer = self.models.spec.layer if backbone == self.models.spec.backbone else -1
        model = self.models.get(backbone, layer)
        own = model.backbone
        least = nearest_sizes(own.default_size // 3, own.patch_size, own.stride)[0]
        size = gr.Slider(minimum=least, maximum=largest_size(own), step=own.stride, value=own.default_size)
        return layer, size, _methods(model, None), about(model)

    @plainly
    def choose_layer(self, backbone: str, layer: int | None, method: str) -> tuple[Any, ...]:
        """Layer -> methods and description."""
        model = self.models.get(backbone, _whole(layer, "layer"))
        return _methods(model, method), about(model)

    @plainly
    def run(
        self,
        photo: str | None,
        backbone: str,
        method: str,
        layer: int | None,
        size: int,
        views: int,
        wide: bool,
        scale: int,
        kind: str,
        before: Path | None,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008, required by Gradio
    ) -> tuple[Any, ...]:
        """Photo and settings -> answer, pictures and metrics."""
        if photo is None:
            raise AppError("no photo: choose a sample or upload one")
        settings = Settings(backbone, method, _whole(layer, "layer"), int(size), int(views), wide, int(scale))
        session = str(request.session_hash)

        def advance(done: int, total: int) -> None:
            progress((done, total), desc="views" if total > 1 else "one pass", unit="views")

        try:
            found = answer(self.models, self.keep, Path(photo), settings, self.visitors.watched(session, advance))
        except Gone:
            return tuple(gr.skip() for _ in range(11))
        finally:
            self.visitors.served(session)
        self.keep.forget(before)
        scene = scene_in(found.folder)
        row, column = scene.centre
        h, w = scene.grid
        return (
            found.folder,
            *self._shown(scene, kind, scene.centre),
            LEGENDS[kind],
            gr.Number(value=row, info=f"0 to {h - 1}"),
            gr.Number(value=column, info=f"0 to {w - 1}"),
            table(figures(found)),
            gr.DownloadButton(value=found.features, interactive=True),
            gr.DownloadButton(interactive=False),
        )

    @plainly
    def draw(self, folder: Path | None) -> Any:
        """Answer -> the picture of `dvit denoise`, for download."""
        try:
            sheet = None if folder is None else draw_sheet(Answer.load(folder))
        except (AppError, OSError):
            if folder is not None and folder.exists():
                raise
            sheet = None  # another photo was chosen, or the tab was closed
        return gr.skip() if sheet is None else gr.DownloadButton(value=sheet, interactive=True)

    @plainly
    def switch(self, folder: Path | None, kind: str, row: int | None, column: int | None) -> tuple[Any, ...]:
        """Kind of map -> both sides of the map, and its legend."""
        if folder is None or row is None or column is None:
            return gr.skip(), LEGENDS[kind]
        return scene_in(folder).maps(kind, (int(row), int(column))), LEGENDS[kind]

    @plainly
    def click(self, folder: Path | None, kind: str, event: gr.SelectData) -> tuple[Any, ...]:
        """Clicked pixel -> row and column of its patch, and the pictures."""
        if folder is None:
            raise AppError("denoise the photo first; then a click shows the similarity to a patch")
        scene = scene_in(folder)
        at = scene.patch_at(*event.index)
        return (*at, *self._shown(scene, kind, at))

    @plainly
    def type_patch(self, folder: Path | None, kind: str, row: int | None, column: int | None) -> tuple[Any, ...]:
        """Row and column -> the pictures."""
        if folder is None or row is None or column is None:  # nothing to show, or incomplete input
            return tuple(gr.skip() for _ in range(4))
        return self._shown(scene_in(folder), kind, (int(row), int(column)))

    def leave(self, request: gr.Request) -> None:
        """Cancel the work for a closed tab."""
        self.visitors.leaves(request.session_hash)

    def _shown(self, scene: Scene, kind: str, at: tuple[int, int]) -> tuple[Any, ...]:
        """Both sides of the map, the photo with the patch marked, and both sides of the similarity to the patch."""
        return (scene.maps(kind, at), scene.marked(at), *scene.maps(SIMILARITY, at))


def about(model: Model) -> str:
    """Description of a backbone."""
    own = model.backbone
    depth = "" if own.depth is None else f" Layers 0 to {own.depth - 1}, or -1 for the last."
    lacks = "" if model.denoiser else " No denoiser is available for this layer; exact needs none."
    return (
        f"Patches of {own.patch_size} pixels, {own.embed_dim} channels; weights: {_plain(own.weights)}.{depth}{lacks}"
    )


def table(lines: list[Figure]) -> str:
    """Metrics as an HTML table."""
    rows = "".join(f"<tr><th scope='row'>{line.name}</th>{_cells(line)}<td>{line.words}</td></tr>" for line in lines)
    head = "".join(f"<th scope='col'>{heading}</th>" for heading in ("metric", "raw", "denoised", "meaning"))
    return f"<table class='figures'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cells(line: Figure) -> str:
    if line.raw is None:
        return f"<td colspan='2'>{line.clean}</td>"
    return f"<td class='raw'>{line.raw}</td><td class='denoised'>{line.clean}</td>"


def _methods(model: Model, wanted: str | None) -> Any:
    return gr.Radio(choices=list(model.methods), value=wanted if wanted in model.methods else model.methods[0])


def _whole(value: int | None, name: str) -> int:
    if value is None:
        raise AppError(f"{name} must be a whole number; enter one")
    return int(value)


def _plain(text: str) -> str:
    """Untrusted text, escaped for Markdown."""
    return "".join(f"&#{ord(letter)};" if letter in "<>&*_`[]()#!|~\\" else letter for letter in text)
