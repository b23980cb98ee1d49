"""Metrics for TensorBoard; its errors never stop a run."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from denoising_vit.errors import DenoisingVitWarning


class Board:
    """TensorBoard's log of a run; does nothing if TensorBoard is not installed or its file cannot be written.

    Args:
        folder: folder of the files.
        step: step at which the run starts or resumes.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder, self._writer = folder, None
        self._hook, threading.excepthook = threading.excepthook, self._on_thread
        with contextlib.suppress(ImportError), self._going_on():
            from torch.utils.tensorboard import SummaryWriter

            self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the metrics of a step."""
        with self._going_on():
            for name, value in figures.items():
                if self._writer is not None:
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the file."""
        with self._going_on():
            if self._writer is not None:
                self._writer.close()
        threading.excepthook = self._hook

    def _on_thread(self, args: threading.ExceptHookArgs) -> None:
        """Suppress the traceback of TensorBoard's thread, because the next call raises its error again."""
        if not (issubclass(args.exc_type, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            self._hook(args)

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """Turn an error into a warning, and stop writing."""
        try:
            yield
        except OSError as error:
            self._writer = None
            warnings.warn(
                f"{self._folder}: TensorBoard logging stopped ({error}); log.jsonl has all metrics",
                DenoisingVitWarning,
                stacklevel=2,
            )
