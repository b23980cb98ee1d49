"""What a run tells while it goes: JSON lines, and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from denoising_vit.errors import TrainError


class Log:
    """Writes figures of steps, line by line, and to TensorBoard.

    Args:
        path: of the JSON lines; TensorBoard's files go beside it.
        step: that the run goes on from.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._board = _board(path.parent / "tensorboard", step)

    def write(self, step: int, kind: str, figures: dict[str, float]) -> None:
        """One line: the step, ``train`` or ``held_out``, and figures; those that are not finite as null.

        Raises:
            TrainError: if it cannot be written.
        """
        plain = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        try:
            self._file.write(json.dumps({"step": step, "kind": kind, **plain}) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainError(f"{self._file.name}: cannot be written to ({error}); --resume goes on") from error
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Ends both."""
        with contextlib.suppress(OSError):  # a full disk was told when the line was written
            self._file.close()
        if self._board is not None:
            self._board.close()


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # JSON lines hold the same
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
