"""Which parameters are trained, which stay unchanged, and their moving average."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import denoising_vit as dv
import tiny_distillation as tiny
import tiny_fit
import tiny_training
from denoising_vit import Backbone
from denoising_vit.distilled.models import Average, Student, trained
from denoising_vit.errors import TrainError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def blank_panels() -> Iterator[None]:
    with tiny.blank_panels():
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_fit.write_photos(tmp_path_factory.mktemp("photos"), 6)


def student(backbone: Backbone, layers: tuple[int, ...] = (), *, prefix: bool = True) -> Student:
    made = Student(backbone, layers)
    made.require_grad((tiny.SIZE, tiny.SIZE), prefix=prefix)
    return made


def names(model: Student) -> set[str]:
    """Names of the trained parameters, as in the original model."""
    return {name.removeprefix("backbone.model.") for name, _ in trained(model)}


def blocks(model: Student) -> set[int]:
    return {int(name.split(".")[1]) for name in names(model) if name.startswith("blocks.")}


# --- which parameters ---


def test_all_parameters_are_trained_if_the_last_layer_is_taught() -> None:
    model = student(tiny.backbone())
    assert names(model) == {name.removeprefix("backbone.model.") for name, _ in model.named_parameters()}
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.bias"} <= names(model)


def test_blocks_after_the_layer_are_not_trained() -> None:
    model = student(tiny.backbone(12, 5))
    assert blocks(model) == set(range(6))
    assert {"cls_token", "norm.weight"} <= names(model)


def test_unused_norm_is_not_trained() -> None:
    assert not {name for name in names(student(tiny.backbone(3, 1, norm=False))) if name.startswith("norm.")}


@pytest.mark.parametrize(("layers", "last"), [((0,), 1), ((3, 0), 3), ((2,), 2)])
def test_blocks_up_to_the_last_of_several_layers_are_trained(layers: tuple[int, ...], last: int) -> None:
    assert blocks(student(tiny.backbone(5, 1), layers)) == set(range(last + 1))


@pytest.mark.parametrize("prefix", [True, False])
def test_unused_heads_are_not_trained(prefix: bool) -> None:
    trained_names = names(student(tiny.tokens(), prefix=prefix))
    assert {"project.weight", "project.bias"} <= trained_names
    assert not trained_names & {"head.weight", "head.bias"}


def test_finding_trained_parameters_changes_nothing() -> None:
    backbone = tiny.backbone()
    before = tiny.copied(backbone)
    model = student(backbone)
    assert tiny.gradients(model) == {}
    tiny.assert_same(tiny.copied(backbone), before)


def test_trained_blocks_follow_a_change_of_layer() -> None:
    backbone = tiny.backbone(3)
    assert blocks(student(backbone)) == {0, 1, 2}
    assert blocks(student(backbone.at_layer(0))) == {0}


def test_function_without_weights_is_rejected() -> None:
    def patches(image: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(image, 16)

    with pytest.raises(TrainError, match=r"patches has no weights to train; expected a model of torch modules"):
        student(dv.load_backbone(patches, patch_size=16, default_size=48, layout="channels_first"))


class OneSize(nn.Module):
    """Accepts only the size of its position embedding, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, 64, 16, 16)
        self.position = nn.Parameter(torch.zeros(1, 64, 3, 3))

    def forward(self, image: Tensor) -> Tensor:
        return self.project(image) + self.position


def test_a_model_of_one_size_can_be_trained() -> None:
    backbone = dv.load_backbone(OneSize(), patch_size=16, default_size=48, layout="channels_first")
    assert len(names(student(backbone))) == 3


@pytest.mark.parametrize("stride", [None, 8])
def test_overlapping_patches_are_trained(stride: int | None) -> None:
    backbone = tiny.backbone()
    if stride:
        backbone = type(backbone)(backbone.model, name=tiny.MODEL, stride=stride, layer=-1, norm=True, weights="")
    assert "patch_embed.proj.weight" in names(student(backbone))


# --- outputs ---


def test_features_and_prefix_match_the_backbone() -> None:
    backbone, image = tiny.backbone(3), torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        (features,), (prefix,) = Student(backbone)(image)
        expected = backbone.forward_with_prefix(image)
    assert torch.equal(features, expected[0])
    assert torch.equal(prefix, expected[1])


def test_own_layer_comes_first_then_the_given_order() -> None:
    backbone, image = tiny.backbone(3), torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        features, prefixes = Student(backbone, (1, 0))(image)
        for place, layer in enumerate((2, 1, 0)):
            alone = backbone.at_layer(layer).forward_with_prefix(image)
            torch.testing.assert_close(features[place], alone[0])
            torch.testing.assert_close(prefixes[place], alone[1])


# --- what a run does not change ---


