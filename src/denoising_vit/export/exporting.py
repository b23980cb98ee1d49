"""export_extractor: write a folder with the model, check it, and move it into place."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.errors import ExportError
from denoising_vit.export.card import card, description
from denoising_vit.export.checkpoints import WEIGHTS, write_extractor, write_huggingface, write_timm
from denoising_vit.export.graphs import quantise, trace, write_onnx, write_program
from denoising_vit.export.options import CHECKPOINTS, ExportOptions
from denoising_vit.export.traceable import Extractor, TraceableExtractor
from denoising_vit.export.verification import (
    CHECKED,
    FORMAT,
    FORMAT_VERSION,
    INT8,
    META,
    ONNX,
    PROGRAM,
    REFERENCE,
    TOLERANCES,
    Comparison,
    Run,
    compare,
    record,
    runner,
)
from denoising_vit.files import (
    DISTILLED,
    KEY,
    clipped,
    current_umask,
    file_digest,
    flush_folder,
    flush_tree,
    make_folder,
    needed,
    unwritable,
    write_tensors,
)
from denoising_vit.training_free.registers import has_registers

README = "README.md"

Sizes = list[list[int]]

#: Packages of a format, with their extra.
_NEEDED: dict[str, tuple[tuple[str, str], ...]] = {
    "onnx": (("onnx", "onnx"), ("onnxscript", "onnx"), ("onnxruntime", "onnx")),
    "huggingface": (("transformers", "hf"),),
}


def export_extractor(
    extractor: Extractor,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    weights: Path | None = None,
    distilled: bool = False,
) -> Comparison:
    """Write a folder with the model, its card and reference features, atomically.

    Args:
        extractor: a backbone or :class:`~denoising_vit.DenoisedViT`; exported in float32.
        out: the folder; must be new or empty.
        options: format and options.
        weights: file of the backbone's weights, which may record a distillation.
        distilled: True if the weights are distilled but their file does not record it.

    Returns:
        The difference from PyTorch.

    Raises:
        ExportError: if the format does not support the extractor, the folder exists or cannot be written, a package is
            missing, or the export differs from PyTorch.
    """
    options = options or ExportOptions()
    options.validate()
    _require_held(extractor, options)
    module = TraceableExtractor(extractor, pixels=options.pixels, prefix=options.prefix)
    meta = {"format": FORMAT, "format_version": FORMAT_VERSION, "format_of_files": options.format}
    meta |= description(extractor, options, weights, distilled=distilled)
    with _appearing(Path(out).expanduser()) as folder:
        _write_model(extractor, module, folder, options, meta)
        sizes = _sizes(module, options.format)
        reference = record(module.reference(), sizes, pixels=options.pixels)
        run = runner(folder, options.format, int8=options.int8)
        found = compare(reference, record(run, sizes, pixels=options.pixels))
        allowed = TOLERANCES[options.format]
        if found is None or (not options.int8 and found.relative > allowed):  # int8 is only measured
            problem = "features have wrong shapes or non-finite values"
            if found is not None:
                problem = f"features differ by up to {found.relative:.2g} of their scale, expected at most {allowed:g}"
            raise ExportError(f"the export differs from PyTorch: {problem}. Nothing was written")
        meta["check"] = {"file": REFERENCE, "sizes": sizes, "tolerance": allowed, **dataclasses.asdict(found)}
        if options.format == "huggingface":
            meta["check"] |= _elsewhere(module, run)
        meta["files"] = {path.name: file_digest(path) for path in _model_first(folder)}
        write_tensors(reference, folder / REFERENCE)
        meta["check"]["digest"] = file_digest(folder / REFERENCE)
        (folder / META).write_text(json.dumps(meta, indent=2) + "\n")
        (folder / README).write_text(card(meta))
    return found


def _require_held(extractor: Extractor, options: ExportOptions) -> None:
    """Raise ExportError if the format does not support the extractor, or a package is missing."""
    for package, extra in _NEEDED.get(options.format, ()):
        needed(package, extra, ExportError)
    clean = isinstance(extractor, DenoisedViT)
    if clean and options.format in CHECKPOINTS:
        raise ExportError(
            f"{options.format} stores only the weights of a ViT, not a cleaner after its final norm; use onnx, program "
            "or safetensors, or distil the cleaner into the ViT (stage 3) and export that"
        )
    if has_registers(extractor) and options.format in (*CHECKPOINTS, "safetensors"):
        raise ExportError(f"{options.format} stores only weights, no test-time registers; use onnx or program")
    if not clean and options.format == "safetensors":
        raise ExportError(
            "safetensors needs a cleaner (subtract, denoiser or project); export raw and distilled models as timm"
        )


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
        about = {KEY: json.dumps({key: meta[key] for key in ("features", "backbone", "licence")})}
        write_onnx(trace(module), module, folder / ONNX, about)
        if options.int8:
            quantise(folder / ONNX, folder / INT8)
            for path in folder.glob(f"{ONNX}*"):
                path.unlink()


def _carried(meta: dict[str, Any]) -> dict[str, str]:
    """Metadata of a checkpoint: the record of distillation."""
    return {} if meta["distilled"] is None else {KEY: json.dumps({"format": DISTILLED} | meta["distilled"])}


def _sizes(module: TraceableExtractor, form: str) -> Sizes:
    """Batch size, height and width of the compared images."""
    backbone = module.backbone
    patch, stride = backbone.patch_size, backbone.stride
    if form == "huggingface":  # the grid of the position embedding, because transformers resamples without antialiasing
        model: Any = backbone.model
        side = int(model.patch_embed.grid_size[0]) * patch
        return [[1, side, side]]
    return [[batch, patch + (h - 1) * stride, patch + (w - 1) * stride] for batch, h, w in CHECKED]


def _elsewhere(module: TraceableExtractor, run: Run) -> dict[str, Any]:
    """Difference of transformers from timm at sizes where position embeddings are resampled."""
    sizes = _sizes(module, "timm")
    away = compare(record(module.reference(), sizes, pixels=False), record(run, sizes, pixels=False))
    return {} if away is None else {"elsewhere": dataclasses.asdict(away) | {"sizes": sizes}}


def _model_first(folder: Path) -> list[Path]:
    """Files of an export, with the model first."""
    first = (ONNX, INT8, PROGRAM, WEIGHTS)
    return sorted(folder.iterdir(), key=lambda path: (path.name not in first, path.name))


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A temporary folder next to ``out`` that is renamed to it if the block succeeds.

    Raises:
        ExportError: if ``out`` exists and is not empty, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} already exists; choose another folder with -o, or remove it")
    temporary = None
    try:
        make_folder(out.parent)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{clipped(out.name, 200)}.", suffix=".part"))
        yield temporary
        temporary.chmod(0o777 & ~current_umask())
        flush_tree(temporary)
        temporary.replace(out)
        flush_folder(out.parent)
    except OSError as error:
        raise ExportError(f"cannot write to {out} ({unwritable(error)}); choose another folder with -o") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
