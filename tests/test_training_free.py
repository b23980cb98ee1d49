"""Cleaning without training: projection, averaged passes, test-time registers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import denoising_vit as dv
import tiny_artifact as planted
import tiny_export
from denoising_vit import Backbone, Subspace
from denoising_vit.backbones.recorded import describe
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.extractors import Cleaners
from denoising_vit.show.sheets import PhotoExtractor
from denoising_vit.training_free import AveragedViT, Registers, find_registers, find_subspace, with_registers
from denoising_vit.training_free.average import aligned_mean, moved, moves
from denoising_vit.training_free.common import photo_images
from denoising_vit.training_free.project import choose_rank, place_directions, principal_directions
from denoising_vit.training_free.registers import _Shift, has_registers
from denoising_vit.views.plan import ViewPlan
from denoising_vit.views.rendering import ViewRenderer, to_image

pytestmark = pytest.mark.usefixtures("one_thread")


def normalised(photo: np.ndarray, backbone: Backbone, size: tuple[int, int]) -> Tensor:
    plan = ViewPlan.make(1, size=size, patch_size=backbone.patch_size, stride=backbone.stride)
    return ViewRenderer(to_image(photo, torch.device("cpu")), plan, backbone.mean, backbone.std)(slice(1))


# --- project


def test_projection_matches_a_hand_computed_value() -> None:
    subspace = Subspace(torch.tensor([[0.6, 0.8]]), {})
    # (1, 2) along (0.6, 0.8) is 2.2: (1 - 1.32, 2 - 1.76).
    torch.testing.assert_close(subspace(torch.tensor([[1.0, 2.0]])), torch.tensor([[-0.32, 0.24]]))


def test_principal_directions_of_a_planted_pattern() -> None:
    strong, weak = torch.tensor([0.0, 0.6, 0.8]), torch.tensor([1.0, 0.0, 0.0])
    along = torch.tensor([[2.0, -2.0], [2.0, -2.0]])[..., None]
    across = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])[..., None]
    found = principal_directions(5 + along * strong + across * weak)
    assert found.shape == (2, 3)  # the third is rounding error
    torch.testing.assert_close(found[0].abs(), strong)
    torch.testing.assert_close(found[1].abs(), weak)


def test_directions_of_the_artifact_remove_any_multiple_of_it() -> None:
    image = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    backbone = planted.backbone()
    artifact = planted.artifact_of(backbone, planted.pattern(7, 7)[..., :1] * torch.tensor([1.0, 2, 0, 0, -1, 0]))
    subspace = find_subspace(backbone, source="artifact", artifact=artifact, rank=1)
    clean = subspace(backbone(image))
    torch.testing.assert_close(subspace(backbone(image) + 3 * artifact.values), clean, rtol=0, atol=1e-4)
    with pytest.raises(dv.PlanError, match="rank must be 0 to 1, the number of directions of 'artifact', got 2"):
        find_subspace(backbone, source="artifact", artifact=artifact, rank=2)


def test_directions_of_a_black_image_remove_the_planted_pattern() -> None:
    backbone = planted.backbone(strength=0.5)
    subspace = find_subspace(backbone, rank=5)
    black = (-torch.tensor(backbone.mean) / torch.tensor(backbone.std)).view(1, 3, 1, 1).expand(1, 3, 56, 56)
    raw = backbone(black)[0]
    left = subspace(raw)
    assert left.var((0, 1)).sum() < 0.05 * raw.var((0, 1)).sum()


def positional(photos: int = 8, seed: int = 0, place: float = 1.0) -> Tensor:
    """Features (N, 5, 7, 6): x in channel 0, y in channel 1, content in the others."""
    features = torch.randn(photos, 5, 7, 6, generator=torch.Generator().manual_seed(seed))
    features[..., 0] *= 0.05
    features[..., 1] *= 0.05
    features[..., 0] += place * torch.linspace(-1, 1, 7)
    features[..., 1] += place * torch.linspace(-1, 1, 5)[:, None]
    return features


def test_place_directions_span_the_positional_channels() -> None:
    found = place_directions(positional(), 2)
    assert found.shape == (2, 6)
    torch.testing.assert_close(found @ found.T, torch.eye(2), rtol=0, atol=1e-5)
    assert found[:, 2:].abs().max() < 0.1


def test_chosen_rank_removes_position_and_keeps_content() -> None:
    rank, tried = choose_rank(positional(), torch.eye(6))
    assert rank == 2
    assert [row["rank"] for row in tried] == [0, 1, 2]  # at most half of the channels
    assert tried[0]["place"] > 0.9
    assert tried[2]["place"] < 0.1
    assert tried[2]["lost"] < 0.01
    # By hand: channels of unit variance are a quarter of the content each.
    assert choose_rank(positional(), torch.eye(6)[2:])[1][1]["lost"] == pytest.approx(0.25, abs=0.03)
    with pytest.raises(dv.PlanError, match="at least 4 photos, got 3"):
        choose_rank(positional(3), torch.eye(6))


def test_rank_is_chosen_from_photos(tmp_path: Path) -> None:
    backbone = planted.backbone()
    chance = np.random.default_rng(0)
    photos = [chance.integers(0, 255, (56, 56, 3), dtype=np.uint8) for _ in range(8)]
    found = find_subspace(backbone, photos, source="place")
    assert found.info["photos"] == 8
    assert found.rank == found.info["rank"] > 0
    with pytest.raises(dv.PlanError, match="at least 4 photos, got 3"):  # one half evaluates directions of the other
        find_subspace(backbone, photos[:6], source="place")
    found.save(tmp_path / "a.safetensors")
    again = Subspace.load(tmp_path / "a.safetensors")
    assert torch.equal(again.directions, found.directions)
    assert again.info == found.info
    with pytest.raises(dv.ArtifactError, match="Use that backbone"):
        again.require_of(planted.backbone(seed=1))
    with pytest.raises(
        dv.FormatError, match=r"expected a safetensors file with registers \(no 'denoising-vit/registers' metadata"
    ):
        Registers.load(tmp_path / "a.safetensors")
    for wrong in ("x", "place", "artifact"):
        with pytest.raises(dv.PlanError):
            find_subspace(backbone, source=wrong)  # pyright: ignore[reportArgumentType]


# --- the registry of feature kinds


@pytest.fixture(scope="module")
def tiny_vit() -> Backbone:
    return dv.load_backbone("vit_tiny_patch16_224", weights="random", device="cpu", dtype="float32")


def test_registry_creates_each_kind(backbone: Backbone, photos: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    image = photos[0][:2]
    found = find_registers(backbone, photos[0], size=(96, 96))
    found.save(tmp_path / "registers.safetensors")
    subspace = find_subspace(backbone, rank=3)
    subspace.save(tmp_path / "subspace.safetensors")
    cleaners = Cleaners(
        subspace=str(tmp_path / "subspace.safetensors"), registers=str(tmp_path / "registers.safetensors")
    )
    made = {name: cleaners.extractor(name, backbone) for name in ("project", "average", "registers")}
    torch.testing.assert_close(made["project"][0](image), subspace(backbone(image)))
    torch.testing.assert_close(made["average"][0](image), AveragedViT(backbone)(image))
    torch.testing.assert_close(made["registers"][0](image), with_registers(backbone, found)(image))
    identities = [made[name][1] for name in made]
    assert identities == [{"subspace": subspace.digest}, {"passes": "5"}, {"registers": found.digest}]
    # Without a file, the projection uses 16 directions of a black image.
    torch.testing.assert_close(
        Cleaners().extractor("project", backbone)[0](image), find_subspace(backbone, rank=16)(backbone(image))
    )
    with pytest.raises(dv.PlanError, match="--registers FILE"):
        Cleaners().extractor("registers", backbone)


@pytest.mark.parametrize("name", ["project", "average"])
def test_denoise_image_with_project_and_average(tiny_vit: Backbone, name: str) -> None:
    photo = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    result = dv.denoise_image(tiny_vit, photo, method=name, size=(96, 96))
    assert result.semantic.shape == (6, 6, 192)
    assert not torch.allclose(result.semantic, result.raw, atol=1e-3)


def test_given_subspace_and_registers_are_used(
    backbone: Backbone, photos: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """In `denoise_image` and on sheets; a subspace that the method does not use is rejected."""
    photo = planted.photos(1)[0]
    subspace, registers = find_subspace(backbone, rank=3), find_registers(backbone, photos[0], size=(96, 96))
    subspace.save(tmp_path / "subspace.safetensors")
    made = {"project": {"subspace": tmp_path / "subspace.safetensors"}, "registers": {"registers": registers}}
    whole = dv.denoise_image(backbone, photo, method="subtract", artifact="none", size=(96, 96)).raw
    image = normalised(photo, backbone, (96, 96))
    for method, given in made.items():
        result = dv.denoise_image(backbone, photo, method=method, size=(96, 96), **given)
        expected = subspace(whole) if method == "project" else with_registers(backbone, registers)(image)[0]
        torch.testing.assert_close(result.semantic, expected, rtol=1e-4, atol=1e-4)
    cleaners = Cleaners(subspace=tmp_path / "subspace.safetensors", registers=registers)
    shown = PhotoExtractor(backbone, ["raw", "project", "registers"], cleaners, DenoiseOptions(size=(96, 96)))(photo)
    for method in made:
        wanted = dv.denoise_image(backbone, photo, method=method, size=(96, 96), **made[method]).semantic
        assert torch.equal(shown.found[method].semantic, wanted)
    with pytest.raises(dv.PlanError, match="a subspace is given, but method 'average' does not use it"):
        dv.denoise_image(backbone, photo, method="average", size=(96, 96), subspace=subspace)


def test_subtract_rejects_the_artifact_none(tiny_vit: Backbone) -> None:
    with pytest.raises(dv.PlanError, match="subtract needs an artifact as a file or an Artifact"):
        Cleaners(artifact="none").extractor("subtract", tiny_vit)


def test_a_projection_is_exported(tiny_vit: Backbone, tmp_path: Path) -> None:
    shallow = tiny_export.shallow()
    extractor = dv.DenoisedViT(shallow, find_subspace(shallow, rank=4, size=(96, 96)))
    image = torch.randn(1, 3, 64, 96)
    dv.export_extractor(extractor, tmp_path / "program", format_of("program"))
    again = torch.export.load(tmp_path / "program" / "model.pt2").module()(image)
    torch.testing.assert_close(again, extractor(image), rtol=0, atol=1e-4)
    extractor = dv.DenoisedViT(tiny_vit, find_subspace(tiny_vit, rank=4, size=(96, 96)))
    assert "without their positional directions" in (tmp_path / "program" / "README.md").read_text()
    dv.export_extractor(extractor, tmp_path / "file", format_of("safetensors"))
    loaded = dv.load_extractor(tmp_path / "file", device="cpu", dtype="float32")
    torch.testing.assert_close(loaded(image), extractor(image))
    half = copy.deepcopy(extractor).to(torch.bfloat16)
    assert half.subspace is not None and half.subspace.directions.dtype == torch.float32
    assert repr(half).count("without 4 positional directions") == 1


def test_registers_are_exported_as_a_graph_only(
    backbone: Backbone, photos: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    clean = with_registers(backbone, find_registers(backbone, photos[0], size=(96, 96)))
    with pytest.raises(dv.ExportError, match="no test-time registers; use onnx or program"):
        dv.export_extractor(clean, tmp_path / "timm", format_of("timm"))
    dv.export_extractor(clean, tmp_path / "program", format_of("program"))
    again = torch.export.load(tmp_path / "program" / "model.pt2").module()(photos[0][:1])
    torch.testing.assert_close(again, clean(photos[0][:1]), rtol=0, atol=1e-3)


def format_of(name: Any) -> dv.ExportOptions:
    return dv.ExportOptions(format=name)


# --- average


def test_moves_by_hand() -> None:
    assert moves(4, (16, 8)) == [(0, 0, False), (0, 0, True), (2, 1, False), (-2, -1, True)]
    assert len(moves(10, (3, 3))) == 10
    for wrong in (1, 11):
        with pytest.raises(dv.PlanError, match="passes must be 2 to 10"):
            moves(wrong, (4, 4))


def test_moved_pixels_by_hand() -> None:
    image = torch.arange(6.0).view(1, 1, 2, 3).expand(1, 3, 2, 3)
    assert moved(image, (0, 1, False), 1)[0, 0].tolist() == [[0, 0, 1], [3, 3, 4]]
    assert moved(image, (-1, 0, True), 1)[0, 0].tolist() == [[5, 4, 3], [5, 4, 3]]


def test_each_place_is_the_mean_of_the_passes_that_show_it() -> None:
    first, second = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[9.0, 10.0, 20.0]])
    # Moved right by one: places 0 and 1 are seen at 1 and 2; place 2 is seen by the first pass only.
    mean = aligned_mean([first.view(1, 1, 3, 1), second.view(1, 1, 3, 1)], [(0, 0, False), (0, 1, False)])
    assert mean.flatten().tolist() == [5.5, 11.0, 3.0]


@pytest.mark.parametrize("passes", [2, 5, 10])
def test_averaging_keeps_content_and_reduces_the_artifact(passes: int) -> None:
    pool = nn.AvgPool2d(8)
    image = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    local = dv.load_backbone(lambda image: pool(image), patch_size=8, default_size=40)
    torch.testing.assert_close(AveragedViT(local, passes)(image), local(image))
    artifact = torch.arange(7.0) ** 2
    dirty = dv.load_backbone(lambda image: pool(image) + torch.arange(image.shape[3] // 8) ** 2.0, patch_size=8)
    if passes == 2:
        expected = local(image) + ((artifact + artifact.flip(0)) / 2)[:, None]
        torch.testing.assert_close(AveragedViT(dirty, 2)(image), expected)
    found = AveragedViT(dirty, passes).forward_with_prefix(image)
    assert (found[0] - local(image)).var() < (dirty(image) - local(image)).var()
    assert found[1].shape == (2, 0, 3)


# --- registers


def test_activations_are_moved_to_the_last_token() -> None:
    hidden = torch.tensor([[[1.0, 5.0], [-7.0, 2.0], [0.0, 0.0]]])
    (shifted,) = _Shift([0])(nn.Identity(), (hidden,))
    assert shifted.tolist() == [[[0.0, 5.0], [0.0, 2.0], [-7.0, 0.0]]]


BLOCK, NEURON = 1, 5


def outlying(image: Tensor, white: Tensor) -> Any:
    """A ViT in which one neuron adds a vector of large norm at white patches."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"img_size": 96, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 0}
    model = cast(Any, timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **shape).eval())
    mlp, seen = model.blocks[BLOCK].mlp, []
    handle = mlp.fc1.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.forward_features(image)
        handle.remove()
        tokens = seen[0][:, 1:]  # (N, h w, C)
        at, elsewhere = tokens[white].mean(0), tokens[~white].mean(0)
        way = at - elsewhere
        mlp.fc1.weight[NEURON] = 40 * way / way.square().sum()
        mlp.fc1.bias[NEURON] = -40 * float((at + elsewhere) @ way / 2 / way.square().sum())
        mlp.fc2.weight[:, NEURON] = 10 * torch.randn(64)
    return model


