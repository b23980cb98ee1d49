"""Run exports with their target libraries, and compare them with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from denoising_vit.backbones.recorded import synthetic_image
from denoising_vit.errors import ExportError
from denoising_vit.export.checkpoints import load_extractor
from denoising_vit.export.graphs import INPUT, refuse_pickles
from denoising_vit.files import file_digest, first_line, needed, parse_json

#: Features (B, h, w, C), and prefix tokens (B, P, C) if exported, of images (B, 3, H, W).
Run = Callable[[Tensor], tuple[Tensor, Tensor | None]]

#: Files of the model; other formats are loaded as directories.
ONNX, INT8, PROGRAM = "model.onnx", "model.int8.onnx", "model.pt2"


def runner(folder: Path, kind: str, *, int8: bool = False) -> Run:
    """Load the export in a folder.

    Raises:
        ExportError: if it cannot be loaded, or a package is missing.
    """
    made = {
        "timm": _timm,
        "huggingface": _huggingface,
        "onnx": lambda place: _onnx(place / (INT8 if int8 else ONNX)),
        "program": lambda place: _program(place / PROGRAM),
        "safetensors": _own,
    }
    if kind not in made:
        raise ExportError(f"{folder}: unknown export format {kind!r}; upgrade denoising-vit")
    try:
        run = made[kind](folder)
    except ExportError:
        raise
    except Exception as error:  # libraries raise many types
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
        # Models with mean pooling apply their final norm after it.
        tokens = model.fc_norm(tokens) if isinstance(model.norm, torch.nn.Identity) else tokens
        return _on_grid(tokens[:, model.num_prefix_tokens :], image, model.patch_embed.patch_size[0]), None

    return run


def _huggingface(folder: Path) -> Run:
    transformers = needed("transformers", "hf", ExportError)
    from denoising_vit.backbones.huggingface_loading import quiet

    with quiet(transformers):
        # The processor must load, though the compared images are already normalised.
        transformers.AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=False)
        model = transformers.AutoModel.from_pretrained(str(folder), trust_remote_code=False, dtype=torch.float32).eval()

    def run(image: Tensor) -> tuple[Tensor, None]:
        tokens = model(pixel_values=image).last_hidden_state
        prefix = 1 + getattr(model.config, "num_register_tokens", 0)
        return _on_grid(tokens[:, prefix:], image, model.config.patch_size), None

    return run


def _onnx(path: Path) -> Run:
    runtime = needed("onnxruntime", "onnx", ExportError)
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are raised as exceptions
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


FORMAT = "denoising-vit/export"
FORMAT_VERSION = 1

META, REFERENCE = "export.json", "check.safetensors"

#: Compared images: batch size, and patches down and across.
CHECKED = ((2, 4, 5), (1, 9, 6), (1, 7, 7))

#: Maximum difference of a feature, relative to the root mean square of the features if that is above 1.
TOLERANCES = {"timm": 1e-4, "huggingface": 1e-4, "safetensors": 1e-4, "program": 1e-4, "onnx": 1e-3}

#: Tolerance of the mean cosine of int8, which processors round differently.
INT8_SLACK = 0.005


@dataclass(frozen=True)
class Comparison:
    """Difference between two runs on the same images."""

    difference: float  #: maximum absolute difference of features and prefix tokens
    scale: float  #: root mean square of the reference, at least 1
    cosine: float  #: mean cosine of features over patches and images
    least_cosine: float  #: cosine of the worst patch

    @property
    def relative(self) -> float:
        """Maximum difference, relative to the scale."""
        return self.difference / self.scale


@dataclass(frozen=True)
class Verdict:
    """The result of :func:`verify_export`."""

    kind: str  #: format of the export
    comparison: Comparison | None  #: None if shapes differ or files have changed
    problems: tuple[str, ...]  #: empty for an intact export


def record(run: Run, sizes: Sequence[Sequence[int]], *, pixels: bool) -> dict[str, Tensor]:
    """Outputs of a run for the fixed images of these sizes (B, H, W), as tensors of a file."""
    kept = {}
    for index, (batch, height, width) in enumerate(sizes):
        features, prefix = run(_image(batch, height, width, pixels=pixels))
        kept[f"features_{index}"] = features.detach().float().cpu().contiguous()
        if prefix is not None:
            kept[f"prefix_{index}"] = prefix.detach().float().cpu().contiguous()
    return kept


def _image(batch: int, height: int, width: int, *, pixels: bool) -> Tensor:
    """Fixed images (B, 3, H, W) without a random generator: normalised, or in [0, 1]."""
    waves = synthetic_image(max(height, width))[..., :height, :width]
    images = torch.cat([waves * (1 - 0.3 * index) if index % 2 == 0 else waves.flip(-1) for index in range(batch)])
    return ((images + 2) / 4).clamp(0, 1) if pixels else images


def compare(reference: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Comparison | None:
    """Compare two records; None if names or shapes differ, or values are not finite."""
    if reference.keys() != found.keys() or not reference:
        return None
    pairs = [(reference[name], found[name]) for name in reference]
    if any(theirs.shape != ours.shape or not torch.isfinite(ours).all() for theirs, ours in pairs):
        return None
    features = [name for name in reference if name.startswith("features")]
    cosines = torch.cat([cosine_similarity(reference[name], found[name], dim=-1).flatten() for name in features])
    squares = torch.cat([theirs.flatten() for theirs, _ in pairs]).square().mean()
    return Comparison(
        difference=max(float((theirs - ours).abs().max()) for theirs, ours in pairs if theirs.numel()),
        scale=max(float(squares.sqrt()), 1.0),
        cosine=float(cosines.mean()),
        least_cosine=float(cosines.min()),
    )


def verify_export(path: str | Path) -> Verdict:
    """Check an export against the digests and features that were recorded with it.

    Args:
        path: its folder, or a file in it.

    Raises:
        ExportError: if it is not an export of this package, or cannot be run.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    meta = _read(path, folder)
    kind, options, check = meta["format_of_files"], meta["options"], meta["check"]
    if changed := _changed(folder, meta):  # changed files are not loaded
        return Verdict(kind, None, tuple(changed))
    try:
        reference = load_file(folder / REFERENCE)
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{folder / REFERENCE}: damaged ({error})") from error
    run = runner(folder, kind, int8=options["int8"])
    found = compare(reference, record(run, check["sizes"], pixels=options["pixels"]))
    problem = None
    if found is None:
        problem = "features have other shapes than recorded, or non-finite values"
    elif options["int8"]:
        least = check["cosine"] - INT8_SLACK
        if found.cosine < least:
            problem = f"mean cosine {found.cosine:.4f}, expected at least {least:.4f}"
    elif found.relative > check["tolerance"]:
        problem = (
            f"features differ by up to {found.relative:.2g} of their scale, expected at most {check['tolerance']:g}"
        )
    return Verdict(kind, found, (problem,) if problem else ())


def _read(path: Path, folder: Path) -> dict[str, Any]:
    try:
        meta = parse_json((folder / META).read_text())
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path}: not an export, or damaged: expected a folder of `dvit export` with {META} in it ({error})"
        ) from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ExportError(f"{folder / META}: not the record of an export (no {FORMAT!r} in it)")
    version = meta.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ExportError(
            f"{folder / META}: expected format version {FORMAT_VERSION} or lower, got {version}; upgrade denoising-vit"
        )
    parts = {"format_of_files": str, "options": dict, "check": dict, "files": dict}
    if lacking := [key for key, kind in parts.items() if not isinstance(meta.get(key), kind)]:
        raise ExportError(f"{folder / META}: damaged record: {', '.join(lacking)} missing")
    return meta


def _changed(folder: Path, meta: dict[str, Any]) -> list[str]:
    """Problems with files that are missing or have another digest."""
    problems = []
    for name, digest in {**meta["files"], REFERENCE: meta["check"].get("digest")}.items():
        path = folder / Path(name).name  # never outside the folder
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif (found := file_digest(path)) != digest:
            problems.append(
                f"{path}: not the file that was exported (SHA-256 {found[:12]}..., was {str(digest)[:12]}...)"
            )
    return problems
