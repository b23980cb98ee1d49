"""Serve the page: check the address, load the model before the first visitor, clean up at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from denoising_vit.data import find_photos
from denoising_vit.denoise import denoise_image
from denoising_vit.errors import AppError
from denoising_vit.extractors import KINDS
from denoising_vit.files import extra_hint
from denoising_vit.show.app.answers import Keep, Settings, cleaner_of
from denoising_vit.show.app.models import Models
from denoising_vit.show.options import AppOptions

#: Seconds to wait for running work when the page is closed.
_PATIENCE = 20.0

#: Number of further ports to try, to suggest a free one.
_TRIED = 100

_SHIPPED = Path(__file__).parent / "samples"

#: Public-domain photographs in scikit-image's own folder.
_SCIKIT_IMAGE = {"astronaut": "astronaut.png", "coffee": "coffee.png", "rocket": "rocket.jpg"}


@dataclass(frozen=True)
class Opened:
    """The addresses of an open page."""

    url: str  # on this computer
    shared: str | None  # public address, if any


@contextlib.contextmanager
def serve(models: Models, options: AppOptions) -> Iterator[Opened]:
    """Serve the page until the block ends.

    Raises:
        AppError: if Gradio is not installed, the port is in use, or the page cannot be opened.
        BackboneError, WeightsError: if the first backbone cannot be loaded.
        DenoiserError, ArtifactError, FormatError: if its denoiser or artifact does not fit.
    """
    options.validate()
    if importlib.util.find_spec("gradio") is None:
        raise AppError(f"the page needs gradio: install {extra_hint('app')}")
    require_free(options.host, options.port)
    samples = find_samples(options.examples)
    warm(models)
    with Keep() as keep, _environment(GRADIO_TEMP_DIR=str(keep.served), GRADIO_ANALYTICS_ENABLED="False"):
        from denoising_vit.show.app.handlers import Handlers
        from denoising_vit.show.app.page import CSS, build, theme

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
        except (OSError, RuntimeError, ValueError) as error:  # the port was taken since the check, or there is no relay
            raise AppError(f"the page could not be opened at {options.host}:{options.port} ({error})") from error
        try:
            yield Opened(url, shared)
        finally:
            handlers.visitors.all_leave(_PATIENCE)
            page.close(verbose=False)


def require_free(host: str, port: int) -> None:
    """Check that the page can listen at this address.

    Raises:
        AppError: if the port is in use, naming the next free one, or if the address does not belong to this computer.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise AppError(f"cannot listen on host {host!r} ({error})") from error
    if _is_free(found[0], host, port):
        return
    others = range(port + 1, min(port + _TRIED, 65535) + 1)
    free = next((other for other in others if _is_free(found[0], host, other)), None)
    if free is None:
        raise AppError(
            f"cannot listen on {host} at ports {port} to {port + len(others)}; expected an address of this computer "
            "with a free port"
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


def find_samples(folder: Path | None = None) -> dict[str, Path]:
    """Sample photos of the folder (AppError if it has none), the package, and scikit-image if installed, by name."""
    own = {}
    if folder is not None:
        photos, _ = find_photos([str(folder)])
        if not photos:
            raise AppError(f"examples must be a folder with photos, got {folder}, which has none")
        own = {str(path.relative_to(folder)): path for path in photos}
    shipped = {path.stem: path for path in sorted(_SHIPPED.glob("*.jpg"))}
    return own | {name: path for name, path in (shipped | _of_scikit_image()).items() if name not in own}


def _of_scikit_image() -> dict[str, Path]:
    spec = importlib.util.find_spec("skimage")  # not imported, which takes a second
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(spec.submodule_search_locations[0]) / "data"
    return {name: folder / file for name, file in _SCIKIT_IMAGE.items() if (folder / file).is_file()}


def warm(models: Models) -> None:
    """Load the first backbone and run it once, so that the first visitor does not wait longer than others."""
    import denoising_vit.maps  # noqa: F401, matplotlib takes seconds to import

    model = models.require_given()
    method = model.methods[0]
    if KINDS[method].one_pass:
        grey = np.full((model.backbone.patch_size, model.backbone.patch_size, 3), 128, np.uint8)
        cleaner = cleaner_of(model, Settings(model.backbone.name, method))
        denoise_image(model.backbone, grey, method=method, **cleaner)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for a block; Gradio has no other way to configure these."""
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
