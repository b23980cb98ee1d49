"""What training minimises."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def denoising_loss(clean: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error, and mean over patches of the cosine, of features (B, h, w, C) against targets.

    The published loss of stages 2 and 3 is ``MSE + (1 - cosine)`` (section 4.2 of the paper).
    """
    return F.mse_loss(clean, target), F.cosine_similarity(clean, target, dim=-1).mean()
