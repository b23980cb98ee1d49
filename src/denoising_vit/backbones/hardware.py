"""Devices and floating-point types by what users call them."""

from __future__ import annotations

from typing import Literal

import torch

from denoising_vit.errors import BackboneError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32 (recent CUDA; AMX or AVX512-BF16), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        # torch has no public question for this; absent functions (other platforms) mean no.
        asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        return torch.bfloat16 if any(ask is not None and ask() for ask in asked) else torch.float32
    return torch.float32


def device_at(device: str | torch.device) -> torch.device:
    """The device that is meant, if it is there.

    Raises:
        BackboneError: if it cannot be used.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return place


def dtype_on(dtype: Dtype | torch.dtype, device: torch.device) -> torch.dtype:
    """The type that is meant for a device.

    Raises:
        BackboneError: if it is none.
    """
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        return fast_dtype(device)
    if not isinstance(dtype, str) or dtype not in named:
        raise BackboneError(f"dtype must be auto, {', '.join(named)}, got {dtype!r}")
    return named[dtype]
