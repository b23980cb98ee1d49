"""One photo of `dvit denoise`: compute its features or keep an existing result; write and draw in the background."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from denoising_vit.cli.outputs import Output, OutputFolder
from denoising_vit.cli.reporting import PhotoProgress, Report, Row, number, reason_of
from denoising_vit.data.pictures import Picture, drawable, picture_digest
from denoising_vit.decomposition.result import Decomposition
from denoising_vit.denoise import Denoising
from denoising_vit.files import atomic_path, digest_of, readable
from denoising_vit.tiling.denoising import TiledDenoising, denoise_picture, open_for
from denoising_vit.tiling.layout import TileOptions

if TYPE_CHECKING:
    from denoising_vit.show.pages.photos import PhotosPage


#: Headings of a row's numbers.
PHOTO_NUMBERS = ("views", "held-out R²", "cosine", "seconds")


@dataclass(frozen=True)
class PhotoRow(Row):
    """The result of one photo."""

    image: str
    panel: str | None = None  # path of the picture
    views: int | None = None  # number of fitted crops
    heldout_r2: float | None = None  # fraction of the variance of held-out views that is explained
    heldout_cosine: float | None = None  # mean cosine to held-out views

    @property
    def item(self) -> str:
        """Path of the photo."""
        return self.image

    def cells(self) -> tuple[str, ...]:
        """The numbers and the remark, as text."""
        scores = (number(score, ".3f") for score in (self.heldout_r2, self.heldout_cosine))
        note = self.note or ("kept" if self.status == "kept" else "")
        return str(self.views), *scores, number(self.seconds, ".1f"), note


@dataclass(frozen=True)
class DenoiseJob:
    """Settings shared by all photos of a run."""

    clean: Denoising | TiledDenoising  # computes the results
    folder: OutputFolder
    upsample: int  # factor, for stored and drawn features
    exact: Denoising | TiledDenoising | None  # stage 1 for the comparison in the picture, if requested
    page: PhotosPage | None = None
    pictures: bool = True  # draw a picture of each photo
    max_pixels: int = TileOptions.max_pixels

    @property
    def work(self) -> int:
        """Total amount of work for one photo, or for one tile."""
        return self.clean.work + (0 if self.exact is None else self.exact.work)

    def compute(self, photo: Path, progress: PhotoProgress) -> Callable[[], PhotoRow]:
        """Compute the features of one photo, unless it has a result.

        Returns:
            A function that writes and draws them and returns the row. Errors are recorded in the row, not raised.
        """

        def failed(error: Exception) -> PhotoRow:
            return PhotoRow(str(photo), status="failed", note=reason_of(error))

        try:
            finish = self._computed(photo, progress)
        except Exception as error:  # one bad photo must not stop the batch
            row = failed(error)
            return lambda: row

        def guarded() -> PhotoRow:
            try:
                return finish()
            except Exception as error:
                return failed(error)

        return guarded

    def _computed(self, photo: Path, progress: PhotoProgress) -> Callable[[], PhotoRow]:
        started = time.perf_counter()
        picture = open_for(self.clean, photo, self.max_pixels)
        digest = picture_digest(picture)
        output = self.folder.claim(photo, digest)
        if output.existing is not None:
            compares = self._redraws(output, output.existing) and self.clean.made(output.existing)
            exact = self._exact(picture, digest, progress) if compares else None
            return functools.partial(self._keep, photo, picture, output, exact)
        result = self._denoised(self.clean, picture, digest, progress)
        about = result.info["photo"] | {"name": readable(photo.name), "place": digest_of(photo.resolve())}
        result = dataclasses.replace(result, info=result.info | {"photo": about})
        exact = self._exact(picture, digest, progress)
        return functools.partial(self._finish, photo, picture, result, exact, output, started)

    def _finish(
        self,
        photo: Path,
        picture: Picture,
        result: Decomposition,
        exact: Decomposition | None,
        output: Output,
        started: float,
    ) -> PhotoRow:
        """Write and draw the computed features."""
        pixels = drawable(picture)
        while not self._write(pixels, result, exact, output):  # another run has taken the name
            self.folder.release(output)
            output = self.folder.claim(photo, result.info["photo"]["sha256"])
            if output.existing is not None:
                return self._keep(photo, picture, output, exact if self.clean.made(output.existing) else None)
        self._show(photo, pixels, result, exact)
        seconds = round(time.perf_counter() - started, 2)
        return self._row(photo, output, result.info, "done", seconds=seconds, note=output.note)

    @staticmethod
    def _denoised(
        method: Denoising | TiledDenoising, picture: Picture, digest: str, progress: PhotoProgress
    ) -> Decomposition:
        before = progress.at

        def advance(done: int, total: int) -> None:
            progress.advance(before + done, before + total)

        return denoise_picture(method, picture, progress=advance, watch=progress.show_score, digest=digest)

    def _keep(self, photo: Path, picture: Picture, output: Output, exact: Decomposition | None) -> PhotoRow:
        """Keep a result, and add what is missing: its picture, or upsampled features."""
        info = output.existing
        assert info is not None
        notes = [] if self.clean.made(info) else ["made with other settings; use --overwrite to redo it"]
        redrawn, refined = self._redraws(output, info), self._refines(info)
        if redrawn or refined or self.page is not None:
            result, pixels = Decomposition.load(output.result), drawable(picture)
            self._show(photo, pixels, result, exact)
            if redrawn:
                with self._drawn(pixels, result, exact, output):
                    pass
            if refined:
                result.save(output.result, upsample=self.upsample)  # from the stored field, without recomputation
                notes.append("upsampled features added")
        return self._row(photo, output, info, "kept", note=", ".join(["kept", *notes]))

    def _redraws(self, output: Output, info: dict[str, Any]) -> bool:
        """True if the picture of an existing result is missing, or is requested at a higher resolution."""
        return self.pictures and (self._refines(info) or not output.panel.exists())

    def _refines(self, info: dict[str, Any]) -> bool:
        return self.upsample > 1 and info.get("upsample") != self.upsample

    def _show(self, photo: Path, pixels: np.ndarray, result: Decomposition, exact: Decomposition | None) -> None:
        if self.page is not None:
            self.page.add(photo.name, pixels, result, exact)

    def _write(self, pixels: np.ndarray, result: Decomposition, exact: Decomposition | None, output: Output) -> bool:
        """Write the result and its picture; return False and write neither if another run has taken the name."""
        try:
            with (
                self._drawn(pixels, result, exact, output),
                atomic_path(output.result, new=not output.replaces) as temporary,
            ):
                result.save(temporary, upsample=self.upsample)
        except FileExistsError:
            return False
        return True

    @contextlib.contextmanager
    def _drawn(
        self, pixels: np.ndarray, result: Decomposition, exact: Decomposition | None, output: Output
    ) -> Iterator[None]:
        """Draw the picture to a temporary file and move it into place if the block succeeds."""
        if not self.pictures:
            yield
            output.panel.unlink(missing_ok=True)  # the picture of an earlier result would not show this one
            return
        from denoising_vit.maps import draw_panel  # matplotlib and scikit-learn take seconds to import

        with atomic_path(output.panel) as temporary:
            draw_panel(pixels, result, temporary, upsample=self.upsample, exact=exact)
            output.mark.add(temporary, ".png")
            yield

    def _exact(self, picture: Picture, digest: str, progress: PhotoProgress) -> Decomposition | None:
        """Stage 1 for the comparison; None if not requested."""
        return None if self.exact is None else self._denoised(self.exact, picture, digest, progress)

    @staticmethod
    def _row(photo: Path, output: Output, info: dict[str, Any], status: Any, **more: Any) -> PhotoRow:
        return PhotoRow(
            image=str(photo),
            status=status,
            output=str(output.result),
            panel=str(output.panel) if output.panel.exists() else None,
            views=info.get("views", 1),
            heldout_r2=info["heldout_r2"],
            heldout_cosine=info["heldout_cosine"],
            **more,
        )


class Writing:
    """Writes and draws each photo in a thread, while the next is computed; ``table`` gets the rows in order."""

    def __init__(self, table: Report) -> None:
        self._table = table
        self._pool = ThreadPoolExecutor(1, "write")
        self._last: Future[None] | None = None

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *_exception: object) -> None:
        with self._pool:
            self._settle()

    def add(self, finish: Callable[[], PhotoRow]) -> None:
        """Start to write a photo, once the previous one is written."""
        self._settle()
        self._last = self._pool.submit(lambda: self._table.add(finish()))

    def _settle(self) -> None:
        """Wait for the last photo, and raise its error, if any."""
        if self._last is not None:
            self._last.result()
            self._last = None
