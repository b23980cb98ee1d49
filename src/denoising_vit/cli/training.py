"""``dvit train`` and ``dvit distill``: training of stages 2 and 3."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.reporting import OnScreen, print_error, print_note, print_skipped, progress_bar, show_progress
from denoising_vit.cli.streams import INTERRUPTED, OK, SOME_FAILED
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.denoiser.options import PairOptions, TrainOptions
from denoising_vit.distilled.options import DistillOptions
from denoising_vit.errors import DenoisingVitError, TrainError
from denoising_vit.progress import no_progress
from denoising_vit.training.options import RunOptions, ViewOptions

if TYPE_CHECKING:
    from denoising_vit.backbones import Backbone
    from denoising_vit.data import Dataset, Skipped
    from denoising_vit.denoiser.job import Photos, Stored


def train(
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA_OR_STORE")],
    /,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="RUN")],
    photos: str | None = None,
    on_the_fly: tyro.conf.FlagCreatePairsOff[bool] = False,
    resume: tyro.conf.FlagCreatePairsOff[bool] = False,
    cache: Path | None = None,
    artifact: str | None = None,
    training: tyro.conf.OmitArgPrefixes[TrainOptions] = TrainOptions(),  # noqa: B008, frozen
    pairs: PairOptions = PairOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    exact: DenoiseOptions = DenoiseOptions(held_out=0),  # noqa: B008, frozen
) -> int:
    """Stage 2: train a denoiser that cleans features in one forward pass.

    Targets are the semantic fields of stage 1. The folder of the run gets `denoiser.safetensors` (the best on held-out
    images, for `--denoiser`), `last.safetensors`, `log.jsonl`, TensorBoard files, panels, checkpoints, and at the end
    `run.html`, a page about the run. To resume an interrupted run, repeat the command with --resume. On several devices
    or machines: `accelerate launch -m denoising_vit train ...`.

    Args:
        data: a store of `dvit fit`, or photos with --on-the-fly.
        out: folder of the run; created if it does not exist.
        photos: with a store: the photos that it was fitted on.
        on_the_fly: fit stage 1 on the photos in this run, without a store.
        resume: resume the run in the folder; the result is bit-identical to that of an uninterrupted run.
        cache: folder for the features of the pairs, which runs with other learning rates or steps can share. Defaults
            to a subfolder of the run's folder.
        artifact: with --on-the-fly: the known artifact of the backbone, a file, `shipped` or `none`.
        training: length, learning rate and logging.
        pairs: views to use as training pairs.
        model: the frozen backbone.
        exact: with --on-the-fly: options of stage 1.
    """
    from denoising_vit.denoiser.job import Stored, TrainJob

    training.validate()
    pairs.validate()
    source = _pairs_source(data, photos, on_the_fly, exact, artifact)
    # A store lists its photos, so other files in the folder do not matter.
    left_out = () if isinstance(source, Stored) else source.dataset.skipped
    job = TrainJob.prepare(source, out, model, training, pairs, cache=cache, resume=resume)
    run = _Run(job.accelerator, out, left_out, lambda: job.skipped)

    def prepared() -> Any:
        job.fill(show_progress if run.main else no_progress)
        run.print_skipped()
        found = job.training()
        run.note(f"{len(found.sampler.images)} images to train on, {len(found.held_out.images)} held out; run {out}")
        run.note_blanks(training)
        return found

    return run(job.backbone, prepared, training, job.folder.denoiser)


def _pairs_source(
    data: str, photos: str | None, on_the_fly: bool, exact: DenoiseOptions, artifact: str | None
) -> Photos | Stored:
    """The photos and their targets; TrainError if the arguments are inconsistent."""
    from denoising_vit.data import open_dataset
    from denoising_vit.denoiser.job import Photos, Stored
    from denoising_vit.store import FeatureStore

    is_store = FeatureStore.exists(data)
    if is_store and on_the_fly:
        raise TrainError(f"{data} is a store and already contains the fields; omit --on-the-fly")
    if is_store and photos is None:
        raise TrainError(f"{data} is a store of fields; also give its photos with --photos")
    if is_store and photos is not None:
        return Stored(FeatureStore.open(data), open_dataset(photos))
    if not on_the_fly:
        raise TrainError(
            f"{data} is not a store, so it has no targets; first run dvit fit {data} -o STORE, or give --on-the-fly to "
            "fit them in this run"
        )
    if photos is not None:
        raise TrainError("--photos needs a store; with --on-the-fly, give the photos as the data")
    return Photos(open_dataset(data), exact, artifact)


def distill(
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")],
    /,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="RUN")],
    denoiser: str | None = None,
    also: tuple[str, ...] = (),
    fields: str | None = None,
    start: str | None = None,
    resume: tyro.conf.FlagCreatePairsOff[bool] = False,
    training: tyro.conf.OmitArgPrefixes[DistillOptions] = DistillOptions(),  # noqa: B008, frozen
    views: ViewOptions = ViewOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
) -> int:
    """Stage 3: fine-tune the whole ViT to give clean features without an extra block.

    The teacher is the frozen backbone with its denoiser. The folder of the run gets `distilled.safetensors` (the best
    on held-out photos, for `--weights` of all verbs and timm's `checkpoint_path` with `num_classes=0`),
    `last.safetensors`, `log.jsonl`, TensorBoard files, panels, checkpoints, and at the end `run.html`, a page about the
    run. To resume an interrupted run, repeat the command with --resume. On several devices or machines:
    `accelerate launch -m denoising_vit distill ...` or `torchrun -m denoising_vit distill ...`.

    Args:
        data: photos: a folder at any depth (class names are ignored), a text list, or tar shards, local or at an
            address like `https://host/shards-{0000..0009}.tar`.
        out: folder of the run; created if it does not exist.
        denoiser: denoiser of the teacher: a file of `dvit train`, or voc_denoised or imgnet_denoised for the published
            ones. Defaults to the shipped one.
        also: denoisers of further layers, trained with --layer, to distil at the same time, for decoders that read
            several layers.
        fields: a store of `dvit fit` for these photos; its semantic fields replace the denoiser as the teacher. Fitted
            with this backbone, or in a further round with the weights of --start (`dvit fit --weights FILE`).
        start: distilled weights of this backbone to train further: a file, or `distilled` for the package's. Defaults
            to the backbone's own weights.
        resume: resume the run in the folder; the result is bit-identical to that of an uninterrupted run.
        training: length, learning rate and logging.
        views: views of the photos to train on.
        model: the backbone of teacher and student.
    """
    from denoising_vit.data import Dataset
    from denoising_vit.distilled.job import DistillJob

    training.validate()
    views.validate()
    source = _photos_source(data, fields)
    left_out = source.skipped if isinstance(source, Dataset) else ()
    job = DistillJob.prepare(
        source, out, model, training, views, denoiser=denoiser, also=also, start=start, resume=resume
    )
    run = _Run(job.accelerator, out, left_out, lambda: job.skipped)

    def prepared() -> Any:
        found = job.training()
        counts = f"{len(found.sampler.images)} photos to train on, {len(found.held_out.images)} held out"
        processes = job.accelerator.num_processes
        if training.shard and processes == 1:
            run.note("--shard has no effect with one process")
        run.note(f"{counts}; {job.options.steps} steps of {training.views_a_step(processes)} views; run {out}")
        run.note_blanks(training)
        if (rate := training.safer_rate(processes)) is not None:
            run.note(
                f"training with so few views per step has diverged at --learning-rate {training.learning_rate:g}; "
                f"--learning-rate {rate:.2g} is safer"
            )
        return found

    return run(job.teacher.backbone, prepared, job.options, job.folder.distilled)


def _photos_source(data: str, fields: str | None) -> Dataset | Stored:
    """The photos, with their fields if there is a store; TrainError if one is given in place of the other."""
    from denoising_vit.data import open_dataset
    from denoising_vit.denoiser.job import Stored
    from denoising_vit.store import FeatureStore

    if FeatureStore.exists(data):
        raise TrainError(f"{data} is a store; expected photos. Use PHOTOS --fields {data} to use its fields as targets")
    if fields is None:
        return open_dataset(data)
    if not FeatureStore.exists(fields):
        raise TrainError(
            f"{fields} is not a store; first run dvit fit {data} -o {fields}, or give a denoiser (--denoiser)"
        )
    return Stored(FeatureStore.open(fields), open_dataset(data))


class _Run:
    """Displays a run. Only the first of several processes prints.

    ``left_out`` are entries of the data set that are not photos; ``skipped`` returns the photos found unusable so far.
    """

    def __init__(
        self, accelerator: Any, folder: Path, left_out: Iterable[Skipped], skipped: Callable[[], Mapping[str, str]]
    ) -> None:
        self.main: bool = accelerator.is_main_process
        self._accelerator, self._folder = accelerator, folder
        self._left_out, self._skipped, self._reported = [*left_out], skipped, False

    def __call__(self, backbone: Backbone, prepared: Callable[[], Any], options: Any, best: Path) -> int:
        """Run the prepared training, and return the exit code of this process; ``best`` is the file of the best model.

        It returns only after all processes are done, because a launcher kills the others when one fails.
        """
        self.note(
            f"backbone {backbone.extra_repr()} on {backbone.device}, {self._accelerator.num_processes} process(es)"
        )
        try:
            training = prepared()
            with _StepsBar(options.last_step, shown=self.main) as bar:
                progress = training.run(bar.step, bar.look)
        except KeyboardInterrupt:
            self.note("interrupted; continue with --resume")
            self._write_page()
            return INTERRUPTED
        self.print_skipped()
        more = "" if progress.step == options.steps else " (continue with --resume)"
        where = "" if progress.best_step is None else f", the best after step {progress.best_step}: {best}"
        self.note(f"{progress.step} of {options.steps} steps done{more}{where}")
        self._write_page()
        self._accelerator.wait_for_everyone()
        return SOME_FAILED if self.main and (self._skipped() or self._left_out) else OK

    def note_blanks(self, options: RunOptions) -> None:
        """Print the number of content-free images per batch, because a small fraction of a small batch may be 0."""
        if options.blank:
            self.note(f"{options.blanks} of {options.batch_size} images in a batch are content-free (--blank)")

    def note(self, message: str) -> None:
        """Print a message."""
        if self.main:
            print_note(message)

    def print_skipped(self) -> None:
        """Print skipped entries with reasons, once."""
        if self.main and not self._reported:
            self._reported = True
            for name, reason in [*((item.item, item.reason) for item in self._left_out), *self._skipped().items()]:
                print_skipped(name, reason)

    def _write_page(self) -> None:
        """Write the page of the run, if a step is done; a failure is only a warning."""
        from denoising_vit.show.pages.run import write_run_page

        if not self.main or not (self._folder / "log.jsonl").is_file():
            return
        try:
            print_note(f"page {write_run_page(self._folder)}")
        except (DenoisingVitError, OSError) as error:
            print_error(f"the page of the run could not be written ({error})", "warning")


class _StepsBar(OnScreen):
    """A progress bar of steps with the loss, and a line per evaluation."""

    def __init__(self, steps: int, *, shown: bool) -> None:
        self._progress = progress_bar("steps, loss {task.fields[loss]}", shown=shown, speed_estimate_period=300)
        self._task = self._progress.add_task("", total=steps, loss="-")

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Update the bar after a step."""
        self._progress.update(self._task, completed=step, loss=f"{figures['loss']:.3f}")

    def look(self, step: int, figures: dict[str, float]) -> None:
        """Print the metrics of an evaluation."""
        drift = f", class token 1 - cosine {figures['class_drift']:.2g}" if "class_drift" in figures else ""
        self._progress.print(
            f"step {step}: held-out cosine {figures['cosine']:.4f} (raw {figures['raw_cosine']:.4f}), "
            f"1 - cosine {figures['ratio']:.3f} times that of raw, effective rank {figures['rank']:.0f} "
            f"(raw {figures['raw_rank']:.0f}){drift}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
