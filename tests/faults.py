"""A fault at every write: each file-system call of a verb fails once, and afterwards the same command must succeed.

`python tests/faults.py` tries every call of every verb in every way and prints a table; `test_faults.py` tries a few.
A shim (`faults.c`, built here with the system's C compiler) counts the calls that change files below one folder. One
process imports everything once; every trial is a fork of it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import gc
import hashlib
import importlib
import io
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import flushes

SHIM = Path(__file__).with_suffix(".c")

#: Modes of the shim: how the call fails, and with which error.
FAULTS: dict[str, tuple[int, int]] = {
    "disk full from then on": (2, errno.ENOSPC),
    "input/output error": (1, errno.EIO),
    "permission denied": (1, errno.EACCES),
    "short write": (3, 0),
    "killed after it": (4, 0),
}
COUNT = 0

#: timm's smallest ViT: 64 channels in 6 blocks.
MODEL = "test_vit"

#: Packages that the commands import lazily.
_OTHERS = ("torch", "torchvision", "timm", "matplotlib.pyplot", "sklearn.decomposition", "scipy.ndimage", "zarr", "av")
_OTHERS += ("rich.progress", "tyro", "PIL.Image", "jinja2", "accelerate", "tensorboard", "torchmetrics", "pydantic")

#: Exit code of a process that the shim has killed.
KILLED = 137

#: Bytes of a file next to the outputs that no verb may touch.
FOREIGN = b"a file of somebody else"

#: Files that contain times and commands, and pictures, which are redrawn from the float16 features of a kept file.
_TIMED = re.compile(r"(about\.json|log\.jsonl|.*\.html|out/.*\.png)$")

#: Pattern of temporary file names; after a kill such files may stay.
_TEMPORARY = re.compile(r"(^|/)\.[^/]*(\.parts?|\.tmp[A-Za-z0-9]*)(/|$)|(^|/)\.tmp[A-Za-z0-9]+$")


@dataclass(frozen=True)
class Case:
    """A verb with arguments, relative to the folder of the trial.

    arguments: arguments of the first run.
        arguments: of the first run.
        again: arguments of the run that resumes, if they differ.
    """

    arguments: tuple[str, ...]
    again: tuple[str, ...] | None = None


@dataclass
class Trial:
    """Results of a disturbed run and of the run after it."""

    code: int
    words: str
    again: int
    words_again: str
    problems: list[str] = field(default_factory=list)


def cases() -> dict[str, Case]:
    """The verbs that write, at sizes that take a second."""
    import tiny_fit

    model = ("--backbone", MODEL, "--weights", "weights.safetensors", "--device", "cpu", "--dtype", "float32")
    seen = (*model, "--size", str(tiny_fit.SIZE), "--views", "8")
    quick = ("--steps", "2", "--batch-size", "1", "--held-out", "1", "--checkpoint-every", "1", "--evaluate-every", "1")
    train = ("train", "photos", "-o", "out/run", "--on-the-fly", *quick, "--pairs.keep", "1", "--pairs.whole", "1")
    fitting = ("--exact.size", str(tiny_fit.SIZE), "--exact.views", "8")
    distill = ("distill", "photos", "-o", "out/run", "--denoiser", "denoiser.safetensors", *quick)
    views = ("--views.sizes", str(tiny_fit.SIZE))
    show = ("show", "photos", "-o", "out/pictures", *model, "--size", "48", "--features", "raw", "--maps", "pca")
    film = ("video", "clip", "-o", "out/film.mp4", *model, "--size", "48", "--panel-size", "80", "--features", "raw")
    return {
        "denoise": Case(("denoise", "photos", "-o", "out", *seen, "--held-out", "0", "--method", "exact")),
        "fit": Case(("fit", "photos", "-o", "out/store", *seen, "--held-out", "0", "--images-per-shard", "2")),
        "calibrate": Case(("calibrate", "photos", "-o", "out/g.safetensors", *seen)),
        "train": Case((*train, *fitting, *model), (*train, *fitting, *model, "--resume")),
        "distill": Case((*distill, *views, *model), (*distill, *views, *model, "--resume")),
        "export": Case(("export", "-o", "out/model", "--format", "timm", *model)),
        "store export": Case(("store", "export", "store", "-o", "out/single")),
        "show": Case(show),
        "video": Case(film),
    }


def prepare(folder: Path) -> None:
    """Inputs of every verb: photos, frames, weights, a denoiser, a store."""
    import tiny_export
    import tiny_fit
    from denoising_vit.denoiser import write_denoiser

    tiny_fit.write_photos(folder / "photos", 4)
    tiny_fit.write_photos(folder / "clip", 3, seed=1)
    spec = tiny_fit.spec_of(tiny_fit.write_weights(folder / "weights.safetensors", MODEL), backbone=MODEL)
    write_denoiser(tiny_export.denoiser(spec.load()), folder / "denoiser.safetensors")
    tiny_fit.prepare(folder / "photos", folder / "store", spec).run()
    (folder / "out").mkdir()
    (folder / "out" / "theirs.txt").write_bytes(FOREIGN)


def build(folder: Path) -> Path:
    """The shim as a library.

    Raises:
        FileNotFoundError: if there is no C compiler.
    """
    library = folder / "faults.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("expected a C compiler (cc) to build faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SHIM, "-ldl"], check=True)
    return library


def preloaded(folder: Path, arguments: Sequence[str]) -> int:
    """Runs this script with the shim preloaded, in a separate process."""
    environment = {**os.environ, "LD_PRELOAD": str(build(folder)), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run([sys.executable, __file__, "--armed", *arguments], env=environment, check=False).returncode


def import_everything() -> None:
    """Imports what the verbs import, without running torch: forks of a process with OpenMP threads would hang."""
    import denoising_vit

    for name in _OTHERS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for module in pkgutil.walk_packages(denoising_vit.__path__, "denoising_vit."):
        # The page writes nothing here, and Gradio takes seconds.
        if not module.name.startswith(("denoising_vit.show.app.", "denoising_vit.__main__")):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    gc.freeze()  # otherwise the collector of each fork touches, and so copies, all imported objects


def forked(
    folder: Path, arguments: Sequence[str], n: int, mode: int, code: int, log: Path | None
) -> tuple[int, str, int]:
    """Runs a verb in a fork with the n-th call failing: exit code, what it printed, how many calls it made."""
    printed, counted = folder.parent / "printed.txt", folder.parent / "counted.txt"
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(folder)
            out = os.open(printed, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), line_buffering=True)
            sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), line_buffering=True)
            ended = _run(folder, arguments, n, mode, code, log, counted)
        except BaseException as error:
            print("Traceback", repr(error), file=sys.__stderr__)
            ended = 70
        os._exit(ended)
    _, status = os.waitpid(pid, 0)
    made = int(counted.read_text()) if counted.exists() else 0
    counted.unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(status), printed.read_text("utf-8", "replace"), made


def _run(folder: Path, arguments: Sequence[str], n: int, mode: int, code: int, log: Path | None, counted: Path) -> int:
    import torch

    from denoising_vit.cli import app

    torch.set_num_threads(1)
    shim = ctypes.CDLL(None)
    logged = -1 if log is None else os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    shim.fault_arm(f"{folder}/".encode(), n, mode, code, logged)
    try:
        return app.run([*arguments])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except KeyboardInterrupt:
        return 130
    finally:
        made = shim.fault_count()
        shim.fault_arm(b"", 0, COUNT, 0, -1)
        counted.write_text(str(made))


def tree(folder: Path) -> dict[str, str]:
    """Digests of all files below the folder but TensorBoard's, named by time; of those that tell times, presence."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.name.startswith("events.out") and "leases" not in path.parts:
            found[name] = "" if _TIMED.search(name) else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@contextlib.contextmanager
