"""The shipped denoiser on held-out images: probes fitted on train, scored on val, with paired intervals over images.

    PYTHONPATH=src python recipes/confirm.py --train DIR --val DIR [--denoiser FILE ...] -o FILE

Both folders are written by `labelled.py`. The probes are those of `probes.py`: quick ones on patches, not the published
protocols of `dvit evaluate`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import probes
import torch
from stage_two import apply
from torch import Tensor
from torch.nn.functional import normalize

import denoising_vit as dv
from denoising_vit.backbones import BackboneSpec
from denoising_vit.evaluation.knn import vote
from denoising_vit.evaluation.outcomes import interval_over

#: Patches of the memory, and every so many-th patch that is asked for.
MEMORY, EVERY = 20_000, 6


def main() -> None:
    """Writes one line for each set, task and denoiser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--denoiser", nargs="+", default=["shipped"])
    parser.add_argument("--weights", default="auto")
    parser.add_argument("-o", "--out", type=Path, required=True)
    asked = parser.parse_args()
    backbone = BackboneSpec(weights=asked.weights).load()
    size = (backbone.default_size, backbone.default_size)
    denoisers = {name: dv.load_denoiser(name, backbone=backbone).to(backbone.device) for name in asked.denoiser}
    with torch.no_grad(), asked.out.open("a") as lines:
        train, val = (
            probes.load(part, backbone.grid_size(*size), backbone.device) for part in (asked.train, asked.val)
        )
        for name in train:
            raw = [probes.shown(part[name], backbone, size) for part in (train, val)]
            plain = counts_of(name, train[name], val[name], *raw)
            for denoiser, module in denoisers.items():
                clean = counts_of(name, train[name], val[name], *(apply(module, part, 8) for part in raw))
                for task, counts in clean.items():
                    line = {"set": name, "task": task, "denoiser": denoiser, **compared(task, plain[task], counts)}
                    print(json.dumps(line), flush=True)
                    lines.write(json.dumps(line) + "\n")
                    lines.flush()


def counts_of(
    name: str, train: probes.Labelled, val: probes.Labelled, memory: Tensor, queries: Tensor
) -> dict[str, np.ndarray]:
    """By task: confusions (images, k + 1, k + 1) of the scored classes, or squared errors and counts (images, 2)."""
    if name == "nyu":
        return {"depth": depth_errors(train, val, memory, queries)}
    scored = probes.SCORED[name]
    truth = val.labels.flatten(1)
    found = {"neighbours": neighbours(train, memory, queries), "ridge": ridge(train, memory, queries)}
    return {
        task: np.stack([confusion(t, p, scored) for t, p in zip(truth, one, strict=True)])
        for task, one in found.items()
    }


def neighbours(train: probes.Labelled, memory: Tensor, queries: Tensor) -> list[Tensor]:
    """The class of every EVERY-th patch of each image by its 30 nearest; -1 elsewhere."""
    labels = train.labels.flatten()
    known = torch.nonzero(labels != probes.NO_LABEL).flatten()
    known = known[:: max(len(known) // MEMORY, 1)]
    memory, labels = normalize(memory.flatten(0, 2)[known].float(), dim=-1), labels[known]
    found = []
    for image in queries:
        patches = image.flatten(0, 1).float()
        votes = vote(patches[::EVERY], memory, labels, 256, 30, probes.TEMPERATURE)
        predicted = torch.full((len(patches),), -1, device=patches.device)
        predicted[::EVERY] = votes
        found.append(predicted)
    return found


def ridge(train: probes.Labelled, memory: Tensor, queries: Tensor) -> list[Tensor]:
    """The class of every patch of each image by one-hot ridge regression."""
    predict = probes.class_regression(memory, train.labels)
    return [predict(image.flatten(0, 1)) for image in queries]


def depth_errors(train: probes.Labelled, val: probes.Labelled, memory: Tensor, queries: Tensor) -> np.ndarray:
    """Sums of squared errors in square metres, and numbers of patches, of ridge regression, (images, 2)."""
    predict = probes.depth_regression(memory, train.labels)
    rows = []
    for image, truth in zip(queries, val.labels.flatten(1), strict=True):
        found = predict(image.flatten(0, 1))
        there = truth > 0
        rows.append([float((found - truth)[there].square().sum()), float(there.sum())])
    return np.array(rows)


def confusion(truth: Tensor, predicted: Tensor, scored: tuple[int, ...]) -> np.ndarray:
    """(classes + 1, classes + 1): rows truth, columns predicted; the last stands for all other classes."""
    there = (truth != probes.NO_LABEL) & (predicted >= 0)
    place = torch.full((256,), len(scored), device=truth.device)
    place[list(scored)] = torch.arange(len(scored), device=truth.device)
    side = len(scored) + 1
    joint = place[truth[there]] * side + place[predicted[there]]
    return torch.bincount(joint, minlength=side * side).view(side, side).cpu().numpy()


def compared(task: str, plain: np.ndarray, clean: np.ndarray) -> dict[str, float | int | None]:
    """Both metrics, and their difference with its 95 % interval over images."""
    figure = rmse if task == "depth" else miou
    everything = np.ones((1, len(plain)))
    raw, own = (float(figure(everything, one)[0]) for one in (plain, clean))
    interval = interval_over(
        own - raw,
        np.arange(len(plain)),
        lambda weights: figure(weights, clean) - figure(weights, plain),
        [one.reshape(len(one), -1).sum(1) > 0 for one in (plain, clean)],
    )
    ends = {"low": interval.low, "high": interval.high, "images": interval.groups}
    return {"raw": raw, "clean": own, "difference": own - raw} | ends


def miou(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """MIoU in percent (rows,) of confusions (images, k + 1, k + 1) under weights (rows, images)."""
    joint = np.tensordot(weights, counts, 1)  # (rows, k + 1, k + 1)
    overlap = np.diagonal(joint, axis1=1, axis2=2)
    union = joint.sum(1) + joint.sum(2) - overlap
    return 100 * (overlap / np.maximum(union, 1))[:, :-1].mean(1)


def rmse(weights: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """RMSE in metres (rows,) of sums (images, 2) under weights (rows, images)."""
    total = weights @ sums
    return np.sqrt(total[:, 0] / total[:, 1])


if __name__ == "__main__":
    main()
