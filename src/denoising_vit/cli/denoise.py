"""``dvit denoise``: from photos to clean features and pictures that show the difference."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from torch import Tensor

from denoising_vit.artifact import SHIPPED, artifact_digest, resampling_note
from denoising_vit.backbones import Backbone, BackboneSpec, Fingerprint
from denoising_vit.cli.exit_codes import INTERRUPTED, WRONG_USAGE
from denoising_vit.cli.outputs import Output, OutputFolder
from denoising_vit.cli.reporting import PhotoProgress, Report, Row, print_error, print_note
from denoising_vit.dataset import find_photos
from denoising_vit.decomposition import Decomposition
from denoising_vit.denoise import denoise_image, settle, work
from denoising_vit.denoiser.loading import FoundDenoiser
from denoising_vit.errors import DenoisingVitError
from denoising_vit.files import atomic_path
from denoising_vit.options import DenoiseOptions
from denoising_vit.photos import photo_digest, read_photo
from denoising_vit.preparing import given_artifact, prepare
from denoising_vit.views import ViewPlan


def denoise(
    inputs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PHOTO ...")],
    /,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    denoising: tyro.conf.OmitArgPrefixes[DenoiseOptions] = DenoiseOptions(method="auto"),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    artifact: str | None = None,
    denoiser: str | None = None,
    no_exact: tyro.conf.FlagCreatePairsOff[bool] = False,
    upsample: int = 1,
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Clean features of photos: for each a .safetensors file and a picture that shows the difference.

    Args:
        inputs: image files, folders (searched recursively for image files) and globs (every file they match).
        out: folder for the results; made where it does not exist.
        denoising: how semantic field and artifact are separated.
        model: the backbone, and how it is run.
        artifact: the backbone's artifact where it is known, which takes fewer views: a file of `dvit calibrate`, or
            `shipped` for the one that comes with the package; with `none`, nothing is put down to the place in the
            view. Without it, one is fitted in each photo; subtract takes the shipped one. Given without a method or a
            denoiser, it has exact run.
        denoiser: the backbone's denoiser: a file, voc_denoised or imgnet_denoised for the published ones, or `shipped`
            for the one that comes with the package, which is taken without it as well.
        no_exact: with a denoiser, leave exact out of the pictures. They compare the denoiser with it otherwise, and it
            is fitted for them alone, with the options of stage 1: a pass for each view.
        upsample: also store the clean features this many times finer, and draw them so.
        overwrite: do photos again whose results are there already.
        json: print one JSON line per photo instead of a table.
    """
    if not inputs:
        print_error("no input: name image files, folders or globs, as in `dvit denoise photo.jpg -o out`")
        return WRONG_USAGE
    if upsample < 1:
        print_error(f"--upsample must be a whole number of at least 1, got {upsample}")
        return WRONG_USAGE
    photos, missing = find_photos(inputs)
    report = Report(as_json=json)
    for item in missing:
        report.add(Row(item.item, "failed", note=item.reason))
    if not photos:
        report.finish(out)
        return WRONG_USAGE
    denoising.validate()
    backbone = model.load()
    options, found = settle(denoising, backbone, denoiser, artifact)
    exact = dataclasses.replace(options, method="exact") if found is not None and not no_exact else None
    # What is wrong with the options is said before any photo is touched.
    known = given_artifact(artifact, backbone, options)
    plan, _ = prepare(backbone, options, known)
    if exact is not None:
        prepare(backbone, exact, known)
    folder = OutputFolder(out, overwrite=overwrite)
    print_note(
        f"backbone {backbone.extra_repr()} on {backbone.device}, fingerprint {backbone.fingerprint.short}; "
        f"method {_told(options, found)}"
    )
    if exact is not None:
        print_note(f"pictures compare it with exact, {work(exact)} passes a photo; --no-exact leaves it out")
    if known is not None and (resampled := resampling_note(artifact or SHIPPED, backbone, plan.grid)):
        print_note(resampled)
    job = _Job(backbone, options, plan, folder, upsample, known, found, exact)
    unit = {"exact": "views", "neural-field": "views and steps"}.get(options.method, "passes")
    with PhotoProgress(len(photos), job.work, unit) as progress:
        try:
            for photo in photos:
                progress.start(photo.name)
                report.add(job.run(photo, progress))
                progress.finish()
        except KeyboardInterrupt:
            progress.stop()
            report.finish(out)
            print_note("interrupted; finished results stay, and the same command goes on from there")
            return INTERRUPTED
    return report.finish(out)


def _told(options: DenoiseOptions, found: FoundDenoiser | None) -> str:
    """The method in words, and where its denoiser comes from."""
    if found is None:
        return options.method
    source = "comes with the package" if found.source == SHIPPED else found.source
    return f"{options.method} ({source}, {found.digest[:8]})"


#: Options that change nothing in the result, or whose part in it the plan's digest tells.
_INDIFFERENT = {"views", "held_out", "size", "resolution", "coverage", "taper", "seed", "batch_size"}


