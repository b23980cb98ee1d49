"""Progress and summary of training runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoising_vit.cli.exit_codes import OK, SOME_FAILED
from denoising_vit.cli.reporting import OnScreen, print_error, print_note, progress_bar
from denoising_vit.errors import DenoisingVitError

if TYPE_CHECKING:
    from denoising_vit.training.checkpoints import Progress


def ending(progress: Progress, steps: int, best: Path) -> str:
    """Steps done, and the best model."""
    more = "" if progress.step == steps else " (continue with --resume)"
    where = "" if progress.best_step is None else f", the best after step {progress.best_step}: {best}"
    return f"{progress.step} of {steps} steps done{more}{where}"


def exit_code(accelerator: Any, *, some_failed: bool) -> int:
    """The exit code of this process, after all are done: a launcher kills the others when one fails.

    Only the first process reports failed items.
    """
    accelerator.wait_for_everyone()
    return SOME_FAILED if some_failed and accelerator.is_main_process else OK


def tell_page(folder: Path) -> None:
    """Writes the page of a run; a failure is only a warning."""
    from denoising_vit.show.pages.run import write_run_page

    if not (folder / "log.jsonl").is_file():
        return  # no step was done
    try:
        print_note(f"page {write_run_page(folder)}")
    except (DenoisingVitError, OSError) as error:
        print_error(f"the page of the run could not be written ({error})", "warning")


class StepsBar(OnScreen):
    """A progress bar of steps with the loss, and a line for each evaluation."""

    def __init__(self, steps: int, *, shown: bool) -> None:
        self._progress = progress_bar("steps, loss {task.fields[loss]}", shown=shown, speed_estimate_period=300)
        self._task = self._progress.add_task("", total=steps, loss="-")

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Updates the bar after a step."""
        self._progress.update(self._task, completed=step, loss=f"{figures['loss']:.3f}")

    def look(self, step: int, figures: dict[str, float]) -> None:
        """Prints the metrics of an evaluation."""
        self._progress.print(
            f"step {step}: held-out cosine {figures['cosine']:.4f} (raw {figures['raw_cosine']:.4f}), "
            f"1 - cosine {figures['ratio']:.3f} of raw's, effective rank {figures['rank']:.0f} "
            f"(raw {figures['raw_rank']:.0f}){_drift(figures)}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _drift(figures: dict[str, float]) -> str:
    return f", class token 1 - cosine {figures['class_drift']:.2g}" if "class_drift" in figures else ""
