"""Options of stage 1 over a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from denoising_vit.errors import PlanError, require_at_least

Engine = Literal["local", "ray"]
Grid = Literal["field", "patch"]
Precision = Literal["float16", "float32", "int8"]


@dataclass(frozen=True)
class FitOptions:
    """Options of a fit over a data set; only ``grid``, ``precision`` and ``compiled`` affect the stored values.

    Attributes:
        engine: local for this process; ray for several processes, on this machine or a cluster.
        workers: ray only; number of processes, each with its own model.
        ray_address: ray only; address of a running cluster, as printed by `ray start`. Defaults to RAY_ADDRESS, or to a
            new cluster on this machine.
        worker_cpus: ray only; CPU cores per worker. Defaults to an even share, with some left for reading.
        worker_gpus: ray only; accelerators per worker.
        grid: field stores all nodes of F, so that crops can be training targets; patch stores the patch grid only, a
            quarter of the bytes, without crops.
        precision: precision of the store. int8 takes half the bytes of float16, with one scale per channel and photo;
            photos are rejected if the cosine of any patch to its float16 value falls below 0.999.
        images_per_shard: number of photos per store object.
        decoders: number of threads that read and decode photos.
        compiled: compile the backbone, which takes minutes once; for accelerators, because it is slower on a CPU.
            Results differ by rounding.
        strict: stop at the first unusable photo.
        retry_failed: retry photos that an earlier run could not use.
    """

    engine: Engine = "local"
    workers: int = 1
    ray_address: str | None = None
    worker_cpus: float | None = None
    worker_gpus: float | None = None
    grid: Grid = "field"
    precision: Precision = "float16"
    images_per_shard: int = 16
    decoders: int = 2
    compiled: bool = False
    strict: bool = False
    retry_failed: bool = False

    def validate(self) -> None:
        """Check the range of every option.

        Raises:
            PlanError: naming the option, its range, and its value.
        """
        for name, choices in (("engine", Engine), ("grid", Grid), ("precision", Precision)):
            value, expected = getattr(self, name), get_args(choices)
            if value not in expected:
                raise PlanError(f"{name} must be {' or '.join(map(repr, expected))}, got {value!r}")
        least = {"workers": 1, "images_per_shard": 1, "decoders": 1, "worker_cpus": 0, "worker_gpus": 0}
        require_at_least(self, least, PlanError)
        alone = [name for name in ("ray_address", "worker_cpus", "worker_gpus") if getattr(self, name) is not None]
        if self.engine == "local" and (alone or self.workers != 1):
            raise PlanError(f"{', '.join(alone) or 'workers'} applies to engine 'ray' only; local has one process")
