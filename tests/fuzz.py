"""Damaged inputs: whatever a file holds, readers may raise only the project's own errors, soon and in bounded memory.

`python tests/fuzz.py --count 3000` tries that many mutations of every kind of file; `test_fuzz.py` tries a few of each.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import resource
import signal
import sys
import tarfile
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from denoising_vit.artifact import Artifact
from denoising_vit.backbones.recorded import names_backbone, recorded_words, same_weights
from denoising_vit.data import open_dataset
from denoising_vit.data.photos import FORMATS, read_photo_bytes
from denoising_vit.decomposition.result import Decomposition
from denoising_vit.denoiser import Denoiser, read_denoiser, write_denoiser
from denoising_vit.errors import DenoisingVitError
from denoising_vit.evaluation.results import Record, Results
from denoising_vit.files import KEY
from denoising_vit.maps.palette import read_palette
from denoising_vit.store import FeatureStore, Manifest
from denoising_vit.training_free import common

#: Maximum seconds to read one file, on a busy machine.
PATIENCE = 60

#: Largest photo in pixels here; larger ones are rejected before they are decoded.
PIXELS = 1_000_000

BACKBONE = {"name": "vit", "fingerprint": [float(value) for value in np.linspace(-1, 1, 128)]}

#: Unexpected values.
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, float("inf"), float("nan"), 2**70, 10**6),
    *("", "x", "\ud800", "\0", "../..", "1" * 5000),
    *([], {}, [[]], [None], {"": None}, ["x", 1], [1, 2], [-1, -1], [2**40, 2**40]),
)

#: Lines of a list that are not images of this folder, except the first.
LINES = ("00.png", "./00.png", "../photos/00.png", "# no", "", "a\0b.png", "x" * 5000, "*.png", "{0..9}.png", "~/a.png")
LINES += ("file:///etc/hostname", "file://", "::", "a::b", "/", ".", "a.tar", "é.png")

#: Addresses in a list; none is fetched.
ADDRESSES = (
    "s3://",
    "s3://[::1",
    "http://[",
    "https://a b/c.png",
    "zip://a.png",
    "nul://",
    "dir://a",
    "memory://a.png",
)
ADDRESSES += ("filecache://a", "reference://a")

_STAGED = "staged/00000002.safetensors"


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        seeds: contents of valid files.
        read: reads a file.
        suffix: of the file.
        heads: whether the content is JSON, or safetensors with a JSON head, whose values are changed as well.
    """

    seeds: tuple[bytes, ...]
    read: Callable[[Path], object]
    suffix: str = ".safetensors"
    heads: bool = True


def kinds(folder: Path) -> dict[str, Kind]:
    """All kinds of files, with seeds made in a folder."""
    torch.manual_seed(0)
    photos = folder / "photos"
    photos.mkdir()
    pictures = dict(_pictures())
    (photos / "00.png").write_bytes(pictures["PNG"])
    store = folder / "store"
    _store(store)
    return {
        "photo": Kind(tuple(pictures.values()), _photo, ".img", heads=False),
        "list": Kind(tuple(_lists()), _dataset, ".txt", heads=False),
        "shard": Kind((_shard(pictures), _shard(pictures, tarfile.PAX_FORMAT)), _dataset, ".tar", heads=False),
        "decomposition": Kind((_decomposition(folder),), Decomposition.load),
        "artifact": Kind((_artifact(folder),), lambda path: _compared(Artifact.load(path).backbone)),
        "denoiser": Kind((_denoiser(folder),), lambda path: _compared(read_denoiser(path).trained_for)),
        "palette": Kind((_palette(),), lambda path: _compared(read_palette(path).backbone)),
        "matrix": Kind((_matrix(),), lambda path: _compared(common.read(path, "kind", "a matrix")[1])),
        "manifest": _object(store, "manifest.json"),
        "marker": _object(store, "sealed/000000.json"),
        "failure": _object(store, "failed/00000003.json"),
        "staged": Kind(((store / _STAGED).read_bytes(),), lambda path: _opened(store, _STAGED, path)),
        "results": Kind((_results(),), Results, ".jsonl"),
    }


