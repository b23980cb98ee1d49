"""The recipes of the shipped denoiser, at a tiny size on the CPU."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data

import denoising_vit as dv
from denoising_vit.backbones.recorded import describe
from denoising_vit.denoiser.module import Denoiser, read_denoiser, write_denoiser
from denoising_vit.distilled.weights import write_distilled
from denoising_vit.files import file_digest, read_record

RECIPES = Path(__file__).parents[1] / "recipes"


def load(name: str) -> Callable[[list[str]], None]:
    sys.path.insert(0, str(RECIPES))
    try:
        return runpy.run_path(str(RECIPES / name))["main"]
    finally:
        sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def recipe() -> Callable[[list[str]], None]:
    return load("shipped_denoiser.py")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(data, name)()).resize((160, 128)).save(folder / f"{name}.png")
    return folder


def command(photos: Path, out: Path, *more: str) -> list[str]:
    small = "--model test_vit --weights random --device cpu --tiny --scenes 2 --views 4 --plans 2 --batch 4"
    return [*small.split(), "--blanks", "32", "--photos", str(photos), "-o", str(out), *more]


@pytest.mark.usefixtures("one_thread")
def test_recipe_trains_and_writes_a_denoiser(recipe: Callable[[list[str]], None], photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)  # for the random weights of the backbone
    recipe(command(photos, tmp_path, "--steps", "240", "--variants", "half-blank", "no-blank"))
    lines = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    left = {line["features"]: line["variance_left"] for line in lines if line.get("blank") == "uniform"}
    assert left["raw"] == pytest.approx(1)
    assert left["half-blank"] < min(left["raw"], left["no-blank"])  # training on blank images reduces the variance
    denoiser = read_denoiser(tmp_path / "half-blank.safetensors")
    assert denoiser.info["area"] == [0.4, 1.0] and denoiser.info["blank"] == 0.5
    assert denoiser.trained_for is not None and denoiser.trained_for["name"] == "test_vit"
    assert denoiser(torch.randn(1, 8, 8, 64)).shape == (1, 8, 8, 64)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["denoiser", "distilled"])
def test_student_follows_a_second_teacher_and_blank_images_stay_clean(
    kind: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, out = "shipped", tmp_path / "student.safetensors"
    if kind == "denoiser":
        teacher = str(tmp_path / "teacher.safetensors")
        write_denoiser(other_denoiser(), teacher)
    asked = "--weights bundled --device cpu --sizes 112,98x126 --count 4 --held-out 1 --blanks 32 --steps 40 --share 1"
    load("second_teacher.py")([*asked.split(), f"--{kind}", teacher, "--photos", str(photos), "-o", str(out)])
    lines = [json.loads(line[line.index("{") :]) for line in capsys.readouterr().out.splitlines() if "{" in line]
    for size in ([112, 112], [98, 126]):
        some = [line for line in lines if line["size"] == size]
        cosines = {line["features"]: line["cosine_to_teacher"] for line in some if "features" in line}
        assert cosines["student"] > cosines["raw"]
        assert all(line["variance_left"] < 0.175 for line in some if line.get("blank") == "uniform")
    assert read_denoiser(out).info["steps"] == 40
    assert read_denoiser(out).info["teacher"].keys() == {kind}


def other_denoiser() -> Denoiser:
    """A denoiser of the bundled backbone with small random changes."""
    backbone = dv.load_backbone("vit_small_patch14_dinov2.lvd142m", weights="bundled", device="cpu")
    torch.manual_seed(0)
    teacher = Denoiser(backbone.embed_dim, (37, 37), trained_for=describe(backbone))
    with torch.no_grad():
        for weights in teacher.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
    return teacher


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    """Three labelled photos per split in the layouts of VOC 2012, CamVid and NYUv2."""
    chance = np.random.default_rng(0)
    voc, camvid, nyu = (tmp_path / name for name in ("voc", "camvid", "nyu"))
    lists = {split: [f"{split}{number}" for number in range(3)] for split in ("train", "val")}
    for split, names in lists.items():
        (voc / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (voc / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
        rows = [f"{name}.jpg {name}.png 518.8" for name in names]
        nyu.mkdir(exist_ok=True)
        (nyu / f"nyu_{'train' if split == 'train' else 'test'}.txt").write_text("\n".join(rows))
        for name in names:
            pixels = chance.integers(0, 255, (96, 128, 3), dtype=np.uint8)
            classes = Image.fromarray(np.repeat([0, 8], 48).astype(np.uint8)[:, None].repeat(128, 1))
            metres = Image.fromarray((pixels[..., 0].astype(np.uint16) + 100) * 20)
            for photo, truth, labels in (
                (voc / f"JPEGImages/{name}.jpg", voc / f"SegmentationClass/{name}.png", classes),
                (camvid / f"{split}/images/{name}.png", camvid / f"{split}/masks/{name}.png", classes),
                (nyu / f"{name}.jpg", nyu / f"{name}.png", metres),
            ):
                for path, image in ((photo, Image.fromarray(pixels)), (truth, labels)):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image.save(path)
    return ["--voc", str(voc), "--camvid", str(camvid), "--nyu", str(nyu)]


@pytest.mark.usefixtures("one_thread")
def test_offsets_are_compared_on_every_set(sets: list[str], tmp_path: Path) -> None:
    small = "--model test_vit --weights random --size 128 --views 12 --most 3"
    load("offsets.py")([*sets, *small.split(), "-o", str(tmp_path / "lines.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    planted, lines = lines[:8], lines[8:]
    assert {line["features"] for line in planted} == {"no G", "G fitted", "no G, offsets", "G fitted, offsets"}
    for line in planted:  # a fitted G removes the patterns, also with offsets
        assert (max(line["left"].values()) < 0.01) == line["features"].startswith("G fitted"), line
    tasks = {(line["set"], line["task"]) for line in lines}
    assert tasks == {
        ("nyu", "depth"),
        *((name, task) for name in ("voc", "camvid") for task in ("neighbours", "ridge")),
    }
    assert len(lines) == 5 * 7 and all(line["images"] in (3, None) for line in lines)
    pair = next(line for line in lines if line["features"] == ["no G", "no G, offsets"])
    assert pair["difference"] == pytest.approx(pair["second"] - pair["first"]) and pair["difference"] != 0


@pytest.fixture
def student(tmp_path: Path) -> tuple[list[str], str]:
    """Options that name a small backbone, and distilled weights of it, which differ in rank 2."""
    torch.manual_seed(0)
    model: torch.nn.Module = timm.create_model("test_vit", num_classes=0)
    save_file(model.state_dict(), tmp_path / "raw.safetensors")
    raw = dv.load_backbone("test_vit", weights=tmp_path / "raw.safetensors", device="cpu", dtype="float32")
    state = model.state_dict()
    for name, value in state.items():
        if value.ndim == 2:
            rows, columns = value.shape
            state[name] = value + 0.05 * torch.randn(rows, 2) @ torch.randn(2, columns)
    write_distilled(state, tmp_path / "student.safetensors", {"backbone": describe(raw), "info": {}})
    named = ["--model", "test_vit", "--weights", str(tmp_path / "raw.safetensors"), "--device", "cpu"]
    return named, str(tmp_path / "student.safetensors")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("one_thread")
def test_distilled_weights_are_compared_by_label_probes(
    sets: list[str], student: tuple[list[str], str], tmp_path: Path
) -> None:
    load("labelled.py")([*sets, "--split", "train", "-o", str(tmp_path / "labelled")])
    named, path = student
    where = ["--labelled", str(tmp_path / "labelled"), "--size", "128", "160", "-o", str(tmp_path / "lines.jsonl")]
    load("students.py")([*named, *where, "raw", path, f"{path}*0", f"{path}*2+{path}*-1"])
    raw, distilled, nothing, difference = (
        {name: value for name, value in line.items() if name != "candidate"}
        for line in read_lines(tmp_path / "lines.jsonl")
    )
    assert raw["size"] == [128, 160]
    assert raw["uniform"] == pytest.approx({"variance_left": 1, "high_frequencies_left": 1}, rel=1e-4)
    assert set(raw) == {"size", "uniform", "noise", "voc", "camvid", "nyu"}
    assert raw["nyu"]["rmse"] > 0 and raw["voc"]["knn"] > 0
    assert distilled != raw
    assert nothing == raw
    assert difference["uniform"] == pytest.approx(distilled["uniform"], rel=0.02)


@pytest.mark.usefixtures("one_thread")
def test_distilled_weights_are_reduced_to_several_ranks(
    photos: Path, student: tuple[list[str], str], tmp_path: Path
) -> None:
    named, path = student
    load("students.py")(
        [*named, "--ranks", "1", "2", "--photos", str(photos), "--size", "128", "160", "-o", str(tmp_path / "l"), path]
    )
    one, two = read_lines(tmp_path / "l")
    assert one["distance"] > 0.05 > 1e-4 > two["distance"]
    assert one["bytes"] < two["bytes"] == (tmp_path / f"{tmp_path.name}-student.rank2.safetensors").stat().st_size


@pytest.mark.usefixtures("one_thread")
def test_a_sum_of_distilled_weights_is_written_with_its_parts(
    photos: Path, student: tuple[list[str], str], tmp_path: Path
) -> None:
    named, path = student
    named += ["--ranks", "2", "--photos", str(photos), "--size", "128", "160", "-o", str(tmp_path / "l")]
    load("students.py")([*named, path])
    (small,) = tmp_path.glob("*.rank2.safetensors")
    load("students.py")([*named, f"{small}*2+{path}*-1.5"])
    assert read_lines(tmp_path / "l")[1]["distance"] < 1e-3
    (written,) = tmp_path.glob("sum-????????.safetensors")
    raw, whole, added = (load_file(one) for one in (tmp_path / "raw.safetensors", Path(path), written))
    for name, value in added.items():
        torch.testing.assert_close(value.float(), (raw[name] + whole[name]).float() / 2, rtol=2e-3, atol=1e-3)
    record = read_record(written)
    parts = [(part["digest"], part["factor"]) for part in record["info"]["sum"]]
    assert parts == [(file_digest(small), 2), (file_digest(Path(path)), -1.5)]
    assert record["backbone"]["name"] == "test_vit" and "difference" not in record
    with pytest.raises(SystemExit, match="omit the candidate raw"):
        load("students.py")([*named, "raw"])
