"""Running an export as its users do: by the library that it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoising_vit.errors import ExportError
from denoising_vit.export.comparison import Run
from denoising_vit.export.extractor_file import load_extractor
from denoising_vit.export.graphs import INPUT, first_line, refuse_pickles
from denoising_vit.export.needed import needed

#: Files that hold the model, by format; other formats are loaded as directories.
ONNX, INT8, PROGRAM = "model.onnx", "model.int8.onnx", "model.pt2"


def runner(folder: Path, kind: str, *, int8: bool = False) -> Run:
    """What maps images to features by the export in a folder.

    Raises:
        ExportError: if it cannot be loaded, or a package is missing that it is for.
    """
    made = {
        "timm": _timm,
        "huggingface": _huggingface,
        "onnx": lambda place: _onnx(place / (INT8 if int8 else ONNX)),
        "program": lambda place: _program(place / PROGRAM),
        "safetensors": _own,
    }
    if kind not in made:
        raise ExportError(f"{folder}: an export of unknown format {kind!r}; upgrade denoising-vit")
    try:
        run = made[kind](folder)
    except ExportError:
        raise
    except Exception as error:  # each library has errors of its own
        raise ExportError(f"{folder}: could not be loaded ({type(error).__name__}: {first_line(error)})") from error

    def guarded(image: Tensor) -> tuple[Tensor, Tensor | None]:
        try:
            with torch.no_grad():
                return run(image)
        except Exception as error:
            size = " x ".join(map(str, image.shape[2:]))
            raise ExportError(
                f"{folder}: does not run on images of {size} ({type(error).__name__}: {first_line(error)})"
            ) from error

    return guarded


def _timm(folder: Path) -> Run:
    import timm

    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def run(image: Tensor) -> tuple[Tensor, None]:
        tokens = model.forward_features(image)
        # Models that pool by the mean keep their final norm behind the pooling.
        tokens = model.fc_norm(tokens) if isinstance(model.norm, torch.nn.Identity) else tokens
        return _on_grid(tokens[:, model.num_prefix_tokens :], image, model.patch_embed.patch_size[0]), None

    return run


def _huggingface(folder: Path) -> Run:
    transformers = needed("transformers", "hf")
    from denoising_vit.backbones.huggingface_loading import quiet

    with quiet(transformers):
        # The processor must load, though the images that are compared come prepared.
        transformers.AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=False)
        model = transformers.AutoModel.from_pretrained(str(folder), trust_remote_code=False, dtype=torch.float32).eval()

    def run(image: Tensor) -> tuple[Tensor, None]:
        tokens = model(pixel_values=image).last_hidden_state
        prefix = 1 + getattr(model.config, "num_register_tokens", 0)
        return _on_grid(tokens[:, prefix:], image, model.config.patch_size), None

    return run


def _onnx(path: Path) -> Run:
    runtime = needed("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong comes as an exception
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> tuple[Tensor, Tensor | None]:
        found = [torch.from_numpy(part) for part in session.run(None, {INPUT: image.numpy()})]
        return found[0], found[1] if len(found) > 1 else None

    return run


def _program(path: Path) -> Run:
    refuse_pickles(path)
    module = torch.export.load(str(path)).module()

    def run(image: Tensor) -> tuple[Tensor, Tensor | None]:
        found = module(image)
        return found if isinstance(found, tuple | list) else (found, None)  # pyright: ignore[reportReturnType]

    return run


def _own(folder: Path) -> Run:
    extractor = load_extractor(folder, device="cpu", dtype="float32")
    return lambda image: (extractor(image), None)


def _on_grid(tokens: Tensor, image: Tensor, patch: int) -> Tensor:
    """(B, h w, C) -> (B, h, w, C)."""
    return tokens.unflatten(1, (image.shape[2] // patch, image.shape[3] // patch))
