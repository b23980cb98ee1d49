"""`dvit distill` from the command line: exit codes, messages and output files."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import denoising_vit as dv
import tiny_distillation as tiny
import tiny_fit
from command import Dvit, Outcome, in_process
from denoising_vit.backbones import BackboneSpec
from denoising_vit.data import open_dataset
from denoising_vit.distilled.job import DistillJob
from denoising_vit.distilled.options import DistillOptions
from denoising_vit.distilled.train import Distillation
from denoising_vit.files import read_record
from denoising_vit.training import photos as photos_module
from denoising_vit.training.options import ViewOptions
from denoising_vit.training.samples import split

pytestmark = pytest.mark.usefixtures("one_thread")

PHOTOS = 6

#: Indices of the held-out photos, and of one that is trained on.
HELD_OUT = split(range(PHOTOS), 2, 0)[1]
TRAINED = next(number for number in range(PHOTOS) if number not in HELD_OUT)

Distill = Callable[..., Outcome]


@pytest.fixture(scope="module", autouse=True)
def blank_panels() -> Iterator[None]:
    with tiny.blank_panels():
        yield


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    return in_process(capsys, monkeypatch)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the model; denoisers of its last layer, another layer, other weights and no recorded backbone."""
    folder = tmp_path_factory.mktemp("files")
    backbone = tiny_fit.spec_of(tiny_fit.write_weights(folder / "tiny.safetensors")).load()
    tiny.write(tiny.denoiser(backbone), folder / "last.safetensors")
    tiny.write(tiny.denoiser(backbone.at_layer(5), seed=5), folder / "inner.safetensors")
    tiny.write(tiny.denoiser(tiny.backbone()), folder / "other.safetensors")
    tiny.write(tiny.denoiser(None), folder / "nameless.safetensors")
    tiny.write(tiny.denoiser(None, channels=384), folder / "wide.safetensors")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_fit.write_photos(tmp_path_factory.mktemp("photos"), PHOTOS)


