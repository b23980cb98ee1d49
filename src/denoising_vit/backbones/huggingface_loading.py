"""Load a backbone from a Hugging Face directory, hub id or model."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from denoising_vit.backbones.base import IMAGENET_MEAN, IMAGENET_STD
from denoising_vit.backbones.huggingface import FAMILIES, Family, HuggingFaceBackbone, Shown, square_side
from denoising_vit.backbones.runtime import offline_if_unreachable, seeded
from denoising_vit.backbones.weights import require_finite
from denoising_vit.errors import BackboneError, DenoisingVitWarning, WeightsError
from denoising_vit.files import extra_hint, first_line, parse_json

#: Prefix of a hub id or directory.
PREFIX = "hf:"

_PROCESSOR = "preprocessor_config.json"

Triple = tuple[float, float, float]


def is_huggingface(model: str) -> bool:
    """True for a name with the prefix, or a directory with a Hugging Face model."""
    return model.startswith(PREFIX) or "model_type" in folder_config(Path(model).expanduser())


def folder_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a directory; empty if it cannot be read."""
    try:
        found = parse_json((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load_huggingface(
    model: str,
    *,
    weights: str = "auto",
    layer: int = -1,
    norm: bool = True,
    mean: Triple | None = None,
    std: Triple | None = None,
    default_size: int | None = None,
) -> HuggingFaceBackbone:
    """Load a ViT of transformers; code from a model repository is never executed.

    ``model`` is a directory or hub id, with or without the prefix ``hf:``; ``weights`` are ``auto`` or ``hub`` for the
    model's own, or ``random``. The other arguments are those of :func:`~denoising_vit.load_backbone`.

    Raises:
        BackboneError: if it cannot be built: missing directory, unsupported model type, or no patch size.
        WeightsError: if the weights are missing, not finite, or do not fit the configuration.
    """
    transformers = _transformers()
    source = model.removeprefix(PREFIX)
    folder = Path(source).expanduser()
    local = bool(source) and folder.is_dir()
    if not local and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise BackboneError(f"{model}: expected a directory, or a hub id such as hf:facebook/dinov2-small")
    if weights not in ("auto", "hub", "random"):
        raise WeightsError(f"{model} has its own weights; weights must be auto, hub or random, got {weights!r}")
    where = str(folder) if local else source
    name = PREFIX + (folder.resolve().name if local else source)
    with quiet(transformers), contextlib.nullcontext() if local else offline_if_unreachable():
        raw = _fetched(name, transformers.PreTrainedConfig.get_config_dict, where)[0]
        family = _family(raw, name)
        _require_patch_size(raw, name)
        config = _fetched(name, transformers.AutoConfig.from_pretrained, where, trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        for key, value in family.config:
            setattr(config, key, value)
        shown = _shown(transformers, where, name, config, mean, std, default_size)
        cls = getattr(transformers, family.model)
        if weights == "random":
            with seeded(0):  # loading must not change the caller's random state
                built = cls(config, **dict(family.build))
        else:
            built = _pretrained(cls, where, name, config, family)
    source = "random" if weights == "random" else where if local else "hub"
    return HuggingFaceBackbone(
        built.eval().requires_grad_(False), family, shown, name=name, layer=layer, norm=norm, weights=source
    )


def is_model_of_transformers(model: object) -> bool:
    """True for a model of transformers; does not import the package."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__)


def wrap_huggingface(
    model: Any,
    *,
    layer: int = -1,
    norm: bool = True,
    mean: Triple | None = None,
    std: Triple | None = None,
    default_size: int | None = None,
    frozen: bool = True,
) -> HuggingFaceBackbone:
    """Wrap a loaded model of transformers as a backbone; for a model with heads or a text tower, use its ViT.

    Unless given, the normalisation is ImageNet's, because the model does not include it, and the side of the images the
    configuration's. ``frozen`` freezes the model and puts it in evaluation mode.

    Raises:
        BackboneError: if the model is of an unknown family.
    """
    name = type(model).__name__
    family = _family({"model_type": getattr(model.config, "model_type", None)}, name)
    candidates = (model, getattr(model, "vision_model", None), getattr(model, "base_model", None))
    tower = next((part for part in candidates if type(part).__name__ == family.model), None)
    if tower is None:
        raise BackboneError(f"{name} has no {family.model}; give one, or its directory or hub id: hf:...")
    if frozen:
        tower.eval().requires_grad_(False)
    size = square_side(tower.config.image_size, f"{name}: image_size") if default_size is None else default_size
    shown = Shown(mean or IMAGENET_MEAN, std or IMAGENET_STD, size)
    return HuggingFaceBackbone(tower, family, shown, name=name, layer=layer, norm=norm, weights="as given")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise BackboneError(f"Hugging Face models need transformers: install {extra_hint('hf')}") from error
    return transformers


def _family(raw: dict[str, Any], name: str) -> Family:
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise BackboneError(
            f"{name} has model type {kind!r}; expected one of {', '.join(FAMILIES)}. To use another model, wrap it: "
            "load_backbone(module, patch_size=...)"
        )
    return FAMILIES[kind]


def _require_patch_size(raw: dict[str, Any], name: str) -> None:
    """Reject a configuration without a patch size, for which transformers would use a default.

    The configuration of an image tower inside a larger model may omit it; loading the weights checks it.
    """
    if "vision_config" not in raw and raw.get("patch_size") is None:
        raise BackboneError(f"{name}: config.json has no patch_size, so its grid is unknown; add it there")


def _shown(
    transformers: Any, where: str, name: str, config: Any, mean: Triple | None, std: Triple | None, size: int | None
) -> Shown:
    """Normalisation from the image processor and size from the configuration, unless given."""
    processor: Any = {}
    if mean is None or std is None:
        processor = _processor(transformers, where, name)
        mean, std = mean or _channels(processor, "image_mean", name), std or _channels(processor, "image_std", name)
    own = size if size is not None else square_side(config.image_size, f"{name}: image_size")
    if processor.get("do_center_crop"):
        cut = processor.get("crop_size") or {}
        warnings.warn(
            f"the image processor of {name} crops the centre of photos ({cut.get('height')} x {cut.get('width')}); "
            f"denoising-vit uses whole photos instead, resized to the requested size ({own} by default)",
            DenoisingVitWarning,
            stacklevel=4,
        )
    return Shown(mean, std, own)


def _processor(transformers: Any, where: str, name: str) -> dict[str, Any]:
    try:
        found = transformers.AutoImageProcessor.from_pretrained(where, trust_remote_code=False).to_dict()
    except Exception as error:  # transformers raises many types: missing file, invalid file, unknown class
        raise BackboneError(
            f"{name}: expected an image processor with the normalisation ({_PROCESSOR}: {first_line(error)}). Add the "
            "file, or give mean and std: load_backbone(..., mean=(..), std=(..))"
        ) from error
    return found if found.get("do_normalize", True) else found | {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}


def _channels(processor: dict[str, Any], key: str, name: str) -> Triple:
    values = processor.get(key)
    numbers = isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
    if not isinstance(values, list | tuple) or not numbers or len(values) != 3:
        raise BackboneError(f"{name}: {key} of {_PROCESSOR} must be three numbers, got {values!r}")
    return float(values[0]), float(values[1]), float(values[2])


def _pretrained(cls: Any, where: str, name: str, config: Any, family: Family) -> nn.Module:
    """The model with its weights; raises if any are missing, misshapen, or belong to blocks that it does not have."""
    try:
        with seeded(0):
            model, info = cls.from_pretrained(
                where, config=config, output_loading_info=True, dtype=torch.float32, **dict(family.build)
            )
    except Exception as error:  # transformers raises many types: missing file, damaged file, wrong shapes
        misfit = isinstance(error, RuntimeError) and "size" in str(error)
        what = (
            "do not fit its config.json: wrong tensor shapes" if misfit else f"could not be loaded: {first_line(error)}"
        )
        raise WeightsError(f"the weights of {name} {what} ({type(error).__name__})") from error
    missing = sorted(info["missing_keys"])
    unused = sorted(key for key in info["unexpected_keys"] if "text" not in key and re.search(r"layers?\.\d+\.", key))
    if missing or unused:
        raise WeightsError(
            f"the weights of {name} do not fit its config.json: {len(missing)} missing "
            f"({', '.join(missing[:3]) or '-'}), {len(unused)} for blocks that it does not have "
            f"({', '.join(unused[:3]) or '-'})"
        )
    require_finite(model, name)
    return model


def _fetched(name: str, fetch: Any, *arguments: Any, **more: Any) -> Any:
    try:
        return fetch(*arguments, **more)
    except Exception as error:  # transformers and the hub's client raise many types
        raise BackboneError(
            f"the config.json of {name} could not be read or downloaded ({type(error).__name__}: "
            f"{first_line(error)}). Check the network, or give a local directory: hf:PATH"
        ) from error


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Hide progress bars and loading reports; problems are raised as this package's errors."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
