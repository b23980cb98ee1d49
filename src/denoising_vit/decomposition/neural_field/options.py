"""Options of the neural field: the published recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from denoising_vit.errors import PlanError

Recipe = Literal["paper", "released"]

#: Default number of Adam steps.
_STEPS: dict[str, int] = {"paper": 20_000, "released": 25_000}


@dataclass(frozen=True)
class NeuralFieldOptions:
    """Model and training of the neural field. Defaults follow the paper (section 4.1 and appendix A).

    Attributes:
        recipe: paper follows the paper. released follows its released code: the loss times 1,024, never divided again,
            so that weight decay and eps act as if 1,024 times smaller; G initialised randomly with standard deviation
            0.02; the vertices of tiny-cuda-nn; once h is fitted, the cosine of F + G + h with the features, one step
            later; a learning rate that rises from 0 and does not quite reach the final one. The released views are a
            separate option (coverage released, 769 views).
        steps: number of Adam steps. Defaults to 20,000 as in the paper, or 25,000 as in the released code.
        tokens: number of tokens drawn per step, from all patches of all views.
        learning_rate: learning rate after the warm-up.
        final_learning_rate: learning rate at the last step, after a cosine decay.
        warm_up: fraction of the steps with a rising learning rate.
        beta1: first beta of Adam.
        beta2: second beta of Adam.
        eps: epsilon of Adam.
        weight_decay: weight decay of Adam, added to the gradient.
        levels: number of levels of the hash grid.
        coarsest: vertices per side of the first level.
        finest: vertices per side of the last level; a single level has the coarsest.
        level_channels: number of features per level.
        table_size: maximum number of vertices stored per level; a level with more is hashed.
        field_hidden: width of the field's network. Defaults to half the features' channels.
        residual_hidden: width of h's network. Defaults to a quarter of the features' channels.
        residual_from: fraction of the steps after which G is frozen and h is fitted; 1 never fits h.
        residual_weight: weight of the squared error of h.
        sparsity_weight: weight of the mean absolute value of h.
        shared_artifact: fit G; otherwise F (and h) explain everything.
        evaluate_every: number of steps between evaluations on the held-out views.
        keep: keep the result of the last step, as published, or of the best step on the held-out views.
    """

    recipe: Recipe = "paper"
    steps: int | None = None
    tokens: int = 2048
    learning_rate: float = 1e-2
    final_learning_rate: float = 1e-3
    warm_up: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-15
    weight_decay: float = 1e-5
    levels: int = 16
    coarsest: int = 16
    finest: int = 1024
    level_channels: int = 8
    table_size: int = 2**20
    field_hidden: int | None = None
    residual_hidden: int | None = None
    residual_from: float = 0.5
    residual_weight: float = 0.1
    sparsity_weight: float = 0.02
    shared_artifact: bool = True
    evaluate_every: int = 500
    keep: Literal["last", "best"] = "last"

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps."""
        return _STEPS[self.recipe] if self.steps is None else self.steps

    @property
    def first_with_residual(self) -> int:
        """The first step that fits h, counted from 0; at least the number of steps if h is never fitted."""
        begin = self.residual_from * self.total_steps
        return int(begin) + 1 if self.recipe == "released" else math.ceil(begin)

    def validate(self) -> None:
        """Check the ranges of all options.

        Raises:
            PlanError: with the option, its range, and its value.
        """
        at_least_one = ("steps", "tokens", "levels", "level_channels", "table_size", "evaluate_every")
        for name in (*at_least_one, "field_hidden", "residual_hidden"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise PlanError(f"{name} must be at least 1, got {value}")
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise PlanError(f"{name} must be a positive number, got {value}")
        for name in ("weight_decay", "residual_weight", "sparsity_weight", "final_learning_rate"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise PlanError(f"{name} must be at least 0, got {value}")
        for name in ("warm_up", "residual_from"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise PlanError(f"{name} must be a fraction in [0, 1], got {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise PlanError(f"{name} must be in [0, 1), got {value}")
        if not 2 <= self.coarsest <= self.finest:
            raise PlanError(f"coarsest must be at least 2 and at most finest, got {self.coarsest} and {self.finest}")
        if self.recipe not in _STEPS:
            raise PlanError(f"recipe must be 'paper' or 'released', got {self.recipe!r}")
        if self.keep not in ("last", "best"):
            raise PlanError(f"keep must be 'last' or 'best', got {self.keep!r}")
