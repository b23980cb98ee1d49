"""Graphs that run without this package: ``torch.export`` programs and ONNX."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import Dim, ExportedProgram

from denoising_vit.errors import ExportError
from denoising_vit.export.traceable import TraceableExtractor, timm_resamples_in_graph
from denoising_vit.files import first_line

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

INPUT, OUTPUT, PREFIX = "image", "features", "prefix"

#: Declared upper bound of patches per side.
_MOST_PATCHES = 4096

#: Bytes above which the weights go to a separate file, because of the limit of protocol buffers.
_LARGE = 1_800_000_000


def trace(module: TraceableExtractor) -> ExportedProgram:
    """Trace a program for any batch size, height and width on the patch grid; it rejects other sizes.

    Raises:
        ExportError: if the model cannot be traced.
    """
    backbone = module.backbone
    patch, stride = backbone.patch_size, backbone.stride
    # An example with different sides, and no size that the model may handle specially.
    example = torch.zeros(2, 3, patch + 6 * stride, patch + 4 * stride)
    sides = [stride * Dim(name, min=1, max=_MOST_PATCHES) for name in ("h", "w")]
    if patch != stride:
        sides = [side + (patch - stride) for side in sides]
    shapes = {INPUT: {0: Dim("batch", min=1), 2: sides[0], 3: sides[1]}}
    try:
        with torch.no_grad(), timm_resamples_in_graph():
            program = torch.export.export(module, (example,), dynamic_shapes=shapes)
    except Exception as error:  # the tracer raises many types
        raise ExportError(
            f"{backbone.name} cannot be traced for arbitrary image sizes ({type(error).__name__}: {first_line(error)})"
            "; models of timm and Hugging Face transformers can be"
        ) from error
    _require_any_size(program, backbone.name)
    return program


def _require_any_size(program: ExportedProgram, name: str) -> None:
    """Raise ExportError if the example's size was silently fixed in the program."""
    outputs: Any = next(node for node in program.graph.nodes if node.op == "output").args[0]
    fixed = [side for side in outputs[0].meta["val"].shape[:3] if isinstance(side, int)]
    if fixed:
        raise ExportError(f"{name} cannot be traced for arbitrary image sizes: it converts sizes to plain numbers")


def write_program(program: ExportedProgram, path: Path) -> None:
    """Write a ``.pt2`` file without example inputs, which would be pickled."""
    program.example_inputs = None
    torch.export.save(program, path)
    refuse_pickles(path)


def refuse_pickles(path: Path) -> None:
    """Reject ``.pt2`` files with pickled parts, from which torch would execute hidden code.

    Raises:
        ExportError: naming such a part, or if the file is not a program.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = [part for part in archive.infolist() if _is_pickled(archive, part)]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ExportError(f"{path}: not a torch.export program, or damaged ({error})") from error
    if pickled:
        raise ExportError(
            f"{path}: rejected: {pickled[0].filename} is pickled, so loading it could run code; exports have no pickles"
        )


def _is_pickled(archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> bool:
    """True if torch would unpickle a part, or weights that it lists."""
    if part.filename.endswith("_config.json"):
        listed = json.loads(archive.read(part)).get("config", {})
        return any(entry.get("use_pickle") for entry in listed.values())
    return part.file_size > 0 and part.filename.endswith((".pt", ".pkl"))


def write_onnx(program: ExportedProgram, module: TraceableExtractor, path: Path, about: dict[str, str]) -> None:
    """Write an ONNX file with named axes and metadata ``about``, which rejects sizes off the patch grid at run time."""
    import onnx

    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")  # from the converter
        names = [OUTPUT, PREFIX] if module.prefix else [OUTPUT]
        converted: Any = torch.onnx.export(program, dynamo=True, verbose=False, input_names=[INPUT], output_names=names)
        model: ModelProto = converted.model_proto
    backbone = module.backbone
    _require_grid(model.graph, backbone.patch_size, backbone.stride)
    _name_axes(model.graph)
    for key, value in about.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    large = model.ByteSize() > _LARGE
    onnx.save_model(model, str(path), save_as_external_data=large, location=f"{path.name}.data" if large else None)


def quantise(source: Path, target: Path) -> None:
    """Write an ONNX file with linear layers in int8, with one scale per output channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet("", "onnxruntime"):
        quantize_dynamic(
            str(source),
            str(target),
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],  # a convolution in int8 is slower than in float32 on CPUs
        )


def _require_grid(graph: GraphProto, patch: int, stride: int) -> None:
    """Insert a named reshape before the model that fails if patches do not cover the image exactly.

    ONNX has no assertions, and a convolution would silently drop rows and columns. The reshape is to the largest size
    on the grid: the image's own, or one with fewer elements, which every runtime rejects.
    """
    import onnx

    rule = f"multiples_of_{patch}" if patch == stride else f"{patch}_plus_multiples_of_{stride}"
    name = f"height_and_width_must_be_{rule}_pixels"
    numbers = {"unit": [1, 1, stride, stride], "least": [0, 0, patch - stride, patch - stride]}
    for key, value in numbers.items():
        graph.initializer.append(onnx.helper.make_tensor(f"{name}_{key}", onnx.TensorProto.INT64, [4], value))
    steps = [
        ("Shape", [INPUT], "shape"),
        ("Sub", [f"{name}_shape", f"{name}_least"], "inner"),
        ("Div", [f"{name}_inner", f"{name}_unit"], "patches"),
        ("Mul", [f"{name}_patches", f"{name}_unit"], "covered"),
        ("Add", [f"{name}_covered", f"{name}_least"], "fitting"),
    ]
    nodes = [onnx.helper.make_node(kind, given, [f"{name}_{made}"], f"{name}_{made}") for kind, given, made in steps]
    # A side below one patch gives zero, which must not mean "unchanged".
    checked = onnx.helper.make_node("Reshape", [INPUT, f"{name}_fitting"], [f"{INPUT}_checked"], name, allowzero=1)
    nodes.append(checked)
    for node in graph.node:
        for index, given in enumerate(node.input):
            if given == INPUT:
                node.input[index] = f"{INPUT}_checked"
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def _name_axes(graph: GraphProto) -> None:
    """Give input and output axes readable names instead of the tracer's symbols."""
    del graph.value_info[:]
    axes = {INPUT: {0: "batch", 2: "height", 3: "width"}, OUTPUT: {0: "batch", 1: "h", 2: "w"}, PREFIX: {0: "batch"}}
    for value in (*graph.input, *graph.output):
        for index, axis in axes[value.name].items():
            value.type.tensor_type.shape.dim[index].dim_param = axis


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silence loggers below errors in a block."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
