"""Read weights from checkpoints and load them into a timm model."""

from __future__ import annotations

import argparse
import importlib
import pickle
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from denoising_vit.errors import WeightsError
from denoising_vit.files import is_safetensors

if TYPE_CHECKING:  # timm takes seconds to import
    from denoising_vit.backbones.timm_vit import TimmViT

#: Name parts that compilation, data parallelism and similar wrappers add anywhere in a name.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

#: Words in a prefix, in order of preference.
_BEST, _AVERAGED, _LAST = {"teacher", "target"}, {"ema"}, {"student", "online"}

#: Function that NumPy scalars are pickled with; its module was renamed in NumPy 2.
_SCALAR = np.float64(0).__reduce__()[0]

#: Types besides tensors in checkpoints: command lines, and NumPy scalars such as learning rates. None can run code.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
]

#: Lock, because the allowed types are a process-wide setting.
_TURN = threading.Lock()


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors or PyTorch file by name; names of nested containers are joined by dots.

    The file's content determines the format, not its name. PyTorch files are read with ``weights_only=True``, which
    rejects code in a pickle. Optimizer states and the name parts of wrappers are removed.

    Raises:
        WeightsError: if the file is missing or damaged, has more than weights, or has none.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    if path.stat().st_size == 0:
        raise WeightsError(f"{path}: the file is empty (0 bytes)")
    tensors: dict[str, Tensor] = {}
    try:
        for name, tensor in _named(load_file(path) if is_safetensors(path) else _unpickled(path)):
            if tensors.setdefault(name, tensor) is not tensor:
                raise WeightsError(f"{path}: two tensors named {name}, with and without wrapper prefixes")
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: rejected, because the file is damaged or contains more than weights (code in checkpoints is "
            "never executed). If you trust it, convert it to safetensors"
        ) from error
    except Exception as error:  # damaged files raise many types
        raise WeightsError(
            f"{path}: not a readable safetensors or PyTorch weights file ({type(error).__name__}: {error})"
        ) from error
    if not tensors:
        raise WeightsError(
            f"{path}: no tensors found; expected a state dict, or one under denoiser, model or state_dict"
        )
    return tensors


def models_among(tensors: dict[str, Tensor], landmark: str) -> dict[str, dict[str, Tensor]]:
    """Models in a checkpoint by prefix, each with its tensors without the prefix.

    A teacher comes first, then an average of weights (EMA), then others; a student comes last. ``landmark`` is a
    pattern of a name that each model has exactly once.
    """
    found = (re.fullmatch(rf"((?:.*\.)?){landmark}", name) for name in tensors)
    prefixes = sorted({match[1] for match in found if match}, key=len, reverse=True)
    models: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is not None:
            models[prefix][name.removeprefix(prefix)] = tensor
    return {prefix: models[prefix] for prefix in sorted(models, key=lambda prefix: (_rank(prefix), prefix))}


def the_model(models: dict[str, dict[str, Tensor]], source: str) -> tuple[str, dict[str, Tensor]]:
    """Prefix and tensors of the preferred model among those found by :func:`models_among`.

    Raises:
        WeightsError: if two are equally preferred; the message names their prefixes.
    """
    best, *others = models
    if alike := [prefix for prefix in others if _rank(prefix) == _rank(best)]:
        raise WeightsError(
            f"{source}: several models, under {', '.join(repr(prefix) for prefix in (best, *alike))}, with no "
            "indication of which to use; save the one to use in a separate file"
        )
    return best, models[best]


