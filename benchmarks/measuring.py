"""Shared by all benchmarks: clocks, alternating runs, rates, operation counts, slopes, photos, and writing of results.

Wall seconds depend on the load of the machine. Processor seconds (of all threads of this process) hardly do, if
threads that wait for each other sleep: on a busy CPU set OMP_WAIT_POLICY=passive and trust their ratios. On an
accelerator they do not measure the device.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from denoising_vit.data import Dataset, open_dataset, spread

#: Side of the square bfloat16 product that measures the device's matrix rate.
MATRIX_SIDE = 4096


@dataclass
class Times:
    """Seconds of the runs of one job: wall clock and processor."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def median(self, clock: str) -> float:
        """Median over all runs, by one of the two clocks."""
        return statistics.median(getattr(self, clock))

    def add(self, job: Callable[[], Any]) -> None:
        """Runs a job once and records its time, including all work that it starts."""
        synchronise()
        wall, processor = time.perf_counter(), time.process_time()
        job()
        synchronise()
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)


def alternate(jobs: Mapping[str, Callable[[], Any]], runs: int, *, warm: bool = True) -> dict[str, Times]:
    """Runs jobs in turn, so that a disturbance affects all of them.

    Args:
        jobs: jobs by name.
        runs: number of runs of each job.
        warm: run each job once before, untimed.
    """
    if warm:
        for job in jobs.values():
            job()
    times = {name: Times() for name in jobs}
    for _ in range(runs):
        for name, job in jobs.items():
            times[name].add(job)
    return times


def ratios(above: Times, below: Times) -> dict[str, Any]:
    """Time of one job relative to another: the median over pairs of runs, by either clock, with minimum and maximum."""
    found = {}
    for clock in ("wall", "processor"):
        each = [a / b for a, b in zip(getattr(above, clock), getattr(below, clock), strict=True)]
        found[clock] = {"median": statistics.median(each), "least": min(each), "largest": max(each)}
    return found


def matrix_product(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> tuple[Callable[[], Any], float]:
    """A large product of random matrices, and its number of operations."""
    left, right = (torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out), 2.0 * MATRIX_SIDE**3


def operations(job: Callable[[], Any]) -> float:
    """Multiplications and additions in the products and convolutions of a job, counted as it runs."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        job()
    return float(counter.get_total_flops())


def slope(amounts: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log costs over log amounts, by least squares: 1 is linear."""
    x, y = [math.log(amount) for amount in amounts], [math.log(cost) for cost in costs]
    return statistics.linear_regression(x, y).slope


def timed(job: Callable[[], Any], repeats: int = 1) -> float:
    """Minimum wall seconds over a few repeats."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        job()
        synchronise()
        times.append(time.perf_counter() - started)
    return min(times)


def synchronise() -> None:
    """Waits for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def resident() -> int:
    """Resident memory of this process in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak(device: torch.device) -> int:
    """Peak memory in bytes so far: allocated on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak(device: torch.device) -> None:
    """Resets :func:`peak` (Linux, CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def hardware() -> str:
    """The hardware that this runs on, in one line."""
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    kind = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"{chip}, {kind}, torch {torch.__version__}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def write(out: Path | None, name: str, found: Mapping[str, Any], markdown: str) -> None:
    """Prints results, and writes them as JSON and Markdown if a folder is given."""
    print(json.dumps(found, indent=2))
    print(markdown)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        (out / f"{name}.md").write_text(markdown)


def some_photos(folder: Path, count: int) -> Dataset:
    """That many photos of a folder, evenly spaced; all of them if there are fewer."""
    photos = open_dataset(folder)
    return Dataset(str(folder), [photos[index] for index in spread(len(photos), count)])


def passes(model: Callable[[torch.Tensor], Any], images: torch.Tensor) -> Callable[[], None]:
    """A job of one forward pass."""

    @torch.inference_mode()
    def job() -> None:
        model(images)

    return job
