"""``dvit denoise``: clean features of photos, with pictures of raw and clean features."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.outputs import OutputFolder, require_writable
from denoising_vit.cli.reporting import PhotoProgress, Report, print_backbone, print_note
from denoising_vit.cli.streams import WRONG_USAGE, Interrupted
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.environment import run_info, software_words
from denoising_vit.errors import OutputError, PlanError
from denoising_vit.extractors import Cleaners
from denoising_vit.files import Mark, digest_of, require_ours
from denoising_vit.tiling.layout import TileOptions

if TYPE_CHECKING:
    from denoising_vit.backbones import Backbone
    from denoising_vit.denoiser.loading import FoundDenoiser
    from denoising_vit.show.pages.photos import PhotosPage


@dataclass(frozen=True)
class _PhotoCleaners(Cleaners):
    """Cleaners for features of photos.

    Attributes:
        artifact: the backbone's artifact, which reduces the number of views needed: a file of `dvit calibrate`, or
            `shipped` for the one in the package; `none` models no artifact. By default, one is fitted in each photo,
            and subtract uses the shipped one. Selects the exact method unless a method or another cleaner is given.
        denoiser: the backbone's denoiser: a file, voc_denoised or imgnet_denoised for the published ones, or `shipped`
            for the one in the package.
        subspace: positional directions for --method project. Defaults to the 16 strongest of a black image.
        registers: register neurons for --method registers.
        distilled: weights for --method distilled: a file of `dvit distill`. Defaults to those in the package.
    """

    artifact: str | None = None


def denoise(
    inputs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PHOTO ...")],
    /,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    denoising: tyro.conf.OmitArgPrefixes[DenoiseOptions] = DenoiseOptions(method="auto"),  # noqa: B008, frozen
    tiling: tyro.conf.OmitArgPrefixes[TileOptions] = TileOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    cleaners: tyro.conf.OmitArgPrefixes[_PhotoCleaners] = _PhotoCleaners(),
    compare: tyro.conf.FlagCreatePairsOff[bool] = False,
    pictures: bool = True,
    upsample: int = 1,
    report: Annotated[Path | None, tyro.conf.arg(metavar="FILE.html")] = None,
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Clean the features of photos; writes a .safetensors file and a picture of raw and clean features for each.

    Args:
        inputs: image files, folders (searched recursively for images) and globs.
        out: folder for the results; created if it does not exist.
        denoising: method and options of stage 1.
        tiling: tiling of photos larger than the backbone's input.
        model: the backbone and its options.
        cleaners: sources of the artifact, denoiser and other cleaners.
        compare: also run the exact method with the options of stage 1, and draw both; not with subtract. Costs one
            forward pass per view.
        pictures: draw a picture of each photo. On an accelerator, drawing takes longer than one forward pass. With
            --no-pictures, replacing a result also removes its earlier picture.
        upsample: also store and draw the clean features upsampled by this factor.
        report: also write a self-contained page (.html) with maps and metrics of all photos.
        overwrite: replace existing results, including those from before the photo changed.
        json: print one JSON line per photo instead of a table.
    """
    from denoising_vit.artifact import SHIPPED, resampling_note
    from denoising_vit.cli.denoise_job import PHOTO_NUMBERS, DenoiseJob, PhotoRow, Writing
    from denoising_vit.data import find_photos
    from denoising_vit.decomposition.inputs import given_artifact
    from denoising_vit.decomposition.options import STAGE_ONE
    from denoising_vit.denoise import settle
    from denoising_vit.tiling.denoising import TiledDenoising, denoising_of

    if not inputs:
        raise PlanError("no input; give image files, folders or globs, as in `dvit denoise photo.jpg -o out`")
    if upsample < 1:
        raise PlanError(f"--upsample must be a whole number of at least 1, got {upsample}")
    if report is not None and (report.suffix.lower() not in (".html", ".htm") or report.is_dir()):
        raise PlanError(f"--report {report}: expected a name ending in .html")
    if compare and not pictures and report is None:
        raise PlanError("--compare needs a picture or a page: omit --no-pictures, or give --report")
    photos, missing = find_photos(inputs)
    table = Report("photo", PHOTO_NUMBERS, as_json=json)
    for item in missing:
        table.add(PhotoRow(item.item, status="failed", note=item.reason))
    if not photos:
        table.finish(out)
        return WRONG_USAGE
    mark = Mark("page", digest_of(*map(Path, inputs)))
    if report is not None:
        require_ours(report, mark, photos)
        require_writable(report.parent)
    denoising.validate()
    backbone = model.load()
    artifact = cleaners.artifact
    # With --compare, the artifact is for stage 1, and does not decide the method.
    options, found = settle(denoising, backbone, replace(cleaners, artifact=None) if compare else cleaners)

    # Invalid options are reported before any photo is read.
    if compare and (options.method in STAGE_ONE or options.method == "subtract"):
        raise PlanError(
            "--compare draws stage 1 next to features that do not separate an artifact, such as denoiser, got "
            f"{options.method}; choose another --method, or omit --compare"
        )
    used = replace(cleaners, artifact=None if compare or found is not None else artifact, denoiser=found)
    clean = denoising_of(backbone, options, used, tiling)
    exact = None
    if compare:
        exact = denoising_of(backbone, replace(options, method="exact"), Cleaners(artifact=artifact), tiling)
    elif found is not None:
        given_artifact(artifact, backbone, options)  # not used, but an invalid file is an error
    folder = OutputFolder(out, overwrite=overwrite)
    print_backbone(backbone, f"; method {_method_words(options, found)}")
    if exact is not None:
        print_note(
            f"pictures also show exact, which takes {exact.work} more passes per "
            f"{'photo' if tiling.tile is None else 'tile'}"
        )
    views = [one.whole if isinstance(one, TiledDenoising) else one for one in (clean, exact) if one is not None]
    subtracted = next((one for one in views if one.artifact is not None), None)
    if subtracted is not None and (note := resampling_note(artifact or SHIPPED, backbone, subtracted.fitted.grid)):
        print_note(note)
    page = None
    if report is not None:
        from denoising_vit.show.pages.photos import PhotosPage  # matplotlib and scikit-learn take seconds to import

        page = PhotosPage(run_info()["command"])
    job = DenoiseJob(clean, folder, upsample, exact, page, pictures, tiling.max_pixels)
    unit = {"exact": "views", "neural-field": "views and steps"}.get(options.method, "passes")
    interrupted = False
    try:
        with PhotoProgress(len(photos), job.work, unit) as progress, Writing(table) as writing:
            for photo in photos:
                progress.start(photo.name)
                writing.add(job.compute(photo, progress))
                progress.finish()
    except KeyboardInterrupt:
        interrupted = True
    code = table.finish(out)
    if page is not None and report is not None:
        _write_page(page, table, backbone, _method_words(options, found), report, mark)
    if interrupted:
        raise Interrupted("interrupted; finished results are kept, run the command again to resume")
    return code


def _write_page(page: PhotosPage, table: Report, backbone: Backbone, method: str, path: Path, mark: Mark) -> None:
    from denoising_vit.show.pages.rendering import write_page

    run = run_info()
    about = {
        "backbone": backbone.extra_repr(),
        "fingerprint": backbone.fingerprint.short,
        "method": method,
        "hardware": run["hardware"],
        "software": software_words(run),
    }
    try:
        write_page(page.render([asdict(row) for row in table.rows], about, backbone.name), path, mark)
    except OSError as error:
        raise OutputError(f"--report {path}: cannot be written ({error.strerror or error})") from error
    print_note(f"page {path}")


def _method_words(options: DenoiseOptions, found: FoundDenoiser | None) -> str:
    """Description of the method and of the denoiser's source."""
    from denoising_vit.artifact import SHIPPED

    if found is None:
        return options.method
    source = "in the package" if found.source == SHIPPED else found.source
    return f"{options.method} ({source}, {found.digest[:8]})"
