"""Extractor files: a backbone with its denoiser or G in one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch

from denoising_vit.artifact import Artifact
from denoising_vit.backbones.catalog import Dtype
from denoising_vit.backbones.runtime import device_at, dtype_on
from denoising_vit.backbones.timm_vit import TimmBackbone, build_timm_model
from denoising_vit.backbones.weights import load_weights, require_finite
from denoising_vit.denoiser import Denoiser
from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.errors import DenoisingVitError, ExportError, FormatError
from denoising_vit.export.checkpoints import WEIGHTS, float_state
from denoising_vit.files import KEY, below, open_own, write_tensors
from denoising_vit.training_free.project import Subspace

FORMAT = "denoising-vit/extractor"
FORMAT_VERSION = 1

_BACKBONE, _DENOISER, _ARTIFACT, _SUBSPACE = "backbone.", "denoiser.", "artifact", "subspace"
_REQUIRED = ("backbone", "positions")


def write_extractor(extractor: DenoisedViT, folder: Path) -> None:
    """Write a float32 file for :func:`load_extractor`.

    Raises:
        ExportError: if the backbone is not a timm model.
    """
    backbone = extractor.backbone
    if not isinstance(backbone, TimmBackbone):
        raise ExportError(f"safetensors supports models of timm, got {backbone.name}; use onnx or program")
    tensors = {_BACKBONE + key: value for key, value in float_state(backbone.model).items()}
    head: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION, "positions": extractor.positions}
    head["backbone"] = {key: getattr(backbone, key) for key in ("name", "stride", "layer", "norm")}
    if extractor.denoiser is not None:
        head["denoiser"] = extractor.denoiser.config
        tensors |= {_DENOISER + key: value for key, value in float_state(extractor.denoiser).items()}
    elif extractor.subspace is not None:
        head["subspace"] = {"backbone": extractor.subspace.backbone, "info": extractor.subspace.info}
        tensors[_SUBSPACE] = extractor.subspace.directions.detach().float().cpu().contiguous()
    elif extractor.artifact is not None:
        artifact = extractor.artifact
        # Without the names of photos, because the file may be shared.
        info = {key: value for key, value in artifact.info.items() if key not in ("photos", "skipped")}
        head["artifact"] = {"size": artifact.size, "backbone": artifact.backbone, "info": info}
        tensors[_ARTIFACT] = artifact.values.detach().float().cpu().contiguous()
    write_tensors(tensors, folder / WEIGHTS, {KEY: json.dumps(head)})


def load_extractor(
    path: str | Path, *, device: str | torch.device = "auto", dtype: Dtype | torch.dtype = "auto"
) -> DenoisedViT:
    """Read a file of ``dvit export --format safetensors``.

    Args:
        path: its directory, or the file.
        device: ``auto`` is CUDA, then MPS, then the CPU.
        dtype: ``auto`` is bfloat16 if the hardware is fast at it, else float32.

    Raises:
        FormatError: if the file is missing, damaged, of another type, or from a newer version.
    """
    path = Path(path).expanduser()
    path = path / WEIGHTS if path.is_dir() else path
    with open_own(path, FORMAT, FORMAT_VERSION, "an extractor", _REQUIRED) as (head, file):
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no dict
    try:
        return _built(head, tensors, str(path), device, dtype)
    except DenoisingVitError as error:
        raise FormatError(f"{path}: damaged extractor ({error})") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"{path}: damaged extractor ({type(error).__name__}: {error})") from error


def _built(
    head: dict[str, Any], tensors: dict[str, Any], source: str, device: str | torch.device, dtype: Any
) -> DenoisedViT:
    about = head["backbone"]
    name = str(about["name"])
    model = build_timm_model(name, pretrained=False)
    load_weights(model, below(_BACKBONE, tensors), name=name, source=source)
    require_finite(model, source)
    options = {key: about[key] for key in ("stride", "layer", "norm")}
    backbone = TimmBackbone(model, name=name, weights=Path(source).name, **options)
    if "denoiser" in head:
        cleaner: Denoiser | Artifact | Subspace = Denoiser(**head["denoiser"])
        cleaner.load_state_dict(below(_DENOISER, tensors))
        cleaner.eval().requires_grad_(False)
    elif "subspace" in head:
        cleaner = Subspace(tensors[_SUBSPACE], head["subspace"]["backbone"], head["subspace"]["info"])
    else:
        record = head["artifact"]
        size = cast("tuple[int, int]", tuple(record["size"]))
        cleaner = Artifact(tensors[_ARTIFACT].float(), size, record["backbone"], record["info"])
    made = DenoisedViT(backbone, cleaner, positions=float(head["positions"]))  # checks that they match
    place = device_at(device)
    return made.to(device=place, dtype=dtype_on(dtype, place))
