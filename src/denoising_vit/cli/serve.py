"""``dvit app``: the page to play with."""

from __future__ import annotations

import signal
import threading

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.exit_codes import INTERRUPTED
from denoising_vit.cli.reporting import print_error, print_note
from denoising_vit.show.app.options import AppOptions


def app(
    page: tyro.conf.OmitArgPrefixes[AppOptions] = AppOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    denoiser: str | None = None,
    artifact: str | None = None,
) -> int:
    """A page in the browser: raw and denoised features of your photos side by side. Needs the extra `app`.

    Args:
        page: where it is, and what it takes.
        model: the backbone it begins with, and how all are run.
        denoiser: the backbone's denoiser: a file, voc_denoised or imgnet_denoised for the published ones; without it,
            the one that comes with the package.
        artifact: the backbone's artifact, for subtract and exact: a file of `dvit calibrate`, or `shipped`. Without it,
            exact fits one in each photo, and subtract takes the one that comes with the package.
    """
    page.validate()
    from denoising_vit.show.app.models import Models
    from denoising_vit.show.app.serving import serve

    if page.share:
        print_error(
            "--share opens a public address: whoever has it can use this computer's page, and photos pass through "
            "Gradio's relay",
            "warning",
        )
    elif not page.local:
        print_error(
            f"--host {page.host} opens the page to the network: whoever reaches this computer can use it, without a "
            "password and without encryption",
            "warning",
        )
    print_note(f"loading {model.backbone} ...")
    with serve(Models(model, denoiser, artifact), page) as opened:
        print_note(f"ready: {opened.url}" + (f" and {opened.shared}" if opened.shared else ""))
        print_note("Ctrl-C closes the page and removes its files")
        _wait()
    return INTERRUPTED


def _wait() -> None:
    """Returns when the process is asked to end, by Ctrl-C or by a service manager: its files are removed either way."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print_note("closing the page")
    finally:
        signal.signal(signal.SIGTERM, before)
