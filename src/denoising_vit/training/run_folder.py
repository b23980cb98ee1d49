"""The folder of a run: records, log, checkpoints, best model."""

from __future__ import annotations

import atexit
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoising_vit.environment import run_info
from denoising_vit.errors import StoreError, TrainError
from denoising_vit.files import atomic_path
from denoising_vit.store.layout import LEASES
from denoising_vit.store.leases import Lease, Leases
from denoising_vit.store.local import LocalObjects
from denoising_vit.training.checkpoints import Checkpoints
from denoising_vit.training.engine import from_first
from denoising_vit.training.pair_files import REASONS, has_pairs, remove_pairs

#: What earlier versions did not record; where it is not told, it is not compared, so that what they made stays valid.
_ADDED = frozenset({"targets.photos", "backbone.digest", "backbone.mean", "backbone.std"})


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None where it holds none."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def differences(there: dict[str, Any], here: dict[str, Any], path: str = "") -> list[str]:
    """Each value in which a record that is there differs from that of now, with both sides."""
    found = []
    for name in sorted(there.keys() | here.keys()):
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{path}{name}.")
        elif old != new and (name in there or f"{path}{name}" not in _ADDED):
            found.append(f"{path}{name} was {_short(old)}, now {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


#: The hidden folder in which it is noted.
HOLDING = ".held"

_HELD: dict[tuple[Path, str], Lease] = {}


def hold(folder: Path, name: str) -> None:
    """Keeps other processes from writing a folder, until this one ends or :func:`let_go` is called.

    Raises:
        TrainError: naming the process that writes it.
        OSError: if the folder cannot be written to.
    """
    key = folder.resolve(), name
    if key in _HELD:
        with suppress(StoreError):  # the folder was removed since, and made anew
            _HELD[key].check()
            return
        let_go(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _HELD[key] = Leases(LocalObjects(folder / HOLDING)).acquire(name)
    except StoreError as error:
        raise TrainError(f"{folder}: another run writes it ({error})") from error
    atexit.register(let_go, folder, name)


def let_go(folder: Path, name: str) -> None:
    """Lets other processes write it."""
    lease = _HELD.pop((folder.resolve(), name), None)
    if lease is not None:
        lease.release(forget=True)
        with suppress(OSError):  # others note there that they hold something else
            for empty in (folder / HOLDING / LEASES, folder / HOLDING):
                empty.rmdir()


@contextmanager
def held(folder: Path, name: str) -> Iterator[None]:
    """As :func:`hold`, for as long as the block lasts."""
    hold(folder, name)
    try:
        yield
    finally:
        let_go(folder, name)


FORMAT = "denoising-vit/run"

_HEAD, _ABOUT, _PAIRS = "run.json", "about.json", "pairs"


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it makes.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def checkpoints(self) -> Checkpoints:
        """Where the run stands."""
        return Checkpoints(self.path / "checkpoints")

    @property
    def denoiser(self) -> Path:
        """The best denoiser by held-out images."""
        return self.path / "denoiser.safetensors"

    @property
    def distilled(self) -> Path:
        """The best distilled model by held-out images."""
        return self.path / "distilled.safetensors"

    @property
    def last(self) -> Path:
        """The denoiser or distilled model after the last step."""
        return self.path / "last.safetensors"

    @property
    def log(self) -> Path:
        """JSON lines: one a step, and one an evaluation."""
        return self.path / "log.jsonl"

    @property
    def panels(self) -> Path:
        """Pictures of held-out images, one an evaluation."""
        return self.path / "panels"

    @property
    def pairs(self) -> Path:
        """Views that are kept, where no other place is named for them."""
        return self.path / _PAIRS

    def is_over(self, steps: int) -> bool:
        """Whether a run of so many steps has been carried out to its end."""
        return self.checkpoints.step >= steps and self.last.is_file()

    def begin(self, identity: dict[str, Any], *, resume: bool) -> None:
        """Makes the folder for a run, or opens that of the same run to go on with it.

        Beside what decides the run, it is recorded how it came about: command, hardware, software.

        A run that has nothing but its record could not begin (no room for its pairs), and does not keep others out.

        Args:
            identity: what decides the run; JSON values.
            resume: whether it is to be gone on with.

        Raises:
            TrainError: if the folder holds something else, holds a run and none is to be resumed, holds none and one
                is, or holds one with other options, each named with both sides.
        """
        self._require_fit(resume=resume)
        try:
            hold(self.path, "run")
        except OSError as error:
            raise self._unwritable(error) from error
        self._require_fit(resume=resume)  # another run may have begun meanwhile
        if not resume:
            self._record(identity)
            return
        head = self.path / _HEAD
        there = read_object(head)
        if there is None:
            raise TrainError(f"{head}: damaged (expected a JSON object); start anew in another folder")
        here = json.loads(json.dumps({"format": FORMAT, "version": 1, **identity}))
        if different := differences(there, here):
            raise TrainError(
                f"{self.path}: cannot resume with other options: {'; '.join(different)}. Give those of the run, or "
                "start anew in another folder"
            )

    def begin_together(self, identity: dict[str, Any], accelerator: Any, *, resume: bool) -> None:
        """What :meth:`begin` does, by the first process; the others are told what it began, and check that they agree.

        Raises:
            TrainError: as :meth:`begin` does, or if a process was given other options.
        """
        if accelerator.is_main_process:
            self.begin(identity, resume=resume)
        first = from_first(accelerator, identity)
        if different := differences(json.loads(json.dumps(first)), json.loads(json.dumps(identity))):
            raise TrainError(
                f"{self.path}: process {accelerator.process_index} was given other options or photos than the first: "
                f"{'; '.join(different)}. Give all the same"
            )

    def _require_fit(self, *, resume: bool) -> None:
        """Refuses a folder that is not as it has to be for a run to begin or be resumed."""
        if not (self.path / _HEAD).is_file():
            if resume:
                raise TrainError(f"{self.path}: no run to resume; start it without --resume")
            if self.path.exists() and (not self.path.is_dir() or {e.name for e in self.path.iterdir()} - {HOLDING}):
                raise TrainError(f"{self.path} is there and is no run of this program; expected a new or empty folder")
        elif not resume and self._is_begun():
            raise TrainError(f"{self.path} holds a run already; --resume goes on with it, or name another folder")

    def _is_begun(self) -> bool:
        """Whether there is more than the record of a run, or the record is none of ours."""
        ours = (read_object(self.path / _HEAD) or {}).get("format") == FORMAT
        others = {entry.name for entry in self.path.iterdir()} - {_HEAD, _ABOUT, _PAIRS, REASONS, HOLDING}
        return not ours or bool(others) or has_pairs(self.pairs)

    def _record(self, identity: dict[str, Any]) -> None:
        """Makes the folder and the record; files for pairs that a run before it never filled give way."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            remove_pairs(self.pairs)
            (self.path / REASONS).unlink(missing_ok=True)
            with atomic_path(self.path / _HEAD) as temporary:
                temporary.write_text(json.dumps({"format": FORMAT, "version": 1, **identity}, indent=1))
            with atomic_path(self.path / _ABOUT) as temporary:
                temporary.write_text(json.dumps(run_info(), indent=1))
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> TrainError:
        return TrainError(f"{self.path}: cannot be made or written to ({error}); name another folder")

    def cut_log(self, step: int) -> None:
        """Drops what was logged after a step, which is going to be done again."""
        if not self.log.is_file():
            return
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        with atomic_path(self.log) as temporary:
            temporary.write_text("".join(kept))

    def _lines(self) -> Iterator[str]:
        """The whole lines of the log; a crash may have left half of one."""
        for line in self.log.read_text().splitlines(keepends=True):
            try:
                if line.endswith("\n") and isinstance(json.loads(line).get("step"), int):
                    yield line
            except (ValueError, AttributeError):
                continue
