"""Weights: from a hub, a local file, or a package on this machine; checked before they are used."""

from __future__ import annotations

import re

import timm.models.eva
import timm.models.vision_transformer
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from denoising_vit.backbones.checkpoints import models_among, the_model, without_containers
from denoising_vit.errors import WeightsError

#: What every ViT in timm's names has, under whatever prefix.
_PATCHES = "patch_embed.proj.weight"

#: The same in the names of CLIP's release, which timm translates.
_PATCHES_OF_CLIP = r"visual\.conv1\.weight"

#: The same in the names of Hugging Face transformers.
_PATCHES_OF_TRANSFORMERS = re.compile(r"(.*\.)?embeddings\.patch_embeddings?(\.projection)?\.weight")

#: Where files keep weights in other names that timm translates.
_CONTAINERS = ("model", "state_dict", "teacher")

#: What every denoiser has.
_OF_A_DENOISER = re.compile(r"(.*\.)?denoiser\.(\d+\.)?norm1\.weight")

#: Parts of checkpoints that dense features never use: classifiers, pooling heads, decoders, training tokens.
_UNUSED = ("head", "fc_norm", "mask_token", "decoder", "attn_pool", "contrastive", "visual.proj", "logit_scale")


def load_weights(model: VisionTransformer | Eva, tensors: dict[str, Tensor], *, name: str, source: str) -> None:
    """Loads weights, in timm's names or in those of the original release, into a timm model.

    They may stand under any prefix, beside other models: the ViT is where its patch embedding is.

    Args:
        model: that gets them.
        tensors: of a file, by their full names.
        name: of the model, for messages.
        source: the file, for messages.

    Raises:
        WeightsError: if there are none, or anything is missing, left over, or of another shape; the message names both
            sides.
    """
    prefix, state = _vit_among(tensors, model, name, source)
    where = f"the ViT under {prefix!r}" if prefix else "its weights"
    misfit = f"{source}: {where} cannot be loaded, they do not fit {name}"
    if reason := _other_patches(model, state):
        raise WeightsError(f"{misfit}: {reason}")
    filters = timm.models.eva if isinstance(model, Eva) else timm.models.vision_transformer
    own = model.state_dict()
    try:
        fitted = dict(filters.checkpoint_filter_fn(dict(state), model))  # pyright: ignore[reportArgumentType]
    except Exception as error:  # timm reshapes what it takes for its own, and fails in many ways where it is not
        reason = _difference(own, state) or f"{type(error).__name__}: {error}"
        raise WeightsError(f"{misfit}: {reason}") from error
    if reason := _difference(own, fitted):
        beside = sorted(key for key in tensors if not key.startswith(prefix))
        more = f"; {_some(beside, 'not under this prefix')}" if beside else ""
        raise WeightsError(f"{misfit}: {reason}{more}")
    model.load_state_dict({key: value for key, value in fitted.items() if key in own}, strict=False)


def _vit_among(
    tensors: dict[str, Tensor], model: VisionTransformer | Eva, name: str, source: str
) -> tuple[str, dict[str, Tensor]]:
    """Prefix and tensors of the ViT; everything where none has its patch embedding by timm's name."""
    models = models_among(tensors, re.escape(_PATCHES)) or models_among(tensors, _PATCHES_OF_CLIP)
    # A student may be of another size than its teacher: then the size tells which is meant.
    fitting = {prefix: state for prefix, state in models.items() if not _other_patches(model, state)}
    if models:
        prefix, state = the_model(fitting or models, source)
        # Blocks trained in chunks: blocks.CHUNK.NUMBER. instead of blocks.NUMBER.
        return prefix, {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in state.items()}
    if theirs := next(filter(_PATCHES_OF_TRANSFORMERS.fullmatch, tensors), None):
        raise WeightsError(
            f"{source}: {theirs} is a name of Hugging Face transformers, and {name} one of timm. Give the folder with "
            "the file and its config.json, or the hub id, as the model: load_backbone('hf:FOLDER')"
        )
    if any(map(_OF_A_DENOISER.fullmatch, tensors)):
        raise WeightsError(
            f"{source}: a denoiser, not the weights of {name}; give it as one: load_denoiser(FILE), --denoiser FILE"
        )
    return "", without_containers(tensors, _CONTAINERS)


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
        _some(keys, what)
        for what, keys in (("missing", missing), ("left over", unknown), ("of another shape", shapes))
        if keys
    )


def _some(keys: list[str], what: str) -> str:
    return f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"


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


def _other_patches(model: VisionTransformer | Eva, state: dict[str, Tensor]) -> str:
    """What is wrong with the patch embedding: timm would resample one of another patch size without a word."""
    there, mine = state.get(_PATCHES), model.patch_embed.proj.weight
    if there is None or there.ndim != 4 or there.shape == mine.shape:
        return ""
    return f"patch embedding of shape {tuple(there.shape)} instead of {tuple(mine.shape)}"
