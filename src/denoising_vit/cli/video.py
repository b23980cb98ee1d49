"""``dvit video``: videos of features from videos or folders of frames."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.markup import escape

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.reporting import OnScreen, Report, Row, number, print_backbone, progress_bar, reason_of
from denoising_vit.cli.streams import Interrupted
from denoising_vit.errors import OutputError, PlanError
from denoising_vit.extractors import Cleaners
from denoising_vit.files import plain_stem
from denoising_vit.show.options import VideoOptions

if TYPE_CHECKING:
    from denoising_vit.show.video.clips import Clip
    from denoising_vit.show.video.rendering import VideoMaker


def video(
    inputs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="VIDEO ...")],
    /,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    showing: tyro.conf.OmitArgPrefixes[VideoOptions] = VideoOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    cleaners: tyro.conf.OmitArgPrefixes[Cleaners] = Cleaners(),  # noqa: B008, frozen
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Render videos of raw and clean features side by side, with the same colours in all frames of a clip.

    Each clip becomes NAME.mp4 (H.264, with the timestamps of its source) in the folder. The same command resumes an
    interrupted run.

    Args:
        inputs: video files, and folders of frames in the order of their names.
        out: folder for the results; created if it does not exist.
        showing: options of the videos.
        model: the backbone; --stride below the patch size gives finer maps.
        cleaners: sources of the artifact, denoiser and other cleaners.
        overwrite: replace existing videos, and unfinished ones with other settings.
        json: print one JSON line per video instead of a table.
    """
    from denoising_vit.cli.outputs import require_writable
    from denoising_vit.show.video.rendering import VideoMaker

    if not inputs:
        raise PlanError("no input; give video files or folders of frames, as in `dvit video clip.mp4 -o out`")
    showing.validate()
    require_writable(out)
    backbone = model.load()
    maker = VideoMaker(backbone, showing, cleaners)
    print_backbone(backbone, f"; features {', '.join(maker.options.names)}")
    batch = _Batch(maker, out, overwrite)
    table = Report("video", ("frames", "seconds"), as_json=json)
    try:
        with ClipProgress() as progress:
            for given in inputs:
                table.add(batch.run(given, progress))
    except KeyboardInterrupt:
        table.finish(out)
        raise Interrupted("interrupted; finished parts are kept, run the command again to resume") from None
    return table.finish(out)


@dataclass(frozen=True)
class ClipRow(Row):
    """The result for a clip."""

    clip: str  # the file or folder
    frames: int | None = None
    resumed: int | None = None  # number of frames from an earlier run

    @property
    def item(self) -> str:
        """The file or folder."""
        return self.clip

    def cells(self) -> tuple[str, ...]:
        """The numbers and the remarks, as text."""
        notes = ["kept"] * (self.status == "kept") + [f"{self.resumed} from an earlier run"] * bool(self.resumed)
        frames, seconds = number(self.frames, "d"), number(self.seconds, ".1f")
        return frames, seconds, "; ".join([*notes, *filter(None, [self.note])])


class ClipProgress(OnScreen):
    """Progress over the frames of the current clip, on standard error."""

    def __init__(self) -> None:
        self._progress = progress_bar("frames", speed_estimate_period=120)
        self._task = self._progress.add_task("", total=None)
        self._begun = False

    def start(self, clip: str) -> None:
        """Start the next clip."""
        self._progress.reset(self._task, total=None, description=escape(clip))
        self._begun = False

    def advance(self, done: int, total: int) -> None:
        """Update the number of finished frames; resumed frames do not count towards the speed."""
        if not self._begun:
            self._progress.reset(self._task, total=total, completed=done)
            self._begun = True
        self._progress.update(self._task, completed=done, total=max(done, total))


class _Batch:
    """Renders clips one after another, with unique names in one folder."""

    def __init__(self, maker: VideoMaker, folder: Path, overwrite: bool) -> None:
        self._maker, self._folder, self._overwrite = maker, folder, overwrite
        self._claimed: set[Path] = set()

    def run(self, given: str, progress: ClipProgress) -> ClipRow:
        """Render one clip, unless it is done. Errors are recorded in the row."""
        from denoising_vit.show.video.films import open_clip
        from denoising_vit.show.video.parts import BegunElsewhereError

        started = time.perf_counter()
        progress.start(Path(given).name)
        try:
            clip = open_clip(given, self._maker.options.rate)
            while True:
                out = self._claim(clip)
                try:
                    done = self._maker.render(clip, out, overwrite=self._overwrite, progress=progress.advance)
                    break
                except BegunElsewhereError:
                    self._claimed.discard(out)
        except Exception as error:  # one clip must not stop the batch
            return ClipRow(given, status="failed", note=reason_of(error))
        seconds = round(time.perf_counter() - started, 2) if done.status == "done" else None
        note = "; ".join(done.notes) or None
        return ClipRow(
            given, done.frames, done.resumed, status=done.status, output=str(out), seconds=seconds, note=note
        )

    def _claim(self, clip: Clip) -> Path:
        """A name that is free or belongs to a video of this clip."""
        from denoising_vit.cli.outputs import numbered
        from denoising_vit.show.video.parts import FrameFolder, require_own_video

        stem = plain_stem(clip.path.resolve().name if clip.path.is_dir() else clip.path.stem)
        for name in numbered(stem):
            path = self._folder / f"{name}.mp4"
            if path in self._claimed:
                continue
            with contextlib.suppress(OutputError):
                require_own_video(path, clip)
                if self._maker.options.frames:
                    FrameFolder(path.with_suffix(""), clip.digest).require_free(clip.path)
                self._claimed.add(path)
                return path
        raise AssertionError("unreachable: numbers do not end")
