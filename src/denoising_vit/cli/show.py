"""``dvit show`` and ``dvit app``: feature maps in shared colours, on sheets and in the browser."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.reporting import PhotoProgress, load_backbone, print_error, print_note, print_skipped
from denoising_vit.cli.streams import INTERRUPTED, OK, SOME_FAILED, interruptible
from denoising_vit.errors import DenoisingVitError, OutputError, PlanError
from denoising_vit.extractors import Cleaners
from denoising_vit.files import Mark, digest_of, owned_path, plain_stem, readable, require_ours
from denoising_vit.show.options import AppOptions, ShowOptions
from denoising_vit.tiling.layout import TileOptions

if TYPE_CHECKING:
    from denoising_vit.maps import Palette
    from denoising_vit.show.sheets import PhotoExtractor, ShownPhoto

#: Suffixes of a sheet.
_ONE_SHEET = (".png", ".pdf", ".svg")

#: Kinds of marks.
_SHEET, _PALETTE = "sheet", "palette"


def show(
    inputs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PHOTO ...")],
    /,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    showing: tyro.conf.OmitArgPrefixes[ShowOptions] = ShowOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    cleaners: tyro.conf.OmitArgPrefixes[Cleaners] = Cleaners(),  # noqa: B008, frozen
    tiling: tyro.conf.OmitArgPrefixes[TileOptions] = TileOptions(),  # noqa: B008, frozen
    colours: Literal["each", "together"] = "each",
    palette: Path | None = None,
    save_palette: Path | None = None,
    format: Literal["png", "pdf", "svg"] = "png",
) -> int:
    """Draw maps of raw and clean features in shared colours, on one sheet or on one sheet per photo.

    Args:
        inputs: image files, folders (searched recursively for image files) and globs (every file they match).
        out: one sheet of all photos (.png, .pdf or .svg), or a folder with one sheet per photo. Only earlier sheets of
            the same photos are replaced.
        showing: options of the sheet.
        model: the backbone.
        cleaners: sources of the artifact, denoiser and other cleaners.
        tiling: tiling of photos larger than the backbone's input.
        colours: colours shared by all features of a photo. each: different colours for every photo. together: the same
            for all photos, whose features are kept in memory (about 2 MB per photo and kind).
        palette: file of --save-palette, whose colours are used for all photos.
        save_palette: write the colours of all photos together to this .safetensors file, for other pictures or videos.
        format: format of sheets in a folder.
    """
    from denoising_vit.cli.outputs import require_writable
    from denoising_vit.data import find_photos

    if not inputs:
        raise PlanError("no input; give image files, folders or globs, as in `dvit show photo.jpg -o sheet.png`")
    if palette is not None and (save_palette is not None or colours == "together"):
        raise PlanError("--palette cannot be combined with --colours together or --save-palette")
    if save_palette is not None and save_palette.suffix != ".safetensors":
        raise PlanError(f"--save-palette {save_palette}: expected a name ending in .safetensors")
    showing.validate()
    photos, missing = find_photos(inputs)
    skipped = [(item.item, item.reason) for item in missing]
    if not photos:
        return _print_summary(0, skipped, out)
    one = out.suffix.lower() in _ONE_SHEET
    source = digest_of(*map(Path, inputs))
    for file, kind in ((out if one else None, _SHEET), (save_palette, _PALETTE)):
        if file is not None:
            require_ours(file, Mark(kind, source), photos)
    for folder in (out.parent if one else out, *([] if save_palette is None else [save_palette.parent])):
        require_writable(folder)
    from denoising_vit.maps import read_palette
    from denoising_vit.show.sheets import PhotoExtractor

    backbone = load_backbone(model)
    names = showing.names(backbone, cleaners)
    extractor = PhotoExtractor(backbone, names, cleaners, showing.denoising(), tiling)
    given = None if palette is None else read_palette(palette, backbone)
    tiles = "" if tiling.tile is None else f"; tiles of {tiling.tile} px"
    print_note(f"features {', '.join(names)}; maps {', '.join(showing.kinds())}{tiles}")
    job = _Job(extractor, showing, out, given, colours == "together", format)
    with interruptible("interrupted; finished sheets are kept"):
        done = job.run(photos, skipped, source, save_palette, one)
    return _print_summary(done, skipped, out)


def _print_summary(done: int, skipped: Sequence[tuple[str, str]], out: Path) -> int:
    """Print what was skipped and why, and return the exit code."""
    for name, reason in skipped:
        print_skipped(name, reason)
    missing = f", {len(skipped)} skipped" if skipped else ""
    print_note(f"{done} of {done + len(skipped)} photos shown{missing}" + (f"; {out}" if done else ""))
    return SOME_FAILED if skipped or not done else OK


@dataclass(frozen=True)
class _Job:
    """Settings for all photos."""

    extractor: PhotoExtractor
    options: ShowOptions
    out: Path  # a sheet, or a folder of sheets
    given: Palette | None  # from a file
    together: bool  # all photos share their colours
    kind: str  # format of sheets in a folder

    def run(
        self, photos: Sequence[Path], skipped: list[tuple[str, str]], source: str, save_palette: Path | None, one: bool
    ) -> int:
        """Draw one sheet of all photos, or one per photo once its colours are known. Returns the number of photos."""
        from denoising_vit.maps import write_palette

        extracted = self._extracted(photos, skipped)
        common = None
        if one or self.together or save_palette:
            extracted = list(extracted)
            if not extracted:
                return 0
            shown = [photo for _, photo in extracted]
            common = self._palette(shown) if self.together or save_palette else None
            if save_palette is not None and common is not None:
                write_palette(common, save_palette, mark=Mark(_PALETTE, source))
            if not self.together:
                common = None  # saving a palette does not change the pictures
            if one:
                with owned_path(self.out, Mark(_SHEET, source)) as temporary:
                    palettes = [common or self._palette([photo]) for photo in shown]
                    self._draw(shown, palettes, temporary, self.out.suffix)
                return len(shown)
        taken: set[Path] = set()
        for file, photo in extracted:
            self._draw_own(file, photo, common or self._palette([photo]), taken)
        return len(taken)

    def _draw_own(self, file: Path, photo: ShownPhoto, palette: Palette, taken: set[Path]) -> None:
        """Draw the sheet of one photo, under a name that is free or belongs to an earlier sheet of it."""
        from denoising_vit.cli.outputs import numbered

        mark = Mark(_SHEET, digest_of(file.resolve()))
        for name in numbered(plain_stem(file.stem)):
            path = self.out / f"{name}.{self.kind}"
            if path in taken:
                continue
            with contextlib.suppress(FileExistsError), contextlib.ExitStack() as stack:
                try:
                    temporary = stack.enter_context(owned_path(path, mark))
                except OutputError:  # not an earlier sheet of this photo
                    continue
                self._draw([photo], [palette], temporary, path.suffix)
                taken.add(path)
                return

    def _extracted(self, photos: Sequence[Path], skipped: list[tuple[str, str]]) -> Iterator[tuple[Path, ShownPhoto]]:
        """Photos with their features; unusable photos are skipped."""
        with PhotoProgress(len(photos), self.extractor.passes, "passes") as progress:
            for photo in photos:
                progress.start(photo.name)
                try:
                    picture = self.extractor.open(photo)
                    found = self.extractor(picture, name=readable(photo.name), progress=progress.advance)
                except (DenoisingVitError, OSError) as error:
                    skipped.append((str(photo), str(error)))
                else:
                    yield photo, found
                progress.finish()

    def _palette(self, photos: list[ShownPhoto]) -> Palette:
        from denoising_vit.backbones.recorded import describe
        from denoising_vit.show.sheets import palette_of

        return self.given or palette_of(photos, self.options, describe(self.extractor.backbone))

    def _draw(self, photos: list[ShownPhoto], palettes: list[Palette], path: Path, suffix: str) -> None:
        from denoising_vit.maps.sheet import BESIDE
        from denoising_vit.show.sheets import draw_sheet

        backbone = self.extractor.backbone
        exact = [f"exact with {self.options.views} views"] if "exact" in self.extractor.names else []
        whose = "a palette" if self.given else "all photos" if self.together else "each photo"
        parts = [backbone.name, backbone.weights, *exact, f"colours of {whose}, the same for all features"]
        draw_sheet(photos, palettes, path, self.options, caption=[BESIDE.join(parts)], suffix=suffix)


def app(
    page: tyro.conf.OmitArgPrefixes[AppOptions] = AppOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    denoiser: str | None = None,
    artifact: str | None = None,
) -> int:
    """Serve a browser page that shows raw and denoised features of your photos side by side. Needs the extra `app`.

    Args:
        page: address and limits of the page.
        model: the first backbone; its device and precision apply to all.
        denoiser: denoiser of the backbone: a file, voc_denoised or imgnet_denoised for the published ones; defaults to
            the one in the package.
        artifact: artifact of the backbone for subtract and exact: a file of `dvit calibrate`, or `shipped`. By default,
            exact fits one in each photo, and subtract uses the one in the package.
    """
    page.validate()
    from denoising_vit.show.app.models import Models
    from denoising_vit.show.app.serving import serve

    if page.share:
        print_error(
            "--share opens a public address: anyone with the address can use the page on this computer, and photos "
            "pass through Gradio's relay",
            "warning",
        )
    elif not page.local:
        print_error(
            f"--host {page.host} opens the page to the network: anyone who can reach this computer can use it, without "
            "a password and without encryption",
            "warning",
        )
    print_note(f"loading {model.backbone} ...")
    with serve(Models(model, denoiser, artifact), page) as opened:
        print_note(f"ready: {opened.url}" + (f" and {opened.shared}" if opened.shared else ""))
        print_note("press Ctrl-C to stop; uploaded photos and their results are then deleted")
        _wait()
    return INTERRUPTED


def _wait() -> None:
    """Wait for Ctrl-C or SIGTERM; files are removed in either case."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print_note("stopping")
    finally:
        signal.signal(signal.SIGTERM, before)
