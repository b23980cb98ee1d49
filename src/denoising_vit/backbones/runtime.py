"""Process-wide settings: devices, dtypes, random seeds, network access."""

from __future__ import annotations

import contextlib
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import torch

from denoising_vit.backbones.catalog import Dtype
from denoising_vit.errors import BackboneError
from denoising_vit.files import first_line

_SEED_LOCK = threading.RLock()
_HUB_LOCK = threading.RLock()


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if the hardware multiplies it faster than float32 (recent CUDA; AMX or AVX512-BF16), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        # torch has no public function for this; these functions are missing on other platforms.
        checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        return torch.bfloat16 if any(check is not None and check() for check in checks) else torch.float32
    return torch.float32


def device_at(device: str | torch.device) -> torch.device:
    """The device; ``auto`` is CUDA, then MPS, then the CPU.

    Raises:
        BackboneError: if the device is not available.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(f"device {device!r} is not available ({first_line(error)})") from error
    return place


def dtype_on(dtype: Dtype | torch.dtype, device: torch.device) -> torch.dtype:
    """The torch dtype; ``auto`` is the fast one on this device.

    Raises:
        BackboneError: if the dtype is unknown or not a floating-point type.
    """
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        return fast_dtype(device)
    if not isinstance(dtype, str) or dtype not in named:
        raise BackboneError(f"dtype must be one of auto, {', '.join(named)}, got {dtype!r}")
    return named[dtype]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the block and restore it afterwards.

    Only one thread runs inside at a time, because the generator is shared by the whole process. Libraries that disable
    weight initialisation for the whole process while they load a model also run inside.
    """
    with _SEED_LOCK, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU generator only, because no other one is restored
        yield


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Set the hub client to offline mode inside the block if the hub is unreachable.

    Without a network, the client retries for most of a minute before it uses its cache. Only one thread runs inside at
    a time, because the setting is shared by the whole process.
    """
    from huggingface_hub import constants

    with _HUB_LOCK:
        before = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = before


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # The network is available: the hub's client may know certificates that urllib does not.
        return "CERTIFICATE" in str(error.reason)
    except OSError:
        return False
