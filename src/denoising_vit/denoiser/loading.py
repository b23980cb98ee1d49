"""From a name, a file, a hub id or nothing at all to the denoiser of a backbone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from denoising_vit.artifact import SHIPPED
from denoising_vit.backbones import SEEDS, Backbone
from denoising_vit.backbones.recorded import is_recorded
from denoising_vit.backbones.runtime import offline_if_unreachable
from denoising_vit.denoiser.files import read_denoiser, require_finite
from denoising_vit.denoiser.module import Denoiser
from denoising_vit.denoiser.published import VARIANTS
from denoising_vit.denoiser.published.checkpoints import fetch_published, published_variants
from denoising_vit.errors import DenoiserError, FormatError

#: Checkpoints that are denoisers; the others are whole models.
DENOISED = tuple(variant for variant in VARIANTS if variant.endswith("denoised"))

_SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True, eq=False)
class FoundDenoiser:
    """A denoiser that is ready for the features of a backbone, and what is recorded with results of it.

    Attributes:
        denoiser: of the backbone, on its device and in its precision; as it was given, where it was given as a module.
        source: where it comes from: ``shipped``, the name of a file without its folder, a published variant, a hub id,
            or ``given`` for a module.
        digest: :func:`denoiser_digest` of it, taken before it was put into the backbone's precision: what made a result
            is the same denoiser on all hardware.
    """

    denoiser: Denoiser
    source: str
    digest: str

    @property
    def recorded(self) -> dict[str, str]:
        """What identifies it, as JSON values."""
        return {"source": self.source, "digest": self.digest}


#: A denoiser, one that was found before, or what :func:`load_denoiser` takes.
GivenDenoiser = Denoiser | FoundDenoiser | str | Path


def load_denoiser(source: str | Path, *, backbone: Backbone | None = None) -> Denoiser:
    """A denoiser, in evaluation mode and frozen.

    Args:
        source: a model's name, for the denoiser that comes with the package; a file of ours (.safetensors) or a
            published one (.pth); ``voc_denoised`` or ``imgnet_denoised``, which are fetched from the hub; a hub id
            (``owner/name``) that holds one; or, with a backbone, ``shipped``.
        backbone: that it is for: it is checked, and put on the backbone's device in its precision.

    Raises:
        DenoiserError: if it is for another backbone, or cannot be found or fetched.
        FormatError: if the file is damaged or something else.
    """
    if backbone is not None:
        return find_denoiser(source, backbone).denoiser
    return _found(str(source), None).requires_grad_(False)


def find_denoiser(given: GivenDenoiser | None, backbone: Backbone) -> FoundDenoiser:
    """The denoiser of a backbone, given in any form; the one that comes with the package where none is given.

    A module that is given is used as it is, wherever it is: moving it would change what belongs to the caller.

    Raises:
        DenoiserError: if it is for another backbone, or cannot be found or fetched; it says what to do then.
        FormatError: if the file is damaged or something else.
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
    """The denoiser that comes with the package for this backbone with these weights, layer and stride; None if none.

    One that does not say what it was trained for is none: that it fits cannot be known.

    Raises:
        FormatError: if its file is damaged.
    """
    architecture = backbone.name.split(".")[0]
    for path in sorted(_SHIPPED.glob("*.safetensors")):
        if path.name.split(".")[0] == architecture:  # fingerprints cost a forward pass
            denoiser = read_denoiser(path)
            if denoiser.trained_for is not None and is_recorded(denoiser.trained_for, backbone):
                return _ready(denoiser, SHIPPED, backbone)
    return None


def shipped_denoiser_for(backbone: Backbone) -> Denoiser | None:
    """What :func:`find_shipped` finds, without its record."""
    found = find_shipped(backbone)
    return None if found is None else found.denoiser


def denoiser_digest(denoiser: Denoiser) -> str:
    """SHA-256 of a denoiser's values as a file holds them (float16), and of its shape."""
    digest = hashlib.sha256(denoiser.extra_repr().encode())
    for value in denoiser.state_dict().values():
        digest.update(value.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()


def source_name(given: GivenDenoiser) -> str:
    """A denoiser that was asked for as people tell it from others: a file by its name, without its folder."""
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
    if path.suffix in (".safetensors", ".pth", ".pt") or source.count("/") != 1:
        raise FormatError(f"{source}: no such denoiser file, and no model or variant of that name")
    try:
        with offline_if_unreachable():
            found = Denoiser.from_pretrained(source, strict=True).eval()  # what is missing is never made up
        require_finite(found.state_dict(), source)
        return found
    except FormatError:
        raise
    except Exception as error:  # the hub's client raises many kinds: network, missing file, damaged cache
        reason = str(error).strip().splitlines()
        raise DenoiserError(
            f"{source} is no file, and could not be fetched from the hub ({type(error).__name__}: "
            f"{reason[0] if reason else 'no reason given'})"
        ) from error


def _shipped(model: str) -> Denoiser:
    for path in sorted(_SHIPPED.glob(f"{model}.*safetensors")):  # the tag of other weights may follow
        return read_denoiser(path)
    raise DenoiserError(f"no denoiser of {model} comes with the package; published ones: --denoiser voc_denoised")
