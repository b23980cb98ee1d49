"""Checkpoints and the folder of a run: files are complete, and no other run is overwritten."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from denoising_vit import Denoiser
from denoising_vit.environment import run_info
from denoising_vit.errors import TrainError
from denoising_vit.training import run_folder
from denoising_vit.training.checkpoints import Checkpoints, Progress
from denoising_vit.training.run_folder import HOLDING, RunFolder, is_new

IDENTITY: dict[str, Any] = {"stage": "denoiser", "options": {"steps": 20, "seed": 0}, "processes": 1}


def model(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(64, (3, 5))


def optimiser_of(trained: Denoiser) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained.parameters(), lr=1e-3)


def step(trained: Denoiser, optimiser: torch.optim.Optimizer) -> None:
    raw = torch.linspace(-1, 1, 3 * 5 * 64).view(1, 3, 5, 64)
    trained(raw).square().mean().backward()
    optimiser.step()
    optimiser.zero_grad()


@pytest.fixture
def there(tmp_path: Path) -> Checkpoints:
    """Two checkpoints, after one step and after two."""
    made, trained = Checkpoints(tmp_path / "checkpoints"), model()
    optimiser = optimiser_of(trained)
    for number in (1, 2):
        step(trained, optimiser)
        made.save(Progress(number, 0.5, 1), trained, optimiser)
    return made


def names(made: Checkpoints) -> list[str]:
    return sorted(path.name for path in made.folder.iterdir())


def test_weights_and_moments_are_restored_bit_for_bit(there: Checkpoints) -> None:
    trained, optimiser = model(seed=1), None
    optimiser = optimiser_of(trained)
    assert there.load(trained, optimiser) == Progress(2, 0.5, 1)
    straight = model()
    its = optimiser_of(straight)
    for _ in range(2):
        step(straight, its)
    for one, other in ((trained, optimiser), (straight, its)):
        step(one, other)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name
    for one, other in zip(straight.parameters(), trained.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(its.state[one][name], optimiser.state[other][name])


def test_missing_checkpoints_mean_step_0(tmp_path: Path) -> None:
    empty = Checkpoints(tmp_path / "nothing")
    trained = model()
    assert empty.load(trained, optimiser_of(trained)) == Progress()
    assert (empty.last, empty.step) == (None, 0)


def test_the_last_two_are_kept(there: Checkpoints) -> None:
    trained = model()
    for number in (3, 40, 1000):
        there.save(Progress(number), trained, optimiser_of(trained))
    assert names(there) == ["step-0000040.safetensors", "step-0001000.safetensors"]
    assert there.step == 1000


def test_checkpoint_metadata_records_the_progress(there: Checkpoints) -> None:
    assert there.last is not None
    with safe_open(there.last, framework="pt") as file:
        assert json.loads(file.metadata()["denoising_vit"]) == {"step": 2, "best": 0.5, "best_step": 1}


def full(*_args: Any, **_more: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_keeps_the_previous_checkpoint_and_is_reported(
    there: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = model()
    before = {path.name: path.read_bytes() for path in there.folder.iterdir()}
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(
        TrainError,
        match=r"step-0000003.*could not be written \(.*No space left.*step-0000002.* is intact; continue with --resume",
    ):
        there.save(Progress(3), trained, optimiser_of(trained))
    assert {path.name: path.read_bytes() for path in there.folder.iterdir()} == before
    assert there.load(trained, optimiser_of(trained)).step == 2


def test_a_full_disk_at_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors.torch.save_file", full)
    trained = model()
    with pytest.raises(TrainError, match="there is no earlier one"):
        Checkpoints(tmp_path / "checkpoints").save(Progress(3), trained, optimiser_of(trained))


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "no metadata"])
def test_damaged_checkpoint_is_named_and_the_previous_one_loads(there: Checkpoints, damage: str) -> None:
    assert there.last is not None
    whole = there.last.read_bytes()
    damaged = {"cut": whole[: len(whole) // 2], "empty": b"", "noise": b"\xff" * 100}
    damaged["no metadata"] = whole.replace(b'"denoising_vit"', b'"denoising_vot"')
    there.last.write_bytes(damaged[damage])
    trained = model()
    with pytest.raises(
        TrainError, match=r"step-0000002.safetensors: damaged checkpoint .*delete it, and continue from the previous"
    ):
        there.load(trained, optimiser_of(trained))
    there.last.unlink()
    assert there.load(trained, optimiser_of(trained)).step == 1


def test_a_checkpoint_of_another_model_is_refused(there: Checkpoints) -> None:
    other = Denoiser(128, (3, 5))
    with pytest.raises(TrainError, match=r"damaged checkpoint .*size mismatch"):
        there.load(other, optimiser_of(other))


# --- the folder of a run ---


def test_new_folder_is_created_and_the_same_run_resumes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new" / "run")
    folder.begin(IDENTITY, resume=False)
    assert json.loads((folder.path / "run.json").read_text())["stage"] == "denoiser"
    folder.begin(IDENTITY, resume=True)
    folder.begin(IDENTITY, resume=True)


def test_resume_writes_a_missing_about_record(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(IDENTITY, resume=False)
    (tmp_path / "about.json").unlink()
    folder.begin(IDENTITY, resume=True)
    assert json.loads((tmp_path / "about.json").read_text()).keys() == run_info().keys()


def test_empty_folder_is_accepted(tmp_path: Path) -> None:
    RunFolder(tmp_path).begin(IDENTITY, resume=False)


@pytest.mark.parametrize("there", ["log.jsonl", "checkpoints/step-0000001.safetensors", "pairs/state.u8", "note.txt"])
def test_existing_run_is_not_overwritten(tmp_path: Path, there: str) -> None:
    RunFolder(tmp_path).begin(IDENTITY, resume=False)
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_bytes(b"\0\1\0")
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(TrainError, match="already has a run; use --resume to continue it, or choose another folder"):
        RunFolder(tmp_path).begin(IDENTITY | {"processes": 2}, resume=False)
    assert (tmp_path / there).read_bytes() == b"\0\1\0"
    assert (tmp_path / "run.json").read_text() == before


@pytest.mark.parametrize("pairs", [False, True])
def test_run_without_progress_can_be_replaced(tmp_path: Path, pairs: bool) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(IDENTITY, resume=False)
    folder.begin(IDENTITY, resume=True)
    if pairs:  # pair files of the first run, without pairs
        folder.pairs.mkdir()
        for name in ("pairs.json", "state.u8", "raw-0-7x7.f16", "target-0-7x7.f16", "unusable.jsonl", "note.txt"):
            (folder.pairs / name).write_bytes(b"\0\0\0")
    folder.begin(IDENTITY | {"processes": 2}, resume=False)
    assert json.loads((tmp_path / "run.json").read_text())["processes"] == 2
    left = [path.name for path in tmp_path.rglob("*") if path.is_file() and HOLDING not in path.parts]
    assert sorted(left) == ["about.json", *(["note.txt"] if pairs else []), "run.json"]


@pytest.mark.parametrize("text", ["{}", '{"format": "another/program"}', "words"])
def test_a_record_of_another_program_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(TrainError, match="already has a run"):
        RunFolder(tmp_path).begin(IDENTITY, resume=False)
    assert (tmp_path / "run.json").read_text() == text


def test_resume_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no run to resume; start it without --resume"):
        RunFolder(tmp_path / "run").begin(IDENTITY, resume=True)
    assert not (tmp_path / "run").exists()


def test_folders_and_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mum.txt").write_text("dear")
    for place in ("letters", "letters/mum.txt"):
        with pytest.raises(TrainError, match="exists and is not a run of this program; expected a new or empty folder"):
            RunFolder(tmp_path / place).begin(IDENTITY, resume=False)
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["mum.txt"]


def test_a_start_that_was_killed_while_writing_its_record_can_be_repeated(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".run.json.70ou7zmp.part").write_text('{"format')
    RunFolder(run).begin(IDENTITY, resume=False)
    assert not list(run.glob("*.part")) and (run / "run.json").is_file()
    assert is_new(tmp_path / "none", "run.json") and not is_new(run, "run.json")
    for other in (".run.json.part", ".other.json.70ou7zmp.part", "run.json.70ou7zmp.part"):
        folder = tmp_path / other
        folder.mkdir()
        (folder / other).touch()
        assert not is_new(folder, "run.json")


def test_changed_options_are_named_with_both_values(tmp_path: Path) -> None:
    RunFolder(tmp_path).begin(IDENTITY, resume=False)
    other = {"stage": "denoiser", "options": {"steps": 30, "seed": 1}, "processes": 2}
    with pytest.raises(TrainError, match="cannot resume with other options") as caught:
        RunFolder(tmp_path).begin(other, resume=True)
    for part in ("options.steps was 20, now 30", "options.seed was 0, now 1", "processes was 1, now 2"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "null",
    ],
)
def test_damaged_run_record_is_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(TrainError, match=r"run.json: damaged .*start again in another folder"):
        RunFolder(tmp_path).begin(IDENTITY, resume=True)


def test_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError):
        RunFolder(tmp_path / "file" / "run").begin(IDENTITY, resume=False)


def test_log_lines_after_the_checkpoint_and_incomplete_ones_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    whole = [json.dumps({"step": number, "kind": "train", "loss": 1.0}) + "\n" for number in range(1, 8)]
    folder.log.write_text("".join(whole) + '{"step": 3, "ki')
    folder.cut_log(5)
    assert folder.log.read_text() == "".join(whole[:5])
    folder.cut_log(0)
    assert folder.log.read_text() == ""


def test_invalid_log_lines_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log.write_text('\n{"step": "1"}\n[1]\nwords\n{"step": 1}\n{"step": 2}')
    folder.cut_log(9)
    assert folder.log.read_text() == '{"step": 1}\n'


def test_cutting_a_missing_log_does_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path).cut_log(3)
    assert list(tmp_path.iterdir()) == []


def test_folder_in_use_by_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.begin(IDENTITY, resume=False)
    monkeypatch.setattr(run_folder, "_HELD", {})  # as another process sees it
    for resume in (False, True):
        with pytest.raises(TrainError, match=r"another run is writing to it .*process \d+ on "):
            second.begin(IDENTITY, resume=resume)
    monkeypatch.undo()
    run_folder.let_go(first.path, "run")
    second.begin(IDENTITY, resume=True)


@dataclasses.dataclass
class Second:
    """The accelerator of the second process of a run."""

    is_main_process: bool = False
    process_index: int = 1


def test_other_processes_get_the_run_from_the_first_not_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "from_first", lambda _accelerator, _mine: IDENTITY)
    folder = RunFolder(tmp_path / "not there yet")
    folder.begin_together(IDENTITY, Second(), resume=False)
    with pytest.raises(TrainError, match=r"process 1 has other options or photos than the first process: processes"):
        folder.begin_together(IDENTITY | {"processes": 5}, Second(), resume=False)
    assert not folder.path.exists()
