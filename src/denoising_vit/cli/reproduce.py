"""``dvit reproduce``: reproduce published rows."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.comparison import main_value
from denoising_vit.cli.reporting import load_backbone, number, plain_table, print_error, print_note, show_progress
from denoising_vit.cli.streams import OK, SOME_FAILED, WRONG_USAGE, interruptible
from denoising_vit.denoiser.published import VARIANTS, published_rows
from denoising_vit.environment import run_info
from denoising_vit.errors import PlanError
from denoising_vit.evaluation.results import METRICS, Results

if TYPE_CHECKING:
    from denoising_vit.reproduction import Row, Step

    #: Steps and their result lines.
    _Measured = Sequence[tuple[Step, dict[str, Any]]]


#: Default variant.
_FIRST = VARIANTS[0]


def reproduce(
    row: str | None = None,
    variant: str | None = None,
    list: tyro.conf.FlagCreatePairsOff[bool] = False,
    data: Path = Path("data"),
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("reproduced.jsonl"),
    weights: str = "hub",
    device: str = "auto",
    seed: int = 0,
    dry: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Reproduce a published row with the released protocol, and print published and measured scores side by side.

    Runs the steps whose data are available; for the others, lists what is missing and where to put it.

    Args:
        row: the model, as named by `--list`.
        variant: baseline, voc_denoised, voc_distilled, imgnet_denoised or imgnet_distilled. Defaults to baseline.
        list: list every row with the status of its steps, and exit.
        data: folder with VOCdevkit/VOC2012, ADEChallengeData2016 and nyu; for denoisers also VOCdevkit/VOC2007 and the
            released list of photos voc_train.txt, and imagenet/train for training on ImageNet.
        out: results file to append lines to. The same command resumes an interrupted run.
        weights: weights of the model: hub, or a .safetensors or .pth file. The bundled DINOv2 is not the one in the
            table.
        device: auto, cpu, cuda, cuda:1, mps.
        seed: seed for the probe, the denoiser and the distillation.
        dry: run every step on synthetic data, with a random model of two blocks and two training steps. Without a row,
            runs all rows of the variant; without both, all rows. The scores are meaningless and not kept.
    """
    from denoising_vit.reproduction import list_rows

    if list:
        _print_list(list_rows(data, Results(out).lines if out.exists() else []))
        return OK
    if variant is not None and variant not in VARIANTS:
        raise PlanError(f"--variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    if seed < 0:
        raise PlanError(f"--seed must be at least 0, got {seed}")
    if dry:
        return _dry(row, variant, device, seed)
    if row is None:
        raise PlanError("no row given; give --row MODEL (see `dvit reproduce --list`)")
    return _reproduce(
        row, variant or _FIRST, data, out, BackboneSpec(row, weights, device=device, dtype="float32"), seed
    )


def _reproduce(model: str, variant: str, data: Path, out: Path, spec: BackboneSpec, seed: int) -> int:
    from denoising_vit.reproduction import Protocols, find_row

    found = find_row(model, variant, data)  # regardless of existing results, which are printed again
    if not _able(found):
        return WRONG_USAGE
    results = Results(out)
    backbone = load_backbone(spec)
    with interruptible("interrupted; finished steps are kept, run the command again to resume"):
        measured = _measured(
            found,
            data=data,
            backbone=backbone,
            spec=spec,
            results=results,
            folder=out.with_suffix(".cache"),
            seed=seed,
            protocols=Protocols(),
        )
    _print_measured([(found, measured)], f"{model}, {variant}")
    complete = _tell_rest(found)
    print_note(f"results in {out}")
    return SOME_FAILED if _tell_failed(measured) or not complete else OK


def _dry(model: str | None, variant: str | None, device: str, seed: int) -> int:
    from denoising_vit.reproduction import find_row
    from denoising_vit.reproduction.dry import dry_backbone, dry_data, dry_protocols

    chosen = [(row.model, row.variant) for row in published_rows() if variant in (None, row.variant)]
    chosen = chosen if model is None else [(model, variant or _FIRST)]
    found, failed = [], False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = dry_data(folder / "data")
        rows = [find_row(*each, data) for each in chosen]
        if not _able(*rows):
            return WRONG_USAGE
        with interruptible("interrupted; results of a dry run are not kept"):
            for row in rows:
                backbone = dry_backbone(row.published.model)
                backbone = backbone if device == "auto" else backbone.to(device)
                measured = _measured(
                    row,
                    data=data,
                    backbone=backbone,
                    spec=BackboneSpec(row.published.model, "random"),
                    results=Results(folder / "results.jsonl"),
                    folder=folder / "cache",
                    seed=seed,
                    protocols=dry_protocols(backbone),
                )
                failed = _tell_failed(measured) or failed
                found.append((row, measured))
    _print_measured(found, "dry run: random weights and synthetic data, so the measured scores are meaningless")
    _tell_rest(*rows)
    return SOME_FAILED if failed else OK


def _able(*rows: Row) -> bool:
    """True if any step is ready; otherwise print the reasons."""
    if any(step.status == "ready" for row in rows for step in row.steps):
        return True
    _tell_rest(*rows)
    print_error(f"no step can run for {', '.join(f'{r.published.model}, {r.published.variant}' for r in rows)}")
    return False


def _measured(row: Row, **settings: Any) -> list[tuple[Step, dict[str, Any]]]:
    """Run the steps of a row with settings of `reproduce_row`, and print their main scores."""
    from denoising_vit.reproduction import reproduce_row

    done = []
    for step, line in reproduce_row(row, run=run_info(), progress=show_progress, **settings):
        done.append((step, line))
        if not line["failed"]:
            print_note(f"{row.published.model} on {step.benchmark.name}: {main_value(line)}")
    return done


def _print_list(rows: Sequence[Row]) -> None:
    table = plain_table("model", "variant", "status of its steps", fold=True)  # so that names can be copied
    for row in rows:
        table.add_row(row.published.model, row.published.variant, row.status)
    Console().print(table)
    _tell_rest(*rows)


def _print_measured(rows: Sequence[tuple[Row, _Measured]], title: str) -> None:
    """Print published and measured scores side by side."""
    Console().print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    table = plain_table("model", "variant", "on", "", numbers=("published", "measured"), fold=True)
    for row, measured in rows:
        for step, line in measured:
            digits = {metric.name: metric.digits for metric in METRICS[step.benchmark.task]}
            for metric, key in step.benchmark.figures.items():
                published, found = row.published.figures[key], line["metrics"].get(metric)
                table.add_row(
                    row.published.model,
                    row.published.variant,
                    step.benchmark.name,
                    metric,
                    *(number(value, f".{digits[metric]}f") for value in (published, found)),
                )
    Console().print(table)


def _tell_failed(measured: _Measured) -> bool:
    """Print failed steps and skipped images with their reasons; True if there are any."""
    for step, line in measured:
        if line["failed"]:
            print_error(line["failed"], f"{step.benchmark.name} failed")
        for name, reason in line["skipped"]:
            print_error(f"{name}: {reason}", f"{step.benchmark.name} skipped")
    return any(line["failed"] or line["skipped"] for _, line in measured)


def _tell_rest(*rows: Row) -> bool:
    """Print the steps that were not run and why, each reason once; True if no data are missing."""
    left = dict.fromkeys((step.benchmark.name, step.why) for row in rows for step in row.steps if step.why)
    for name, why in left:
        print_note(f"{name}: {why}")
    return not any(step.status == "missing" for row in rows for step in row.steps)