def _pictures() -> Iterator[tuple[str, bytes]]:
    pixels = np.random.default_rng(0).integers(0, 255, (13, 17, 3), np.uint8)
    Image.init()
    for name in FORMATS:
        if name in Image.SAVE:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, name)
            yield name, file.getvalue()
    for name, mode, more in (("PNG", "P", {}), ("TIFF", "L", {"compression": "tiff_lzw"}), ("JPEG", "CMYK", {})):
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, name, **more)
        yield f"{name} {mode}", file.getvalue()


def _lists() -> Iterator[bytes]:
    for address in ADDRESSES:
        yield "\n".join(LINES).encode()
        yield "\n".join((*LINES[:2], address)).encode()


def _shard(pictures: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in list(pictures.items())[:3]:
            info = tarfile.TarInfo(f"{'long/' * 30}{name}.png")
            info.size = len(content)
            info.mtime = 0.5
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _decomposition(folder: Path) -> bytes:
    path, grid = folder / "seed.safetensors", torch.randn(2, 3, 5)
    Decomposition(torch.randn(4, 6, 5), grid, grid + 1, (28, 42), 14, 14, info={"views": 8}).save(path)
    return path.read_bytes()


def _artifact(folder: Path) -> bytes:
    path = folder / "seed.safetensors"
    Artifact(torch.randn(2, 3, 5), (28, 42), BACKBONE, {"photos": ["a.png"], "skipped": []}).save(path)
    return path.read_bytes()


def _denoiser(folder: Path) -> bytes:
    path = folder / "seed.safetensors"
    write_denoiser(Denoiser(64, (2, 3), 1, BACKBONE, {"steps": 1}), path)
    return path.read_bytes()


def _palette() -> bytes:
    from denoising_vit.maps.palette import FORMAT, FORMAT_VERSION

    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "backbone": BACKBONE, "fields": ["norms"]}
    return _safetensors({"norms.low": torch.tensor(0.5), "norms.high": torch.tensor(2.0)}, head)


def _matrix() -> bytes:
    head = {"format": "kind", "format_version": 1, "backbone": BACKBONE, "info": {}}
    return _safetensors({"values": torch.randn(3, 5)}, head)


def _safetensors(tensors: dict[str, torch.Tensor], head: Any) -> bytes:
    return safetensors.torch.save(tensors, {KEY: json.dumps(head)})


def _store(folder: Path) -> None:
    """A store with a sealed shard, a staged image and a failed one."""
    manifest = Manifest(BACKBONE, "abc", (42, 56), 14, 14, (3, 4), (3, 4), 5, {"views": 8}, images_per_shard=2)
    store = FeatureStore.create(folder, manifest, ["a", "b", "c", "d"])
    with store.writer(0) as writer:
        for index in (0, 1):
            writer.put(index, torch.randn(3, 4, 5))
        writer.finish()
    with store.writer(1) as writer:
        writer.put(2, torch.randn(3, 4, 5))
        writer.fail(3, "no luck")


def _object(store: Path, name: str) -> Kind:
    """A record of a store as earlier releases wrote it, without the checksum that detects most changes."""
    content = json.loads((store / name).read_bytes())
    content.pop("crc32", None)
    return Kind((json.dumps(content).encode(),), lambda path: _opened(store, name, path), ".json")


def _results() -> bytes:
    return Record("knn", "raw", {"seed": 0}, metrics={"mIoU": 1.0}).to_line().encode()


def _photo(path: Path) -> None:
    read_photo_bytes(path.read_bytes(), path.name, max_pixels=PIXELS)


def _dataset(path: Path) -> None:
    dataset = open_dataset(path)
    for index, item in enumerate(dataset):
        if "://" not in item.url and (item.size or 0) < 1 << 20:
            try:
                dataset.read(index)
            except DenoisingVitError:
                continue


def _compared(recorded: dict[str, Any] | None) -> None:
    """Compares a recorded backbone, as all its users do."""
    if names_backbone(recorded):
        assert recorded is not None
        recorded_words(recorded)
        same_weights(recorded, BACKBONE)


