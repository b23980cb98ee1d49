"""The folder of a run: records, log, checkpoints, best model."""

from __future__ import annotations

import atexit
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import weights_key
from denoising_vit.environment import run_info
from denoising_vit.errors import StoreError, TrainError
from denoising_vit.files import atomic_path, make_folder, parse_json
from denoising_vit.store.layout import LEASES
from denoising_vit.store.leases import Lease, Leases
from denoising_vit.store.objects import LocalObjects
from denoising_vit.training.checkpoints import Checkpoints
from denoising_vit.training.engine import from_first
from denoising_vit.training.pair_files import REASONS, has_pairs, remove_pairs

FORMAT = "denoising-vit/run"

_HEAD, _ABOUT, _PAIRS = "run.json", "about.json", "pairs"

#: Hidden folder of leases.
HOLDING = ".held"

#: Values that earlier versions did not record; if missing, they are not compared, so that older runs resume.
_ADDED = frozenset({"targets.photos", "backbone.digest", "backbone.mean", "backbone.std"})

_HELD: dict[tuple[Path, str], Lease] = {}


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints."""
        return Checkpoints(self.path / "checkpoints")

    @property
    def denoiser(self) -> Path:
        """The denoiser with the best held-out cosine."""
        return self.path / "denoiser.safetensors"

    @property
    def distilled(self) -> Path:
        """The distilled model that is best on held-out photos."""
        return self.path / "distilled.safetensors"

    @property
    def last(self) -> Path:
        """The denoiser or distilled model after the last step."""
        return self.path / "last.safetensors"

    @property
    def log(self) -> Path:
        """JSON lines, one per step and evaluation."""
        return self.path / "log.jsonl"

    @property
    def panels(self) -> Path:
        """Pictures of held-out images, one per evaluation."""
        return self.path / "panels"

    @property
    def pairs(self) -> Path:
        """Default folder of the kept pairs."""
        return self.path / _PAIRS

    def is_over(self, steps: int) -> bool:
        """True if a run of this many steps is finished."""
        return self.checkpoints.step >= steps and self.last.is_file()

    def begin(self, identity: dict[str, Any], *, resume: bool) -> None:
        """Create the folder of a new run, or open it to resume, and lock it for this process.

        A folder with only a record is from a run that could not start (no space for its pairs); a new run replaces it.

        Args:
            identity: JSON values that determine the run's result.
            resume: resume the run in the folder.

        Raises:
            TrainError: if the folder has other contents, a run but not `resume`, `resume` but no run, or a run with
                other options; the message has both values of each.
        """
        self._require_fit(resume=resume)
        try:
            hold(self.path, "run")
        except OSError as error:
            raise self._unwritable(error) from error
        self._require_fit(resume=resume)  # another run may have started since the first check
        if not resume:
            self._record(identity)
            return
        head = self.path / _HEAD
        recorded = read_object(head)
        if recorded is None:
            raise TrainError(f"{head}: damaged (expected a JSON object); start again in another folder")
        if different := differences(recorded, {"format": FORMAT, "version": 1, **identity}):
            raise TrainError(
                f"{self.path}: cannot resume with other options: {'; '.join(different)}. Use the options of the run, "
                "or start again in another folder"
            )
        if not (self.path / _ABOUT).is_file():  # an earlier run was stopped before it wrote this
            self._write({_ABOUT: run_info()})

    def begin_together(self, identity: dict[str, Any], accelerator: Any, *, resume: bool) -> None:
        """:meth:`begin` in the first process; the others check that they were given the same options.

        Raises:
            TrainError: as in :meth:`begin`, or if the options of a process differ.
        """
        if accelerator.is_main_process:
            self.begin(identity, resume=resume)
        if different := differences(from_first(accelerator, identity), identity):
            raise TrainError(
                f"{self.path}: process {accelerator.process_index} has other options or photos than the first process: "
                f"{'; '.join(different)}. Use the same for all processes"
            )

    def _require_fit(self, *, resume: bool) -> None:
        """Reject a folder in which the run cannot start or resume."""
        if not (self.path / _HEAD).is_file():
            if resume:
                raise TrainError(f"{self.path}: no run to resume; start it without --resume")
            if not is_new(self.path, _HEAD):
                raise TrainError(f"{self.path} exists and is not a run of this program; expected a new or empty folder")
        elif not resume and self._is_begun():
            raise TrainError(f"{self.path} already has a run; use --resume to continue it, or choose another folder")

    def _is_begun(self) -> bool:
        """True if the folder has more than the record of a run, or a record from another program."""
        ours = (read_object(self.path / _HEAD) or {}).get("format") == FORMAT
        others = {entry.name for entry in self.path.iterdir()} - {_HEAD, _ABOUT, _PAIRS, REASONS, HOLDING}
        return not ours or bool(others) or has_pairs(self.pairs)

    def _record(self, identity: dict[str, Any]) -> None:
        """Write the records of a new run, and remove files of pairs that an earlier run reserved but never filled."""
        try:
            make_folder(self.path)
            for path in self.path.glob(f".{_HEAD}.*.part"):  # left by a run that was killed while starting
                path.unlink()
            remove_pairs(self.pairs)
            (self.path / REASONS).unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        self._write({_HEAD: {"format": FORMAT, "version": 1, **identity}, _ABOUT: run_info()})

    def _write(self, records: dict[str, dict[str, Any]]) -> None:
        """Write records by file name."""
        try:
            for name, record in records.items():
                with atomic_path(self.path / name) as temporary:
                    temporary.write_text(json.dumps(record, indent=1))
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> TrainError:
        return TrainError(f"{self.path}: cannot be created or written to ({error}); choose another folder")

    def cut_log(self, step: int) -> None:
        """Remove log lines after a step, and incomplete lines, which a crash may leave."""
        if not self.log.is_file():
            return
        lines = self.log.read_text().splitlines(keepends=True)
        with atomic_path(self.log) as temporary:
            temporary.write_text("".join(line for line in lines if _logged_step(line) <= step))


def is_new(folder: Path, record: str) -> bool:
    """True if a folder does not exist, or has only leftovers of a run that was killed while writing its record."""
    if not folder.exists():
        return True
    left = re.compile(rf"\.{re.escape(record)}\.\w+\.part")
    return folder.is_dir() and all(e.name == HOLDING or left.fullmatch(e.name) for e in folder.iterdir())


def _logged_step(line: str) -> float:
    """The step of a log line; infinity for other or incomplete lines."""
    try:
        step = parse_json(line)["step"] if line.endswith("\n") else None
    except (ValueError, LookupError, TypeError):
        step = None
    return step if isinstance(step, int) else math.inf


def backbone_identity(backbone: Backbone) -> dict[str, Any]:
    """JSON values that determine the features of a backbone."""
    known = {name: getattr(backbone, name) for name in ("name", "layer", "norm", "stride", "mean", "std")}
    weights = {"fingerprint": backbone.fingerprint.short, "digest": weights_key(backbone)}
    return known | weights | {"dtype": str(backbone.dtype).removeprefix("torch.")}


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is none."""
    try:
        found = parse_json(path.read_text())
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def differences(before: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """Differences between a recorded JSON object and the current one, with both values."""
    before, now = (json.loads(json.dumps(record)) for record in (before, now))  # tuples as lists
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{path}{name}.")
        elif old != new and (name in before or f"{path}{name}" not in _ADDED):
            found.append(f"{path}{name} was {_short(old)}, now {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def hold(folder: Path, name: str) -> None:
    """Lock a folder against writing by other processes, until this process ends or :func:`let_go` is called.

    Raises:
        TrainError: naming the process that holds the lock.
        OSError: if the folder cannot be written to.
    """
    key = folder.resolve(), name
    if key in _HELD:
        with suppress(StoreError):  # the folder was removed and created again
            _HELD[key].check()
            return
        let_go(folder, name)
    make_folder(folder)
    try:
        _HELD[key] = Leases(LocalObjects(folder / HOLDING)).acquire(name)
    except StoreError as error:
        raise TrainError(f"{folder}: another run is writing to it ({error})") from error
    atexit.register(let_go, folder, name)


def let_go(folder: Path, name: str) -> None:
    """Release the lock of :func:`hold`."""
    lease = _HELD.pop((folder.resolve(), name), None)
    if lease is not None:
        lease.release(forget=True)
        with suppress(OSError):  # not empty: there are other leases
            for empty in (folder / HOLDING / LEASES, folder / HOLDING):
                empty.rmdir()


@contextmanager
def held(folder: Path, name: str) -> Iterator[None]:
    """:func:`hold` as a context manager."""
    hold(folder, name)
    try:
        yield
    finally:
        let_go(folder, name)
