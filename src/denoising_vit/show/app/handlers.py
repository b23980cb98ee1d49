"""What happens when a control of the page is used: from its values to what is shown next."""

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

from denoising_vit.errors import AppError, DenoisingVitError
from denoising_vit.show.app.answering import Answer, Settings, answer, draw_sheet, largest_size, read_upload, shrunk
from denoising_vit.show.app.figures import Figure, figures
from denoising_vit.show.app.keeping import Keep
from denoising_vit.show.app.models import Model, Models
from denoising_vit.show.app.pictures import LEGENDS, LONGER, SIMILARITY, Scene, scene_in
from denoising_vit.views.patch_grid import nearest_sizes

#: Seconds that an error stays on the page.
_SHOWN = 20


def plainly(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors reach the page as plain words; what was not foreseen is printed where the page runs."""

    @functools.wraps(handler)
    def handle(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except DenoisingVitError as error:
            words = str(error)
        except MemoryError:
            words = "not enough memory for this; take a smaller photo, a smaller size or fewer views"
        except Exception as error:  # the page goes on, and shows no code
            traceback.print_exc()
            words = f"this could not be done ({type(error).__name__}); the terminal in which dvit app runs says more"
        raise gr.Error(html.escape(words), duration=_SHOWN, title="Not done", print_exception=False)

    return handle


class Gone(Exception):
    """Nobody waits for this answer any more."""


class Visitors:
    """Which sessions wait for an answer, and which of them have left."""

    def __init__(self) -> None:
        self._lock, self._waiting, self._left = threading.Lock(), set[str](), set[str]()
        self._closed = False

    def leaves(self, session: str | None) -> None:
        """Takes note of a closed tab; what runs for it ends at the next batch of views."""
        with self._lock:
            if session in self._waiting:
                self._left.add(session)

    def all_leave(self, seconds: float) -> None:
        """Ends what runs, and waits so long for it at most; nobody is served any more."""
        with self._lock:
            self._closed = True
        until = time.monotonic() + seconds
        while self._waiting and time.monotonic() < until:
            time.sleep(0.05)

    def watched(self, session: str, progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """Progress that ends the work once the visitor has left."""

        def advance(done: int, total: int) -> None:
            if self._closed or session in self._left:
                raise Gone
            progress(done, total)

        with self._lock:
            self._waiting.add(session)
        return advance

    def served(self, session: str) -> None:
        """Forgets a session that has its answer, or left."""
        with self._lock:
            self._waiting.discard(session)
            self._left.discard(session)


class Handlers:
    """The handlers of one page.

    Args:
        models: backbones; that of the start is loaded.
        keep: where answers lie.
        samples: photos by name.
    """

    def __init__(self, models: Models, keep: Keep, samples: dict[str, Path]) -> None:
        self.models, self.keep, self.samples = models, keep, samples
        self.visitors = Visitors()

    @plainly
    def choose(self, sample: str, before: Path | None) -> tuple[Any, ...]:
        """A sample's name -> the photo's file, a line about it, its picture, and nothing of the answer before."""
        return self._photo(self.samples[sample], before)

    @plainly
    def upload(self, file: str, before: Path | None) -> tuple[Any, ...]:
        """An uploaded file -> the same, or an error that says why it cannot be used."""
        return self._photo(Path(file), before)

    def _photo(self, path: Path, before: Path | None) -> tuple[Any, ...]:
        pixels = read_upload(path)
        self.keep.forget(before)
        height, width = pixels.shape[:2]
        told = f"**{_plain(path.name)}**, {width} × {height} pixels"
        off = gr.DownloadButton(interactive=False)
        return str(path), told, shrunk(pixels, LONGER), None, None, None, None, "", off, off

    @plainly
    def choose_backbone(self, backbone: str) -> tuple[Any, ...]:
        """A backbone's name -> its layer, size, methods, and what it is."""
        layer = self.models.spec.layer if backbone == self.models.spec.backbone else -1
        model = self.models.get(backbone, layer)
        own = model.backbone
        least = nearest_sizes(own.default_size // 3, own.patch_size, own.stride)[0]
        size = gr.Slider(minimum=least, maximum=largest_size(own), step=own.stride, value=own.default_size)
        return layer, size, _methods(model, None), about(model)

    @plainly
    def choose_layer(self, backbone: str, layer: int | None, method: str) -> tuple[Any, ...]:
        """A layer -> its methods, and what it is."""
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
        scale: int,
        kind: str,
        before: Path | None,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008, how Gradio is asked for it
    ) -> tuple[Any, ...]:
        """Photo and settings -> the answer, and all that shows it."""
        if photo is None:
            raise AppError("no photo: choose a sample or upload one")
        settings = Settings(backbone, method, _whole(layer, "layer"), int(size), int(views), int(scale))
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
        """An answer -> the picture that `dvit denoise` writes, to be downloaded."""
        try:
            sheet = None if folder is None else draw_sheet(Answer.load(folder))
        except (AppError, OSError):
            if folder is not None and folder.exists():
                raise
            sheet = None  # another photo was chosen meanwhile, or the tab was closed: nobody wants it
        return gr.skip() if sheet is None else gr.DownloadButton(value=sheet, interactive=True)

    @plainly
    def switch(self, folder: Path | None, kind: str, row: int | None, column: int | None) -> tuple[Any, ...]:
        """Another map -> both sides of it, and its legend."""
        if folder is None or row is None or column is None:
            return gr.skip(), LEGENDS[kind]
        return scene_in(folder).maps(kind, (int(row), int(column))), LEGENDS[kind]

    @plainly
    def click(self, folder: Path | None, kind: str, event: gr.SelectData) -> tuple[Any, ...]:
        """A pixel of a picture -> its patch's row and column, and all that shows it."""
        if folder is None:
            raise AppError("denoise the photo first; then a click shows what is alike to a patch")
        scene = scene_in(folder)
        at = scene.patch_at(*event.index)
        return (*at, *self._shown(scene, kind, at))

    @plainly
    def type_patch(self, folder: Path | None, kind: str, row: int | None, column: int | None) -> tuple[Any, ...]:
        """Row and column -> all that shows the patch."""
        if folder is None or row is None or column is None:  # nothing to show yet, or still being typed
            return tuple(gr.skip() for _ in range(4))
        return self._shown(scene_in(folder), kind, (int(row), int(column)))

    def _shown(self, scene: Scene, kind: str, at: tuple[int, int]) -> tuple[Any, ...]:
        """Both sides of the map, the photo with the patch, and similarity to it on both sides."""
        return (scene.maps(kind, at), scene.marked(at), *scene.maps(SIMILARITY, at))


def about(model: Model) -> str:
    """A backbone in a sentence."""
    own = model.backbone
    depth = "" if own.depth is None else f" Layers 0 to {own.depth - 1}, or -1 for the last."
    lacks = "" if model.denoiser else " No denoiser is known for it at this layer; exact needs none."
    return (
        f"Patches of {own.patch_size} pixels, {own.embed_dim} channels; weights: {_plain(own.weights)}.{depth}{lacks}"
    )


def table(lines: list[Figure]) -> str:
    """Figures as a table in HTML."""
    rows = "".join(f"<tr><th scope='row'>{line.name}</th>{_cells(line)}<td>{line.words}</td></tr>" for line in lines)
    head = "".join(f"<th scope='col'>{heading}</th>" for heading in ("figure", "raw", "denoised", "what it says"))
    return f"<table class='figures'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cells(line: Figure) -> str:
    if line.raw is None:
        return f"<td colspan='2'>{line.clean}</td>"
    return f"<td class='raw'>{line.raw}</td><td class='denoised'>{line.clean}</td>"


def _methods(model: Model, wanted: str | None) -> Any:
    return gr.Radio(choices=list(model.methods), value=wanted if wanted in model.methods else model.methods[0])


def _whole(value: int | None, name: str) -> int:
    if value is None:
        raise AppError(f"{name} must be a whole number, got nothing")
    return int(value)


def _plain(text: str) -> str:
    """Text of others as Markdown shows it letter by letter."""
    return "".join(f"&#{ord(letter)};" if letter in "<>&*_`[]()#!|~\\" else letter for letter in text)
