"""Render the video of a clip's features: decode, forward pass, colour, encode."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.data.dataset import spread
from denoising_vit.decomposition.inputs import fitting_batch
from denoising_vit.errors import ClipError
from denoising_vit.extractors import Cleaners
from denoising_vit.files import atomic_path, file_digest
from denoising_vit.maps import Palette, read_palette, write_palette
from denoising_vit.progress import OnProgress, prefetched
from denoising_vit.show.options import VideoOptions, panel_size, shown_size
from denoising_vit.show.video.clips import Clip, Frame
from denoising_vit.show.video.encoding import find_encoder, part_writer
from denoising_vit.show.video.films import open_clip
from denoising_vit.show.video.frames import FrameFeatures, FrameSheet, panel_fields, panel_picture
from denoising_vit.show.video.parts import FrameFolder, Parts, differences, make_record, require_own_video

#: Number of feature vectors to fit the colours of a clip on.
_ENOUGH = 8192

#: Number of frames with features to read ahead.
_WAITING = 4

T = TypeVar("T")

#: Features (h, w, C) of one frame by name.
Maps = dict[str, Tensor]


@dataclass(frozen=True)
class RenderedVideo:
    """Result for a clip."""

    path: Path
    status: Literal["done", "kept"]  # kept: it existed
    frames: int | None = None  # None if it was kept
    resumed: int = 0  # number of frames from an earlier run
    notes: tuple[str, ...] = ()  # remarks for the user


def render_video(
    backbone: Backbone,
    clip: str | Path,
    out: str | Path,
    *,
    cleaners: Cleaners = Cleaners(),  # noqa: B008, frozen
    overwrite: bool = False,
    progress: OnProgress | None = None,
    options: VideoOptions | None = None,
    **changes: Any,
) -> RenderedVideo:
    """Render a video of a clip's features, with the same colours for all frames and features.

    An interrupted run leaves its finished parts in a hidden folder next to ``out``; the same call resumes from them.

    Args:
        backbone: from :func:`~denoising_vit.load_backbone`; a stride below its patch size gives finer maps.
        clip: a video file, or a folder of frames.
        out: the MP4 file; PNG frames go to a folder with the same name without the suffix.
        cleaners: sources of denoiser, artifact and distilled weights.
        overwrite: replace an existing video, or an unfinished one with other settings.
        progress: called as ``progress(done, total)`` after each frame.
        options: what to show.
        **changes: individual fields of :class:`VideoOptions`, such as ``features="raw"``.

    Raises:
        ClipError: if the clip cannot be read, PyAV or its encoder is missing, or an unfinished run has other settings.
        OutputError: if the video or its frames would replace files of another source.
        PlanError: if an option is out of range, or cleaners of several kinds are given without names of features.
        ArtifactError, DenoiserError, WeightsError, FormatError: if a cleaner or palette is missing or belongs to
            another backbone.
        OSError: if results cannot be written.
    """
    options = dataclasses.replace(options or VideoOptions(), **changes)
    maker = VideoMaker(backbone, options, cleaners)
    return maker.render(open_clip(clip, options.rate), Path(out), overwrite=overwrite, progress=progress)


class VideoMaker:
    """Renders videos of several clips with the same options; see :func:`render_video`."""

    def __init__(self, backbone: Backbone, options: VideoOptions, cleaners: Cleaners) -> None:
        options.validate()
        options = options.with_features(backbone, cleaners)
        self.backbone, self.options = backbone, options
        self.encoder = find_encoder()
        self.data_set = None if options.palette is None else read_palette(options.palette, backbone)
        self.features = FrameFeatures(backbone, cleaners, options)
        self._identity = self.features.identity
        if options.palette is not None:
            self._identity = self._identity | {"palette": file_digest(Path(options.palette).expanduser())}

    def render(
        self, clip: Clip, out: Path, *, overwrite: bool = False, progress: OnProgress | None = None
    ) -> RenderedVideo:
        """Render the video of a clip; see :func:`render_video`."""
        if out.suffix.lower() != ".mp4":
            raise ClipError(f"{out}: expected a name ending in .mp4")
        record = make_record(clip.digest, self.options.recorded(), self._identity)
        existing = require_own_video(out, clip)
        frames = FrameFolder(out.with_suffix(""), clip.digest) if self.options.frames else None
        if frames:
            frames.require_free(clip.path)
        if existing is not None and not overwrite:
            changed = differences(existing, record)
            note = f"made with other settings ({'; '.join(changed)}); use --overwrite to redo it" if changed else ""
            return RenderedVideo(out, "kept", notes=(note,) if note else ())
        parts = Parts(out)
        parts.open(record, self.options.part_frames, overwrite=overwrite)
        return _Run(self, clip, out, parts, frames, progress or (lambda done, total: None)).run()


class _Run:
    """The rendering of one video."""

    def __init__(
        self, maker: VideoMaker, clip: Clip, out: Path, parts: Parts, frames: FrameFolder | None, progress: OnProgress
    ) -> None:
        self._maker, self._clip, self._out, self._parts, self._progress = maker, clip, out, parts, progress
        self._frame_folder = frames
        self._options = options = maker.options
        self._shown = shown_size(clip.size, maker.backbone, options)
        self._panel = panel_size(clip.size, options)
        self._panels = options.shown
        self._sheet = FrameSheet(options.names, self._panels, self._panel, smooth=options.smooth)
        grid = maker.backbone.grid_size(*self._shown)
        self._batch = options.batch_size or fitting_batch(maker.backbone.device, grid[0] * grid[1])
        self._total = min(-(-clip.count // options.every), options.max_frames or clip.count)
        self._ready: dict[int, Maps] = {}
        self._fitted_on: frozenset[int] = frozenset()
        self._lost: list[str] = []
        self._boxed = self._count = self._end = 0

    def run(self) -> RenderedVideo:
        resumed = self._parts.frames
        self._progress(resumed, self._total)
        colours = self._colours()
        with contextlib.closing(self._ahead(self._featured(resumed), _WAITING)) as stream:
            for number, group in itertools.groupby(stream, lambda item: item[0].number // self._options.part_frames):
                if number < len(self._parts.finished):
                    for frame, _ in group:
                        self._note(frame)
                else:
                    self._make_part(number, group, colours)
        if not self._count:
            raise ClipError(f"{self._clip.path}: the clip has no frames")
        if self._frame_folder:
            self._frame_folder.drop_after(self._count)
        self._parts.finish(self._end * self._clip.time_base)
        return RenderedVideo(self._out, "done", self._count, resumed, tuple(self._notes()))

    def _colours(self) -> Palette:
        """The colours of the clip; features computed to fit them are kept for later use."""
        palette = self._parts.palette
        if palette.is_file():
            return read_palette(palette)
        most = self._options.basis_frames
        chosen = set(spread(self._total, most - most % self._batch if most > self._batch else most))  # whole batches
        wanted = (frame for frame in self._frames(chosen.__contains__, max(chosen) + 1) if frame.number in chosen)
        while batch := list(itertools.islice(wanted, self._batch)):
            self._ready |= {frame.number: maps for frame, maps in self._extracted(batch)}
            self._progress(len(self._ready), self._total)
        if not self._ready:  # fewer frames than the header says
            first = next(self._frames(lambda number: number == 0, 1))
            self._ready = {frame.number: maps for frame, maps in self._extracted([first])}
        self._fitted_on = frozenset(self._ready)
        colours = Palette([found for maps in self._ready.values() for found in maps.values()], most=_ENOUGH)
        write_palette(colours, palette, panel_fields(self._panels))
        return colours

    def _frames(self, wanted: Callable[[int], bool], most: int | None) -> Iterator[Frame]:
        return self._clip.frames(self._shown, self._panel, wanted=wanted, every=self._options.every, most=most)

    def _ahead(self, items: Iterator[T], most: int) -> Generator[T, None, None]:
        """The same items, read ahead in a thread if there is an accelerator.

        Not on a CPU: each parallel section of a model waits for its slowest core, so an extra thread costs more than
        its own time.
        """
        if self._maker.backbone.device.type == "cpu":
            return (item for item in items)
        return prefetched(items, most)

    def _featured(self, start: int) -> Iterator[tuple[Frame, Maps]]:
        """All frames in order, with features starting at frame number ``start``."""
        frames = self._frames(lambda number: number >= start, self._options.max_frames)
        window: list[Frame] = []
        fresh = 0
        with contextlib.closing(self._ahead(frames, self._batch)) as ahead:
            for frame in ahead:
                if frame.number < start:
                    yield frame, {}
                    continue
                window.append(frame)
                fresh += frame.number not in self._ready
                if fresh == self._batch:
                    yield from self._with_ready(window)
                    window, fresh = [], 0
        yield from self._with_ready(window)

    def _with_ready(self, window: list[Frame]) -> Iterator[tuple[Frame, Maps]]:
        found = dict(self._extracted([frame for frame in window if frame.number not in self._ready]))
        for frame in window:
            yield frame, found[frame] if frame in found else self._ready.pop(frame.number)

    def _extracted(self, frames: list[Frame]) -> Iterator[tuple[Frame, Maps]]:
        """Frames with their features, in batches of one size, so that rounding is the same in every batch."""
        if not frames:
            return
        pixels = [frame.shown for frame in frames if frame.shown is not None]
        filled = np.stack(pixels + pixels[-1:] * (self._batch - len(pixels)))
        features = self._maker.features(filled)
        for index, frame in enumerate(frames):
            yield frame, {name: maps[index] for name, maps in features.items()}

    def _make_part(self, number: int, group: Iterator[tuple[Frame, Maps]], colours: Palette) -> None:
        clip, before = self._clip, self._count
        with (
            atomic_path(self._parts.path(number)) as temporary,
            part_writer(temporary, self._sheet.size, clip.time_base, clip.rate, self._maker.encoder) as write,
        ):
            for frame, maps in group:
                sheet = self._drawn(frame, maps, colours)
                write(sheet, frame.time)
                if self._frame_folder:
                    self._frame_folder.write(sheet, frame.number)
                self._note(frame)
                ahead = sum(number > frame.number for number in self._fitted_on)  # already extracted
                self._progress(self._count + ahead, self._total)
        self._parts.add(self._parts.path(number), self._count - before)

    def _drawn(self, frame: Frame, maps: Maps, colours: Palette) -> np.ndarray:
        assert frame.panel is not None
        pictures: dict[tuple[str | None, str], np.ndarray] = {
            (name, panel): panel_picture(panel, features, colours, self._maker.data_set)
            for name, features in maps.items()
            for panel in self._panels
            if panel != "image"
        }
        return self._sheet.draw(frame.panel, pictures)

    def _note(self, frame: Frame) -> None:
        self._count, self._end = frame.number + 1, frame.time + frame.duration
        self._boxed += frame.boxed
        if frame.lost is not None:
            self._lost.append(frame.lost)

    def _notes(self) -> Iterator[str]:
        if self._lost:
            lost = f"{len(self._lost)} of {self._count} frames could not be read ({self._lost[0]})"
            yield f"{lost}; the previous frame is repeated"
        if self._clip.missing:
            yield f"the file is truncated: {self._clip.missing} of the frames listed in its header are missing"
        if self._boxed:
            yield f"{self._boxed} frames have a different aspect ratio from the first and are padded with black bars"
