"""The published losses of stage 1 and where their gradients stop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.decomposition.neural_field.options import Recipe


def reconstruction_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error plus one minus the mean cosine, of tokens (N, C)."""
    return F.mse_loss(predicted, target) + 1 - F.cosine_similarity(predicted, target, dim=-1).mean()


def first_phase_loss(semantic: Tensor, artifact: Tensor, features: Tensor) -> Tensor:
    """F and G together explain the features; all (N, C)."""
    return reconstruction_loss(semantic + artifact, features)


def second_phase_loss(
    semantic: Tensor,
    artifact: Tensor,
    residual: Tensor,
    features: Tensor,
    residual_weight: float,
    sparsity_weight: float,
    recipe: Recipe = "paper",
) -> Tensor:
    """F explains what h leaves of the features, and h, kept small, what F and G leave of them; G rests. All (N, C).

    No gradient passes from F's error into h, nor from h's into F. The two recipes have the same squared error; the
    released one takes the cosine of F + G + h with the features, the paper's that of F + G with what h leaves.
    """
    artifact, given = artifact.detach(), residual.detach()
    if recipe == "released":
        field_loss = reconstruction_loss(semantic + artifact + given, features)
    else:
        field_loss = reconstruction_loss(semantic + artifact, features - given)
    left_over = (features - semantic - artifact).detach()
    residual_loss = residual_weight * F.mse_loss(residual, left_over)
    return field_loss + residual_loss + sparsity_weight * torch.mean(residual.abs())
