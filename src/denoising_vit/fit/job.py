"""A data set, a store, and how the one gets into the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from denoising_vit.artifact import KnownArtifact, artifact_digest
from denoising_vit.backbones import BackboneSpec
from denoising_vit.backbones.batching import compiled
from denoising_vit.backbones.recorded import describe
from denoising_vit.data import Dataset
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.stage_one import StageOne
from denoising_vit.errors import FitError
from denoising_vit.fit.estimate import Estimate, free_bytes, seconds_per_pass
from denoising_vit.fit.local import LocalRun, OnPhoto
from denoising_vit.fit.options import FitOptions
from denoising_vit.fit.ray_engine import RayJob, fit_with_ray, local_threads
from denoising_vit.store import FeatureStore, Manifest

#: A staged photo that turns out to be damaged is done again; what is damaged again and again is not.
_ROUNDS = 3


@dataclass
class FitJob:
    """Stage 1 of a data set into a store; made by :meth:`prepare`, carried out by :meth:`run`.

    Attributes:
        dataset: the photos.
        store: where their fields go; open for writing.
        stages: the exact solver, once for each device.
        spec: the backbone in words, for other processes.
        options: how it is run.
    """

    dataset: Dataset
    store: FeatureStore
    stages: Sequence[StageOne]
    spec: BackboneSpec
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
    ) -> FitJob:
        """Loads the backbone, factors the plan, and makes or opens the store.

        Args:
            dataset: the photos.
            store: folder or URL.
            spec: the backbone; several devices, separated by commas, share the work.
            denoising: options of stage 1.
            options: how it is run.
            artifact: G where it is known, as `denoise_image` takes it.

        Raises:
            FitError: if there is nothing to fit, no room for it, or the devices would not give the same results.
            ArtifactError: if the artifact is that of another backbone.
            StoreError: if the store is of another backbone, plan or data set, or is none.
        """
        options.validate()
        if not len(dataset):
            raise FitError(f"{dataset.source}: no photos to fit")
        devices = [device.strip() for device in spec.device.split(",")]
        if options.engine == "ray" and len(devices) > 1:
            raise FitError("engine 'ray' takes one device; give each worker its own by --workers and --worker-gpus")
        backbones = [replace(spec, device=device).load() for device in devices]
        if options.compiled:
            backbones = [compiled(backbone) for backbone in backbones]
        stages = [StageOne(backbone, denoising, artifact) for backbone in backbones]
        manifest = manifest_of(stages[0], options)
        for device, stage in zip(devices, stages, strict=True):
            if differences := manifest.mismatch(manifest_of(stage, options)):
                raise FitError(
                    f"{devices[0]} and {device} would not give the same results: {'; '.join(differences)}; name a "
                    "dtype that both compute in (--dtype), or one device"
                )
        if not FeatureStore.exists(store):
            args = stages, manifest, options, str(store), len(dataset), 0, 0
            if _estimate(*args, seconds_a_pass=0).lacks_room:  # measured only where it is going to be told
                _estimate(*args, seconds_per_pass(stages[0])).require_room()
        opened = FeatureStore.create_or_open(store, manifest, [item.id for item in dataset])
        if options.retry_failed:
            opened.retry_failed()
        return cls(dataset, opened, stages, spec, options)

    def estimate(self) -> Estimate:
        """What is left, from a short measurement."""
        done, failed = len(self.store.done()), len(self.store.failed())
        seconds = seconds_per_pass(self.stages[0]) if done + failed < len(self.store) else 0.0
        args = self.stages, self.store.manifest, self.options, self.store.url
        return _estimate(*args, len(self.store), done, failed, seconds)

    def run(self, on_photo: OnPhoto = lambda _index, _reason: None) -> None:
        """Fits what is left; finished photos cost nothing. Photos that could not be reached stay to be done.

        Args:
            on_photo: called after each photo with its index and None, or why it was not done. With Ray, shard by shard.

        Raises:
            PhotoError: if strict, and a photo cannot be used.
            StoreError: if a shard is being written by someone else.
            FitError: if Ray cannot carry it out, or a shard cannot be sealed.
            OSError: if the store cannot be written to; what is finished stays.
        """
        reasons: dict[int, str] = {}

        def note(index: int, reason: str | None) -> None:
            if reason is not None:
                reasons[index] = reason
            on_photo(index, reason)

        lost: set[int] = set()
        for _ in range(_ROUNDS):
            shards = self.store.unfinished()
            if shards:
                self._run(shards, note)
            lost = set(range(len(self.store))) - self.store.done() - set(self.store.failed()) - reasons.keys()
            if not lost:
                return
        raise FitError(
            f"{len(lost)} photos were written to {self.store.url} and cannot be read back (the first is "
            f"{self.dataset[min(lost)].id}); is the disk damaged?"
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
            dtype=str(backbone.dtype).removeprefix("torch."),  # another machine might choose another
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


def manifest_of(stage: StageOne, options: FitOptions) -> Manifest:
    """What decides the results, for the store."""
    return Manifest(
        backbone=describe(stage.backbone),
        plan=stage.fitted.digest,
        options=stage.options.recorded("shape", "nothing")
        | {"artifact": artifact_digest(stage.artifact), "grid": options.grid},
        size=stage.fitted.size,
        patch_size=stage.backbone.patch_size,
        stride=stage.backbone.stride,
        grid=stage.fitted.grid,
        field=stage.fitted.resolution if options.grid == "field" else stage.fitted.grid,
        channels=stage.backbone.embed_dim,
        images_per_shard=options.images_per_shard,
    )


def absolute(source: str) -> str:
    """A local path as a process in another folder finds it; URLs stay."""
    return source if "://" in source else str(Path(source).expanduser().absolute())


def _estimate(
    stages: Sequence[StageOne],
    manifest: Manifest,
    options: FitOptions,
    url: str,
    photos: int,
    done: int,
    failed: int,
    seconds_a_pass: float,
) -> Estimate:
    left = photos - done - failed
    # While a shard is sealed, its photos are there twice; as many shards are open as there are writers.
    twice = min(len(stages) * options.workers * manifest.images_per_shard, left)
    # Workers on this machine share what was measured with all of its processors.
    side_by_side = len(stages) if options.engine == "local" else options.workers if options.ray_address else 1
    passes = left * stages[0].views
    return Estimate(
        photos=photos,
        done=done,
        failed=failed,
        left=left,
        passes=passes,
        seconds=seconds_a_pass * passes / side_by_side,
        image_bytes=manifest.image_bytes,
        bytes_needed=(left + twice) * manifest.image_bytes,
        bytes_free=free_bytes(url),
    )
