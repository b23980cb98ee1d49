"""``dvit fit``: stage 1 for a whole data set, into a feature store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.reporting import OnScreen, print_error, print_left_out, print_note, progress_bar
from denoising_vit.cli.streams import OK, SOME_FAILED, interruptible, print_json
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.errors import FitError, PhotoError
from denoising_vit.fit.options import FitOptions

if TYPE_CHECKING:
    from denoising_vit.data import Dataset
    from denoising_vit.fit.job import FitJob


def fit(
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")],
    /,
    out: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="STORE")],
    denoising: tyro.conf.OmitArgPrefixes[DenoiseOptions] = DenoiseOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    artifact: str | None = None,
    running: tyro.conf.OmitArgPrefixes[FitOptions] = FitOptions(),  # noqa: B008, frozen
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Fit stage 1 to a whole data set: clean features of every photo, in one store.

    Prints an estimate of time and disk space first. The same command resumes an interrupted run.

    Args:
        data: a folder (searched recursively), a text file with one photo per line, tar shards (`x-{000..099}.tar`), or
            one of these at a URL (s3://, gs://, https://).
        out: folder or URL of the store; created if it does not exist.
        denoising: options of stage 1; held-out views cost forward passes, `--held-out 0` saves them.
        model: the backbone; several devices, as in `--device cuda:0,cuda:1`, share the work.
        artifact: a known artifact of the backbone: a file of `dvit calibrate`, `shipped`, or `none` for no artifact. By
            default, one is fitted in each photo.
        running: options of the run.
        json: print one JSON line per photo.
    """
    from denoising_vit.artifact import resampling_note
    from denoising_vit.data import open_dataset
    from denoising_vit.fit.job import FitJob

    denoising.validate()
    running.validate()
    dataset = open_dataset(data)
    if running.strict and (left_out := next(iter(dataset.skipped), None)):
        raise PhotoError(f"{left_out.item}: {left_out.reason}")
    print_left_out(dataset.skipped)
    job = FitJob.prepare(dataset, out, model, denoising, running, artifact)
    estimate = job.estimate()
    print_note(str(estimate))
    stage = job.stages[0]
    if estimate.left:
        print_note(f"backbone {stage.backbone.extra_repr()} on {stage.backbone.device}; store {job.store.url}")
    if artifact is not None and (resampled := resampling_note(artifact, stage.backbone, stage.fitted.grid)):
        print_note(resampled)
    estimate.require_room()
    report = _Report(dataset, estimate.left, as_json=json)
    stopped = "interrupted; finished photos are kept, run the command again to resume"
    with interruptible(stopped), report:
        try:
            job.run(report.photo)
        except BrokenPipeError:  # standard output was closed, not the store
            raise
        except OSError as error:
            raise FitError(
                f"cannot write to {job.store.url} ({error.strerror or error}); finished photos are kept, run the "
                "command again to resume"
            ) from error
    return report.finish(job)


class _Report(OnScreen):
    """Progress bar with photos per second, JSON lines, and finally the skipped photos with reasons."""

    def __init__(self, dataset: Dataset, left: int, *, as_json: bool) -> None:
        self._dataset, self._as_json = dataset, as_json
        self._done, self._started = 0, time.perf_counter()
        self._unreached: dict[int, str] = {}
        # Photos are finished in bursts, so the rate is averaged over a long period.
        self._progress = progress_bar("photos, {task.fields[rate]}", speed_estimate_period=600)
        self._task = self._progress.add_task("", total=left, rate="starting")

    def photo(self, index: int, reason: str | None) -> None:
        """Report the result of a photo."""
        self._done += 1
        rate = self._done / (time.perf_counter() - self._started)
        self._progress.update(self._task, completed=self._done, rate=f"{rate:.2f} photos/s")
        if reason is not None:
            self._unreached[index] = reason  # includes failures that the store also records
        if self._as_json:
            status = {"status": "done"} if reason is None else {"status": "failed", "note": reason}
            print_json({"image": self._dataset[index].id, **status})

    def finish(self, job: FitJob) -> int:
        """Print a summary and return the exit code."""
        done, failed = len(job.store.done()), job.store.failed()
        for index, reason in sorted((self._unreached | failed).items()):
            print_error(f"{self._dataset[index].id}: {reason}", "skipped")
        seconds = time.perf_counter() - self._started
        rate = f" at {self._done / seconds:.2f} photos/s" if self._done else ""
        skipped = f", {len(failed)} skipped (use --retry-failed to retry)" if failed else ""
        print_note(f"{done} of {len(self._dataset)} photos in {job.store.url}{rate}{skipped}")
        if left := len(self._dataset) - done - len(failed):
            print_note(f"{left} photos were unreachable; run the command again to retry")
        return SOME_FAILED if failed or left or self._dataset.skipped else OK
