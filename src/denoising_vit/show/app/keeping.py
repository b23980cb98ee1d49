"""Where answers lie while somebody looks at them: a private folder, from which they go again."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

#: Seconds after which nobody looks at an answer any more.
LIFETIME = 3600.0

#: Answers that are kept at most; the oldest go first.
MOST = 64


class Keep:
    """A folder of its own for each answer, readable by this user only; use it as a context, it leaves nothing behind.

    Attributes:
        served: folder for files that the page hands to browsers.
    """

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="dvit-app-"))  # mode 0700
        self._answers = self._root / "answers"
        self.served = self._root / "served"
        for folder in (self._answers, self.served):
            folder.mkdir()

    def new(self) -> Path:
        """An empty folder; answers that are too old, or too many, go first."""
        ages = sorted((folder.stat().st_mtime, folder) for folder in self._answers.iterdir())
        stale = sum(age < time.time() - LIFETIME for age, _ in ages)
        for _, folder in ages[: max(stale, len(ages) - MOST + 1)]:
            self.forget(folder)
        return Path(tempfile.mkdtemp(dir=self._answers))

    def forget(self, folder: Path | None) -> None:
        """Removes an answer; one that has gone already, or none, is no mistake."""
        if folder is not None and folder.parent == self._answers:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Removes everything."""
        shutil.rmtree(self._root, ignore_errors=True)

    def __enter__(self) -> Keep:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