@pytest.mark.parametrize("make", [tiny.backbone, tiny.tokens])
def test_a_run_changes_neither_the_callers_backbone_nor_the_teacher(
    photos: Path, tmp_path: Path, make: Callable[[], Backbone]
) -> None:
    backbone = make()
    denoiser = tiny.denoiser(backbone, channels=backbone.embed_dim)
    before, fingerprint, cleaning = tiny.copied(backbone), backbone.fingerprint, tiny.copied(denoiser)
    job, _ = tiny.distilled(photos, tmp_path / "run", backbone, tiny.options(hold_prefix=0.5), denoiser=denoiser)
    assert job.teacher.backbone is backbone
    tiny.assert_same(tiny.copied(backbone), before)
    tiny.assert_same(tiny.copied(denoiser), cleaning)
    backbone._fingerprint = None
    assert backbone.fingerprint == fingerprint
    assert not any(value.requires_grad or value.grad is not None for value in backbone.parameters())
    assert not any(value.requires_grad or value.grad is not None for value in denoiser.parameters())
    moved = [name for name, value in tiny.copied(job.student.backbone).items() if not torch.equal(value, before[name])]
    assert {name.removeprefix("model.") for name in moved} == names(job.student)


def test_trained_student_does_not_match_the_original_fingerprint(photos: Path, tmp_path: Path) -> None:
    backbone = tiny.backbone()
    assert backbone.fingerprint  # computed before the copy
    job, _ = tiny.distilled(photos, tmp_path / "run", backbone)
    assert not job.student.backbone.fingerprint.matches(backbone.fingerprint)
    assert not job.training().evaluated.backbone.fingerprint.matches(backbone.fingerprint)


def test_backbone_spec_is_loaded_for_teacher_and_student_separately(photos: Path, tmp_path: Path) -> None:
    spec = tiny_fit.spec_of(tiny_fit.write_weights(tmp_path / "tiny.safetensors"))
    before = tiny.copied(spec.load())
    denoiser = tiny.denoiser(spec.load())
    job, _ = tiny.distilled(photos, tmp_path / "run", spec, tiny.options(steps=1), denoiser=denoiser)
    tiny.assert_same(tiny.copied(job.teacher.backbone), before)
    assert not torch.equal(tiny.copied(job.student.backbone)["model.cls_token"], before["model.cls_token"])


def test_student_of_a_bfloat16_backbone_is_trained_in_float32(photos: Path, tmp_path: Path) -> None:
    spec = tiny_fit.spec_of(tiny_fit.write_weights(tmp_path / "tiny.safetensors"), dtype="bfloat16")
    job = tiny.prepared(photos, tmp_path / "run", spec, denoiser=tiny.denoiser(None))
    exact = tiny.copied(tiny_fit.spec_of(tmp_path / "tiny.safetensors").load())
    assert job.teacher.backbone.dtype == torch.bfloat16
    tiny.assert_same(tiny.copied(job.student.backbone), exact)  # not rounded to bfloat16
    assert job.training().evaluated.backbone.dtype == torch.bfloat16


def test_blocks_after_the_layer_stay_unchanged_in_a_run(photos: Path, tmp_path: Path) -> None:
    backbone = tiny.backbone(4, 1)
    before = tiny.copied(backbone)
    job, _ = tiny.distilled(photos, tmp_path / "run", backbone, tiny.options(weight_decay=0.5, ema=0.5))
    kept = tiny_training.weights_of(job.folder.path / "checkpoints" / "step-0000006.safetensors")
    for name, value in kept.items():
        plain = name.removeprefix("model.backbone.")
        behind = plain.startswith(("model.blocks.2.", "model.blocks.3."))
        assert torch.equal(value, before[plain]) == behind, plain


# --- the moving average ---


def test_average_by_hand() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average = Average(model, 0.75)
    expected = model.weight.detach().clone().double()
    for step in range(4):
        with torch.no_grad():
            model.weight.add_(step + 1.0)
        average.update(model)
        expected = 0.75 * expected + 0.25 * model.weight.detach().double()
    assert average.values.keys() == {"weight"}
    torch.testing.assert_close(average.values["weight"].double(), expected, rtol=1e-6, atol=1e-6)
    assert not average.values["weight"].requires_grad


def test_average_of_a_run_is_evaluated(photos: Path, tmp_path: Path) -> None:
    job = tiny.prepared(photos, tmp_path / "run", training=tiny.options(ema=0.8, evaluate_every=6))
    run = job.training()
    judged: list[dict[str, Tensor]] = []
    judge = run.held_out
    average = {name: value.double() for name, value in tiny.copied(run.student).items()}

    def watched(model: Student) -> dict[str, float]:
        judged.append(tiny.copied(model))
        return judge(model)

    def step(_step: int, _figures: dict[str, float]) -> None:
        for name, value in tiny.copied(run.student).items():
            average[name] = 0.8 * average[name] + 0.2 * value.double()

    setattr(run, "held_out", watched)  # noqa: B010, of another type
    setattr(watched, "draw", judge.draw)  # noqa: B010
    run.run(on_step=step)
    (shown,) = judged
    raw = tiny.copied(run.student)
    for name, value in average.items():
        torch.testing.assert_close(shown[name].double(), value, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(shown["backbone.model.cls_token"], raw["backbone.model.cls_token"], atol=1e-4)


def test_without_ema_checkpoints_hold_no_average(photos: Path, tmp_path: Path) -> None:
    job, _ = tiny.distilled(photos, tmp_path / "run")
    more = [name for name in _tensors(job.folder.checkpoints.last) if name.startswith("more.")]
    assert more == []


def _tensors(path: Path | None) -> dict[str, Any]:
    from safetensors.torch import load_file

    assert path is not None
    return load_file(path)
