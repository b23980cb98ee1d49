"""Checkpoints of a run: weights and optimizer state in safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from denoising_vit.errors import TrainError
from denoising_vit.files import KEY, below, make_folder, parse_json, write_tensors
from denoising_vit.training.engine import gathered, shared_like

#: Number of checkpoints to keep: the newest and the previous one.
_KEPT = 2


@dataclass(frozen=True)
class Progress:
    """State of a run.

    Attributes:
        step: number of optimizer steps done.
        best: the best held-out cosine so far, or minus the loss (stage 3 with content-free images); None before the
            first evaluation.
        best_step: its step.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None


class Checkpoints:
    """The newest checkpoints of a run. Sampler and schedule are functions of the step, so their state is not saved.

    Args:
        folder: folder of the checkpoint files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def last(self) -> Path | None:
        """The newest checkpoint, if any."""
        files = self._all()
        return files[-1] if files else None

    @property
    def step(self) -> int:
        """The step of the newest checkpoint; 0 if there is none."""
        return 0 if self.last is None else int(self.last.stem.removeprefix("step-"))

    def save(
        self,
        progress: Progress,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        more: Mapping[str, Tensor] = MappingProxyType({}),
        *,
        write: bool = True,
    ) -> None:
        """Write a checkpoint atomically, then remove all but the newest two.

        Args:
            progress: state of the run.
            model: the model; if its weights are sharded, all processes must call this.
            optimizer: its optimizer.
            more: further tensors by name.
            write: whether this process writes the file; one process must.

        Raises:
            TrainError: if it cannot be written (for example on a full disk).
        """
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{name}": value for name, value in state.items()}
        tensors |= {f"more.{name}": value for name, value in more.items()}
        tensors = {name: gathered(value.detach()).cpu().contiguous() for name, value in tensors.items()}
        if not write:
            return
        make_folder(self.folder)
        path = self._path(progress.step)
        before = self.last
        try:
            write_tensors(tensors, path, {KEY: json.dumps(asdict(progress))})
        except OSError as error:
            kept = "there is no earlier one" if before is None else f"{before.name} is intact; continue with --resume"
            raise TrainError(f"{path}: the checkpoint could not be written ({error}); {kept}") from error
        for old in self._all()[:-_KEPT]:
            old.unlink(missing_ok=True)

    def load(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        more: Mapping[str, Tensor] = MappingProxyType({}),
        *,
        step: int | None = None,
    ) -> Progress:
        """Load a checkpoint; further tensors are overwritten in place.

        Args:
            model: its model.
            optimizer: its optimizer.
            more: further tensors by name.
            step: step of the checkpoint; 0 loads nothing. Defaults to the newest, if any.

        Raises:
            TrainError: if it is damaged, or belongs to another model.
        """
        step = self.step if step is None else step
        if step == 0:
            return Progress()
        path = self._path(step)
        try:
            with safe_open(path, framework="pt") as file:
                progress = Progress(**parse_json((file.metadata() or {})[KEY]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            own = model.state_dict()
            loaded = {
                name: shared_like(value, own.get(name, value)) for name, value in below("model.", tensors).items()
            }
            model.load_state_dict(loaded)
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": _optimizer_state(tensors, optimizer), "param_groups": groups})
            for name, value in more.items():
                value.copy_(shared_like(tensors[f"more.{name}"], value))
        except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split()[:16])  # torch lists every tensor
            raise TrainError(
                f"{path}: damaged checkpoint ({reason}); delete it, and continue from the previous one with --resume"
            ) from error
        return progress

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:07}.safetensors"

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))


def _optimizer_state(tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in below("optimiser.", tensors).items():
        if (found := re.fullmatch(r"(\d+)\.(\w+)", name)) is None:
            raise ValueError(f"unknown tensor optimiser.{name}")
        state.setdefault(int(found[1]), {})[found[2]] = shared_like(value, parameters[int(found[1])])
    return state
