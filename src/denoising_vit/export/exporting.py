"""export_extractor: from an extractor to a folder that people can deploy, checked before it is there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.errors import ExportError
from denoising_vit.export.card import card
from denoising_vit.export.comparison import CHECKED, TOLERANCES, Comparison, Run, compare, record
from denoising_vit.export.description import DISTILLED, description
from denoising_vit.export.extractor_file import write_extractor
from denoising_vit.export.graphs import quantise, trace, write_onnx, write_program
from denoising_vit.export.huggingface_folder import own_side, write_huggingface
from denoising_vit.export.needed import needed
from denoising_vit.export.options import CHECKPOINTS, ExportOptions
from denoising_vit.export.running import INT8, ONNX, PROGRAM, runner
from denoising_vit.export.timm_folder import WEIGHTS, write_timm
from denoising_vit.export.traceable import Extractor, TraceableExtractor
from denoising_vit.files import clipped, current_umask, file_digest, unwritable, write_tensors

FORMAT = "denoising-vit/export"
FORMAT_VERSION = 1

README, META, REFERENCE = "README.md", "export.json", "check.safetensors"

Sizes = list[list[int]]


def export_extractor(
    extractor: Extractor,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    weights: Path | None = None,
    distilled: bool = False,
) -> Comparison:
    """Writes a folder with the model, its card, and what checks it; it is there whole or not at all.

    Args:
        extractor: a backbone, or what :class:`~denoising_vit.DenoisedViT` makes of it; any precision, exported in
            float32.
        out: the folder, which must not exist, or be empty.
        options: how.
        weights: the file that the backbone's weights came from, which tells whether it is distilled.
        distilled: whether it is, where the file does not tell.

    Returns:
        How far the export is from PyTorch.

    Raises:
        ExportError: if the format cannot hold it, the folder exists or cannot be written, a package is missing, or what
            was written does not compute what PyTorch does.
    """
    options = options or ExportOptions()
    options.validate()
    _require_held(extractor, options)
    module = TraceableExtractor(extractor, pixels=options.pixels, prefix=options.prefix)
    meta = {"format": FORMAT, "format_version": FORMAT_VERSION, "format_of_files": options.format}
    meta |= description(extractor, options, weights, distilled=distilled)
    with _appearing(Path(out).expanduser()) as folder:
        _write_model(extractor, module, folder, options, meta)
        reference = record(_in_pytorch(module), _sizes(module, options), pixels=options.pixels)
        run = runner(folder, options.format, int8=options.int8)
        found = _checked(reference, run, _sizes(module, options), options)
        meta["check"] = _check(found, reference, module, run, options)
        meta["files"] = {path.name: file_digest(path) for path in _model_first(folder)}
        write_tensors(reference, folder / REFERENCE)
        meta["check"]["digest"] = file_digest(folder / REFERENCE)
        (folder / META).write_text(json.dumps(meta, indent=2) + "\n")
        (folder / README).write_text(card(meta))
    return found


#: Packages and their extra that a format takes to write and to check.
_NEEDED: dict[str, tuple[tuple[str, str], ...]] = {
    "onnx": (("onnx", "onnx"), ("onnxscript", "onnx"), ("onnxruntime", "onnx")),
    "huggingface": (("transformers", "hf"),),
}


def _require_held(extractor: Extractor, options: ExportOptions) -> None:
    """Refuses what a format cannot hold, and formats whose packages are missing."""
    for package, extra in _NEEDED.get(options.format, ()):
        needed(package, extra)
    clean = isinstance(extractor, DenoisedViT)
    if clean and options.format in CHECKPOINTS:
        raise ExportError(
            f"{options.format} holds the weights of a ViT, and what cleans the features stands after its final norm "
            "and depends on the place: use onnx, program or safetensors; or distil it (stage 3), and export that"
        )
    if not clean and options.format == "safetensors":
        raise ExportError("safetensors is for features minus G or with a denoiser; raw and distilled models: timm")


def _write_model(
    extractor: Extractor, module: TraceableExtractor, folder: Path, options: ExportOptions, meta: dict[str, Any]
) -> None:
    if options.format == "timm":
        write_timm(module.backbone, folder, _carried(meta))
    elif options.format == "huggingface":
        write_huggingface(module.backbone, folder, _carried(meta))
    elif options.format == "safetensors":
        assert isinstance(extractor, DenoisedViT)
        write_extractor(extractor, folder)
    elif options.format == "program":
        write_program(trace(module), folder / PROGRAM)
    else:
        about = {"denoising_vit": json.dumps({key: meta[key] for key in ("features", "backbone", "licence")})}
        write_onnx(trace(module), module, folder / ONNX, about)
        if options.int8:
            quantise(folder / ONNX, folder / INT8)
            for path in folder.glob(f"{ONNX}*"):
                path.unlink()


def _carried(meta: dict[str, Any]) -> dict[str, str]:
    """Metadata of a checkpoint: that it is distilled goes with the weights."""
    return {} if meta["distilled"] is None else {"denoising_vit": json.dumps({"format": DISTILLED} | meta["distilled"])}


def _in_pytorch(module: TraceableExtractor) -> Run:
    """The extractor itself in float32, by the way that its users take, not by the one that was traced."""
    pure = module.reference()

    def run(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.no_grad():
            features, prefix = pure(image)
        return features, prefix if module.prefix else None

    return run


def _sizes(module: TraceableExtractor, options: ExportOptions) -> Sizes:
    """Batch, height and width of the images that are compared."""
    backbone = module.backbone
    patch, stride = backbone.patch_size, backbone.stride
    if options.format == "huggingface":
        side = own_side(backbone)
        return [[1, side, side]]
    return [[batch, patch + (h - 1) * stride, patch + (w - 1) * stride] for batch, h, w in CHECKED]


def _checked(reference: dict[str, Any], run: Run, sizes: Sizes, options: ExportOptions) -> Comparison:
    """How far an export is from the reference.

    Raises:
        ExportError: if it is further than rounding takes it; int8 is measured, not judged.
    """
    found = compare(reference, record(run, sizes, pixels=options.pixels))
    allowed = TOLERANCES[options.format]
    if found is None or (not options.int8 and found.relative > allowed):
        told = "of other shapes, or not finite" if found is None else f"{found.difference:.2g} apart"
        raise ExportError(
            f"the export does not compute what PyTorch does: features {told} (at most {allowed:g}). Nothing was written"
        )
    return found


def _check(
    found: Comparison, reference: dict[str, Any], module: TraceableExtractor, run: Run, options: ExportOptions
) -> dict[str, Any]:
    check = {"file": REFERENCE, "sizes": _sizes(module, options), "tolerance": TOLERANCES[options.format]}
    check |= dataclasses.asdict(found)
    if options.format == "huggingface":  # how far transformers is from timm where positions are resampled
        sizes = _sizes(module, ExportOptions(format="timm"))
        away = compare(record(_in_pytorch(module), sizes, pixels=False), record(run, sizes, pixels=False))
        if away is not None:
            check["elsewhere"] = dataclasses.asdict(away) | {"sizes": sizes}
    return check


def _model_first(folder: Path) -> list[Path]:
    """Files of an export, that with the weights first."""
    first = (ONNX, INT8, PROGRAM, WEIGHTS)
    return sorted(folder.iterdir(), key=lambda path: (path.name not in first, path.name))


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write to, which becomes it if the block succeeds.

    Raises:
        ExportError: if there is something already, or it cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists already; choose another folder with -o, or remove it")
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{clipped(out.name, 200)}.", suffix=".part"))
        yield temporary
        temporary.chmod(0o777 & ~current_umask())
        temporary.replace(out)
    except OSError as error:
        raise ExportError(f"cannot write to {out} ({unwritable(error)}); choose another folder with -o") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
