"""How stage 1 is run over a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from denoising_vit.errors import PlanError


@dataclass(frozen=True)
class FitOptions:
    """Where and how a data set is fitted; nothing here changes the results, but for the grid that is kept.

    Attributes:
        engine: local is this process; ray is several, on this machine or a cluster.
        workers: ray only; processes that hold a model each.
        ray_address: ray only; of a running cluster, as `ray start` prints it. Without it, that of the environment's
            RAY_ADDRESS, or else one is started here.
        worker_cpus: ray only; processors that a worker asks for. Without it, an even part that leaves some for reading.
        worker_gpus: ray only; accelerators that a worker asks for.
        grid: field keeps every node of F, for crops as training targets; patch keeps the patch grid alone, a quarter of
            the bytes, and gives up crops.
        images_per_shard: photos that share an object in the store.
        decoders: threads that read and decode photos.
        compiled: compile the backbone, which takes minutes once; meant for accelerators, on a CPU it is slower.
            Results differ in their rounding.
        strict: stop at the first photo that cannot be used.
        retry_failed: try photos again that an earlier run could not use.
    """

    engine: Literal["local", "ray"] = "local"
    workers: int = 1
    ray_address: str | None = None
    worker_cpus: float | None = None
    worker_gpus: float | None = None
    grid: Literal["field", "patch"] = "field"
    images_per_shard: int = 16
    decoders: int = 2
    compiled: bool = False
    strict: bool = False
    retry_failed: bool = False

    def validate(self) -> None:
        """Checks every number's range.

        Raises:
            PlanError: naming the option, its range, and what came.
        """
        if self.engine not in ("local", "ray"):
            raise PlanError(f"engine must be 'local' or 'ray', got {self.engine!r}")
        if self.grid not in ("field", "patch"):
            raise PlanError(f"grid must be 'field' or 'patch', got {self.grid!r}")
        for name in ("workers", "images_per_shard", "decoders"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("worker_cpus", "worker_gpus"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise PlanError(f"{name} must be 0 or more, got {value}")
        alone = [name for name in ("ray_address", "worker_cpus", "worker_gpus") if getattr(self, name) is not None]
        if self.engine == "local" and (alone or self.workers != 1):
            raise PlanError(f"{', '.join(alone) or 'workers'} is for engine 'ray'; the local engine is one process")