@pytest.fixture(scope="module")
def store(one_thread: None, photos: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted") / "store"
    tiny_fit.prepare(photos, folder, tiny_fit.spec_of(files / "tiny.safetensors")).run()
    return folder


@pytest.fixture
def distill(dvit: Dvit, files: Path) -> Distill:
    """Runs `dvit distill DATA ...` with the tiny model for two steps; later options win."""
    weights = str(files / "tiny.safetensors")
    model = ("--backbone", tiny.MODEL, "--weights", weights, "--device", "cpu", "--dtype", "float32")
    small = ("--steps", 2, "--batch-size", 1, "--held-out", 2, "--evaluate-every", 1, "--checkpoint-every", 2)
    rest = ("--precision", "float32", "--views.sizes", tiny.SIZE, "--learning-rate", 0.002)
    return lambda data, *more: dvit("distill", data, *model, *small, *rest, *more)


@pytest.fixture
def last(files: Path) -> tuple[str, Path]:
    return "--denoiser", files / "last.safetensors"


# --- help ---


def test_help_documents_every_option(dvit: Dvit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # one column
    printed = dvit("distill", "--help")
    assert printed.code == 0
    options = [field.name for kind in (DistillOptions, BackboneSpec) for field in dataclasses.fields(kind)]
    options += [f"views.{field.name}" for field in dataclasses.fields(ViewOptions)]
    for name in (*options, "out", "denoiser", "also", "fields", "resume"):
        flag = f"--{name.replace('_', '-')}"
        *_, entry = re.findall(rf" {re.escape(flag)}(?:, --no-\S+)? (.*?)\((?:default|required)", printed.words)
        words_found = [word for word in entry.split() if re.fullmatch(r"[a-z',;.]+", word)]
        assert len(words_found) >= 2, (flag, entry)
    for words in (
        "decay of an exponential moving average of the weights",
        "weight of the loss that keeps class token and registers unchanged",
        "factor on the learning rate from each block to the previous one",
        "number of batches to accumulate gradients over per step",
        "number of passes over the photos if steps is 0",
        "photos: a folder at any depth (class names are ignored), a text list, or tar shards",
        "accelerate launch -m denoising_vit distill",
    ):
        assert words in printed.words, words


def test_help_lists_the_command(dvit: Dvit) -> None:
    assert "distill" in dvit("--help").words


# --- runs ---


def test_run_writes_a_model_and_prints_its_path(distill: Distill, last: Any, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    done = distill(photos, *last, "-o", run)
    assert done.code == 0, done.err
    assert done.out == ""
    assert f"4 photos to train on, 2 held out; 2 steps of 1 views; run {run}" in done.err
    assert re.search(
        r"step 1: held-out cosine -?0\.\d+ \(raw -?0\.\d+\), 1 - cosine \d\.\d+ times that of raw, effective rank \d+ "
        r"\(raw \d+\), class token 1 - cosine [\d.e-]+",
        done.words,
    )
    named = re.search(r"2 of 2 steps done, the best after step [12]: (\S+)", done.err)
    assert named and Path(named[1]) == run / "distilled.safetensors"
    dv.load_backbone(tiny.MODEL, weights=named[1], device="cpu")
    timm.create_model(tiny.MODEL, num_classes=0, checkpoint_path=named[1])
    assert [row["step"] for row in tiny.rows(run, "train")] == [1, 2]
    assert {path.name for path in run.iterdir()} >= {
        "last.safetensors",
        "run.json",
        "run.html",
        "panels",
        "checkpoints",
    }


def test_epochs_instead_of_steps(distill: Distill, last: Any, photos: Path, tmp_path: Path) -> None:
    done = distill(photos, *last, "-o", tmp_path / "run", "--steps", 0, "--epochs", 0.75, "--evaluate-every", 9)
    assert done.code == 0, done.err
    assert "3 steps of 1 views" in done.err
    assert "3 of 3 steps done" in done.err


def test_many_options_at_once(distill: Distill, last: Any, files: Path, photos: Path, tmp_path: Path) -> None:
    done = distill(
        photos,
        *last,
        *("--also", files / "inner.safetensors", "-o", tmp_path / "run", "--accumulate", 2, "--ema", 0.5),
        *("--layer-decay", 0.7, "--hold-prefix", 0.5, "--checkpointing", "--views.whole", 0.5, "--seed", 3),
        *("--precision", "bfloat16"),
    )
    assert done.code == 0, done.err
    (_, figures) = tiny.rows(tmp_path / "run", "held_out")
    assert "layer_5_cosine" in figures


def test_denoiser_without_a_recorded_backbone_is_accepted(
    distill: Distill, files: Path, photos: Path, tmp_path: Path
) -> None:
    done = distill(photos, "--denoiser", files / "nameless.safetensors", "-o", tmp_path / "run", "--stop-at", 1)
    assert done.code == 0, done.err


def test_stop_and_resume(distill: Distill, last: Any, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = distill(photos, *last, "-o", run, "--stop-at", 1)
    assert first.code == 0
    assert "1 of 2 steps done (continue with --resume)" in first.err
    again = distill(photos, *last, "-o", run)
    assert again.code == 2
    assert "already has a run; use --resume to continue it" in again.err
    other = distill(photos, *last, "-o", run, "--resume", "--batch-size", 2)
    assert other.code == 2
    assert "cannot resume with other options: options.batch_size was 1, now 2" in other.err
    done = distill(photos, *last, "-o", run, "--resume")
    assert done.code == 0
    assert "2 of 2 steps done," in done.err


def test_ctrl_c_exits_130_and_suggests_resume(
    distill: Distill, last: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Distillation, *_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "run", interrupted)
        done = distill(photos, *last, "-o", tmp_path / "run")
    assert done.code == 130
    assert "interrupted; continue with --resume" in done.err
    assert distill(photos, *last, "-o", tmp_path / "run", "--resume").code == 0


def test_shard_with_one_process_prints_a_note(distill: Distill, last: Any, photos: Path, tmp_path: Path) -> None:
    done = distill(photos, *last, "-o", tmp_path / "run", "--shard", "--stop-at", 1)
    assert done.code == 0
    assert "--shard has no effect with one process" in done.err


def test_store_fields_as_teacher(distill: Distill, store: Path, photos: Path, tmp_path: Path) -> None:
    done = distill(photos, "--fields", store, "-o", tmp_path / "run")
    assert done.code == 0, done.err
    assert "4 photos to train on, 2 held out" in done.err
    assert (tmp_path / "run" / "distilled.safetensors").is_file()


def test_start_from_weights_of_an_earlier_run(distill: Distill, last: Any, photos: Path, tmp_path: Path) -> None:
    assert distill(photos, *last, "-o", tmp_path / "first").code == 0
    start = tmp_path / "first" / "last.safetensors"
    done = distill(photos, *last, "-o", tmp_path / "run", "--start", start)
    assert done.code == 0, done.err
    info = read_record(tmp_path / "run" / "last.safetensors")["info"]
    assert info["start"] == json.loads((tmp_path / "run" / "run.json").read_text())["start"]


# --- unusable photos ---


def test_unreadable_photo_is_reported_and_exits_1(distill: Distill, last: Any, photos: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(photos, tmp_path / "photos")
    for number in (TRAINED, HELD_OUT[0]):
        (damaged / f"{number:02}.png").write_text("words")
    done = distill(damaged, *last, "-o", tmp_path / "run", "--steps", 4)
    assert done.code == 1
    for number in (TRAINED, HELD_OUT[0]):
        assert len(re.findall(rf"skipped: {number:02}.png: not an image file", done.err)) == 1
    assert "4 photos to train on, 1 held out" in done.err
    assert "4 of 4 steps done, the best after step" in done.err
    again = distill(damaged, *last, "-o", tmp_path / "run", "--steps", 4, "--resume")
    assert again.code == 1
    assert f"skipped: {TRAINED:02}.png" in again.err


def test_truncated_shard_is_used_up_to_its_end_and_reported(
    distill: Distill, last: Any, photos: Path, tmp_path: Path
) -> None:
    shard = tiny.write_shard(tmp_path / "s.tar", photos)
    place = open_dataset(shard)[PHOTOS - 1]
    assert place.start is not None and place.size is not None
    shard.write_bytes(shard.read_bytes()[: place.start + place.size // 2])
    done = distill(shard, *last, "-o", tmp_path / "run")
    assert done.code == 1
    assert "3 photos to train on, 2 held out" in done.err
    assert re.search(r"skipped: s.tar: .*5 images before it are used", done.err)
    assert (tmp_path / "run" / "distilled.safetensors").is_file()


def test_missing_shard_on_a_web_server_is_skipped(distill: Distill, last: Any, photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    for number in range(2):
        tiny.write_shard(tmp_path / "shards" / f"s-{number}.tar", photos, 3 * number, 3)
    with tiny.served(tmp_path / "shards") as server:
        done = distill(f"{server.address}/s-{{0..2}}.tar", *last, "-o", tmp_path / "run")
    assert done.code == 1
    assert "skipped: s-2.tar: no such file" in done.err
    assert "4 photos to train on, 2 held out" in done.err


def test_folders_of_classes(distill: Distill, last: Any, photos: Path, tmp_path: Path) -> None:
    for number in range(PHOTOS):
        folder = tmp_path / "train" / f"n{number % 4:08}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / f"{number:02}.png", folder)
    done = distill(tmp_path / "train", *last, "-o", tmp_path / "run")
    assert done.code == 0, done.err
    assert "4 photos to train on, 2 held out" in done.err


def test_unreachable_server_exits_2(
    distill: Distill, last: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(photos_module, "_AGAIN", (0, 0))
    web = shutil.copytree(photos, tmp_path / "web")
    (web / "list.txt").write_text("".join(f"{number:02}.png\n" for number in range(PHOTOS)))
    with tiny.served(web) as server:
        prepare = DistillJob.training

        def away(self: DistillJob) -> Distillation:
            run = prepare(self)
            server.away = 1000
            return run

        with monkeypatch.context() as patch:
            patch.setattr(DistillJob, "training", away)
            done = distill(f"{server.address}/list.txt", *last, "-o", tmp_path / "run")
        assert done.code == 2
        assert re.search(r"\d\d\.png: unreachable .*continue from the last checkpoint with --resume", done.words)


class Second:
    """The accelerator of a process that is not the first."""

    is_main_process = False

    def __init__(self, first: Any) -> None:
        self._first = first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._first, name)


def test_only_the_first_process_prints(
    distill: Distill, last: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = shutil.copytree(photos, tmp_path / "photos")
    (damaged / f"{HELD_OUT[0]:02}.png").write_text("words")
    prepare = DistillJob.prepare

    def second(*args: Any, **more: Any) -> DistillJob:
        job = prepare(*args, **more)
        job.accelerator = Second(job.accelerator)
        return job

    monkeypatch.setattr(DistillJob, "prepare", second)
    done = distill(damaged, *last, "-o", tmp_path / "run")
    assert (done.code, done.out, done.err) == (0, "", "")  # a launcher stops the first process when another fails
    assert not (tmp_path / "run" / "log.jsonl").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


# --- wrong usage ---


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--denoiser", "{files}/other.safetensors"), "Use the backbone that it was trained for"),
        (("--denoiser", "{files}/inner.safetensors"), "layer 5"),
        (("--denoiser", "{files}/wide.safetensors"), "has 384 channels, but "),
        (("--denoiser", "{files}/none.safetensors"), "no such denoiser file"),
        (("--denoiser", "{files}/tiny.safetensors"), "tiny.safetensors"),
        (("--denoiser", "voc_distilled"), "voc_distilled is a whole model, not a denoiser"),
        ((), "no denoiser for vit_tiny_patch16_224 with these weights"),
        (("--also", "{files}/last.safetensors"), "last.safetensors: duplicate denoiser for layer 11"),
        (("--also", "{files}/nameless.safetensors"), "nameless.safetensors does not record its layer"),
        (("--also", "{files}/inner.safetensors", "{files}/inner.safetensors"), "duplicate denoiser for layer 5"),
        (("--also", "{files}/other.safetensors"), r"was trained for \S+ \(layer 1, .* got \S+ \(layer 1, .*Use the"),
        (("--views.sizes", "50"), "a side of 50 pixels does not fit the patch grid: .* Nearest: 48 or 64"),
        (("--views.sizes", "big"), "sizes must be pixel sizes such as 518 or 364x476"),
        (("--views.flip", 2), r"flip must be a fraction in \[0, 1\], got 2.0"),
        (("--ema", 1), r"ema must be a factor in \[0, 1\), got 1.0"),
        (("--layer-decay", 0), r"layer_decay must be a factor in \(0, 1\], got 0.0"),
        (("--steps", 0, "--epochs", 0), "expected --epochs above 0, or --steps"),
        (("--steps", 0, "--epochs", "inf"), "expected --epochs above 0, or --steps; got inf epochs"),
        (("--accumulate", 0), "accumulate must be at least 1, got 0"),
        (("--held-out", PHOTOS), "expected more than 6 images, because 6 are held out"),
        (("--resume",), "no run to resume; start it without --resume"),
        (("--device", "cuda:99"), "device cuda:99 is not available"),
        (("--layer", 12), "has 12 blocks: layer must be -12 to 11, got 12"),
        (("--weights", "{files}/none.pth"), "no such weights file"),
        (("--start", "{files}/none.safetensors"), "none.safetensors: no such file; expected the distilled.safetensors"),
        (("--start", "{files}/last.safetensors"), "last.safetensors: expected a file written by dvit distill"),
        (("--start", "distilled"), "the package has no distilled weights for vit_tiny_patch16_224"),
    ],
)
def test_wrong_options_exit_2_with_a_reason_and_create_no_folder(
    distill: Distill, files: Path, photos: Path, tmp_path: Path, more: tuple[object, ...], message: str
) -> None:
    given = [str(one).replace("{files}", str(files)) for one in more]
    good = ("--denoiser", str(files / "last.safetensors")) if more and "--denoiser" not in more else ()
    done = distill(photos, *good, "-o", tmp_path / "run", *given)
    assert done.code == 2
    assert re.search(message, done.words), done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


def test_store_instead_of_photos_is_refused(distill: Distill, last: Any, store: Path, tmp_path: Path) -> None:
    done = distill(store, *last, "-o", tmp_path / "run")
    assert done.code == 2
    assert f"{store} is a store; expected photos. Use PHOTOS --fields {store} to use its fields as targets" in done.err


def test_fields_without_a_store_are_refused(distill: Distill, photos: Path, tmp_path: Path) -> None:
    done = distill(photos, "--fields", tmp_path / "none", "-o", tmp_path / "run")
    assert done.code == 2
    assert f"not a store; first run dvit fit {photos} -o {tmp_path}/none, or give a denoiser (--denoiser)" in done.err


@pytest.mark.parametrize("option", ["--denoiser", "--also"])
def test_fields_with_a_denoiser_are_refused(
    distill: Distill, files: Path, store: Path, photos: Path, tmp_path: Path, option: str
) -> None:
    done = distill(photos, "--fields", store, option, files / "inner.safetensors", "-o", tmp_path / "run")
    assert done.code == 2
    assert "with --fields, the targets are the store's fields; omit the denoiser or --fields" in done.err


def test_missing_photos_of_fields_are_refused(distill: Distill, store: Path, photos: Path, tmp_path: Path) -> None:
    fewer = shutil.copytree(photos, tmp_path / "photos")
    (fewer / "02.png").unlink()
    done = distill(fewer, "--fields", store, "-o", tmp_path / "run")
    assert done.code == 2
    assert "1 of the store's 6 photos are missing (02.png)" in done.err


@pytest.mark.parametrize("content", [None, ()])
def test_missing_or_empty_photo_folder_is_refused(distill: Distill, last: Any, tmp_path: Path, content: object) -> None:
    if content is not None:
        (tmp_path / "photos").mkdir()
    done = distill(tmp_path / "photos", *last, "-o", tmp_path / "run")
    assert done.code == 2
    assert "expected a folder of images, an image file, a text list of images (.txt) or" in done.err
    assert not (tmp_path / "run").exists()


def test_folder_with_other_contents_is_refused(distill: Distill, last: Any, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("words")
    done = distill(photos, *last, "-o", tmp_path / "run")
    assert done.code == 2
    assert "is not a run of this program; expected a new or empty folder" in done.err


def test_diverged_run_exits_2_and_names_the_kept_model(
    distill: Distill, files: Path, photos: Path, tmp_path: Path
) -> None:
    model = tiny_fit.spec_of(files / "tiny.safetensors").load()
    near = tiny.write(tiny.denoiser(model, strength=0.01), tmp_path / "near.safetensors")
    more = ("--steps", 8, "--learning-rate", 10, "--warmup", 0.4, "--final-rate", 0)
    done = distill(photos, "--denoiser", near, "-o", tmp_path / "run", *more)
    assert done.code == 2
    assert re.search(r"step \d: the run diverged: .*; the best model is kept \(\S+/distilled.safetensors\)", done.words)
    assert "Lower --learning-rate, or raise --warmup" in done.err
    kept = dv.load_backbone(tiny.MODEL, weights=tmp_path / "run" / "distilled.safetensors", device="cpu")
    with torch.no_grad():
        assert torch.isfinite(kept(torch.zeros(1, 3, 48, 48))).all()


def test_messages_name_options_of_this_command(distill: Distill, store: Path, photos: Path, tmp_path: Path) -> None:
    """The option is called `--views.whole` here."""
    coarse = tmp_path / "coarse"
    spec = tiny_fit.spec_of(Path(_weights_of(store)))
    tiny_fit.prepare(photos, coarse, spec, grid="patch").run()
    done = distill(photos, "--fields", coarse, "-o", tmp_path / "run", "--views.whole", 0.5)
    assert done.code == 2
    assert "train on whole photos (--views.whole 1)" in done.err


def _weights_of(store: Path) -> str:
    from denoising_vit.store import FeatureStore

    return FeatureStore.open(store).manifest.backbone["weights"]
