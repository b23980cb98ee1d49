"""``dvit distill``: stage 3, a ViT that gives clean features by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.exit_codes import INTERRUPTED
from denoising_vit.cli.reporting import print_error, print_note
from denoising_vit.cli.run_reporting import StepsBar, ending, exit_code, tell_page
from denoising_vit.distilled.options import DistillOptions
from denoising_vit.errors import TrainError
from denoising_vit.training.options import ViewOptions

if TYPE_CHECKING:
    from denoising_vit.data import Dataset
    from denoising_vit.denoiser.job import Stored


def distill(
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")],
    /,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="RUN")],
    denoiser: str | None = None,
    also: tuple[str, ...] = (),
    fields: str | None = None,
    resume: tyro.conf.FlagCreatePairsOff[bool] = False,
    training: tyro.conf.OmitArgPrefixes[DistillOptions] = DistillOptions(),  # noqa: B008, frozen
    views: ViewOptions = ViewOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
) -> int:
    """Stage 3: fine-tunes the whole ViT to give clean features without an extra block.

    The teacher is the frozen backbone with its denoiser. The folder of the run gets `distilled.safetensors` (the best
    on held-out photos, for `--weights` of all verbs and timm's `checkpoint_path` with `num_classes=0`),
    `last.safetensors`, `log.jsonl`, TensorBoard files, panels, checkpoints, and at the end `run.html`, a page about the
    run. To resume an interrupted run, repeat the command with --resume. On several devices or machines:
    `accelerate launch -m denoising_vit distill ...` or `torchrun -m denoising_vit distill ...`.

    Args:
        data: photos: a folder at any depth (class names are ignored), a text list, or tar shards, local or at an
            address like `https://host/shards-{0000..0009}.tar`.
        out: folder of the run, created if needed.
        denoiser: denoiser of the teacher: a file of `dvit train`, or voc_denoised or imgnet_denoised for the published
            ones. Default: the shipped one.
        also: denoisers of further layers, trained with --layer, to be distilled at the same time, for decoders that
            read several layers.
        fields: a store that `dvit fit` made of these photos; its semantic fields replace the denoiser as the teacher.
        resume: resume the run in the folder, with the same result as without an interruption, bit for bit.
        training: length, learning rate and logging.
        views: which views of the photos.
        model: the backbone of teacher and student.
    """
    from denoising_vit.data import Dataset
    from denoising_vit.distilled.job import DistillJob

    training.validate()
    views.validate()
    source = _source(data, fields)
    left_out = source.skipped if isinstance(source, Dataset) else ()
    job = DistillJob.prepare(source, out, model, training, views, denoiser=denoiser, also=also, resume=resume)
    main, processes = job.accelerator.is_main_process, job.accelerator.num_processes
    if main:
        print_note(
            f"backbone {job.teacher.backbone.extra_repr()} on {job.teacher.backbone.device}, {processes} process(es)"
        )
    try:
        run = job.training()
        if main:
            told = f"{len(run.sampler.images)} photos to train on, {len(run.judge.images)} held out"
            if training.shard and processes == 1:
                print_note("--shard has no effect with one process")
            print_note(f"{told}; {job.options.steps} steps of {run.sampler.pairs} views; run {out}")
            if (rate := training.safer_rate(processes)) is not None:
                print_note(
                    f"runs with steps of so few views have diverged at --learning-rate {training.learning_rate:g}; "
                    f"--learning-rate {rate:.2g} is safer"
                )
        with StepsBar(job.options.last_step, shown=main) as bar:
            progress = run.run(bar.step, bar.look)
    except KeyboardInterrupt:
        if main:
            print_note("interrupted; --resume goes on from the last checkpoint")
            tell_page(out)
        return INTERRUPTED
    skipped = job.skipped
    if main:
        for name, reason in [*((item.item, item.reason) for item in left_out), *skipped.items()]:
            print_error(f"{name}: {reason}", "skipped")
        print_note(ending(progress, job.options.steps, job.folder.distilled))
        tell_page(out)
    return exit_code(job.accelerator, some_failed=bool(skipped or left_out))


def _source(data: str, fields: str | None) -> Dataset | Stored:
    """The photos, with their fields if there is a store.

    Raises:
        TrainError: if a store is given where photos are expected, or the other way round.
    """
    from denoising_vit.data import open_dataset
    from denoising_vit.denoiser.job import Stored
    from denoising_vit.store import FeatureStore

    if FeatureStore.exists(data):
        raise TrainError(
            f"{data} is a store; expected photos. Use PHOTOS --fields {data} to take its fields as targets"
        )
    if fields is None:
        return open_dataset(data)
    if not FeatureStore.exists(fields):
        raise TrainError(
            f"{fields} is no store; run dvit fit {data} -o {fields} first, or give a denoiser (--denoiser)"
        )
    return Stored(FeatureStore.open(fields), open_dataset(data))
