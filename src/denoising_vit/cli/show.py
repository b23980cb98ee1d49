"""``dvit show``: pictures of features, side by side in the same colours."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.exit_codes import INTERRUPTED, OK, SOME_FAILED, WRONG_USAGE
from denoising_vit.cli.reporting import PhotoProgress, print_error, print_note, print_skipped
from denoising_vit.errors import DenoisingVitError, OutputError
from denoising_vit.extractors import Cleaners
from denoising_vit.files import Mark, digest_of, owned_path, plain_stem, readable, require_ours
from denoising_vit.show.options import ShowOptions

if TYPE_CHECKING:
    from denoising_vit.maps import Palette
    from denoising_vit.show.gathering import Gatherer, ShownPhoto

#: Endings of the name of one sheet.
_ONE_SHEET = (".png", ".pdf", ".svg")

#: What sheets and palettes are marked as.
_SHEET, _PALETTE = "sheet", "palette"


def show(
    inputs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PHOTO ...")],
    /,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    showing: tyro.conf.OmitArgPrefixes[ShowOptions] = ShowOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    cleaners: tyro.conf.OmitArgPrefixes[Cleaners] = Cleaners(),  # noqa: B008, frozen
    colours: Literal["each", "together"] = "each",
    palette: Path | None = None,
    save_palette: Path | None = None,
    format: Literal["png", "pdf", "svg"] = "png",
) -> int:
    """Pictures of features: maps of raw and clean ones in the same colours, on one sheet or one for each photo.

    Args:
        inputs: image files, folders (searched recursively for image files) and globs (every file they match).
        out: one sheet of all photos, where the name ends in .png, .pdf or .svg; else a folder for a sheet of each. Only
            earlier sheets of the same photos are replaced.
        showing: what is shown.
        model: the backbone, and how it is run.
        cleaners: what cleans its features.
        colours: features of one photo always share their colours. each: photos have colours of their own. together:
            all photos share them; their features are all kept until the last is seen (about 2 MB a photo and kind).
        palette: the colours of a file that --save-palette wrote, for all photos.
        save_palette: write the colours of all photos together to this .safetensors file, for other pictures or films.
        format: of sheets in a folder.
    """
    from denoising_vit.cli.outputs import require_writable
    from denoising_vit.data import find_photos

    if not inputs:
        print_error("no input: name image files, folders or globs, as in `dvit show photo.jpg -o sheet.png`")
        return WRONG_USAGE
    if palette is not None and (save_palette is not None or colours == "together"):
        print_error("--palette gives the colours: --colours together and --save-palette find them; leave one out")
        return WRONG_USAGE
    if save_palette is not None and save_palette.suffix != ".safetensors":
        print_error(f"--save-palette {save_palette}: expected the name of a .safetensors file")
        return WRONG_USAGE
    showing.validate()
    photos, missing = find_photos(inputs)
    skipped = [(item.item, item.reason) for item in missing]
    if not photos:
        return _tell(0, skipped, out)
    one = out.suffix.lower() in _ONE_SHEET
    source = digest_of(*map(Path, inputs))
    for file, kind in ((out if one else None, _SHEET), (save_palette, _PALETTE)):
        if file is not None:
            require_ours(file, Mark(kind, source), photos)
    for folder in (out.parent if one else out, *([] if save_palette is None else [save_palette.parent])):
        require_writable(folder)
    job = _open(model, showing, cleaners, out, palette, colours, format)
    try:
        done = job.run(photos, skipped, source, save_palette=save_palette, one=one)
    except KeyboardInterrupt:
        print_note("interrupted; sheets that were finished stay")
        return INTERRUPTED
    return _tell(done, skipped, out)


def _tell(done: int, skipped: Sequence[tuple[str, str]], out: Path) -> int:
    """Says what was skipped and why. Returns the exit code."""
    for name, reason in skipped:
        print_skipped(name, reason)
    told = f", {len(skipped)} skipped" if skipped else ""
    print_note(f"{done} of {done + len(skipped)} photos shown{told}" + (f"; {out}" if done else ""))
    return SOME_FAILED if skipped or not done else OK


def _open(
    model: BackboneSpec,
    options: ShowOptions,
    cleaners: Cleaners,
    out: Path,
    palette: Path | None,
    colours: Literal["each", "together"],
    kind: str,
) -> _Job:
    """Loads the backbone; what is wrong with options and files is said before a photo is touched."""
    from denoising_vit.maps import read_palette
    from denoising_vit.show.gathering import Gatherer

    backbone = model.load()
    names = options.names(backbone, cleaners.denoiser)
    gatherer = Gatherer(backbone, names, cleaners, options.denoising())
    given = None if palette is None else read_palette(palette, backbone)
    print_note(f"backbone {backbone.extra_repr()} on {backbone.device}, fingerprint {backbone.fingerprint.short}")
    print_note(f"features {', '.join(names)}; maps {', '.join(options.kinds())}")
    return _Job(gatherer, options, out, given, colours == "together", kind)


@dataclass(frozen=True)
class _Job:
    """What is the same for all photos.

    Attributes:
        gatherer: takes features of photos.
        options: what is shown.
        out: a sheet, or a folder for them.
        given: the colours of all photos, where they come from a file.
        together: whether all photos share their colours.
        kind: of sheets in a folder.
    """

    gatherer: Gatherer
    options: ShowOptions
    out: Path
    given: Palette | None
    together: bool
    kind: str

    def run(
        self,
        photos: Sequence[Path],
        skipped: list[tuple[str, str]],
        source: str,
        *,
        save_palette: Path | None,
        one: bool,
    ) -> int:
        """Draws one sheet of all photos, or one of each as soon as its colours are known. Returns how many were."""
        seen = self._seen(photos, skipped)
        if not (one or self.together or save_palette):
            taken: set[Path] = set()
            for file, photo in seen:
                self._draw_own(file, photo, self._palette([photo]), taken)
            return len(taken)
        kept = list(seen)
        if kept:
            self._draw_kept(kept, source, save_palette, one=one)
        return len(kept)

    def _draw_kept(
        self, photos: list[tuple[Path, ShownPhoto]], source: str, save_palette: Path | None, *, one: bool
    ) -> None:
        from denoising_vit.maps import write_palette

        shown = [photo for _, photo in photos]
        common = self._palette(shown) if self.together or save_palette else None
        if save_palette is not None and common is not None:
            write_palette(common, save_palette, mark=Mark(_PALETTE, source))
        # A palette that is only to be saved does not change the pictures.
        shared = common if self.together else None
        palettes = [shared or self._palette([photo]) for photo in shown]
        if one:
            with owned_path(self.out, Mark(_SHEET, source)) as temporary:
                self._draw(shown, palettes, temporary, self.out.suffix)
            return
        taken: set[Path] = set()
        for (file, photo), palette in zip(photos, palettes, strict=True):
            self._draw_own(file, photo, palette, taken)

    def _draw_own(self, file: Path, photo: ShownPhoto, palette: Palette, taken: set[Path]) -> None:
        """A sheet of one photo, by a name that is free or has an earlier sheet of it."""
        mark, stem = Mark(_SHEET, digest_of(file.resolve())), plain_stem(file.stem)
        for number in itertools.count(1):
            path = self.out / f"{stem if number == 1 else f'{stem}-{number}'}.{self.kind}"
            if path in taken:
                continue
            with contextlib.suppress(OutputError, FileExistsError), owned_path(path, mark) as temporary:
                self._draw([photo], [palette], temporary, path.suffix)
                taken.add(path)
                return

    def _seen(self, photos: Sequence[Path], skipped: list[tuple[str, str]]) -> Iterator[tuple[Path, ShownPhoto]]:
        """The features of one photo after another; whatever is wrong with one, it is skipped."""
        from denoising_vit.data.photos import read_photo

        with PhotoProgress(len(photos), self.gatherer.passes, "passes") as progress:
            for photo in photos:
                progress.start(photo.name)
                try:
                    found = self.gatherer(
                        read_photo(photo), name=readable(photo.name), progress=lambda done: progress.advance(done, 0)
                    )
                except (DenoisingVitError, OSError) as error:
                    skipped.append((str(photo), str(error)))
                else:
                    yield photo, found
                progress.finish()

    def _palette(self, photos: list[ShownPhoto]) -> Palette:
        from denoising_vit.backbones.recorded import describe
        from denoising_vit.show.drawing import palette_of

        return self.given or palette_of(photos, self.options, describe(self.gatherer.backbone))

    def _draw(self, photos: list[ShownPhoto], palettes: list[Palette], path: Path, suffix: str) -> None:
        from denoising_vit.maps.sheet import BESIDE
        from denoising_vit.show.drawing import draw_sheet

        backbone = self.gatherer.backbone
        exact = [f"exact of {self.options.views} views"] if "exact" in self.gatherer.names else []
        whose = "a palette" if self.given else "all photos" if self.together else "each photo"
        told = [backbone.name, backbone.weights, *exact, f"colours of {whose}, the same for all features"]
        draw_sheet(photos, palettes, path, self.options, caption=[BESIDE.join(told)], suffix=suffix)
