"""``dvit train``: stage 2, the one-pass denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.exit_codes import INTERRUPTED
from denoising_vit.cli.reporting import print_error, print_note, watch
from denoising_vit.cli.run_reporting import StepsBar, ending, exit_code, tell_page
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.denoiser.options import PairOptions, TrainOptions
from denoising_vit.errors import TrainError
from denoising_vit.progress import no_progress

if TYPE_CHECKING:
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
    """Stage 2: trains a denoiser that cleans features in one forward pass.

    Targets are the semantic fields of stage 1. The folder of the run gets `denoiser.safetensors` (the best on held-out
    images, for `--denoiser`), `last.safetensors`, `log.jsonl`, TensorBoard files, panels, checkpoints, and at the end
    `run.html`, a page about the run. To resume an interrupted run, repeat the command with --resume. On several devices
    or machines: `accelerate launch -m denoising_vit train ...`.

    Args:
        data: a store of `dvit fit`, or photos with --on-the-fly.
        out: folder of the run, created if needed.
        photos: with a store: the photos it was fitted on.
        on_the_fly: fit stage 1 on the photos in this run, without a store.
        resume: resume the run in the folder, with the same result as without an interruption, bit for bit.
        cache: folder for the features of the pairs, which runs with other learning rates or steps can share. Default:
            in the folder of the run.
        artifact: with --on-the-fly: the known artifact of the backbone, a file, `shipped` or `none`.
        training: length, learning rate and logging.
        pairs: which views are training pairs.
        model: the frozen backbone.
        exact: with --on-the-fly: options of stage 1.
    """
    from denoising_vit.denoiser.job import Stored, TrainJob

    training.validate()
    pairs.validate()
    source = _source(data, photos, on_the_fly, exact, artifact)
    # A store names its photos; other files beside them do not matter.
    left_out = () if isinstance(source, Stored) else source.dataset.skipped
    job = TrainJob.prepare(source, out, model, training, pairs, cache=cache, resume=resume)
    main, processes = job.accelerator.is_main_process, job.accelerator.num_processes
    if main:
        print_note(f"backbone {job.backbone.extra_repr()} on {job.backbone.device}, {processes} process(es)")
    try:
        job.fill(watch if main else no_progress)
        if main:
            for name, reason in [*((item.item, item.reason) for item in left_out), *job.skipped.items()]:
                print_error(f"{name}: {reason}", "skipped")
        run = job.training()
        if main:
            print_note(f"{len(run.sampler.images)} images to train on, {len(run.judge.images)} held out; run {out}")
        with StepsBar(training.last_step, shown=main) as bar:
            progress = run.run(bar.step, bar.look)
    except KeyboardInterrupt:
        if main:
            print_note("interrupted; continue with --resume")
            tell_page(out)
        return INTERRUPTED
    if main:
        print_note(ending(progress, training.steps, job.folder.denoiser))
        tell_page(out)
    return exit_code(job.accelerator, some_failed=bool(job.skipped or left_out))


def _source(
    data: str, photos: str | None, on_the_fly: bool, exact: DenoiseOptions, artifact: str | None
) -> Photos | Stored:
    """The photos and their targets.

    Raises:
        TrainError: if the arguments do not fit together.
    """
    from denoising_vit.data import open_dataset
    from denoising_vit.denoiser.job import Photos, Stored
    from denoising_vit.store import FeatureStore

    is_store = FeatureStore.exists(data)
    if is_store and on_the_fly:
        raise TrainError(f"{data} is a store and already contains the fields; leave out --on-the-fly")
    if is_store and photos is None:
        raise TrainError(f"{data} is a store of fields; also give its photos with --photos")
    if is_store and photos is not None:
        return Stored(FeatureStore.open(data), open_dataset(photos))
    if not on_the_fly:
        raise TrainError(
            f"{data} is no store, so it has no targets; run dvit fit {data} -o STORE first, or give --on-the-fly to "
            "fit them now"
        )
    if photos is not None:
        raise TrainError("--photos goes with a store; with --on-the-fly, the data are the photos")
    return Photos(open_dataset(data), exact, artifact)
