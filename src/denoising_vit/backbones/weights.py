"""Weights: from a hub, a local file, or a package on this machine; checked before they are used."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import timm.models.eva
import timm.models.vision_transformer
import torch
from safetensors.torch import load_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from denoising_vit.errors import WeightsError

#: Where published files keep the weights, and what they put in front of the names.
_CONTAINERS = ("model", "state_dict", "teacher")
_PREFIXES = ("module", "model", "backbone")
_PATCHES = "patch_embed.proj.weight"

#: Parts of checkpoints that dense features never use: classifiers, pooling heads, decoders, training tokens.
_UNUSED = ("head", "fc_norm", "mask_token", "decoder", "attn_pool", "contrastive", "visual.proj", "logit_scale")


def read_state_dict(path: Path, containers: tuple[str, ...] = _CONTAINERS) -> dict[str, Tensor]:
    """Reads a safetensors file or a PyTorch file, and unwraps it to plain parameter names.

    PyTorch files are read with ``weights_only=True``: code hidden in a pickle is refused, never run.

    Args:
        path: the file.
        containers: names under which published files keep them.

    Raises:
        WeightsError: if the file is missing, damaged, holds anything but weights, or holds none.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    if path.stat().st_size == 0:
        raise WeightsError(f"{path}: the file is empty (0 bytes)")
    try:
        if path.suffix == ".safetensors":
            state: object = load_file(path)
        else:
            # Several published files carry their command-line options: plain data.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: refused, the file is damaged or holds more than weights (code is never run from a checkpoint). "
            "Convert it to safetensors where you trust it"
        ) from error
    except Exception as error:  # damaged files meet the readers with all kinds
        raise WeightsError(
            f"{path}: not a readable safetensors or PyTorch weights file ({type(error).__name__}: {error})"
        ) from error
    state = _unwrap(state, containers)
    if not state:
        raise WeightsError(f"{path}: no tensors found; expected a state dict, or one under {' or '.join(containers)}")
    return state


def load_weights(model: VisionTransformer | Eva, state: dict[str, Tensor], *, name: str, source: str) -> None:
    """Loads a state dict, in timm's names or in those of the original release, into a timm model.

    Raises:
        WeightsError: if anything is missing, left over, or of another shape; the message names both sides.
    """
    _refuse_other_patches(model, state, name, source)
    filters = timm.models.eva if isinstance(model, Eva) else timm.models.vision_transformer
    own = model.state_dict()
    try:
        fitted = dict(filters.checkpoint_filter_fn(dict(state), model))  # pyright: ignore[reportArgumentType]
    except Exception as error:  # timm reshapes what it takes for its own, and fails in many ways where it is not
        reason = _difference(own, state) or f"{type(error).__name__}: {error}"
        raise WeightsError(f"{source}: weights of another model, they do not fit {name}: {reason}") from error
    if difference := _difference(own, fitted):
        raise WeightsError(f"{source}: weights of another model, they do not fit {name}: {difference}")
    model.load_state_dict({key: value for key, value in fitted.items() if key in own}, strict=False)


def _difference(own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """What is missing, left over, or of another shape; empty where nothing is."""
    # A norm behind the pooling is not needed of a file, unless the model has one: then it is the final norm.
    missing = [key for key in own if key not in state and not (key.startswith(_UNUSED) and "fc_norm" not in key)]
    unknown = [key for key in state if key not in own and not key.startswith(_UNUSED)]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    return "; ".join(
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("left over", unknown), ("of another shape", shapes))
        if keys
    )


def require_finite(model: nn.Module, source: str) -> None:
    """Refuses weights with NaN or infinity, naming the first.

    Raises:
        WeightsError: if any parameter or buffer is not finite.
    """
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise WeightsError(
                f"{source}: {bad} of {value.numel()} values of {key} are NaN or infinite; the file is damaged or was "
                "saved from a run that diverged"
            )


def _unwrap(state: object, containers: tuple[str, ...]) -> dict[str, Tensor]:
    while isinstance(state, dict) and (inner := next((state[k] for k in containers if k in state), None)) is not None:
        if not isinstance(inner, dict):
            break
        state = inner
    if not isinstance(state, dict):
        return {}
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    # Names may be prefixed, and stand beside those of heads that are trained along: the ViT is where its patches are.
    prefix = next((key.removesuffix(_PATCHES) for key in tensors if key.endswith(_PATCHES)), "")
    if not prefix or prefix.strip(".").split(".")[0] not in _PREFIXES:
        return tensors
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _refuse_other_patches(model: VisionTransformer | Eva, state: dict[str, Tensor], name: str, source: str) -> None:
    """Timm would resample the patch embedding of another patch size without a word."""
    there = state.get(_PATCHES)
    mine = model.patch_embed.proj.weight
    if there is not None and there.ndim == 4 and there.shape != mine.shape:
        raise WeightsError(
            f"{source}: weights of another model, they do not fit {name}: patch embedding of shape "
            f"{tuple(there.shape)} instead of {tuple(mine.shape)}"
        )
