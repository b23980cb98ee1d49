"""``dvit export``: models in the formats of other libraries, compared with PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.reporting import print_error, print_note
from denoising_vit.cli.streams import OK, SOME_FAILED, print_json
from denoising_vit.errors import PlanError
from denoising_vit.export.options import ExportOptions
from denoising_vit.extractors import KINDS, Cleaners, FeatureKind, Unused, features_help, parse_names

if TYPE_CHECKING:
    from denoising_vit.export.verification import Comparison


def _kinds() -> dict[str, FeatureKind]:
    """Kinds of features that one model computes in one pass."""
    return {kind.name: kind for kind in KINDS.values() if kind.one_pass}


_FEATURES = f"kind of features: {features_help(_kinds().values())}. Defaults to those of the given cleaner, else raw."


@dataclasses.dataclass(frozen=True)
class _OnePassCleaners(Cleaners):
    """Cleaners for the features of an export.

    Attributes:
        artifact: G for subtract: a file of `dvit calibrate`, or `shipped` (the default).
        denoiser: the denoiser: a file, voc_denoised or imgnet_denoised, or `shipped` (the default).
        subspace: positional directions for project. Defaults to the 16 strongest of a black image.
        registers: register neurons for registers.
    """

    distilled: Unused = None


def export(
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    features: Annotated[str | None, tyro.conf.arg(help=_FEATURES)] = None,
    exporting: tyro.conf.OmitArgPrefixes[ExportOptions] = ExportOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    cleaners: tyro.conf.OmitArgPrefixes[_OnePassCleaners] = _OnePassCleaners(),
    verify: Path | None = None,
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Export a model in float32 to the format of another library, with a model card, and compare it with PyTorch.

    `dvit export -o DIR --features denoiser --format onnx` writes ONNX for any batch size, height and width; `dvit
    export --verify DIR` checks it again on any machine.

    Args:
        out: folder of the export; must be new or empty.
        features: kind of features.
        exporting: format and options.
        model: the backbone; exports are always computed on the CPU in float32.
        cleaners: sources of the cleaner; at most one.
        verify: check an existing export instead: its folder or a file in it.
        json: print metrics as one JSON line.
    """
    from denoising_vit.backbones import Backbone
    from denoising_vit.denoiser.denoised_vit import DenoisedViT
    from denoising_vit.export.exporting import export_extractor

    if verify is not None:
        return _verify(verify, as_json=json)
    if out is None:
        raise PlanError("nothing to do; give -o DIR to export, or --verify DIR to check an export")
    given = [each.name for each in dataclasses.fields(cleaners) if getattr(cleaners, each.name) is not None]
    if len(given) > 1:
        raise PlanError(f"{' and '.join(f'--{name}' for name in given)} cannot be combined")
    implied = next((kind.name for kind in _kinds().values() if kind.uses in given), "raw")
    (features,) = parse_names([features or implied], _kinds())
    if implied not in ("raw", features):
        raise PlanError(f"--{given[0]} has no effect on --features {features}; omit one")
    exporting.validate()
    weights = _weights_file(model)
    if features == "distilled" and weights is None:
        raise PlanError(
            "--features distilled needs the weights of stage 3; give --weights FILE, or --weights distilled"
        )
    backbone = dataclasses.replace(model, device="cpu", dtype="float32").load()
    # Here distilled weights are the weights of the backbone.
    name = "raw" if features == "distilled" else features
    extractor, _ = cleaners.extractor(name, backbone)
    assert isinstance(extractor, Backbone | DenoisedViT)  # like all features of one pass
    print_note(f"exporting {features} features of {backbone.extra_repr()} as {exporting.format}")
    found = export_extractor(extractor, out, exporting, weights=weights, distilled=features == "distilled")
    _print_comparison(found, out, as_json=json)
    return OK


def _weights_file(model: BackboneSpec) -> Path | None:
    """File of the backbone's weights, if any."""
    from denoising_vit.backbones.huggingface_loading import PREFIX as HUGGINGFACE
    from denoising_vit.backbones.loading import distilled_file
    from denoising_vit.export.checkpoints import WEIGHTS

    if model.weights == "distilled":
        return distilled_file(model.backbone)
    folder = Path(model.backbone.removeprefix(HUGGINGFACE)).expanduser()
    candidates = (Path(model.weights).expanduser(), folder / WEIGHTS)
    return next((path for path in candidates if path.is_file()), None)


def _verify(path: Path, *, as_json: bool) -> int:
    from denoising_vit.export.verification import verify_export

    verdict = verify_export(path)
    for problem in verdict.problems:
        print_error(problem, "failed")
    if verdict.comparison is not None:
        _print_comparison(verdict.comparison, path, as_json=as_json)
    if not verdict.problems:
        print_note(f"{path}: intact")
    return SOME_FAILED if verdict.problems else OK


def _print_comparison(found: Comparison, path: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"export": str(path), **dataclasses.asdict(found)})
    print_note(
        f"against PyTorch: maximum difference {found.difference:.2g}, mean cosine {found.cosine:.6f}, minimum "
        f"{found.least_cosine:.6f}; {path}"
    )
