"""`dvit evaluate depth`: result lines, tables, exit codes, and error messages for data and options."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny_artifact
import tiny_fit
from command import Dvit, in_process
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.evaluation import probing
from denoising_vit.evaluation.depth import data as depth_data
from denoising_vit.evaluation.depth import evaluate as depth_evaluate
from denoising_vit.evaluation.depth import protocol
from tiny_depth import blocky, flat, write_depth, write_nyu, write_pairs, write_photo, write_splits

pytestmark = pytest.mark.usefixtures("one_thread")

Line = dict[str, Any]

SIZE = (48, 64)

#: A few steps of one probe, and few views of stage 1.
SHORT = ("--steps", 3, "--seeds", 0)
EXACT = ("--exact.views", 12)

#: Strength of the planted artifact: as strong as the content of photos.
STRENGTH = 8.0


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    """Runs `dvit ...` in this process."""
    return in_process(capsys, monkeypatch)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> tiny_artifact.Planted:
    """Replaces every model by a planted one: the pixels of a patch plus an artifact."""
    model = tiny_artifact.Planted(STRENGTH)
    backbone = tiny_artifact.plain(model, layout="channels_last")
    monkeypatch.setattr(BackboneSpec, "load", lambda _spec: backbone)
    return model


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a model is loaded: errors must be reported before that."""

    def load(_spec: BackboneSpec) -> Backbone:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(BackboneSpec, "load", load)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("written") / "rooms", blocky(6, 0, SIZE, 16))


@pytest.fixture
def data(written: Path, tmp_path: Path) -> Path:
    """Six photos of 48 x 64 pixels with depth, without splits: three blocks."""
    return Path(shutil.copytree(written, tmp_path / "rooms"))


@pytest.fixture
def nyu(tmp_path: Path) -> Path:
    return write_nyu(tmp_path / "nyu", [flat(3, (480, 640))] * 2, [flat(2, (480, 640))])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def run(dvit: Dvit, data: Path, out: Path) -> Callable[..., Any]:
    """`dvit evaluate depth` on the rooms in three blocks; later options override earlier ones."""

    def call(*options: object, of: Path = data) -> Any:
        blocks = () if "--blocks" in options else ("--blocks", 3)
        return dvit("evaluate", "depth", "--data", of, "-o", out, *blocks, *options)

    return call


Run = Callable[..., Any]


