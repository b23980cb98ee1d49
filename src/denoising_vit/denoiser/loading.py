"""load_denoiser: one function from a name, a file or a hub id to a denoiser."""

from __future__ import annotations

from pathlib import Path

from denoising_vit.backbones import SEEDS, Backbone
from denoising_vit.backbones.loading import offline_if_unreachable
from denoising_vit.denoiser.files import read_denoiser, require_finite
from denoising_vit.denoiser.module import Denoiser
from denoising_vit.denoiser.published import fetch_published
from denoising_vit.errors import DenoiserError, FormatError
from denoising_vit.published import VARIANTS

#: Checkpoints that are denoisers; the others are whole models.
DENOISED = tuple(variant for variant in VARIANTS if variant.endswith("denoised"))

_SHIPPED = Path(__file__).parent / "shipped"


def load_denoiser(source: str | Path, *, backbone: Backbone | None = None) -> Denoiser:
    """A denoiser, in evaluation mode and frozen.

    Args:
        source: a model's name, for the denoiser that comes with the package; a file of ours (.safetensors) or a
            published one (.pth); ``voc_denoised`` or ``imgnet_denoised``, which are fetched from the hub; or a hub id
            (``owner/name``) that holds one.
        backbone: that it is for: it is checked, and put on the backbone's device in its precision.

    Raises:
        DenoiserError: if it is for another backbone, or cannot be found or fetched.
        FormatError: if the file is damaged or something else.
    """
    denoiser = _found(str(source), backbone).requires_grad_(False)
    if backbone is None:
        return denoiser
    denoiser.require_of(backbone)
    return denoiser.to(device=backbone.device, dtype=backbone.dtype)


def _found(source: str, backbone: Backbone | None) -> Denoiser:
    path = Path(source).expanduser()
    if path.is_file():
        return read_denoiser(path)
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