def without_containers(tensors: dict[str, Tensor], containers: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors, with the names of containers that hold all of them removed."""
    for container in containers:
        if tensors and all(name.startswith(f"{container}.") for name in tensors):
            inner = {name.removeprefix(f"{container}."): tensor for name, tensor in tensors.items()}
            return without_containers(inner, containers)
    return tensors


def _rank(prefix: str) -> int:
    words = set(re.split(r"[._]", prefix.lower()))
    order = ((0, _BEST), (1, _AVERAGED), (3, _LAST))
    return next((rank for rank, those in order if words & those), 2)


def _unpickled(path: Path) -> object:
    # Pass an open file, because torch would choose the format by the file's name.
    with _TURN, torch.serialization.safe_globals(_HARMLESS), path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _named(content: object, before: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        parts = (*before, *(part for part in str(key).split(".") if part not in _WRAPPERS))
        if isinstance(value, Tensor):
            yield ".".join(parts), value
        elif not str(key).startswith("optim"):
            yield from _named(value, parts)


#: Landmark of a ViT with timm's names.
_PATCHES = "patch_embed.proj.weight"

#: Landmark with the names of CLIP's release, which timm translates.
_PATCHES_OF_CLIP = r"visual\.conv1\.weight"

#: Landmark with the names of Hugging Face transformers.
_PATCHES_OF_TRANSFORMERS = re.compile(r"(.*\.)?embeddings\.patch_embeddings?(\.projection)?\.weight")

#: Containers of weights with other names that timm translates.
_CONTAINERS = ("model", "state_dict", "teacher")

#: Landmark of a denoiser.
_OF_A_DENOISER = re.compile(r"(.*\.)?denoiser\.(\d+\.)?norm1\.weight")

#: Parts of checkpoints that dense features never use: classifiers, pooling heads, decoders, training tokens.
_UNUSED = ("head", "fc_norm", "mask_token", "decoder", "attn_pool", "contrastive", "visual.proj", "logit_scale")


def load_weights(model: TimmViT, tensors: dict[str, Tensor], *, name: str, source: str) -> None:
    """Load weights with timm's names, or those of the original release, into a timm model.

    Names may have any prefix, and the file may have other models. ``name`` and ``source``, of the model and of the
    file, are for messages.

    Raises:
        WeightsError: if there are none, or any is missing, unexpected, or misshapen.
    """
    prefix, state = _vit_among(tensors, model, name, source)
    where = f"the ViT under {prefix!r}" if prefix else "its weights"
    misfit = f"{source}: {where} do not fit {name}"
    if reason := _other_patches(model, state):
        raise WeightsError(f"{misfit}: {reason}")
    filters = importlib.import_module(type(model).__module__)  # timm's module, which translates published names
    own = model.state_dict()
    try:
        fitted = dict(filters.checkpoint_filter_fn(dict(state), model))
    except Exception as error:  # timm reshapes tensors and raises many types
        reason = _difference(own, state) or f"{type(error).__name__}: {error}"
        raise WeightsError(f"{misfit}: {reason}") from error
    if reason := _difference(own, fitted):
        beside = sorted(key for key in tensors if not key.startswith(prefix))
        more = f"; {_some(beside, 'not under this prefix')}" if beside else ""
        raise WeightsError(f"{misfit}: {reason}{more}")
    model.load_state_dict({key: value for key, value in fitted.items() if key in own}, strict=False)


def _vit_among(tensors: dict[str, Tensor], model: TimmViT, name: str, source: str) -> tuple[str, dict[str, Tensor]]:
    """Prefix and tensors of the ViT; all tensors if none is a patch embedding with timm's name."""
    models = models_among(tensors, re.escape(_PATCHES)) or models_among(tensors, _PATCHES_OF_CLIP)
    # A student may differ in size from its teacher, so prefer the one that fits.
    fitting = {prefix: state for prefix, state in models.items() if not _other_patches(model, state)}
    if models:
        prefix, state = the_model(fitting or models, source)
        # Chunked blocks are named blocks.CHUNK.NUMBER. instead of blocks.NUMBER.
        return prefix, {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in state.items()}
    if theirs := next(filter(_PATCHES_OF_TRANSFORMERS.fullmatch, tensors), None):
        raise WeightsError(
            f"{source}: {theirs} is a tensor name of Hugging Face transformers, but {name} is a timm model. Give the "
            "folder with the file and its config.json, or the hub id, as the model: load_backbone('hf:FOLDER')"
        )
    if any(map(_OF_A_DENOISER.fullmatch, tensors)):
        raise WeightsError(
            f"{source}: a denoiser, not the weights of {name}; load it with load_denoiser(FILE) or --denoiser FILE"
        )
    return "", without_containers(tensors, _CONTAINERS)


def _difference(own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """Missing, unexpected or misshapen tensors, for messages; empty if there are none."""
    # A norm after the pooling may be missing in the file, unless the model uses it as the final norm.
    missing = [key for key in own if key not in state and not (key.startswith(_UNUSED) and "fc_norm" not in key)]
    unknown = [key for key in state if key not in own and not key.startswith(_UNUSED)]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    return "; ".join(
        _some(keys, what)
        for what, keys in (("missing", missing), ("unexpected", unknown), ("of another shape", shapes))
        if keys
    )


def _some(keys: list[str], what: str) -> str:
    return f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"


def require_finite(model: nn.Module, source: str) -> None:
    """Reject weights with NaN or infinity.

    Raises:
        WeightsError: if any parameter or buffer is not finite.
    """
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise WeightsError(
                f"{source}: {bad} of {value.numel()} values of {key} are NaN or infinite; the file is damaged, or was "
                "saved from a diverged run"
            )


def _other_patches(model: TimmViT, state: dict[str, Tensor]) -> str:
    """Description of a misshapen patch embedding, which timm would silently resample; empty if it fits."""
    there, embed = state.get(_PATCHES), getattr(model, "patch_embed", None)
    if embed is None:  # a NaFlexVit, whose patch embedding is resampled by design
        return ""
    mine = embed.proj.weight
    if there is None or there.ndim != 4 or there.shape == mine.shape:
        return ""
    return f"patch embedding of shape {tuple(there.shape)} instead of {tuple(mine.shape)}"
