"""Checkpoints: the tensors of a file, and the models among them, whatever they are wrapped in."""

from __future__ import annotations

import argparse
import pickle
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from denoising_vit.errors import WeightsError
from denoising_vit.files import is_safetensors

#: Parts of names that compilation, data parallelism and the like add, at any place in a name.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

#: Words in a prefix, from the model that is meant to be used to the one that is not.
_BEST, _AVERAGED, _LAST = {"teacher", "target"}, {"ema"}, {"student", "online"}

#: The function that NumPy's scalars are pickled by; its module was renamed in NumPy 2.
_SCALAR = np.float64(0).__reduce__()[0]

#: What checkpoints hold besides tensors: command lines, and numbers of NumPy, as schedules make learning rates. None of
#: them runs code: a number is made of a type and its bytes.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
]

#: What is let through is a setting of the whole process.
_TURN = threading.Lock()


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file by their names: those of nested containers before them, with dots.

    The content tells the kind of file, not its name. PyTorch files are read with ``weights_only=True``: code hidden in
    a pickle is refused, never run. States of optimizers are left out, and what wrappers add to names.

    Raises:
        WeightsError: if the file is missing, damaged, holds anything but weights, or holds none.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    if path.stat().st_size == 0:
        raise WeightsError(f"{path}: the file is empty (0 bytes)")
    tensors: dict[str, Tensor] = {}
    try:
        for name, tensor in _named(load_file(path) if is_safetensors(path) else _unpickled(path)):
            if tensors.setdefault(name, tensor) is not tensor:
                raise WeightsError(f"{path}: two tensors named {name}, with and without what wrappers add to names")
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: refused, the file is damaged or holds more than weights (code is never run from a checkpoint). "
            "Convert it to safetensors where you trust it"
        ) from error
    except Exception as error:  # damaged files meet the readers with all kinds
        raise WeightsError(
            f"{path}: not a readable safetensors or PyTorch weights file ({type(error).__name__}: {error})"
        ) from error
    if not tensors:
        raise WeightsError(
            f"{path}: no tensors found; expected a state dict, or one under denoiser, model or state_dict"
        )
    return tensors


def models_among(tensors: dict[str, Tensor], landmark: str) -> dict[str, dict[str, Tensor]]:
    """The models in a checkpoint: their own names to tensors, by the prefix that the checkpoint has before them.

    A teacher comes before an average of weights (EMA), this before others, and a student comes last.

    Args:
        tensors: by their full names.
        landmark: pattern of a name that each of them has once.
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
    """Prefix and tensors of the one to be used of those that :func:`models_among` found.

    Raises:
        WeightsError: if nothing tells which; it names their prefixes.
    """
    best, *others = models
    if alike := [prefix for prefix in others if _rank(prefix) == _rank(best)]:
        raise WeightsError(
            f"{source}: several models, under {', '.join(repr(prefix) for prefix in (best, *alike))}, and nothing "
            "tells which to use; save the one that you want in a file of its own"
        )
    return best, models[best]


def without_containers(tensors: dict[str, Tensor], containers: tuple[str, ...]) -> dict[str, Tensor]:
    """Names without those of containers that all tensors are in."""
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
    # An open file: torch would take one for safetensors by its name.
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