@dataclass(frozen=True)
class _Job:
    """What is the same for all photos of a run.

    Attributes:
        backbone: the extractor.
        options: with the method that makes the results.
        plan: the views of that method.
        folder: for results and pictures.
        upsample: how many times finer features are stored and drawn.
        artifact: G (h, w, C) where it is known; a denoiser's results do not depend on it.
        denoiser: that makes the results, if one does.
        exact: options of stage 1 for pictures that compare it with the denoiser; None where none do.
    """

    backbone: Backbone
    options: DenoiseOptions
    plan: ViewPlan
    folder: OutputFolder
    upsample: int
    artifact: Tensor | None
    denoiser: FoundDenoiser | None
    exact: DenoiseOptions | None

    @property
    def work(self) -> int:
        """What progress on one photo counts up to."""
        return work(self.options) + (0 if self.exact is None else work(self.exact))

    def run(self, photo: Path, progress: PhotoProgress) -> Row:
        """Does one photo, or finds it done. Whatever is wrong with this photo ends in its row, not in an exception."""
        started = time.perf_counter()
        try:
            pixels = read_photo(photo)
            output = self.folder.claim(photo, photo_digest(pixels))
            if output.existing is not None:
                return self._keep(photo, pixels, output, output.existing, progress)
            result = denoise_image(
                self.backbone,
                pixels,
                artifact=self._of_results,
                denoiser=self.denoiser,
                progress=progress.advance,
                watch=progress.watch,
                options=self.options,
            )
            about = result.info["photo"] | {"name": photo.name}
            result = dataclasses.replace(result, info=result.info | {"photo": about})
            self._draw(pixels, result, output, progress)
            result.save(output.result, upsample=self.upsample)  # last: where this file is, the photo is finished
        except (DenoisingVitError, OSError) as error:
            return Row(str(photo), "failed", note=str(error))
        except Exception as error:  # one photo must not end the batch, whatever is wrong with it
            return Row(str(photo), "failed", note=f"{type(error).__name__}: {error}")
        return self._row(photo, output, result.info, "done", seconds=round(time.perf_counter() - started, 2))

    @property
    def _of_results(self) -> Tensor | None:
        """The known artifact that decides results."""
        return self.artifact if self.denoiser is None else None

    def _keep(
        self, photo: Path, pixels: np.ndarray, output: Output, info: dict[str, Any], progress: PhotoProgress
    ) -> Row:
        notes = [] if self._made_alike(info) else ["made with other settings: --overwrite to do it again"]
        finer = self.upsample > 1 and info.get("upsample") != self.upsample
        if finer or not output.panel.exists():
            result = Decomposition.load(output.result)
            self._draw(pixels, result, output, progress)
            if finer:
                result.save(output.result, upsample=self.upsample)  # the field is there: nothing is computed again
                notes.append("finer features added")
        return self._row(photo, output, info, "kept", note=", ".join(["kept", *notes]))

    def _draw(self, pixels: np.ndarray, result: Decomposition, output: Output, progress: PhotoProgress) -> None:
        from denoising_vit.visualize import draw_panel  # matplotlib and scikit-learn take seconds to import

        exact = self._exact_beside(pixels, result, progress)
        with atomic_path(output.panel) as temporary:
            draw_panel(pixels, result, temporary, upsample=self.upsample, exact=exact)

    def _exact_beside(self, pixels: np.ndarray, result: Decomposition, progress: PhotoProgress) -> Decomposition | None:
        """What the picture compares a denoiser's result with; not one that was kept and made in another way."""
        if self.exact is None or not self._made_alike(result.info):
            return None

        def advance(done: int, total: int) -> None:
            progress.advance(work(self.options) + done, total)

        return denoise_image(self.backbone, pixels, artifact=self.artifact, progress=advance, options=self.exact)

    def _made_alike(self, info: dict[str, Any]) -> bool:
        """Whether an existing result came from this backbone, this plan and these options of the method."""
        theirs = Fingerprint(tuple(info["backbone"]["fingerprint"]))
        # The neural field draws with the seed, and may keep the step that held-out views like best.
        indifferent = _INDIFFERENT - ({"seed", "held_out"} if self.options.method == "neural-field" else set())
        decisive = {key: value for key, value in self.options.recorded().items() if key not in indifferent}
        return (
            info["plan"] == self.plan.digest
            and info.get("artifact") == artifact_digest(self._of_results)
            and info.get("denoiser", {}).get("digest") == (None if self.denoiser is None else self.denoiser.digest)
            and self.backbone.fingerprint.matches(theirs)
            and all(info.get(key) == value for key, value in decisive.items())
        )

    @staticmethod
    def _row(photo: Path, output: Output, info: dict[str, Any], status: Any, **more: Any) -> Row:
        return Row(
            image=str(photo),
            status=status,
            output=str(output.result),
            panel=str(output.panel),
            views=info.get("views", 1),
            heldout_r2=info["heldout_r2"],
            heldout_cosine=info["heldout_cosine"],
            **more,
        )