def lines_of(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_no_results(out: Path) -> None:
    assert not out.exists() or not out.read_text()


def assert_plain(done: Any) -> None:
    """Checks that no traceback was printed."""
    assert "Traceback" not in done.err and "Traceback" not in done.out


# --- Results


def test_metrics_of_a_real_model_are_printed(run: Run, out: Path) -> None:
    done = run(
        *("--features", "raw,exact", "--backbone", tiny_fit.MODEL, "--weights", "random", "--device", "cpu"),
        *("--dtype", "float32", "--exact.views", 8, "--exact.size", 48, *SHORT),
    )
    assert done.code == 0, done.err
    raw, exact = lines_of(out)
    for line in (raw, exact):
        assert (line["task"], line["failed"], line["skipped"]) == ("depth", None, [])
        assert line["images"] == {"val": 6} and [seed["seed"] for seed in line["seeds"]] == [0]
        metrics = line["metrics"]
        shown = (
            f"{metrics['RMSE']:.4f}",
            f"{metrics['AbsRel']:.4f}",
            f"{metrics['log10']:.4f}",
            f"{metrics['a1']:.2f}",
        )
        (row,) = [row for row in done.out.splitlines() if row.startswith(f"{line['features']} ")]
        assert row.split()[1:5] == list(shown)
        assert f"{line['features']}: RMSE {metrics['RMSE']:.4f} in" in done.err
    assert f"{exact['paired']['difference']:+.4f}" in done.out and "RMSE against raw (95 %)" in done.out
    assert "no splits: 3 blocks of consecutive photos are evaluated in turn" in done.err
    assert f"`dvit report {out} -o results.md`" in done.err


def test_all_sources_are_evaluated_on_the_planted_model(
    run: Run, planted: tiny_artifact.Planted, tmp_path: Path, out: Path
) -> None:
    backbone = tiny_artifact.plain(planted, layout="channels_last")
    artifact = tmp_path / "g.safetensors"
    tiny_artifact.artifact_of(backbone, STRENGTH * tiny_artifact.pattern(6, 6)).save(artifact)
    done = run("--artifact", artifact, "--steps", 40, "--batch", 4, "--learning-rate", 0.4, "--seeds", 0, *EXACT)
    assert done.code == 0, done.err
    raw, subtract, exact = lines_of(out)
    assert [line["features"] for line in (raw, subtract, exact)] == ["raw", "subtract", "exact"]
    # The colour of a patch gives its depth, except for the artifact.
    assert subtract["metrics"]["RMSE"] < raw["metrics"]["RMSE"] - 0.1
    assert subtract["paired"]["difference"] < 0 and subtract["paired"]["over"] == "blocks"
    assert exact["failed"] is None and exact["settings"]["features"]["views"] == 12
    assert subtract["settings"]["features"]["artifact"]


def test_json_option_prints_the_result_lines(run: Run, planted: tiny_artifact.Planted, out: Path) -> None:
    done = run("--features", "raw", "--json", *SHORT)
    assert done.code == 0
    assert done.rows == lines_of(out) and done.rows[0]["metrics"]["RMSE"] > 0
    assert "RMSE against" not in done.out


def test_running_again_keeps_the_lines(run: Run, planted: tiny_artifact.Planted, out: Path) -> None:
    first = run("--features", "raw", *SHORT)
    before, passes = out.read_bytes(), planted.passes
    again = run("--features", "raw", *SHORT)
    assert again.code == 0 and again.out == first.out
    assert "(kept from an earlier run)" in again.err
    assert out.read_bytes() == before and planted.passes == passes


def test_splits_and_nyu_have_no_blocks(
    dvit: Dvit, planted: tiny_artifact.Planted, tmp_path: Path, nyu: Path, out: Path
) -> None:
    splits = write_splits(tmp_path / "splits", blocky(3, 0, SIZE), blocky(2, 1, SIZE))
    for root in (splits, nyu):
        done = dvit("evaluate", "depth", "--data", root, "--features", "raw", "-o", out, "--size", 48, *SHORT)
        assert done.code == 0, done.err
        assert "no splits" not in done.err
    assert [line["settings"]["blocks"] for line in lines_of(out)] == [0, 0]
    assert [line["settings"]["data"]["layout"] for line in lines_of(out)] == ["folders", "nyu"]


def test_published_protocol_resumes_after_an_interruption(
    run: Run, planted: tiny_artifact.Planted, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "_CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(protocol, "PAPER", replace(protocol.PAPER, crop=(32, 40), batch=2))
    usual, steps = probing._save, []

    def keep(*arguments: Any) -> None:
        usual(*arguments)
        steps.append(arguments[-1])
        if len(steps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(probing, "_save", keep)
    options = ("--features", "raw", "--preset", "paper", "--steps", 7, "--seeds", 0)
    done = run(*options)
    assert done.code == 130 and "run the command again to resume" in done.err
    assert steps == [2, 4] and not out.read_text()
    done = run(*options)
    assert done.code == 0, done.err
    assert steps == [2, 4, 6, 2, 4, 6, 2, 4, 6]  # of three blocks
    (line,) = lines_of(out)
    assert (line["settings"]["preset"], line["settings"]["steps"]) == ("paper", 7)
    assert line["settings"]["features"] == {"normalisation": "imagenet"}


def test_report_makes_a_table_of_depth(run: Run, planted: tiny_artifact.Planted, dvit: Dvit, out: Path) -> None:
    done = run("--features", "raw,exact", "--steps", 3, "--seeds", 0, 1, *EXACT)
    assert done.code == 0, done.err
    page = out.with_suffix(".md")
    reported = dvit("report", out, "-o", page)
    assert (reported.code, reported.out) == (0, ""), reported.err
    text = page.read_text()
    assert "## Depth by a trained head" in text
    assert "| features | RMSE | AbsRel | log10 | a1 | a2 | a3 |" in text
    blocks = lines_of(out)[1]["paired"]["groups"]
    assert blocks < 5 and f"no interval: {blocks} blocks, at least 5 are needed; lower is better." in text
    for line in lines_of(out):
        (row,) = [row for row in text.splitlines() if row.startswith(f"| {line['features']} |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        metrics = [line["metrics"][name] for name in ("RMSE", "AbsRel", "log10", "a1", "a2", "a3")]
        assert cells[1:7] == [f"{value:.{4 if place < 3 else 2}f}" for place, value in enumerate(metrics)]
        each = [seed["RMSE"] for seed in line["seeds"]]
        assert cells[7] == f"{max(each) - min(each):.4f}"
        if line["paired"]:
            assert cells[8] == f"{line['paired']['difference']:+.4f}"
    assert "RMSE at step (first seed)" in text


def test_help_describes_data_and_options(dvit: Dvit) -> None:
    done = dvit("evaluate", "depth", "--help")
    assert done.code == 0
    for word in (
        *("nyu_train.txt", "rgb/ and depth/", "16-bit PNG", "train/ and val/", "--depth-scale", "1000 for millimetres"),
        *("--blocks", "--preset", "paper", "quick", "--size", "--farthest", "--seeds", "--gradient", "--json"),
    ):
        assert word in done.words
    assert "depth" in dvit("evaluate", "--help").words


# --- Skipped data


def eight_bits(root: Path) -> None:
    Image.fromarray(np.full(SIZE, 100, np.uint8)).save(root / "depth" / "05.png")


def colours(root: Path) -> None:
    Image.fromarray(np.full((*SIZE, 3), 100, np.uint8)).save(root / "depth" / "05.png")


def another_size(root: Path) -> None:
    write_depth(root / "depth" / "05.png", np.full((48, 60), 2.0))


def all_unknown(root: Path) -> None:
    write_depth(root / "depth" / "05.png", np.zeros(SIZE))


def damaged(root: Path) -> None:
    path = root / "depth" / "05.png"
    path.write_bytes(path.read_bytes()[:-70])


def no_depth(root: Path) -> None:
    (root / "depth" / "05.png").unlink()


def no_photo(root: Path) -> None:
    (root / "rgb" / "05.png").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (eight_bits, "05.png: expected 16-bit depth, got 8 bits, which is too coarse"),
        (colours, "05.png: expected one 16-bit value per pixel, got an image of mode RGB"),
        (
            another_size,
            "val/05.png: expected photo and depth map of the same size, got a photo of 64 x 48 pixels and",
        ),
        (all_unknown, "val/05.png: no pixel of the depth map has a depth"),
        (damaged, "05.png: damaged depth map"),
        (no_depth, "val/05.png: a photo without a depth map; expected"),
        (no_photo, "val/05.png: a depth map without a photo; expected"),
    ],
)
def test_unusable_pair_is_skipped_with_a_reason(
    run: Run, planted: tiny_artifact.Planted, data: Path, out: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(data)
    done = run("--features", "raw", "--blocks", 2, *SHORT)
    assert done.code == 1, done.err
    assert_plain(done)
    assert "skipped: " in done.err and message in done.err
    (line,) = lines_of(out)
    assert line["failed"] is None and line["images"] == {"val": 5} and len(line["skipped"]) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/a/rgb_1.png None 518.8579", "skipped: val/a/rgb_1.png: no depth map in the list"),
        ("/a/rgb_1.png", "skipped: val/nyu_test.txt:2: expected a photo, a depth map and a focal length"),
        ("../secret.png /a/depth_1.png 5", "skipped: val/../secret.png: expected a path below the folder"),
        (
            "/small.png /small_depth.png 5",
            "skipped: val/small.png: expected 640 x 480 pixels, as NYUv2 has, got 64 x 48",
        ),
    ],
)
def test_unusable_line_of_nyu_is_skipped_with_a_reason(
    run: Run, planted: tiny_artifact.Planted, nyu: Path, out: Path, line: str, message: str
) -> None:
    photo, metres = flat(2, SIZE)
    write_photo(nyu / "small.png", photo)
    write_depth(nyu / "small_depth.png", metres)
    with (nyu / "nyu_test.txt").open("a") as file:
        file.write(line + "\n")
    done = run("--features", "raw", "--size", 48, "--steps", 1, "--seeds", 0, of=nyu)
    assert done.code == 1, done.err
    assert_plain(done)
    assert message in done.err
    assert lines_of(out)[0]["images"] == {"train": 2, "val": 1}


def test_saved_outcomes_are_grouped_again_without_training(
    run: Run, planted: tiny_artifact.Planted, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [flat(metres, (480, 640)) for metres in (2, 3)]
    nyu = write_nyu(tmp_path / "nyu", pictures, pictures[::-1])
    command = ("--features", "raw,average", "--size", 48, "--steps", 1, "--seeds", 0)
    one_scene = {f"test_0001/rgb_{number:05}.png": 3 for number in range(2)}
    for scenes, over, groups in (({}, "images", 2), (one_scene, "scenes", 1)):
        monkeypatch.setattr(depth_data, "scenes_of", lambda *_ids, found=scenes: found)
        done = run(*command, of=nyu)
        assert done.code == 0, done.err
        raw, average = lines_of(out)[-2:]
        assert raw["settings"].get("over", "images") == average["paired"]["over"] == over
        assert average["paired"]["groups"] == groups
        monkeypatch.setattr(depth_evaluate, "train", None)  # not called again
    assert len(lines_of(out)) == 4
    assert lines_of(out)[0]["metrics"] == lines_of(out)[2]["metrics"]


# --- Refused data and options


def gone(root: Path) -> None:
    shutil.rmtree(root)


def file_there(root: Path) -> None:
    shutil.rmtree(root)
    root.write_text("")


def other_folder(root: Path) -> None:
    shutil.rmtree(root)
    (root / "holiday").mkdir(parents=True)


def nothing_in_it(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def one_list(root: Path) -> None:
    (root / "nyu_train.txt").write_text("/a.png /b.png 5\n")


def all_eight_bits(root: Path) -> None:
    for path in (root / "depth").iterdir():
        Image.fromarray(np.full(SIZE, 100, np.uint8)).save(path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (gone, ["expected a data set folder, found nothing"]),
        (file_there, ["expected a data set folder, found a file"]),
        (other_folder, ["expected NYUv2 (nyu_train.txt", "in two splits (train/rgb or train/images", "found holiday"]),
        (nothing_in_it, ["expected NYUv2 (nyu_train.txt", "found an empty folder"]),
        (one_list, ["looks like NYUv2, but lacks nyu_test.txt"]),
        (all_eight_bits, ["split val, but none of 6 is usable; first reason: 00.png", "got 8 bits"]),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_wrong_data_error_says_what_was_expected_and_found(
    run: Run, data: Path, out: Path, damage: Callable[[Path], None], words: Sequence[str]
) -> None:
    damage(data)
    done = run(*SHORT)
    assert done.code == 2
    assert_plain(done)
    for word in (str(data), *words):
        assert word in done.err
    assert_no_results(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--depth-scale", 1), "which is implausible (expected 0.05 to 200); give the right --depth-scale"),
        (("--depth-scale", 1e7), "which is implausible (expected 0.05 to 200); give the right --depth-scale"),
        (("--depth-scale", 0), "depth scale must be a positive number of units per metre, got 0"),
        (("--depth-scale", "nan"), "depth scale must be a positive number of units per metre, got nan"),
        (("--blocks", 4), "6 photos without splits cannot be evaluated in 4 blocks"),
        (("--blocks", 1), "6 photos without splits cannot be evaluated in 1 blocks; expected at least 2 blocks"),
        (("--images", 5), "5 photos without splits cannot be evaluated in 3 blocks"),
        (("--images", -1), "expected a number of images of at least 1, or 0 for all, got -1"),
        (("--steps", 0), "steps must be at least 1, got 0"),
        (("--batch", 0), "batch must be at least 1, got 0"),
        (("--learning-rate", 0), "learning_rate must be a positive number, got 0"),
        (("--weight-decay", -1), "weight_decay must be at least 0, got -1"),
        (("--gradient", -1), "gradient must be at least 0, got -1"),
        (("--farthest", 0), "farthest must be a depth of more than 0.001 m, got 0"),
        (("--seeds", 1, 1), "seeds must be one or more different numbers of at least 0"),
        (("--seeds", -1), "seeds must be one or more different numbers of at least 0"),
        (("--preset", "paper", "--size", 48), "size applies to preset quick"),
        (("--preset", "slow"), "slow"),
        (("--features", "raw,clean"), "unknown features: 'clean'"),
        (("--exact.views", 0), "views must be at least 1, got 0"),
        (("--cache-gb", -1), "cache_gb must be at least 0"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_options_out_of_range_are_refused_before_a_model_loads(
    run: Run, out: Path, options: tuple[object, ...], message: str
) -> None:
    done = run(*options)
    assert done.code == 2, done.err
    assert_plain(done)
    assert message in done.words
    assert_no_results(out)


def test_size_off_the_patch_grid_is_refused(run: Run, planted: tiny_artifact.Planted, out: Path) -> None:
    done = run("--features", "raw", "--size", 50, *SHORT)
    assert done.code == 2
    assert "a side of 50 pixels does not fit the patch grid" in done.err
    assert_no_results(out)


def test_error_for_too_small_photos_names_the_other_preset(run: Run, planted: tiny_artifact.Planted, out: Path) -> None:
    done = run("--features", "raw", "--preset", "paper", *SHORT)
    assert done.code == 1
    assert_plain(done)
    assert "64 x 48 pixels are smaller than the published protocol's crops of 544 x 416; use --preset quick" in done.err
    assert lines_of(out)[0]["failed"]


def test_published_protocol_refuses_exact_features(run: Run, planted: tiny_artifact.Planted, out: Path) -> None:
    done = run("--preset", "paper", *SHORT)  # exact is one of the default features
    assert done.code == 2
    assert_plain(done)
    assert "exact: stage 1 fields match unchanged images" in done.err
    assert "--preset quick" in done.err and "--features" in done.err
    assert_no_results(out)


def test_error_for_depth_beyond_the_limit_names_the_option(run: Run, planted: tiny_artifact.Planted, out: Path) -> None:
    done = run("--features", "raw", "--farthest", 0.5, *SHORT)
    assert done.code == 1
    assert_plain(done)
    assert "none of the 6 photos of val has a depth below 0.5 m" in done.err and "--farthest" in done.err


def test_unavailable_features_fail_and_the_others_are_evaluated(
    run: Run, planted: tiny_artifact.Planted, out: Path
) -> None:
    done = run("--features", "raw,subtract", *SHORT)  # the package has no artifact for this model
    assert done.code == 1
    assert_plain(done)
    raw, subtract = lines_of(out)
    assert raw["failed"] is None and "create one with dvit calibrate" in subtract["failed"]
    assert "subtract failed: " in done.err and f"{raw['metrics']['RMSE']:.4f}" in done.out