def fresh(inputs: Path, at: Path) -> Iterator[Path]:
    """A copy of the inputs, always at the same path, since files record their inputs."""
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(inputs, at)
    yield at


class Harness:
    """Trials of one verb.

    Args:
        work: a folder for inputs and trials.
        case: the verb.
    """

    def __init__(self, work: Path, case: Case) -> None:
        self.inputs, self.at, self.case = work / "inputs", work / "trial" / "place", case
        self.at.parent.mkdir(exist_ok=True)
        trees = []
        for _ in range(2):
            with fresh(self.inputs, self.at) as place:
                code, words, self.calls = forked(place, case.arguments, 0, COUNT, 0, work / "calls.txt")
                if code != 0:
                    raise AssertionError(f"undisturbed run failed: {code}\n{words}")
                trees.append(tree(place))
        #: Files of an undisturbed run; those that two of them make differently have no digest.
        self.expected = {name: value if trees[1].get(name) == value else "" for name, value in trees[0].items()}
        self.before = tree(self.inputs)
        self.log = [line.split("\t") for line in (work / "calls.txt").read_text().splitlines()]

    def trial(self, n: int, fault: str) -> Trial:
        """The n-th call fails; then the same command runs undisturbed."""
        mode, error = FAULTS[fault]
        with fresh(self.inputs, self.at) as place:
            code, words, _ = forked(place, self.case.arguments, n, mode, error, None)
            after = tree(place)
            again, words_again = 0, ""
            if not self._complete(after):  # otherwise the work is done, and a verb may refuse to repeat it
                again, words_again, _ = forked(place, self._again(after), 0, COUNT, 0, None)
            trial = Trial(code, words, again, words_again)
            removes = self.log[n - 1][1] in ("unlink", "rmdir")  # what could not be removed stays
            self._judge(trial, fault, after, tree(place), removes=removes)
        return trial

    def _complete(self, found: dict[str, str]) -> bool:
        return all(
            found.get(name) == digest or (not digest and name in found) for name, digest in self.expected.items()
        )

    def _again(self, after: dict[str, str]) -> Sequence[str]:
        """The command that resumes; training that has not begun yet is restarted."""
        begun = any(name.endswith("run.json") for name in after)
        return self.case.again if self.case.again is not None and begun else self.case.arguments

    def _judge(self, trial: Trial, fault: str, after: dict[str, str], final: dict[str, str], *, removes: bool) -> None:
        say = trial.problems.append
        if "Traceback" in trial.words + trial.words_again:
            say("a traceback reached the user")
        for name, digest in self.before.items():
            if after.get(name) != digest or final.get(name) != digest:
                say(f"{name} was changed")
        for name, digest in self.expected.items():
            if digest and name in after and name not in self.before and after[name] != digest and _single(name):
                say(f"{name} has its final name and other content")
        if trial.code not in (0, KILLED) and "killed" not in fault and not _names_a_file(trial.words):
            say("the error names no file")
        if trial.again != 0:
            say(f"the command after it ended with {trial.again}")
            return
        for name, digest in self.expected.items():
            if name not in final:
                say(f"{name} is missing afterwards")
            elif digest and final[name] != digest:
                say(f"{name} differs afterwards")
        left = [name for name in final if name not in self.expected and not _TEMPORARY.search(name)]
        if left and not removes:
            say(f"left behind: {', '.join(left[:3])}")
        kept = [name for name in final if _TEMPORARY.search(name)]
        if kept and trial.code != KILLED and not removes:
            say(f"temporary files left: {', '.join(kept[:3])}")


