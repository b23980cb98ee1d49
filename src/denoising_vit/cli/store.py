"""``dvit fit`` and ``dvit store info|verify|export``: feature stores, from stage 1 for a whole data set."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.reporting import OnScreen, print_error, print_left_out, print_note, print_skipped, progress_bar
from denoising_vit.cli.streams import OK, SOME_FAILED, interruptible, print_json
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.errors import FitError, PhotoError, StoreError
from denoising_vit.files import unwritable
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
            print_skipped(self._dataset[index].id, reason)
        seconds = time.perf_counter() - self._started
        rate = f" at {self._done / seconds:.2f} photos/s" if self._done else ""
        skipped = f", {len(failed)} skipped (use --retry-failed to retry)" if failed else ""
        print_note(f"{done} of {len(self._dataset)} photos in {job.store.url}{rate}{skipped}")
        if left := len(self._dataset) - done - len(failed):
            print_note(f"{left} photos were unreachable; run the command again to retry")
        return SOME_FAILED if failed or left or self._dataset.skipped else OK


_StoreName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STORE")]


def info(store: _StoreName, /, json: tyro.conf.FlagCreatePairsOff[bool] = False) -> int:
    """Print the number of photos, backbone, views and size of a store.

    Args:
        store: a folder or URL.
        json: print JSON, with the whole manifest.
    """
    from denoising_vit.store import FeatureStore

    opened = FeatureStore.open(store)
    found = opened.info()
    if json:
        print_json(found)
        return OK
    manifest = opened.manifest
    field, size = (" x ".join(map(str, pair)) for pair in (manifest.field, manifest.size))
    rows = {
        "photos": f"{found['done']} of {found['images']} done, {found['failed']} failed",
        "shards": f"{found['sealed']} of {found['shards']} sealed, {found['staged']} photos staged",
        "field": f"{field} nodes, {manifest.channels} channels, {manifest.dtype}",
        "bytes": f"{found['bytes']:,}",
        "backbone": f"{manifest.backbone.get('name')} ({manifest.backbone.get('weights')})",
        "views": f"{manifest.options.get('views')} of {size} pixels, seed {manifest.options.get('seed')}",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in rows.items():
        table.add_row(name, escape(text))
    Console().print(table)
    return OK


def verify(store: _StoreName, /) -> int:
    """Read a whole store with its checksums, and print any damage.

    Args:
        store: a folder or URL.
    """
    from denoising_vit.store import FeatureStore

    opened = FeatureStore.open(store)
    problems = 0
    for problem in opened.verify():
        problems += 1
        print_error(str(problem), "damaged")
    done = len(opened.done())
    print_note(f"{done} photos read, {problems} problem{'' if problems == 1 else 's'} found in {opened.url}")
    return SOME_FAILED if problems else OK


def export(
    store: _StoreName,
    /,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    kind: Literal["npy", "safetensors"] = "npy",
) -> int:
    """Write the field of each photo to its own file.

    Args:
        store: a folder or URL.
        out: local folder; created if it does not exist. Existing files are kept: if a file with the same name and other
            content exists, nothing is written.
        kind: npy (the field only) or safetensors (with its record); photos of int8 stores are float32.
    """
    from denoising_vit.store import FeatureStore

    try:
        files = FeatureStore.open(store).export(out, kind)
    except OSError as error:
        raise StoreError(f"cannot write to {out} ({unwritable(error)}); choose another folder with -o") from error
    print_note(f"{len(files)} files in {out}")
    return OK