@pytest.fixture(scope="module")
def photos() -> tuple[Tensor, Tensor]:
    """Noise with white patches, (N, 3, 96, 96), and the mask of these patches, (N, 36)."""
    chance = torch.Generator().manual_seed(0)
    image = torch.randn(6, 3, 96, 96, generator=chance) * 0.3 - 1
    white = torch.zeros(6, 36, dtype=torch.bool)
    for number, places in enumerate([(3, 20), (7,), (30, 11), (0,), (16, 17), (25,)]):
        for place in places:
            row, column = divmod(place, 6)
            image[number, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 2
            white[number, place] = True
    return image, white


@pytest.fixture(scope="module")
def backbone(photos: tuple[Tensor, Tensor]) -> Backbone:
    return dv.load_backbone(outlying(*photos), device="cpu", dtype="float32", norm=False)


def norms(backbone: Backbone, image: Tensor) -> Tensor:
    return backbone(image).norm(dim=-1).flatten(1)


def test_planted_neuron_is_found_and_its_outliers_are_removed(
    backbone: Backbone, photos: tuple[Tensor, Tensor]
) -> None:
    image, white = photos
    before = norms(backbone, image)
    assert before[white].min() > 3 * before[~white].max()
    found = find_registers(backbone, image, size=(96, 96))
    assert found.neurons == ((BLOCK, NEURON),)
    assert found.info["before"] == pytest.approx(float(white.float().mean()))
    assert found.info["after"] == 0
    assert str(found) == "1 register neurons in 1 blocks"
    clean = with_registers(backbone, found)
    features, prefix = clean.forward_with_prefix(image)
    assert features.shape == (6, 6, 6, 64)
    assert prefix.shape == (6, 1, 64)
    assert features.norm(dim=-1).max() < 2 * before[~white].median()
    torch.testing.assert_close(norms(backbone, image), before)  # the backbone is unchanged
    wide = torch.cat([image[:1], image[1:2]], dim=3)
    assert clean(wide).shape == (1, 6, 12, 64)


def test_cleaning_a_model_with_registers(photos: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    image, _ = photos
    model = outlying(*photos)
    found = find_registers(dv.load_backbone(copy.deepcopy(model), device="cpu", dtype="float32"), image, size=(96, 96))
    found.save(tmp_path / "registers.safetensors")
    again = Registers.load(tmp_path / "registers.safetensors")
    assert (again.neurons, again.info) == (found.neurons, found.info)
    raw, keys = model.forward_features(image), list(model.state_dict())
    dv.clean(model, "registers", registers=tmp_path / "registers.safetensors")
    clean = model.forward_features(image)
    assert clean.shape == raw.shape
    assert list(model.state_dict()) == keys
    expected = with_registers(dv.load_backbone(outlying(*photos), device="cpu", dtype="float32"), found)(image)
    torch.testing.assert_close(clean[:, 1:], expected.flatten(1, 2))
    final, (grid,) = model.forward_intermediates(image, 1, norm=True)
    torch.testing.assert_close(final, clean)
    torch.testing.assert_close(grid.permute(0, 2, 3, 1), expected)
    torch.testing.assert_close(copy.deepcopy(model).forward_features(image), clean)
    program = torch.export.export(_Features(model), (image,))
    torch.testing.assert_close(program.module()(image), clean)
    torch.testing.assert_close(torch.compile(_Features(model), backend="eager", fullgraph=True)(image), clean)
    torch.testing.assert_close(dv.restore(model).forward_features(image), raw)


class _Features(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model.forward_features(image)


def test_model_without_outliers_is_unchanged() -> None:
    torch.manual_seed(0)
    model = cast(Any, timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0, img_size=96).eval())
    image = torch.randn(4, 3, 96, 96)
    raw, before = model.forward_features(image), repr(model)
    with pytest.warns(dv.errors.DenoisingVitWarning, match="too few to need a register"):
        dv.clean(model, "registers", photos=image, size=(96, 96))
    assert repr(model) == before
    assert torch.equal(model.forward_features(image), raw)
    backbone = dv.load_backbone(model, device="cpu", dtype="float32")
    assert with_registers(backbone, Registers((), describe(backbone))) is backbone


def test_registers_need_a_plain_vit() -> None:
    model = timm.create_model("vit_small_patch16_dinov3", depth=1, num_classes=0, dynamic_img_size=True)
    with pytest.raises(dv.BackboneError, match="need a timm VisionTransformer"):
        dv.clean(model, "registers", photos=torch.randn(1, 3, 64, 64), size=(64, 64))


def test_no_more_photos_are_read_than_used(tiny_vit: Backbone) -> None:
    read = []

    def photos() -> Iterator[np.ndarray]:
        for number in range(5):
            read.append(number)
            yield planted.photos(1)[0]

    assert len(photo_images(photos(), tiny_vit, (48, 48), most=2)) == 2
    assert read == [0, 1]


def test_registers_inside_a_denoised_vit_are_detected(tiny_vit: Backbone) -> None:
    changed = with_registers(tiny_vit, Registers(((0, 3),), describe(tiny_vit), {}))
    subspace = Subspace(torch.eye(tiny_vit.embed_dim)[:1], describe(changed))
    assert has_registers(changed) and has_registers(dv.DenoisedViT(changed, subspace))
    assert not has_registers(tiny_vit)


def test_subspace_is_copied_to_the_device_of_the_backbone() -> None:
    backbone = planted.backbone()
    subspace = Subspace(torch.eye(backbone.embed_dim)[:1], describe(backbone))
    extractor = dv.DenoisedViT(backbone.to("meta"), subspace)
    assert extractor.subspace is not None and extractor.subspace.directions.device.type == "meta"
    assert subspace.directions.device.type == "cpu"
