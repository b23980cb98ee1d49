"""Attention that is fast in bfloat16 on CPUs: one head of one image at a time, as three plain matrix operations.

Scores of one head (1,370 tokens: 3.8 MB) stay in cache, and matrix products and softmax run at the full rate of the
vendor's kernels. torch's fused CPU kernel reaches about a quarter of that rate in bfloat16. docs/decisions.md has the
figures for speed and accuracy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Below this many tokens the fused kernel has no disadvantage.
_LEAST_TOKENS = 256


class HeadwiseAttention(TorchFunctionMode):
    """While active, replaces plain scaled dot product attention on CPU bfloat16 tensors, in any model.

    Masked, causal, grouped or differentiated attention is left to torch.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _applies(*args, **kwargs):
            return headwise_attention(*args[:3], **kwargs)
        return func(*args, **kwargs)


def headwise_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, **_without_effect: Any
) -> Tensor:
    """``softmax(Q K^T scale) V`` for (B, heads, N, D) tensors; the result has the same shape.

    Scores are rounded to bfloat16, so their size matters: subtracting the mean key moves all scores of a query by the
    same amount, which softmax ignores, and makes them smaller. That keeps the accuracy of the fused kernel, which holds
    scores in float32.
    """
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    key = key - key.mean(dim=-2, keepdim=True, dtype=torch.float32).to(key.dtype)
    images, heads, tokens, _ = query.shape
    # Heads lie side by side in memory, (B, N, heads, D), as the projection that follows wants them.
    result = query.new_empty(images, tokens, heads, value.shape[-1]).transpose(1, 2)
    for image in range(images):
        for head in range(heads):
            scores = query[image, head] @ key[image, head].T
            result[image, head] = scores.softmax(-1) @ value[image, head]
    return result


def _applies(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    plain = attn_mask is None and dropout_p == 0 and not is_causal and not enable_gqa
    here = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.ndim == 4
    learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return plain and here and not learning and query.shape[-2] >= _LEAST_TOKENS and query.shape[1] == key.shape[1]
