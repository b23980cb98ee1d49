"""Loading denoisers: shipped with the package, from files, or from the hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from denoising_vit.artifact import SHIPPED
from denoising_vit.backbones import SEEDS, Backbone
from denoising_vit.backbones.recorded import is_recorded
from denoising_vit.denoiser.module import Denoiser, read_denoiser
from denoising_vit.denoiser.published import VARIANTS, fetch_published, published_variants
from denoising_vit.errors import DenoiserError, FormatError, HubError

#: Published checkpoints that are denoisers; the others are whole models.
DENOISED = tuple(variant for variant in VARIANTS if variant.endswith("denoised"))

_SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True, eq=False)
class FoundDenoiser:
    """A denoiser for a backbone, with its record.

    Attributes:
        denoiser: on the device and in the precision of the backbone, or unchanged if it was given as a module.
        source: ``shipped``, the name of a file without its folder, a published variant, a hub id, or ``given`` for a
            module.
        digest: its :func:`denoiser_digest` before the conversion to the backbone's precision, so that it is the same
            on all hardware.
    """

    denoiser: Denoiser
    source: str
    digest: str

    @property
    def recorded(self) -> dict[str, str]:
        """Source and digest, as JSON values."""
        return {"source": self.source, "digest": self.digest}


#: A denoiser, a found one, or a source for :func:`load_denoiser`.
GivenDenoiser = Denoiser | FoundDenoiser | str | Path


def load_denoiser(source: str | Path, *, backbone: Backbone | None = None) -> Denoiser:
    """Loads a denoiser, frozen and in evaluation mode.

    Args:
        source: name of a model with a shipped denoiser; a file (.safetensors, or a published .pth); a folder of
            ``save_pretrained``; ``voc_denoised`` or ``imgnet_denoised`` to download a published one; a hub id
            (``owner/name``); or, with a backbone, ``shipped``.
        backbone: its backbone; the denoiser is checked, and moved to the backbone's device and precision.

    Raises:
        DenoiserError: if it is for another backbone, or cannot be found or downloaded.
        FormatError: if the file is damaged or of another kind.
    """
    if backbone is not None:
        return find_denoiser(source, backbone).denoiser
    return _found(str(source), None).requires_grad_(False)


def find_denoiser(given: GivenDenoiser | None, backbone: Backbone) -> FoundDenoiser:
    """The denoiser of a backbone, given in any form; the shipped one if None is given.

    A module is used unchanged: moving it to another device would change the caller's object.

    Raises:
        DenoiserError: if it is for another backbone, or cannot be found or downloaded; the message says what to do.
        FormatError: if the file is damaged or of another kind.
    """
    if isinstance(given, FoundDenoiser):
        given.denoiser.require_of(backbone)
        return given
    if isinstance(given, Denoiser):
        given.require_of(backbone)
        return FoundDenoiser(given, source_name(given), denoiser_digest(given))
    if given is None or str(given) == SHIPPED:
        found = find_shipped(backbone)
        if found is None:
            raise DenoiserError(_none_shipped(backbone))
        return found
    if not isinstance(given, str | Path):
        raise DenoiserError(f"expected a denoiser as Denoiser, file or name, got {type(given).__name__}")
    denoiser = _found(str(given), backbone)
    denoiser.require_of(backbone)
    return _ready(denoiser, source_name(given), backbone)


def find_shipped(backbone: Backbone) -> FoundDenoiser | None:
    """The shipped denoiser for this backbone with these weights, layer and stride; None if there is none.

    Raises:
        FormatError: if its file is damaged.
    """
    architecture = backbone.name.split(".")[0]
    for path in sorted(_SHIPPED.glob("*.safetensors")):
        if path.name.split(".")[0] == architecture:  # a fingerprint costs a forward pass
            denoiser = read_denoiser(path)
            if denoiser.trained_for is not None and is_recorded(denoiser.trained_for, backbone):
                return _ready(denoiser, SHIPPED, backbone)
    return None


def denoiser_digest(denoiser: Denoiser) -> str:
    """SHA-256 of a denoiser's shape and float16 values."""
    digest = hashlib.sha256(denoiser.extra_repr().encode())
    for value in denoiser.state_dict().values():
        digest.update(value.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()


def source_name(given: GivenDenoiser) -> str:
    """A short name of the source of a denoiser; for a file, its name without the folder."""
    if isinstance(given, FoundDenoiser):
        return given.source
    if isinstance(given, Denoiser):
        return "given"
    path = Path(given).expanduser()
    return path.name if path.is_file() else str(given)


def _ready(denoiser: Denoiser, source: str, backbone: Backbone) -> FoundDenoiser:
    digest = denoiser_digest(denoiser)
    denoiser = denoiser.requires_grad_(False).to(device=backbone.device, dtype=backbone.dtype)
    return FoundDenoiser(denoiser, source, digest)


def _none_shipped(backbone: Backbone) -> str:
    published = ", or --denoiser voc_denoised for the published one"
    return (
        f"no denoiser of {backbone.name} with these weights ({backbone.weights}), layer {backbone.layer} and stride "
        f"{backbone.stride} comes with the package; train one by dvit train and give it by --denoiser FILE"
        f"{published if 'voc_denoised' in published_variants(backbone.name) else ''}"
    )


def _found(source: str, backbone: Backbone | None) -> Denoiser:
    path = Path(source).expanduser()
    if path.is_file():
        return read_denoiser(path)
    if source == SHIPPED:
        raise DenoiserError("which denoiser comes with the package depends on the backbone: give the backbone as well")
    if source in DENOISED:
        if backbone is None:
            raise DenoiserError(f"{source} was published for many models: give the backbone, or the file")
        return read_denoiser(fetch_published(backbone.name, source))
    if source in VARIANTS:
        raise DenoiserError(
            f"{source} is a whole model, not a denoiser: load it as the weights of the backbone, "
            "load_backbone(name, weights=FILE) or --weights FILE"
        )
    if source.split(".")[0] in {name.split(".")[0] for name in SEEDS}:
        return _shipped(source)
    folder = bool(source) and path.is_dir()
    if not folder and (path.suffix in (".safetensors", ".pth", ".pt") or source.count("/") != 1):
        raise FormatError(f"{source}: no such denoiser file, and no model or variant of that name")
    try:
        return Denoiser.from_pretrained(source)
    except HubError as error:
        raise DenoiserError(f"{source} is no file, and {error}") from error


def _shipped(model: str) -> Denoiser:
    for path in sorted(_SHIPPED.glob(f"{model}.*safetensors")):  # possibly with a tag of other weights
        return read_denoiser(path)
    raise DenoiserError(f"no denoiser of {model} comes with the package; published ones: --denoiser voc_denoised")
