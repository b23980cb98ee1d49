"""Processes and devices of a run, as far as they can be tested without several processes or GPUs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import accelerate
import pytest
import torch

from denoising_vit.errors import TrainError
from denoising_vit.training import engine


class Made:
    """Records the arguments of new accelerators, and the current device when one is created."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: dict[str, Any] = {}
        self.present: str | None = None
        self.device: str | None = None
        monkeypatch.setattr(accelerate, "Accelerator", self._make)
        for name in ("WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)

    def _make(self, **given: Any) -> Made:
        self.given, self.device = given, self.present
        return self

    def set_device(self, device: str) -> None:
        self.present = device


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    return Made(monkeypatch)


@pytest.fixture
def two_gpus(made: Made, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made.set_device)
    return made


def test_numbered_device_is_used_for_backbone_and_denoiser(two_gpus: Made) -> None:
    accelerator = engine.make_accelerator("cuda:1")
    assert accelerator is two_gpus
    assert two_gpus.device == "cuda:1"  # the current device, which accelerate uses for cuda
    assert not two_gpus.given["cpu"]
    assert engine.device_of(accelerator, "cuda:1") == "cuda:1"


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_accelerate_chooses_the_device_without_a_number(two_gpus: Made, device: str) -> None:
    engine.make_accelerator(device)
    assert two_gpus.device is None
    assert two_gpus.given["cpu"] == (device == "cpu")


@pytest.mark.parametrize("device", ["cuda:2", "cuda:-1", "cuda:first"])
def test_unavailable_device_number_is_reported(two_gpus: Made, device: str) -> None:
    with pytest.raises(
        TrainError, match=f"device {device} is not available; expected auto, cpu, or a device of this machine"
    ):
        engine.make_accelerator(device)
    assert two_gpus.present is None


def test_busy_device_is_reported(two_gpus: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(_device: str) -> None:
        raise RuntimeError("CUDA-capable device(s) is/are busy")

    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(TrainError, match=r"training cannot start on cuda:1: CUDA-capable .* busy"):
        engine.make_accelerator("cuda:1")


@pytest.mark.parametrize("launched", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}])
def test_numbered_device_is_rejected_under_a_launcher(
    two_gpus: Made, launched: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainError, match="the processes share the devices; expected --device auto, got 'c"):
        engine.make_accelerator("cuda:1")
    engine.make_accelerator("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_unavailable_device_is_reported(device: str) -> None:
    with pytest.raises(TrainError, match=device):
        engine.make_accelerator(device)


def test_process_timeout_is_at_least_two_days(made: Made) -> None:
    """One process may compute pairs for hours while the others wait."""
    engine.make_accelerator("cpu")
    (handler,) = made.given["kwargs_handlers"]
    assert handler.to_kwargs()["timeout"] >= timedelta(days=2)
