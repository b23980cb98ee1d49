"""Random training samples of a probe, drawn in threads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

import torch

from denoising_vit.evaluation.probing import chosen

Sample = TypeVar("Sample")

#: Number of threads that decode and render.
_THREADS = 4


class StepSamples(ABC, Generic[Sample]):
    """The samples of each training step, one step ahead where an accelerator does the forward passes.

    Args:
        images: number of images.
        batch: samples per step.
        steps: number of steps.
        seed: seed for the order of images.
        device: device of the forward passes.
    """

    def __init__(self, images: int, batch: int, steps: int, seed: int, device: torch.device) -> None:
        self._count, self._batch, self._steps, self._seed = images, batch, steps, seed
        self._prefetch = device.type != "cpu"
        self._pool = ThreadPoolExecutor(_THREADS, "render", torch.set_num_threads, (torch.get_num_threads(),))
        self._ahead: dict[int, list[Future[Sample]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    @abstractmethod
    def _draw(self, index: int, step: int, place: int) -> Sample:
        """A sample of an image. Only index, step and place in the batch decide it, so that training can resume."""

    def take(self, step: int) -> list[Sample]:
        """The samples of a step, which is then forgotten."""
        self._submit(step)
        if self._prefetch and step + 1 < self._steps:
            self._submit(step + 1)
        return [future.result() for future in self._ahead.pop(step)]

    def _submit(self, step: int) -> None:
        if step not in self._ahead:
            batch = chosen(self._count, self._batch, step, self._seed)
            self._ahead[step] = [self._pool.submit(self._draw, index, step, place) for place, index in enumerate(batch)]
