"""Fitting a data set into a store: the estimate of the work, and the engine that does it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from denoising_vit.artifact import KnownArtifact
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.passes import compiled
from denoising_vit.data import Dataset
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.stage_one import StageOne
from denoising_vit.errors import FitError
from denoising_vit.fit.local import LocalRun, OnPhoto, manifest_of
from denoising_vit.fit.options import FitOptions
from denoising_vit.fit.ray_engine import RayJob, fit_with_ray, local_threads
from denoising_vit.progress import duration
from denoising_vit.store import FeatureStore, Manifest

#: Number of attempts at staged photos that turn out to be damaged.
_ROUNDS = 3

#: Number of batches to time, after one warm-up batch.
_TIMED = 2


@dataclass(frozen=True)
class Estimate:
    """Remaining work of a job."""

    photos: int  #: number of photos in the data set
    done: int  #: number of photos in the store
    failed: int  #: number of photos that could not be used
    left: int  #: number of remaining photos
    passes: int  #: forward passes for the remaining photos
    seconds: float  #: time for these passes with all devices or workers, from a short measurement
    image_bytes: int  #: bytes per photo in the store
    bytes_needed: int  #: bytes for the remaining photos, with room for the shards being written
    bytes_free: int | None  #: free bytes at the store; None if unknown (an object store)

    @property
    def lacks_room(self) -> bool:
        """True if the disk is too small."""
        return self.bytes_free is not None and self.bytes_needed > self.bytes_free

    def require_room(self) -> None:
        """Check that the disk is large enough.

        Raises:
            FitError: with the whole estimate and possible remedies.
        """
        if self.lacks_room:
            raise FitError(
                f"not enough disk space: {self}. Free some space, choose another location (-o), store the patch grid "
                "only (--grid patch, a quarter of the bytes), store int8 (--precision int8, half the bytes), or use "
                "fewer photos"
            )

    def __str__(self) -> str:
        there = f"{self.done} already done, " if self.done else ""
        there += f"{self.failed} already skipped, " if self.failed else ""
        free = "" if self.bytes_free is None else f" ({_size(self.bytes_free)} free)"
        return (
            f"{self.photos} photos, {there}{self.left} to do: {self.passes:,} forward passes, about "
            f"{duration(self.seconds)}, {_size(self.bytes_needed)}{free}"
        )


@dataclass
class FitJob:
    """Stage 1 of a data set into a store; created by :meth:`prepare`, run by :meth:`run`."""

    dataset: Dataset
    store: FeatureStore  #: open for writing
    stages: Sequence[StageOne]  #: the exact solver, one per device
    spec: BackboneSpec  #: the backbone, as other processes load it
    options: FitOptions

    @classmethod
    def prepare(
        cls,
        dataset: Dataset,
        store: str | Path,
        spec: BackboneSpec,
        denoising: DenoiseOptions,
        options: FitOptions,
        artifact: KnownArtifact | None = None,
        backbone: Backbone | None = None,
    ) -> FitJob:
        """Load the backbone, factor the plan, and create or open the store.

        Args:
            dataset: the photos.
            store: folder or URL.
            spec: the backbone; several devices, separated by commas, share the work.
            denoising: options of stage 1.
            options: options of the job.
            artifact: a known G, as for `denoise_image`.
            backbone: the backbone that ``spec`` describes, if already loaded, on its only device.

        Raises:
            FitError: if the data set is empty, the disk is too small, or the devices would give different results.
            ArtifactError: if the artifact belongs to another backbone.
            StoreError: if the store has another backbone, plan or data set, or is not a store.
        """
        options.validate()
        if not len(dataset):
            raise FitError(f"{dataset.source}: no photos to fit")
        devices = [device.strip() for device in spec.device.split(",")]
        if options.engine == "ray" and len(devices) > 1:
            raise FitError("engine 'ray' expects one device; set the workers with --workers and --worker-gpus")
        backbones = [replace(spec, device=device).load() for device in devices] if backbone is None else [backbone]
        if options.compiled:
            backbones = [compiled(backbone) for backbone in backbones]
        stages = [StageOne(backbone, denoising, artifact) for backbone in backbones]
        manifest = manifest_of(stages[0], options)
        for device, stage in zip(devices, stages, strict=True):
            if differences := manifest.mismatch(manifest_of(stage, options)):
                raise FitError(
                    f"{devices[0]} and {device} would give different results: {'; '.join(differences)}; choose a "
                    "dtype that both support (--dtype), or one device"
                )
        if not FeatureStore.exists(store):
            args = stages, manifest, options, str(store), len(dataset)
            if _estimate(*args).lacks_room:  # time is measured only for the error message
                _estimate(*args, seconds_a_pass=seconds_per_pass(stages[0])).require_room()
        opened = FeatureStore.create_or_open(store, manifest, [item.id for item in dataset])
        if options.retry_failed:
            opened.retry_failed()
        return cls(dataset, opened, stages, spec, options)

    def estimate(self) -> Estimate:
        """Estimate the remaining work, with a short measurement."""
        done, failed = len(self.store.done()), len(self.store.failed())
        seconds = seconds_per_pass(self.stages[0]) if done + failed < len(self.store) else 0.0
        args = self.stages, self.store.manifest, self.options, self.store.url, len(self.store)
        return _estimate(*args, done=done, failed=failed, seconds_a_pass=seconds)

    def run(self, on_photo: OnPhoto = lambda _index, _reason: None) -> None:
        """Fit all remaining photos. Unreachable photos are not recorded as failed; a later run retries them.

        Args:
            on_photo: called once per photo with its index, and None or the reason for skipping it. With Ray, shard by
                shard.

        Raises:
            PhotoError: if strict, and a photo is unusable.
            StoreError: if another process writes a shard.
            FitError: if Ray fails, or a shard cannot be sealed.
            OSError: if the store cannot be written to; finished photos are kept.
        """
        reasons: dict[int, str] = {}

        def note(index: int, reason: str | None) -> None:
            if reason is not None:
                reasons[index] = reason
            on_photo(index, reason)

        lost: set[int] = set()
        for _ in range(_ROUNDS):
            if shards := self.store.unfinished():
                self._run(shards, note)
            lost = set(range(len(self.store))) - self.store.done() - set(self.store.failed()) - reasons.keys()
            if not lost:
                return
        raise FitError(
            f"{len(lost)} photos were written to {self.store.url} but cannot be read back (first: "
            f"{self.dataset[min(lost)].id}); check the disk for damage"
        )

    def _run(self, shards: list[int], on_photo: OnPhoto) -> None:
        options = self.options
        if options.engine == "local":
            LocalRun(self.dataset, self.store, options.decoders, options.strict, on_photo).fit(self.stages, shards)
            return
        backbone = self.stages[0].backbone
        weights = Path(self.spec.weights).expanduser()
        spec = replace(
            self.spec,
            dtype=str(backbone.dtype).removeprefix("torch."),  # explicit, because the default depends on the machine
            weights=str(weights.absolute()) if weights.is_file() else self.spec.weights,
        )
        job = RayJob(
            spec=spec,
            source=absolute(self.dataset.source),
            store=self.store.url,
            denoising=self.stages[0].options,
            options=options,
            artifact=self.stages[0].artifact,
            threads=None if options.ray_address else local_threads(options.workers),
            on_gpu=backbone.device.type == "cuda",
        )
        fit_with_ray(job, self.store, shards, on_photo)


def absolute(source: str) -> str:
    """Make a local path absolute for processes with other working directories; URLs are unchanged."""
    return source if "://" in source else str(Path(source).expanduser().absolute())


def _estimate(
    stages: Sequence[StageOne],
    manifest: Manifest,
    options: FitOptions,
    url: str,
    photos: int,
    *,
    done: int = 0,
    failed: int = 0,
    seconds_a_pass: float = 0,
) -> Estimate:
    left = photos - done - failed
    # While a shard is sealed, its photos exist twice; each writer has one open shard.
    twice = min(len(stages) * options.workers * manifest.images_per_shard, left)
    # Workers on this machine share the CPU cores that the measurement used.
    parallel = len(stages) if options.engine == "local" else options.workers if options.ray_address else 1
    passes = left * stages[0].views
    return Estimate(
        photos=photos,
        done=done,
        failed=failed,
        left=left,
        passes=passes,
        seconds=seconds_a_pass * passes / parallel,
        image_bytes=manifest.image_bytes,
        bytes_needed=(left + twice) * manifest.image_bytes,
        bytes_free=_free_bytes(url),
    )


def seconds_per_pass(stage: StageOne) -> float:
    """Time of a forward pass, measured on blank images in batches of the actual size."""
    images = torch.zeros(stage.batch_size, 3, *stage.fitted.size, device=stage.backbone.device)
    with torch.no_grad():
        stage.backbone(images)
        started = time.perf_counter()
        for _ in range(_TIMED):
            stage.backbone(images).sum().item()  # wait for the device
    return (time.perf_counter() - started) / (_TIMED * stage.batch_size)


def _free_bytes(url: str) -> int | None:
    """Free bytes at a store, existing or not; None for object stores."""
    if "://" in url and not url.startswith("file://"):
        return None
    path = Path(url.removeprefix("file://")).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _size(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
