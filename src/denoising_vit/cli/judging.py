"""What all comparisons of `dvit evaluate` share: their options, the workbench, and what is said of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.exit_codes import INTERRUPTED, OK, SOME_FAILED
from denoising_vit.cli.reporting import CountProgress, print_error, print_note, watch
from denoising_vit.cli.scoreboard import scoreboard
from denoising_vit.cli.streams import print_json
from denoising_vit.environment import run_info
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.options import FieldOptions
from denoising_vit.evaluation.results import Results, main_metric
from denoising_vit.extractors import Cleaners, features_arg

if TYPE_CHECKING:
    from denoising_vit.evaluation.data import JudgedData
    from denoising_vit.evaluation.workbench import Line, Workbench


@dataclass(frozen=True)
class Judged:
    """What is judged, on what, and where the results go.

    Attributes:
        data: the folder of the data; which layouts are known is said above.
        features: names of features.
        out: the file that lines of results are appended to. The same command goes on where it was stopped.
        cache: folder for features and fields. Without it, one beside the results.
        cache_gb: most that cached features may take; fields of stage 1 come on top.
        images: how many images of each split are used, spread evenly over it; 0 takes all.
        cleaners: what cleans the features.
    """

    data: Path
    features: Annotated[str, features_arg("The first is what the others are compared with.")] = "raw,subtract,exact"
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("results.jsonl")
    cache: Path | None = None
    cache_gb: float = 10.0
    images: int = 0
    cleaners: tyro.conf.OmitArgPrefixes[Cleaners] = Cleaners()  # noqa: RUF009, frozen


def open_bench(
    judged: Judged, exact: FieldOptions, model: BackboneSpec, open_data: Callable[[Callable[[], None]], JudgedData]
) -> Workbench:
    """All that a comparison needs; what is wrong with data or files is said before the model is loaded.

    Args:
        judged: what is judged.
        exact: how stage 1 is done.
        model: the backbone.
        open_data: opens the data; it is given what is to be called after each image that is read.

    Raises:
        EvaluationError: if the data cannot be used, or results or cache cannot be written.
        BackboneError: if the backbone cannot be loaded.
    """
    from denoising_vit.evaluation.workbench import Workbench

    if not judged.cache_gb >= 0:
        raise EvaluationError(f"cache_gb must be 0 or more, got {judged.cache_gb}")
    with CountProgress(None, "images read") as progress:
        data = open_data(progress.advance)
    if data.note:
        print_note(data.note)
    if data.absent:
        print_note(f"never occurs in val, left out of the means unless predicted: {', '.join(data.absent)}")
    results = Results(judged.out)  # a file that cannot be written to is said before the model is loaded
    backbone = model.load()
    print_note(f"backbone {backbone.extra_repr()} on {backbone.device}, fingerprint {backbone.fingerprint.short}")
    bench = Workbench(
        data=data,
        backbone=backbone,
        spec=model,
        results=results,
        folder=judged.cache or judged.out.with_suffix(".cache"),
        run=run_info(),
        cache_bytes=judged.cache_gb * 1e9,
        exact=exact.denoising(),
        fields_of=exact.of,
        cleaners=judged.cleaners,
        watch=watch,
    )
    _ = bench.cache  # a folder that cannot be written to is said at once
    return bench


def tell(judged: Judged, lines: Callable[[], Iterator[Line]], *, as_json: bool, varied: tuple[str, ...] = ()) -> int:
    """Says how each source did when it is done, then all of them. Returns the exit code.

    Args:
        judged: what is judged.
        lines: of results.
        as_json: print them instead of a table.
        varied: settings in which lines of one command differ; there is a table for each.
    """
    found: list[Line] = []
    try:
        for line, kept in lines():
            found.append((line, kept))
            if as_json:
                print_json(line)
            if not line["failed"]:
                metric = main_metric(line["task"])
                value = line["metrics"][metric.name]
                words = f"{metric.name} {value:.{metric.digits}f} in {line['seconds']:.0f} s"
                told = ", ".join([line["features"], *filter(None, [_setting(line, varied)])])
                print_note(f"{told}: {words}{' (kept from an earlier run)' if kept else ''}")
    except KeyboardInterrupt:
        print_note("interrupted; finished results stay, and the same command goes on from there")
        return INTERRUPTED
    return finish(found, judged.out, as_json=as_json, varied=varied)


def finish(found: Sequence[Line], out: Path, *, as_json: bool, varied: tuple[str, ...] = ()) -> int:
    """Prints tables of lines of results, and says what failed or was skipped. Returns the exit code."""
    lines = [line for line, _ in found]
    for setting in dict.fromkeys(_setting(line, varied) for line in lines if not as_json):
        if setting:
            print(f"\n{setting}")
        scoreboard([line for line in lines if _setting(line, varied) == setting])
    for line in lines:
        if line["failed"]:
            print_error(line["failed"], f"{line['features']} failed")
    skipped = lines[0]["skipped"] if lines else []
    for name, reason in skipped:
        print_error(f"{name}: {reason}", "skipped")
    print_note(f"results in {out}; `dvit report {out} -o results.md` makes tables of them")
    return SOME_FAILED if skipped or any(line["failed"] for line in lines) else OK


def _setting(line: dict[str, Any], varied: Sequence[str]) -> str:
    from denoising_vit.evaluation.tables.markdown import readable

    settings = line["settings"]
    return ", ".join(f"{name} {readable(settings[name])}" for name in varied if name in settings)
