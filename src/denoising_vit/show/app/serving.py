"""Opening the page: its address, the model made ready before anybody is let in, and nothing left behind."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from denoising_vit.denoise import denoise_image
from denoising_vit.errors import AppError
from denoising_vit.show.app.keeping import Keep
from denoising_vit.show.app.models import Models
from denoising_vit.show.app.options import AppOptions
from denoising_vit.show.app.samples import find_samples

#: Seconds that a running answer has to end in when the page is closed: at most a batch of views.
_PATIENCE = 20.0

#: Ports after the one asked for that are tried, to name a free one.
_TRIED = 100


@dataclass(frozen=True)
class Opened:
    """A page that can be reached.

    Attributes:
        url: its address on this computer or in the network.
        shared: its public address, if it has one.
    """

    url: str
    shared: str | None


@contextlib.contextmanager
def serve(models: Models, options: AppOptions) -> Iterator[Opened]:
    """The page, open for as long as the block lasts.

    Raises:
        AppError: if Gradio is not installed, the port is in use, or the page cannot be opened.
        BackboneError, WeightsError: if the backbone of the start cannot be loaded.
        DenoiserError, ArtifactError, FormatError: if what was given for it does not fit.
    """
    options.validate()
    require_gradio()
    require_free(options.host, options.port)
    samples = find_samples(options.examples)
    warm(models)
    with Keep() as keep, _environment(GRADIO_TEMP_DIR=str(keep.served), GRADIO_ANALYTICS_ENABLED="False"):
        from denoising_vit.show.app.handlers import Handlers
        from denoising_vit.show.app.page import build
        from denoising_vit.show.app.theme import CSS, theme

        handlers = Handlers(models, keep, samples)
        page = build(handlers)
        try:
            _, url, shared = page.launch(
                server_name=options.host,
                server_port=options.port,
                share=options.share,
                max_file_size=int(options.max_upload * 1_000_000),
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                ssr_mode=False,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                theme=theme(),
                css=CSS,
            )
        except (OSError, RuntimeError, ValueError) as error:  # another process was faster, or no relay is reached
            raise AppError(f"the page could not be opened at {options.host}:{options.port} ({error})") from error
        try:
            yield Opened(url, shared)
        finally:
            handlers.visitors.all_leave(_PATIENCE)
            page.close(verbose=False)


def require_gradio() -> None:
    """Refuses where the extra is not installed.

    Raises:
        AppError: naming it.
    """
    if importlib.util.find_spec("gradio") is None:
        raise AppError("the page needs gradio: install the extra `app` (pip install 'denoising-vit[app]')")


def require_free(host: str, port: int) -> None:
    """Refuses a port that is in use, and an address that this computer does not have.

    Raises:
        AppError: naming the next free port.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise AppError(f"host {host!r} is no address that can be listened at ({error})") from error
    if _is_free(found[0], host, port):
        return
    others = range(port + 1, min(port + _TRIED, 65535) + 1)
    free = next((other for other in others if _is_free(found[0], host, other)), None)
    if free is None:
        raise AppError(
            f"{host} cannot be listened at, at port {port} or the {len(others)} after it: expected an address of this "
            "computer, with a free port"
        )
    raise AppError(f"port {port} of {host} is in use; the next free one is {free}: dvit app --port {free}")


def _is_free(family: int, host: str, port: int) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError:
            return False
    return True


def warm(models: Models) -> None:
    """Loads the backbone of the start, and has it denoise once: the first visitor then waits no longer than others."""
    import denoising_vit.maps  # noqa: F401, matplotlib takes seconds to import

    model = models.require_given()
    if model.denoiser is not None:
        grey = np.full((model.backbone.patch_size, model.backbone.patch_size, 3), 128, np.uint8)
        denoise_image(model.backbone, grey, method="denoiser", denoiser=model.denoiser)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables of the environment for as long as a block lasts; Gradio knows no other way to be told these."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
