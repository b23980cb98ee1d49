"""``dvit prepare``: all files for a list of backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from denoising_vit.cli.reporting import print_error, print_left_out, print_note, show_progress
from denoising_vit.cli.streams import OK, SOME_FAILED, interruptible
from denoising_vit.preparation.options import PrepareOptions


def prepare(
    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")],
    photos: Annotated[str, tyro.conf.arg(metavar="DATA")],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")],
    preparing: tyro.conf.OmitArgPrefixes[PrepareOptions] = PrepareOptions(),  # noqa: B008, frozen
    push: Annotated[str | None, tyro.conf.arg(metavar="OWNER")] = None,
) -> int:
    """Prepare backbones for use: artifact, subspace, registers, denoiser, diagnosis and model card of each.

    Each backbone gets a folder DIR/NAME with files for the options of the other verbs: artifact.safetensors for
    --artifact, subspace.safetensors for --subspace, denoiser.safetensors for --denoiser and, if a few neurons write
    outlier tokens, registers.safetensors for --registers; also diagnosis.html and a model card, README.md. The same
    command resumes an interrupted run and skips finished steps. A backbone that fails does not stop the others; the
    reason is printed at the end and recorded in prepared.json.

    Args:
        models: timm names or hf:ID, as for `--backbone` of the other verbs.
        photos: unlabelled photos: a folder, text list, tar shards or URL, as for `dvit fit`.
        out: folder for the results; created if it does not exist.
        preparing: options of the preparation.
        push: upload the safetensors files and the card of each folder to the Hugging Face hub, as OWNER/NAME. Log in
            first (`hf auth login`). The diagnosis is not uploaded, because it shows your photos.
    """
    preparing.validate()
    from denoising_vit.cli.outputs import require_writable
    from denoising_vit.data import open_dataset
    from denoising_vit.preparation.prepare import prepare as prepare_all

    dataset = open_dataset(photos)
    print_left_out(dataset)
    require_writable(out)
    with interruptible("interrupted; run the command again to resume"):
        failed = prepare_all(models, dataset, out, preparing, push=push, watch=show_progress, say=print_note)
    for model, reason in failed.items():
        print_error(f"{model}: {reason}", "failed")
    print_note(f"{len(models) - len(failed)} of {len(models)} backbones prepared in {out}")
    return SOME_FAILED if failed else OK
