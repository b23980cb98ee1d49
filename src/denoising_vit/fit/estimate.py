"""What a data set will take, said before it is begun."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from denoising_vit.decomposition.stage_one import StageOne
from denoising_vit.errors import FitError

#: Batches that are timed, after one that warms up.
_TIMED = 2


@dataclass(frozen=True)
class Estimate:
    """What is left to do.

    Attributes:
        photos: in the data set.
        done: photos that are in the store.
        failed: photos that could not be used.
        left: all others.
        passes: forward passes that these take.
        seconds: that these take on one device, from a short measurement.
        image_bytes: that one photo takes in the store.
        bytes_needed: that the rest takes, with room for the shards that are being written.
        bytes_free: where the store is; None where that cannot be known (an object store).
    """

    photos: int
    done: int
    failed: int
    left: int
    passes: int
    seconds: float
    image_bytes: int
    bytes_needed: int
    bytes_free: int | None

    @property
    def lacks_room(self) -> bool:
        """Whether the disk cannot hold it."""
        return self.bytes_free is not None and self.bytes_needed > self.bytes_free

    def require_room(self) -> None:
        """Refuses what the disk cannot hold.

        Raises:
            FitError: with the whole estimate and what to do.
        """
        if self.lacks_room:
            raise FitError(
                f"no room for it: {self}. Make room, name another place (-o), keep the patch grid only (--grid patch, "
                "a quarter of the bytes), or take fewer photos"
            )

    def __str__(self) -> str:
        there = f"{self.done} done already, " if self.done else ""
        there += f"{self.failed} skipped already, " if self.failed else ""
        free = "" if self.bytes_free is None else f" ({_size(self.bytes_free)} free)"
        return (
            f"{self.photos} photos, {there}{self.left} to do: {self.passes:,} forward passes, about "
            f"{_duration(self.seconds)}, {_size(self.bytes_needed)}{free}"
        )


def seconds_per_pass(stage: StageOne) -> float:
    """Measured on images of one colour, in the batches that will be used."""
    images = torch.zeros(stage.batch_size, 3, *stage.fitted.size, device=stage.backbone.device)
    with torch.no_grad():
        stage.backbone(images)
        started = time.perf_counter()
        for _ in range(_TIMED):
            stage.backbone(images).sum().item()  # waits for the device
    return (time.perf_counter() - started) / (_TIMED * stage.batch_size)


def _size(count: int) -> str:
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def free_bytes(url: str) -> int | None:
    """Bytes free where a store is or will be; None for object stores."""
    if "://" in url and not url.startswith("file://"):
        return None
    path = Path(url.removeprefix("file://")).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
