"""Compares distilled weights on the training lists of labelled sets, and measures how far they can be reduced.

    PYTHONPATH=src python recipes/students.py --labelled DIR -o FILE raw RUN/distilled.safetensors ...
    PYTHONPATH=src python recipes/students.py --photos DIR -o FILE RUN/distilled.safetensors

The first scores each candidate with the probes of `probes.py`, on the images of `labelled.py`, and on content-free
images. A candidate is `raw`, a file, or a sum of changes from the raw weights with factors: `A.safetensors*1.5`,
`A.safetensors+B.safetensors*0.5` (paths without + and *). The second writes the weights of a sum, and the low-rank
difference of each rank, next to the output file, and measures its features' distance to those of the full weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import probes
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from denoising_vit.backbones import BackboneSpec
from denoising_vit.backbones.loading import with_weights
from denoising_vit.data import open_dataset, spread
from denoising_vit.distilled.weights import DistilledWeights, write_distilled
from denoising_vit.files import digest_of, file_digest
from denoising_vit.training_free.common import photo_images


def main(given: list[str] | None = None) -> None:
    """Prints and appends one line per candidate, or per rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", nargs="+")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--labelled", type=Path, help="folder of labelled.py, to compare candidates")
    where.add_argument("--photos", type=Path, help="folder of photos, to reduce candidates")
    parser.add_argument("--most", type=int, default=90, help="images per labelled set")
    parser.add_argument("--count", type=int, default=6, help="number of photos")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--size", type=int, nargs=2, default=(518, 518), help="height and width in pixels")
    parser.add_argument("--model", default=BackboneSpec.backbone)
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--out", type=Path, required=True)
    asked = parser.parse_args(given)
    lines = compared(asked) if asked.labelled else reduced(asked)
    with torch.no_grad(), asked.out.open("a") as out:
        for line in lines:
            print(json.dumps(line), flush=True)
            out.write(json.dumps(line) + "\n")
            out.flush()


def compared(asked: Any) -> Iterator[dict[str, Any]]:
    """Scores of each candidate."""
    spec, size = BackboneSpec(asked.model, weights=asked.weights, device=asked.device), tuple(asked.size)
    raw: Any = replace(spec, dtype="float32").load()  # changes are too small for bfloat16
    shown: Any = spec.load()
    data = probes.load(asked.labelled, shown.grid_size(*size), shown.device, asked.most)
    blanks = probes.blank_images(shown, size)
    blank_features = {kind: shown(images) for kind, images in blanks.items()}
    for candidate in asked.candidates:
        shown.model.load_state_dict(changed(raw, candidate))
        line: dict[str, Any] = {"candidate": candidate, "size": size}
        for kind, images in blanks.items():
            left = probes.blank_figures(blank_features[kind], shown(images))
            line[kind] = dict(zip(("variance_left", "high_frequencies_left"), left, strict=True))
        for name, part in data.items():
            line[name] = probes.scores(name, part, probes.shown(part, shown, size))
        yield line


def changed(raw: Any, candidate: str) -> dict[str, Tensor]:
    """The raw weights, float32, plus a candidate's changes."""
    base = raw.model.state_dict()
    total = {name: value.clone() for name, value in base.items()}
    for path, factor in parts_of(candidate):
        student: Any = with_weights(raw, path)
        for name, value in student.model.state_dict().items():
            if value.is_floating_point():
                total[name] += factor * (value - base[name])
    return total


def parts_of(candidate: str) -> list[tuple[Path, float]]:
    """Files of a candidate and their factors; none for `raw`."""
    parts = [part.partition("*") for part in candidate.split("+")] if candidate != "raw" else []
    return [(Path(path), float(factor or 1)) for path, _, factor in parts]


def whole_weights(raw: Any, candidate: str, folder: Path) -> DistilledWeights:
    """Weights of a candidate; those of a sum are written to a folder, and record how each part was trained."""
    parts = parts_of(candidate)
    found = [DistilledWeights.load(path) for path, _ in parts]
    if [factor for _, factor in parts] == [1]:
        return found[0]
    about = [
        {"digest": file_digest(path), "factor": factor}
        | {key: one.record[key] for key in ("info", "step", "held_out") if key in one.record}
        for one, (path, factor) in zip(found, parts, strict=True)
    ]
    written = folder / f"sum-{digest_of(candidate)[:8]}.safetensors"
    record = {"backbone": found[0].record["backbone"], "info": {"sum": about}}
    write_distilled(changed(raw, candidate), written, record)
    return DistilledWeights.load(written)


def reduced(asked: Any) -> Iterator[dict[str, Any]]:
    """Bytes of each rank, and its distance to the full weights, relative to that of the raw weights."""
    raw: Any = BackboneSpec(asked.model, weights=asked.weights, device=asked.device, dtype="float32").load()
    photos = open_dataset(asked.photos)
    chosen = [photos.read(index) for index in spread(len(photos), asked.count)]
    images = photo_images(chosen, raw, tuple(asked.size))
    for candidate in asked.candidates:
        if candidate == "raw":
            raise SystemExit("--photos reduces distilled weights; omit the candidate raw")
        whole = whole_weights(raw, candidate, asked.out.parent)
        name = "-".join(whole.path.with_suffix("").parts[-2:])
        wanted = _features(with_weights(raw, whole.path), images)
        away = _distance(_features(raw, images), wanted)
        for rank in asked.ranks:
            path = asked.out.with_name(f"{name}.rank{rank}.safetensors")
            whole.reduce(path, rank=rank, base=raw)
            found = _features(with_weights(raw, path), images)
            yield {
                "candidate": candidate,
                "rank": rank,
                "bytes": path.stat().st_size,
                "distance": _distance(found, wanted) / away,
            }


def _features(backbone: Any, images: list[Tensor]) -> Tensor:
    return torch.cat([backbone(image).flatten(0, 2) for image in images])


def _distance(one: Tensor, other: Tensor) -> float:
    """1 - cosine, averaged over patches."""
    return float(1 - cosine_similarity(one, other, dim=-1).mean())


if __name__ == "__main__":
    main()