def _opened(store: Path, name: str, path: Path) -> None:
    """Reads everything in a store with one object replaced."""
    place, before = store / name, (store / name).read_bytes()
    place.write_bytes(path.read_bytes())
    try:
        opened = FeatureStore.open(store)
        list(opened.verify())
        opened.failed()
        for index in sorted(opened.done()):
            try:
                opened[index]
            except DenoisingVitError:
                continue
    finally:
        place.write_bytes(before)


def mutated(content: bytes, chance: Random, *, heads: bool) -> bytes:
    """A changed copy: for JSON or a safetensors head half the time one value, otherwise some bytes."""
    if heads and chance.random() < 0.7:
        return _with_other_value(content, chance)
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(data) + 1), chance.choice((1, 1, 2, 4, 8, 64, 512))
        change = chance.randrange(7)
        if change == 0:
            data[at : at + length] = chance.randbytes(length)
        elif change == 1:
            data[at : at + length] = bytes([chance.choice((0, 127, 128, 255))]) * length
        elif change == 2:
            del data[at : at + length]
        elif change == 3:
            data[at:at] = data[at : at + length]
        elif change == 4:
            data[at:at] = chance.randbytes(length)
        elif change == 5:
            del data[at:]
        else:
            other = chance.randrange(len(data) + 1)
            data[at : at + length] = data[other : other + length]
    return bytes(data)


def _with_other_value(content: bytes, chance: Random) -> bytes:
    try:
        return json.dumps(_changed(json.loads(content), chance)).encode()
    except ValueError:
        pass
    length = int.from_bytes(content[:8], "little")
    outer = json.loads(content[8 : 8 + length])
    inner = json.loads(outer["__metadata__"][KEY])
    if chance.random() < 0.8:
        outer["__metadata__"][KEY] = json.dumps(_changed(inner, chance))
    elif chance.random() < 0.2:
        outer["__metadata__"][KEY] = "[" * 100_000
    else:
        outer = _changed(outer, chance)
    head = json.dumps(outer).encode()
    return len(head).to_bytes(8, "little") + head + content[8 + length :]


def _changed(value: Any, chance: Random) -> Any:
    """A copy with one value anywhere in it replaced or removed."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.1:
        return copy.deepcopy(chance.choice(ODD))
    value = copy.copy(value)
    key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
    if chance.random() < 0.15:
        del value[key]
    else:
        value[key] = _changed(value[key], chance)
    return value


class _LateError(BaseException):
    """Not an Exception, which readers would catch."""


def failures(name: str, kind: Kind, count: int, seed: int, folder: Path) -> Iterator[tuple[int, str]]:
    """Numbers of mutations that were not rejected as expected, with the traceback."""

    def late(*_signal: object) -> None:
        raise _LateError

    path = folder / f"{name}{kind.suffix}"
    before = signal.signal(signal.SIGALRM, late)
    try:
        for number in range(count):
            chance = Random(f"{name} {seed} {number}")
            path.write_bytes(mutated(chance.choice(kind.seeds), chance, heads=kind.heads))
            signal.alarm(PATIENCE)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    kind.read(path)
            except DenoisingVitError as error:
                if not str(error).strip():
                    yield number, "an error without words"
            except (Exception, _LateError):
                yield number, traceback.format_exc()
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    """Tries many mutations and prints each kind of failure once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", default=[])
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        for name, kind in kinds(Path(folder)).items():
            if chosen.kinds and name not in chosen.kinds:
                continue
            seen: dict[str, list[int]] = {}
            for number, words in failures(name, kind, chosen.count, chosen.seed, photos):
                seen.setdefault("\n".join(words.strip().splitlines()[-7:]), []).append(number)
            failed += len(seen)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(f"{name}: {chosen.count} tried, {len(seen)} ways to fail, peak {peak} MiB", flush=True)
            for words, numbers in seen.items():
                print(f"  {len(numbers)} times, such as {numbers[0]}:\n{words}\n", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
