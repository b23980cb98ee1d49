"""``dvit reproduce``: published rows, measured again."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.exit_codes import INTERRUPTED, OK, SOME_FAILED, WRONG_USAGE
from denoising_vit.cli.reporting import print_error, print_note, watch
from denoising_vit.evaluation.records import Results, run_info
from denoising_vit.evaluation.segmentation import PAPER
from denoising_vit.published import VARIANTS, published_rows
from denoising_vit.reproduction import Row, Step, find_row, list_rows, reproduce_row

#: Steps and their lines of results.
_Measured = Sequence[tuple[Step, dict[str, Any]]]


def reproduce(
    row: str | None = None,
    variant: str = "baseline",
    list: tyro.conf.FlagCreatePairsOff[bool] = False,
    data: Path = Path("data"),
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("reproduced.jsonl"),
    weights: str = "hub",
    device: str = "auto",
    seed: int = 0,
    dry: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Measures a published row again, by the published protocol, and prints both side by side.

    Does the steps whose data is there, and says what is missing for the others and where it goes.

    Args:
        row: the model, as `--list` names it.
        variant: baseline, voc_denoised, voc_distilled, imgnet_denoised or imgnet_distilled.
        list: list every row with the status of its steps, and stop.
        data: folder that holds VOCdevkit/VOC2012 and ADEChallengeData2016.
        out: the file that lines of results are appended to. The same command goes on where it was stopped.
        weights: of the model: hub, or a .safetensors or .pth file. The bundled DINOv2 is not that of the table.
        device: auto, cpu, cuda, cuda:1, mps.
        seed: of the probe.
        dry: every step on made-up data, with two blocks of random weights and two steps of training; without a row,
            all baselines. Its figures mean nothing and are not kept.
    """
    if list:
        _print_list(list_rows(data, Results(out).lines if out.exists() else []))
        return OK
    if variant not in VARIANTS:
        print_error(f"--variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        return WRONG_USAGE
    try:
        if dry:
            return _dry(row, variant, device, seed)
        if row is None:
            print_error("which row? Give --row MODEL; `dvit reproduce --list` names them")
            return WRONG_USAGE
        return _reproduce(row, variant, data, out, BackboneSpec(row, weights, device=device), seed)
    except KeyboardInterrupt:
        print_note("interrupted; finished steps stay, and the same command goes on from there")
        return INTERRUPTED


def _reproduce(model: str, variant: str, data: Path, out: Path, spec: BackboneSpec, seed: int) -> int:
    found = find_row(model, variant, data)  # statuses of the data alone: what is done is printed again
    able = [step for step in found.steps if step.status == "ready"]
    if not able:
        _tell_rest(found)
        print_error(f"nothing can be measured of {model}, {variant}")
        return WRONG_USAGE
    results = Results(out)
    measured = [
        *reproduce_row(
            found,
            data=data,
            backbone=spec.load(),
            spec=spec,
            protocol=PAPER,
            results=results,
            folder=out.with_suffix(".cache"),
            run=run_info(),
            seed=seed,
            watch=watch,
        )
    ]
    _print_measured([(found, measured)], f"{model}, {variant}")
    complete = _tell_rest(found)
    failed = _tell_failed(measured)
    print_note(f"results in {out}")
    return OK if complete and not failed else SOME_FAILED


def _dry(model: str | None, variant: str, device: str, seed: int) -> int:
    from denoising_vit.reproduction.dry import dry_backbone, dry_data, dry_protocol

    models = [row.model for row in published_rows() if row.variant == variant] if model is None else [model]
    failed = False
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = dry_data(folder / "data")
        for each in models:
            row = find_row(each, variant, data)
            backbone = dry_backbone(each)
            measured = [
                *reproduce_row(
                    row,
                    data=data,
                    backbone=backbone if device == "auto" else backbone.to(device),
                    spec=BackboneSpec(each, "random"),
                    protocol=dry_protocol(),
                    results=Results(folder / f"{each}.jsonl"),
                    folder=folder / "cache",
                    run=run_info(),
                    seed=seed,
                    watch=watch,
                )
            ]
            failed = _tell_failed(measured) or failed or not measured
            found.append((row, measured))
    _print_measured(found, "dry run: random weights and made-up data, so the measured figures mean nothing")
    for row, _ in found[:1]:
        _tell_rest(row)
    return SOME_FAILED if failed else OK


def _print_list(rows: Sequence[Row]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for heading in ("variant", "status of its steps"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row.published.model, row.published.variant, row.status)
    Console().print(table)
    _tell_rest(*rows)


def _print_measured(rows: Sequence[tuple[Row, _Measured]], title: str) -> None:
    """Measured beside published."""
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for heading in ("model", "variant", "on", ""):
        table.add_column(heading)
    for heading in ("published", "measured"):
        table.add_column(heading, justify="right")
    for row, measured in rows:
        for step, line in measured:
            for metric, key in step.benchmark.figures.items():
                published, found = row.published.figures[key], line["metrics"].get(metric)
                table.add_row(
                    row.published.model,
                    row.published.variant,
                    step.benchmark.name,
                    metric,
                    *("-" if value is None else f"{value:.2f}" for value in (published, found)),
                )
    Console().print(table)


def _tell_failed(measured: _Measured) -> bool:
    """Says which steps failed and why; whether any did."""
    for step, line in measured:
        if line["failed"]:
            print_error(line["failed"], f"{step.benchmark.name} failed")
    return any(line["failed"] for _, line in measured)


def _tell_rest(*rows: Row) -> bool:
    """Says what was not done and why, each reason once; whether nothing was left out."""
    left = dict.fromkeys((step.benchmark.name, step.why) for row in rows for step in row.steps if step.why)
    for name, why in left:
        print_note(f"{name}: {why}")
    return not left