def _single(name: str) -> bool:
    """True for files that are written whole, not appended to or replaced during a run."""
    return not re.search(r"(log\.jsonl|checkpoint|pairs|/(denoiser|distilled)\.)", name)


def _names_a_file(words: str) -> bool:
    return bool(re.search(r"\bout\b|\.(png|safetensors|json|jsonl|mp4|html)\b", words))


def ends(log: Sequence[Sequence[str]]) -> list[int]:
    """Numbers of the first and the last call of each kind on each file; those between them are equivalent."""
    places: dict[tuple[str, ...], list[int]] = {}
    for n, (_, *call) in enumerate(log, 1):
        places.setdefault(tuple(call), []).append(n)
    return sorted({n for each in places.values() for n in (each[0], each[-1])})


def armed(
    work: Path, names: Sequence[str], every: int, faults: Sequence[str], result: Path | None, *, only_ends: bool
) -> int:
    """In the preloaded process: all trials of the named verbs."""
    import_everything()
    pid = os.fork()  # inputs are made in a fork, so that this process never runs torch
    if pid == 0:
        try:
            (work / "inputs").mkdir()
            prepare(work / "inputs")
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        raise AssertionError("the inputs could not be made")
    rows, failed = [], 0
    for name in names or cases():
        harness = Harness(work, cases()[name])
        chosen = ends(harness.log) if only_ends else range(1, harness.calls + 1)
        print(f"{name}: {harness.calls} calls, {len(chosen)} of them chosen", flush=True)
        lost = [problem.replace(f"{harness.at}/", "") for problem in flushes.losses(harness.log)]
        rows.append({"verb": name, "fault": "power cut", "calls": harness.calls, "tried": 1, "problems": lost})
        print("\n".join(f"    {problem}" for problem in lost), end="\n" if lost else "", flush=True)
        failed += bool(lost)
        for place, fault in enumerate(faults):
            first = place * every // len(faults)  # other calls for each fault, to cover more calls in total
            points, found = chosen[first::every], {}
            tried = 0
            for n in points:
                if FAULTS[fault][0] == 3 and harness.log[n - 1][1] != "write":
                    continue
                tried += 1
                trial = harness.trial(n, fault)
                print(".", end="", file=sys.stderr, flush=True)
                for problem in trial.problems:
                    call, words = harness.log[n - 1], (trial.words_again or trial.words).strip().splitlines()
                    where = f"call {n}: {call[1]} {call[2][len(str(harness.at)) + 1 :]}; words: {' '.join(words[-1:])}"
                    found.setdefault(problem, where)
                failed += bool(trial.problems)
            rows.append({"verb": name, "fault": fault, "calls": harness.calls, "tried": tried, "problems": found})
            print(f"{name:14} {fault:24} {tried:5} of {harness.calls} calls, {len(found)} problems", flush=True)
            for problem, where in found.items():
                print(f"    {problem} ({where})", flush=True)
    if result is not None:
        result.write_text(json.dumps(rows, indent=1))
    return 1 if failed else 0


def main() -> int:
    """Runs the trials that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verbs", nargs="*", default=[], help="default: all")
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), help="default: all")
    parser.add_argument("--every", type=int, default=1, help="try each n-th call only")
    parser.add_argument("--ends", action="store_true", help="of the like calls on one file try the first and the last")
    parser.add_argument("--result", type=Path, help="file for the table, as JSON")
    parser.add_argument("--armed", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.armed:
        given = chosen.verbs, chosen.every, chosen.faults, chosen.result
        return armed(chosen.armed, *given, only_ends=chosen.ends)
    with tempfile.TemporaryDirectory() as folder:
        return preloaded(Path(folder), [folder, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
