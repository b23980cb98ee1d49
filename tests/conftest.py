"""What several test files share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest

from browser import NONE_FOUND, chromium  # noqa: F401, a fixture

# Workers beside each other have a core each; torch reads it when it is imported. That is not here: the process that
# hands out the tests needs none of it, and importing it takes seconds.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# As the Ray engine does; some tests import Ray before it.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

# A shell that starts the tests in the background has them ignore Ctrl-C, and with them every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take many times as long as one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


#: Files that take minutes. They come first, so that no worker is left with one of them when the others are done.
LONGEST = (
    "test_fit_ray",
    "test_fit_ray_nodes",
    "test_distillation_processes",
    "test_reproduce",
    "test_app_browser",
    "test_training_processes",
    "test_end_to_end",
    "test_export_bundled",
)


#: Further files that start processes, train, fit whole data sets, or run verbs: `-m "not slow"` leaves them out.
SLOW = (
    *LONGEST,
    "test_app",
    "test_app_serving",
    "test_bundled",
    "test_calibration",
    "test_cli",
    "test_cli_calibrate",
    "test_cli_denoise_denoiser",
    "test_cli_denoise_tiles",
    "test_cli_diagnose",
    "test_cli_distill",
    "test_cli_evaluate",
    "test_cli_evaluate_depth",
    "test_cli_evaluate_tasks",
    "test_cli_export",
    "test_cli_fit",
    "test_cli_show",
    "test_cli_train",
    "test_cli_video",
    "test_comparison",
    "test_denoise",
    "test_denoise_denoiser",
    "test_depth_class_tokens",
    "test_depth_training",
    "test_diagnosis",
    "test_diagnosis_page",
    "test_distillation_judging",
    "test_distillation_photos",
    "test_distillation_run",
    "test_distillation_student",
    "test_distillation_teacher",
    "test_export",
    "test_export_huggingface",
    "test_faults",
    "test_fit_local",
    "test_fit_resume",
    "test_huggingface",
    "test_neural_field",
    "test_outputs",
    "test_pages",
    "test_prepare",
    "test_quickstart",
    "test_recipe",
    "test_segmentation_training",
    "test_showing",
    "test_shipped_denoiser",
    "test_store_durability",
    "test_store_leases",
    "test_training_engine",
    "test_training_pairs",
    "test_training_panels",
    "test_training_run",
    "test_training_targets",
    "test_video_rendering",
    "test_video_sheet",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the slow files, and sorts the longest to the front; workers take files in this order."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONGEST)))


def pytest_collectstart() -> None:
    """Imports make no garbage to speak of, and looking for it grows dearer with all that is imported."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Looking for garbage among all that is imported by now took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Some libraries complain at the end of what was not looked at."""
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says at the very end what was not tried, where nobody overlooks it."""
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    if any(NONE_FOUND in reason for reason in skipped):
        terminalreporter.section("attention", sep="!")
        terminalreporter.line(NONE_FOUND)
