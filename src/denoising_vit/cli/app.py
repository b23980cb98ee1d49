"""Verbs, and how errors reach people."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from denoising_vit.cli.exit_codes import INTERRUPTED, OK, WRONG_USAGE

_DESCRIPTION = "Artifact-free dense features from any Vision Transformer."


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a verb and exits: 0 all succeeded, 1 some items failed, 2 wrong usage, 130 interrupted."""
    try:
        code = run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone (`dvit models | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    sys.exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb and returns its exit code.

    Raises:
        SystemExit: from the parser, with code 2 for wrong usage and 0 for ``--help``.
    """
    # Imports take seconds (torch, timm); inside, so that Ctrl-C during them ends as quietly as any other time.
    import tyro

    from denoising_vit.cli.calibrate import calibrate
    from denoising_vit.cli.denoise import denoise
    from denoising_vit.cli.diagnose import diagnose
    from denoising_vit.cli.evaluate import knn, segmentation
    from denoising_vit.cli.evaluate_artifacts import artifacts
    from denoising_vit.cli.evaluate_correspondence import correspondence
    from denoising_vit.cli.evaluate_depth import depth
    from denoising_vit.cli.evaluate_discovery import discovery
    from denoising_vit.cli.fit import fit
    from denoising_vit.cli.models import models
    from denoising_vit.cli.report import report
    from denoising_vit.cli.reporting import print_error
    from denoising_vit.cli.reproduce import reproduce
    from denoising_vit.cli.store import export, info, verify
    from denoising_vit.cli.train import train
    from denoising_vit.errors import DenoisingVitError

    app = tyro.extras.SubcommandApp()
    app.command(denoise)
    app.command(fit)
    app.command(train)
    app.command(calibrate)
    app.command(diagnose)
    evaluate = tyro.extras.SubcommandApp()
    evaluate.command(knn)
    evaluate.command(segmentation)
    evaluate.command(depth)
    evaluate.command(discovery)
    evaluate.command(correspondence)
    evaluate.command(artifacts)
    app.command(evaluate, name="evaluate")
    app.command(report)
    app.command(reproduce)
    app.command(models)
    store = tyro.extras.SubcommandApp()
    store.command(info)
    store.command(verify)
    store.command(export)
    app.command(store, name="store")
    try:
        return app.cli(args=arguments, prog="dvit", description=_DESCRIPTION) or OK
    except DenoisingVitError as error:
        print_error(str(error))
        return WRONG_USAGE
