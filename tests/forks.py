"""Processes that start with everything imported: a fork each, where a new one imports torch for seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

#: Imported once, by the process that forks the others.
_IMPORTED = ["torch", "timm", "accelerate", "tiny_distillation", "tiny_training", "denoising_vit.backbones.bundled"]
_IMPORTED += [f"denoising_vit.cli.{name}" for name in ("app", "reporting", "store", "training")]

#: Seconds that processes may take on a machine that has much else to do.
PATIENCE = 900

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(_IMPORTED)


@dataclass(frozen=True)
class Fork:
    """A process, and the files that its standard output and error go to."""

    process: ForkServerProcess
    out: Path
    err: Path

    def end(self) -> int:
        """Its exit code, once it has ended."""
        self.process.join(PATIENCE)
        self.process.kill()  # if it is still there
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


def fork(program: Callable[..., Any], *args: Any, folder: Path, **environment: str) -> Fork:
    """Calls a function in a process of its own.

    Args:
        program: a function of some module.
        args: of the function.
        folder: for what it prints.
        environment: variables of the process.
    """
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    process = _FORKS.Process(target=_serve, args=(out, err, environment, program, args), daemon=True)
    process.start()
    return Fork(process, out, err)


@dataclass(frozen=True)
class Ended:
    """How processes ended.

    Attributes:
        codes: their exit codes, by rank.
        err: what they printed to standard error, together.
    """

    codes: tuple[int, ...]
    err: str


def run_together(program: Callable[..., Any], *args: Any, folder: Path, count: int = 2) -> Ended:
    """Calls a function in so many processes, which torchrun's variables tell of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    forks = [
        fork(program, *args, folder=folder, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)
    ]
    codes = tuple(each.end() for each in forks)
    return Ended(codes, forks[0].err.read_text())


def dvit(arguments: list[str]) -> None:
    """The command, as a program; pictures of training runs are blank."""
    from denoising_vit.cli import main
    from tiny_distillation import blank_panels

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with blank_panels():
        main(arguments)


def _serve(
    out: Path, err: Path, environment: dict[str, str], program: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch

    for number, path in enumerate((out, err), start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    torch.set_num_threads(1)
    program(*args)
