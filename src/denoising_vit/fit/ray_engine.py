"""The Ray engine: shards are rows of a Ray dataset, and workers are actors with their own model.

Workers read, fit and write, so that no features move between processes. If a worker dies, it is restarted and its shard
is resumed.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from denoising_vit import errors
from denoising_vit.backbones import BackboneSpec
from denoising_vit.backbones.passes import compiled
from denoising_vit.data import open_dataset
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.stage_one import StageOne
from denoising_vit.errors import DenoisingVitError, FitError
from denoising_vit.files import extra_hint
from denoising_vit.fit.local import LocalRun, OnPhoto, manifest_of
from denoising_vit.fit.options import FitOptions
from denoising_vit.store import FeatureStore

#: Fraction of a machine's CPU cores for the workers; the rest reads and schedules.
_WORKERS_SHARE = 0.8

#: Timeout in seconds for connecting to a cluster; Ray's own takes minutes.
_ANSWER = 5


@dataclass(frozen=True)
class RayJob:
    """Settings for all workers."""

    spec: BackboneSpec  #: the backbone, with its dtype resolved by the driver
    source: str  #: absolute path or URL of the data set
    store: str  #: path or URL of the store
    denoising: DenoiseOptions  #: options of stage 1
    options: FitOptions  #: options of the job
    artifact: Tensor | None = None  #: G (h, w, C) if known
    threads: int | None = None  #: number of torch threads per worker; None for torch's default
    on_gpu: bool = False  #: True if the driver's backbone runs on CUDA


class ShardFitter:
    """A worker: loads the backbone once, then fits one shard after another.

    Errors of this package are returned in rows: if raised, Ray would add its own text to them and retry some of them.
    """

    def __init__(self, job: RayJob) -> None:
        self._options = job.options
        self._error: DenoisingVitError | None = None
        try:
            self._load(job)
        except DenoisingVitError as error:
            self._error = error

    def _load(self, job: RayJob) -> None:
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        backbone = compiled(job.spec.load()) if job.options.compiled else job.spec.load()
        self._stage = StageOne(backbone, job.denoising, job.artifact)
        self._dataset = open_dataset(job.source)
        # Fail before writing if photos were added since the start, or if this machine gives different results.
        ours = manifest_of(self._stage, job.options).with_ids([item.id for item in self._dataset])
        self._store = FeatureStore.open(job.store, ours, writable=True)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Fit the shard of a row; returns the reasons for skipped photos, or the error, as JSON."""
        shard, options = int(row["shard"]), self._options
        outcomes: dict[int, str | None] = {}
        try:
            if self._error is not None:
                raise self._error
            run = LocalRun(self._dataset, self._store, options.decoders, options.strict, outcomes.__setitem__)
            run.fit([self._stage], [shard])
        except DenoisingVitError as error:
            return {"shard": shard, "reasons": "{}", "error": json.dumps([type(error).__name__, str(error)])}
        reasons = {index: reason for index, reason in outcomes.items() if reason is not None}
        return {"shard": shard, "reasons": json.dumps(reasons), "error": ""}


def _fitter_of(job: RayJob) -> type[ShardFitter]:
    """A worker class that contains the job.

    As an argument, G would be kept in the object store of one machine; if that machine died, no worker could restart.
    """

    class Fitter(ShardFitter):
        def __init__(self) -> None:
            super().__init__(job)

    return Fitter


def fit_with_ray(job: RayJob, store: FeatureStore, shards: Sequence[int], on_photo: OnPhoto) -> None:
    """Fit shards with the number of workers in the options.

    When a shard is finished, ``on_photo`` is called for each of its photos, with None or the reason for skipping it.

    Raises:
        FitError: if Ray is not installed, no cluster responds, the cluster is too small for a worker, or a worker
            fails.
        DenoisingVitError: the error of a worker.
    """
    # Under `uv run`, Ray would upload the working directory, and every worker would build its own environment.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise FitError(f"engine 'ray' needs Ray: install {extra_hint('ray')}") from error
    done = store.done()
    todo = {shard: [index for index in store.manifest.images_of(shard) if index not in done] for shard in shards}
    started_here = not ray.is_initialized()
    if started_here:
        _connect(ray, job.options.ray_address)
    try:
        _quiet(ray)
        rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        fitted = rows.map(
            _fitter_of(job),  # pyright: ignore[reportArgumentType], a class means actors
            compute=ray.data.ActorPoolStrategy(size=min(job.options.workers, len(shards))),
            **_request(ray, job),
        )
        for row in fitted.iter_rows():
            if row["error"]:
                raise _as_raised(*json.loads(row["error"]))
            reasons = json.loads(row["reasons"])
            for index in todo[int(row["shard"])]:
                on_photo(index, reasons.get(str(index)))
    except ray.exceptions.RayError as error:
        raise FitError(f"a Ray worker failed: {str(error).strip()}") from error
    finally:
        if started_here:
            ray.shutdown()


def local_threads(workers: int) -> int:
    """Number of torch threads per worker on this machine."""
    return max((os.cpu_count() or 1) // workers, 1)


def _connect(ray: Any, address: str | None) -> None:
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():
            socket.create_connection((host, int(port)), timeout=_ANSWER).close()
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        # Ray looks up a token only for clusters that it discovers, not for a given address.
        unset = address is not None and "RAY_AUTH_MODE" not in os.environ
        hint = ". If the cluster requires a token, set RAY_AUTH_MODE=token" if unset else ""
        raise FitError(f"no Ray cluster at {address or 'this machine'}: {error}{hint}") from error


def _quiet(ray: Any) -> None:
    """Disable Ray's messages and progress bars, and its timeout for rows, because a shard may take half an hour."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if hasattr(context, "execution_no_progress_timeout_s"):
        context.execution_no_progress_timeout_s = -1


def _request(ray: Any, job: RayJob) -> dict[str, Any]:
    """CPU cores and accelerators to request per worker.

    Raises:
        FitError: if no machine has enough.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = {kind: max((machine.get(kind, 0.0) for machine in machines), default=0.0) for kind in ("CPU", "GPU")}
    options = job.options
    cpus, gpus = options.worker_cpus, options.worker_gpus
    if cpus is None:
        even = sum(machine.get("CPU", 0.0) for machine in machines) / options.workers
        cpus = round(_WORKERS_SHARE * min(even, most["CPU"]), 2)
    if gpus is None:
        gpus = 1.0 if job.on_gpu else 0.0
    for kind, asked in (("CPU", cpus), ("GPU", gpus)):
        if asked > most[kind]:
            raise FitError(
                f"a worker needs {asked:g} {kind}s, but the largest machine of the cluster has {most[kind]:g}; lower "
                f"--worker-{kind.lower()}s, or start Ray on larger machines"
            )
    return {"num_cpus": cpus} | ({"num_gpus": gpus} if gpus else {})


def _as_raised(kind: str, message: str) -> DenoisingVitError:
    """Recreate this package's error from its type and message."""
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, DenoisingVitError):
        return known(message)
    return FitError(message)
