"""From a clip to a video of its features: frames are decoded, seen, coloured and encoded side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.data.choosing import spread
from denoising_vit.decomposition.extraction import fitting_batch
from denoising_vit.errors import ClipError, OutputError
from denoising_vit.extractors import Cleaners
from denoising_vit.files import file_digest
from denoising_vit.progress import prefetched
from denoising_vit.show.video.clips import Clip, Frame
from denoising_vit.show.video.colours import ClipColours, data_set_palette
from denoising_vit.show.video.encoding import PartWriter, find_encoder
from denoising_vit.show.video.features import FrameFeatures
from denoising_vit.show.video.films import open_clip
from denoising_vit.show.video.frame_files import drop_frames, require_frames, write_frame
from denoising_vit.show.video.options import VideoOptions
from denoising_vit.show.video.parts import Parts
from denoising_vit.show.video.records import differences, make_record, recorded_in
from denoising_vit.show.video.sheet import Sheet
from denoising_vit.show.video.sizes import panel_size, shown_size

#: Called with the frames that are done, and how many there are as far as is known.
Progress = Callable[[int, int], None]

#: Frames with their features that wait for being drawn.
_WAITING = 4

T = TypeVar("T")

#: Features (h, w, C) of one frame by name.
Maps = dict[str, Tensor]


@dataclass(frozen=True)
class RenderedVideo:
    """What became of a clip.

    Attributes:
        path: the video.
        status: done, or kept where it was there already.
        frames: in the result; None where it was kept.
        resumed: how many of them an earlier run had made.
        notes: what else is worth knowing.
    """

    path: Path
    status: Literal["done", "kept"]
    frames: int | None = None
    resumed: int = 0
    notes: tuple[str, ...] = ()


def render_video(
    backbone: Backbone,
    clip: str | Path,
    out: str | Path,
    *,
    cleaners: Cleaners = Cleaners(),  # noqa: B008, frozen
    overwrite: bool = False,
    progress: Progress | None = None,
    options: VideoOptions | None = None,
    **changes: Any,
) -> RenderedVideo:
    """A video of a clip's features, in colours that are settled once for all frames and extractors.

    A run that is stopped leaves its finished parts in a hidden folder beside ``out``, and the same call goes on from
    there.

    Args:
        backbone: from :func:`~denoising_vit.load_backbone`; with a stride below its patch size maps are finer.
        clip: a video file, or a folder of frames.
        out: the MP4 file to write; PNG frames go to a folder of the same name without its ending.
        cleaners: where features other than raw ones take what cleans them from.
        overwrite: make it again where it is there already, or was begun with other settings.
        progress: called as ``progress(done, total)`` after each frame.
        options: what to show, and how; the defaults where none.
        **changes: single fields of :class:`VideoOptions`, such as ``features="raw"``.

    Raises:
        ClipError: if the clip cannot be read, PyAV or its encoder is missing, or an unfinished run was made with other
            settings.
        OutputError: if the video or its frames would replace what was not made from this clip.
        PlanError: if an option is out of range.
        ArtifactError, DenoiserError, WeightsError, FormatError: if what cleans features, or a palette, is missing or of
            another backbone.
        OSError: if results cannot be written.
    """
    options = dataclasses.replace(options or VideoOptions(), **changes)
    maker = VideoMaker(backbone, options, cleaners)
    return maker.render(open_clip(clip, options.rate), Path(out), overwrite=overwrite, progress=progress)


class VideoMaker:
    """Makes videos of several clips with the same options; see :func:`render_video`."""

    def __init__(self, backbone: Backbone, options: VideoOptions, cleaners: Cleaners) -> None:
        options.validate()
        self.backbone, self.options = backbone, options
        self.encoder = find_encoder()
        self.data_set = data_set_palette(options.palette, backbone)
        self.features = FrameFeatures(backbone, cleaners, options)
        self._identity = self.features.identity
        if options.palette is not None:
            self._identity = self._identity | {"palette": file_digest(Path(options.palette).expanduser())}

    def render(
        self, clip: Clip, out: Path, *, overwrite: bool = False, progress: Progress | None = None
    ) -> RenderedVideo:
        """The video of a clip; see :func:`render_video`."""
        if out.suffix.lower() != ".mp4":
            raise ClipError(f"{out}: expected the name of an .mp4 file")
        record = make_record(clip.digest, self.options.recorded(), self._identity)
        existing = require_own_video(out, clip)
        if self.options.frames:
            require_frames(out.with_suffix(""), clip.digest, clip.path)
        if existing is not None and not overwrite:
            changed = differences(existing, record)
            note = f"made with other settings ({'; '.join(changed)}): --overwrite to do it again" if changed else ""
            return RenderedVideo(out, "kept", notes=(note,) if note else ())
        parts = Parts(out)
        parts.open(record, self.options.part_frames, overwrite=overwrite)
        return _Run(self, clip, out, parts, progress or (lambda done, total: None)).run()


def require_own_video(out: Path, clip: Clip) -> dict[str, Any] | None:
    """The record of the video that is there, which a clip's may replace; None where there is nothing.

    Raises:
        OutputError: if there is something else, a video of another clip, or an unfinished one of another clip.
    """
    existing = recorded_in(out)
    if os.path.lexists(out) and (existing is None or (clip.path.exists() and clip.path.samefile(out))):
        raise OutputError(f"{out} exists and is no video of ours; choose another name")
    if existing is not None and existing.get("source") != clip.digest:
        raise OutputError(f"{out} is a video of another clip, or of this one before it changed; choose another name")
    Parts(out).require_of(clip.digest)
    return existing


class _Run:
    """The making of one video."""

    def __init__(self, maker: VideoMaker, clip: Clip, out: Path, parts: Parts, progress: Progress) -> None:
        self._maker, self._clip, self._out, self._parts, self._progress = maker, clip, out, parts, progress
        self._options = options = maker.options
        self._shown = shown_size(clip.size, maker.backbone, options)
        self._panel = panel_size(clip.size, options)
        self._panels = options.shown
        self._sheet = Sheet(options.names, self._panels, self._panel, smooth=options.smooth)
        grid = maker.backbone.grid_size(*self._shown)
        self._batch = options.batch_size or fitting_batch(maker.backbone.device, grid[0] * grid[1])
        self._total = min(-(-clip.count // options.every), options.max_frames or clip.count)
        self._ready: dict[int, Maps] = {}
        self._settling: frozenset[int] = frozenset()
        self._lost: list[str] = []
        self._boxed = self._count = self._end = 0

    def run(self) -> RenderedVideo:
        resumed = self._parts.frames
        self._progress(resumed, self._total)
        colours = self._settled()
        with contextlib.closing(self._ahead(self._featured(resumed), _WAITING)) as stream:
            for number, group in itertools.groupby(stream, lambda item: item[0].number // self._options.part_frames):
                if number < len(self._parts.finished):
                    self._skip(group)
                else:
                    self._make_part(number, group, colours)
        if not self._count:
            raise ClipError(f"{self._clip.path}: a video of no length: it holds no frame")
        if self._options.frames:
            drop_frames(self._out.with_suffix(""), self._count, self._clip.digest)
        self._parts.finish(self._end * self._clip.time_base)
        return RenderedVideo(self._out, "done", self._count, resumed, tuple(self._notes()))

    def _settled(self) -> ClipColours:
        """The colours of the whole clip; features of the frames they are settled on are kept for their turn."""
        maker, palette = self._maker, self._parts.palette
        if palette.is_file():
            return ClipColours.load(palette, maker.data_set)
        most = self._options.basis_frames
        chosen = set(spread(self._total, most - most % self._batch if most > self._batch else most))  # whole batches
        wanted = (frame for frame in self._frames(chosen.__contains__, max(chosen) + 1) if frame.number in chosen)
        while batch := list(itertools.islice(wanted, self._batch)):
            self._ready |= {frame.number: maps for frame, maps in self._seen(batch)}
            self._progress(len(self._ready), self._total)
        if not self._ready:  # fewer frames than the file says
            chosen = {0}
            self._ready = {frame.number: maps for frame, maps in self._seen([next(self._frames(lambda n: n == 0, 1))])}
        self._settling = frozenset(self._ready)
        colours = ClipColours.fit([found for maps in self._ready.values() for found in maps.values()], maker.data_set)
        colours.save(palette, self._panels)
        return colours

    def _frames(self, wanted: Callable[[int], bool], most: int | None) -> Iterator[Frame]:
        return self._clip.frames(self._shown, self._panel, wanted=wanted, every=self._options.every, most=most)

    def _ahead(self, items: Iterator[T], most: int) -> Generator[T, None, None]:
        """The same items: made beside the forward passes on an accelerator, one after the other on a CPU.

        Each parallel part of a model waits for its slowest core: what runs beside it costs more than its own time.
        """
        if self._maker.backbone.device.type == "cpu":
            return (item for item in items)
        return prefetched(items, most)

    def _featured(self, start: int) -> Iterator[tuple[Frame, Maps]]:
        """All frames in order; those from a number on with their features, others with none."""
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
        found = dict(self._seen([frame for frame in window if frame.number not in self._ready]))
        for frame in window:
            yield frame, found[frame] if frame in found else self._ready.pop(frame.number)

    def _seen(self, frames: list[Frame]) -> Iterator[tuple[Frame, Maps]]:
        """Frames with their features. All batches are of one size: rounding then is the same in all of them."""
        if not frames:
            return
        pixels = [frame.shown for frame in frames if frame.shown is not None]
        filled = np.stack(pixels + pixels[-1:] * (self._batch - len(pixels)))
        features = self._maker.features(filled)
        for index, frame in enumerate(frames):
            yield frame, {name: maps[index] for name, maps in features.items()}

    def _skip(self, group: Iterator[tuple[Frame, Maps]]) -> None:
        for frame, _ in group:
            self._note(frame)

    def _make_part(self, number: int, group: Iterator[tuple[Frame, Maps]], colours: ClipColours) -> None:
        clip, before = self._clip, self._count
        with (
            self._parts.writing(number) as temporary,
            PartWriter(temporary, self._sheet.size, clip.time_base, clip.rate, self._maker.encoder) as writer,
        ):
            for frame, maps in group:
                sheet = self._drawn(frame, maps, colours)
                writer.write(sheet, frame.time)
                if self._options.frames:
                    write_frame(sheet, self._out.with_suffix(""), frame.number, self._clip.digest)
                self._note(frame)
                ahead = sum(number > frame.number for number in self._settling)  # their features are there already
                self._progress(self._count + ahead, self._total)
        self._parts.add(self._parts.path(number), self._count - before)

    def _drawn(self, frame: Frame, maps: Maps, colours: ClipColours) -> np.ndarray:
        assert frame.panel is not None
        pictures: dict[tuple[str | None, str], np.ndarray] = {
            (name, panel): colours.picture(panel, features)
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
            told = f"{len(self._lost)} of {self._count} frames could not be read ({self._lost[0]})"
            yield f"{told}; the one before is shown in their place"
        if self._clip.missing:
            yield f"the file ends early: {self._clip.missing} of the frames that it tells of are not there"
        if self._boxed:
            yield f"{self._boxed} frames of another aspect ratio than the first have black bars"
