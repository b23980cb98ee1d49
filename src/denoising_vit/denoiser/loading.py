"""Loading denoisers: shipped with the package, from files, or from the hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from denoising_vit.artifact import SHIPPED
from denoising_vit.backbones import SEEDS, Backbone
from denoising_vit.backbones.recorded import is_recorded
from denoising_vit.denoiser.module import Denoiser, no_such_file, read_denoiser
from denoising_vit.denoiser.published import VARIANTS, fetch_published, published_variants
from denoising_vit.errors import DenoiserError, HubError

#: Published checkpoints that are denoisers; the others are whole models.
DENOISED = tuple(variant for variant in VARIANTS if variant.endswith("denoised"))

_SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True, eq=False)
class FoundDenoiser:
    """A denoiser for a backbone, with its record.

    Attributes:
        denoiser: on the device and in the precision of the backbone, or unchanged if given as a module.
        source: ``shipped``, the name of a file without its folder, a published variant, a hub id, or ``given`` for a
            module.
        digest: its :func:`denoiser_digest` before the conversion to the backbone's precision, so that it is the same on
            all hardware.
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
    """Load a denoiser, frozen and in evaluation mode.

    Args:
        source: name of a model with a shipped denoiser; a file (.safetensors, or a published .pth); a folder of
            ``save_pretrained``; ``voc_denoised`` or ``imgnet_denoised`` to download a published one; a hub id
            (``owner/name``); or, with a backbone, ``shipped``.
        backbone: its backbone; the denoiser is checked, and moved to the backbone's device and precision.

    Raises:
        DenoiserError: if it belongs to another backbone, or cannot be found or downloaded.
        FormatError: if the file is damaged or of another kind.
    """
    if backbone is not None:
        return find_denoiser(source, backbone).denoiser
    return _found(str(source), None).requires_grad_(False)


def find_denoiser(given: GivenDenoiser | None, backbone: Backbone) -> FoundDenoiser:
    """The denoiser of a backbone, given in any form; the shipped denoiser if None is given.

    A module is used unchanged, because moving it to another device would change the caller's object.

    Raises:
        DenoiserError: if it belongs to another backbone, or cannot be found or downloaded; the message says what to do.
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
        raise DenoiserError(f"expected a denoiser as a Denoiser, file or name, got {type(given).__name__}")
    denoiser = _found(str(given), backbone)
    denoiser.require_of(backbone)
    return _ready(denoiser, source_name(given), backbone)


def find_shipped(backbone: Backbone) -> FoundDenoiser | None:
    """The shipped denoiser for this backbone's weights, layer and stride; None if there is none.

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
    """Short name of a denoiser's source; for a file, its name without the folder."""
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
        f"the package has no denoiser for {backbone.name} with these weights ({backbone.weights}), layer "
        f"{backbone.layer} and stride {backbone.stride}; train one with dvit train and pass it with --denoiser FILE"
        f"{published if 'voc_denoised' in published_variants(backbone.name) else ''}"
    )


def _found(source: str, backbone: Backbone | None) -> Denoiser:
    path = Path(source).expanduser()
    if path.is_file():
        return read_denoiser(path)
    if source == SHIPPED:
        raise DenoiserError("the shipped denoiser depends on the backbone: also give the backbone")
    if source in DENOISED:
        if backbone is None:
            raise DenoiserError(f"{source} was published for several models: also give the backbone, or give the file")
        return read_denoiser(fetch_published(backbone.name, source))
    if source in VARIANTS:
        raise DenoiserError(
            f"{source} is a whole model, not a denoiser: load it as the backbone's weights, with "
            "load_backbone(name, weights=FILE) or --weights FILE"
        )
    if source.split(".")[0] in {name.split(".")[0] for name in SEEDS}:
        return _shipped(source)
    folder = bool(source) and path.is_dir()
    if not folder and (path.suffix in (".safetensors", ".pth", ".pt") or source.count("/") != 1):
        raise no_such_file(source)
    try:
        return Denoiser.from_pretrained(source)
    except HubError as error:
        raise DenoiserError(f"{source} is not a file, and {error}") from error


def _shipped(model: str) -> Denoiser:
    for path in sorted(_SHIPPED.glob(f"{model}.*safetensors")):  # the name may have a tag for other weights
        return read_denoiser(path)
    raise DenoiserError(f"the package has no denoiser for {model}; published ones: --denoiser voc_denoised")
