"""What stage 1 makes of the photos of a stream: seen, solved, or failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from denoising_vit.decomposition.exact import ExactSolver
from denoising_vit.decomposition.heldout import HeldOut
from denoising_vit.decomposition.statistics import Statistics
from denoising_vit.views.plan import ViewPlan


@dataclass(frozen=True)
class Failed:
    """A photo that could not be done.

    Attributes:
        index: its place in the data set.
        name: its id.
        reason: why, without its name.
        final: whether another try would fail as well.
    """

    index: int
    name: str
    reason: str
    final: bool = True


@dataclass(frozen=True)
class Done:
    """A photo that is solved.

    Attributes:
        index: its place in the data set.
        name: its id.
        field: F on its nodes (Ry, Rx, C), float32 on the CPU.
        record: how it went; JSON values.
    """

    index: int
    name: str
    field: Tensor
    record: dict[str, Any]


@dataclass
class Ready:
    """A photo whose views have all been seen; :meth:`finish` solves it.

    Attributes:
        index: its place in the data set.
        about: its name, size and digest.
        statistics: b and g of its views.
        solver: of the plan.
        held_out: the views to judge by, if any.
        artifact: G (h, w, C) where it is known.
        judged: features of these views.
        raw: features of the whole photo (h, w, C), the first of its views.
    """

    index: int
    about: dict[str, Any]
    statistics: Statistics
    solver: ExactSolver
    held_out: ViewPlan | None
    artifact: Tensor | None
    judged: list[Tensor] = field(default_factory=list)
    raw: Tensor | None = None

    def solve_apart(self) -> tuple[Tensor, Tensor]:
        """F as it would be without artifact (Ry, Rx, C), and G of this photo alone (h, w, C); float64.

        Both are linear in the photo: from them, :meth:`ExactSolver.solve_field` gives F for any other G.
        """
        field = self.solver.solve_field(self.statistics.b)
        return field, self.solver.solve_artifact(field, self.statistics.g)

    def finish(self) -> Done:
        """Solves it, and judges it by the views that were held out."""
        return self._done(*_solve(self.solver, self.artifact, self.statistics.b, self.statistics.g))

    def _done(self, nodes: Tensor, artifact: Tensor) -> Done:
        """The result, from F on its nodes (Ry, Rx, C) and G (h, w, C)."""
        record = {"photo": self.about, "clipped_tokens": self.statistics.clipped_tokens}
        if self.held_out is not None:
            judge = HeldOut(nodes, artifact, self.held_out)
            for features in self.judged:
                judge.add_views(features)
            record |= {"heldout_r2": judge.r2, "heldout_cosine": judge.cosine}
        return Done(self.index, self.about["name"], nodes.float().cpu(), record)


def finish_together(photos: Sequence[Ready]) -> list[Done]:
    """Solves photos of one plan side by side: as many launches as for one of them, each with more to do."""
    ready = photos[0]
    b, g = (torch.cat(sums, dim=-1) for sums in zip(*((p.statistics.b, p.statistics.g) for p in photos), strict=True))
    known = None if ready.artifact is None else torch.cat([ready.artifact] * len(photos), dim=-1)
    solved = (part.chunk(len(photos), dim=-1) for part in _solve(ready.solver, known, b, g))
    return [photo._done(nodes, artifact) for photo, nodes, artifact in zip(photos, *solved, strict=True)]


def _solve(solver: ExactSolver, known: Tensor | None, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """F (Ry, Rx, C) and G (h, w, C), fitted unless it is known."""
    if known is None:
        return solver.solve(b, g)
    artifact = known.to(b)
    return solver.solve_field(b, artifact), artifact
