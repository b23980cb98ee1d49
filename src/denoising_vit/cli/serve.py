"""``dvit app``: the browser page."""

from __future__ import annotations

import signal
import threading

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.reporting import print_error, print_note
from denoising_vit.cli.streams import INTERRUPTED
from denoising_vit.show.options import AppOptions


def app(
    page: tyro.conf.OmitArgPrefixes[AppOptions] = AppOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    denoiser: str | None = None,
    artifact: str | None = None,
) -> int:
    """Serve a browser page that shows raw and denoised features of your photos side by side. Needs the extra `app`.

    Args:
        page: address and limits of the page.
        model: the first backbone; its device and precision apply to all.
        denoiser: denoiser of the backbone: a file, voc_denoised or imgnet_denoised for the published ones; defaults to
            the one in the package.
        artifact: artifact of the backbone for subtract and exact: a file of `dvit calibrate`, or `shipped`. By default,
            exact fits one in each photo, and subtract uses the one in the package.
    """
    page.validate()
    from denoising_vit.show.app.models import Models
    from denoising_vit.show.app.serving import serve

    if page.share:
        print_error(
            "--share opens a public address: anyone with the address can use the page on this computer, and photos "
            "pass through Gradio's relay",
            "warning",
        )
    elif not page.local:
        print_error(
            f"--host {page.host} opens the page to the network: anyone who can reach this computer can use it, without "
            "a password and without encryption",
            "warning",
        )
    print_note(f"loading {model.backbone} ...")
    with serve(Models(model, denoiser, artifact), page) as opened:
        print_note(f"ready: {opened.url}" + (f" and {opened.shared}" if opened.shared else ""))
        print_note("press Ctrl-C to stop; uploaded photos and their results are then deleted")
        _wait()
    return INTERRUPTED


def _wait() -> None:
    """Wait for Ctrl-C or SIGTERM; files are removed in either case."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print_note("stopping")
    finally:
        signal.signal(signal.SIGTERM, before)
