"""DenoisedViT: the backbone minus its artifact, or with its denoiser, with the same interface."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import denoising_vit as dv
import tiny_artifact as tiny
from denoising_vit import Artifact, ArtifactError, Backbone, DenoisedViT, Denoiser, DenoiserError, SizeError
from denoising_vit.backbones.recorded import describe
from denoising_vit.views.sampling import sinusoidal_positions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


@pytest.fixture(scope="module")
def artifact(backbone: Backbone) -> Artifact:
    return tiny.artifact_of(backbone)


@pytest.fixture
def extractor(backbone: Backbone, artifact: Artifact) -> DenoisedViT:
    return DenoisedViT(backbone, artifact)


def images(*shape: int, seed: int = 0) -> Tensor:
    """(B, 3, H, W)."""
    batch, height, width = shape
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [1, 3])
def test_features_are_backbone_features_minus_the_artifact(
    extractor: DenoisedViT, backbone: Backbone, artifact: Artifact, batch: int
) -> None:
    image = images(batch, 56, 56)
    assert torch.equal(extractor(image), backbone(image) - artifact.values)


@pytest.mark.parametrize("size", [(88, 88), (40, 72), (8, 104)], ids=str)
def test_artifact_is_resampled_for_other_sizes(
    extractor: DenoisedViT, backbone: Backbone, artifact: Artifact, size: tuple[int, int]
) -> None:
    image = images(2, *size)
    expected = backbone(image) - artifact.at((size[0] // 8, size[1] // 8))
    assert torch.equal(extractor(image), expected)


def test_sizes_may_alternate(extractor: DenoisedViT, backbone: Backbone, artifact: Artifact) -> None:
    for height, width in ((56, 56), (40, 72), (72, 40), (56, 56)):
        image = images(1, height, width)
        assert torch.equal(extractor(image), backbone(image) - artifact.at((height // 8, width // 8)))


class Interrupted(DenoisedViT):
    """Lets other threads run whenever a new value is cached."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_kept":
            time.sleep(0.0001)


def test_threads_with_different_sizes_do_not_interfere(backbone: Backbone, artifact: Artifact) -> None:
    extractor = Interrupted(backbone, artifact, positions=0.5)
    grids = [(2 + side, 7) for side in range(4)]
    places = {grid: 0.5 * sinusoidal_positions(grid, 6) - artifact.at(grid) for grid in grids}

    def wrong(grid: tuple[int, int]) -> int:
        found = [extractor.clean(torch.zeros(1, *grid, 6)) for _ in range(50)]
        return sum(not torch.equal(features[0], places[grid]) for features in found)

    with ThreadPoolExecutor(len(grids)) as pool:
        assert list(pool.map(wrong, grids)) == [0, 0, 0, 0]


@pytest.mark.parametrize("size", [(56, 56), (40, 72)], ids=str)
def test_known_artifact_leaves_clean_features(extractor: DenoisedViT, size: tuple[int, int]) -> None:
    image = images(2, *size)
    planted = tiny.pattern(size[0] // 8, size[1] // 8).square().mean().sqrt()
    left = (extractor(image) - tiny.backbone(0.0)(image)).square().mean().sqrt()
    assert float(left) < 0.05 * float(planted)


def test_calibrated_artifact_leaves_nearly_clean_features(backbone: Backbone) -> None:
    extractor = DenoisedViT(backbone, dv.calibrate(backbone, tiny.photos(16)))
    image = images(2, 56, 56, seed=5)
    left = (extractor(image) - tiny.backbone(0.0)(image)).norm()
    assert float(left) < 0.15 * float((backbone(image) - tiny.backbone(0.0)(image)).norm())


def test_prefix_tokens_are_unchanged() -> None:
    module = tiny.Planted()

    def with_prefix(image: Tensor) -> Tensor:
        tokens = module(image).flatten(1, 2)
        return torch.cat([image.mean((2, 3)).repeat(1, 2)[:, None] + torch.arange(3.0)[None, :, None], tokens], dim=1)

    backbone = tiny.plain(with_prefix)
    artifact = tiny.artifact_of(backbone)
    image = images(2, 40, 72)
    features, prefix = DenoisedViT(backbone, artifact).forward_with_prefix(image)
    raw, expected = backbone.forward_with_prefix(image)
    assert prefix.shape == (2, 3, 6)
    assert torch.equal(prefix, expected)
    assert torch.equal(features, raw - artifact.at((5, 9)))


@pytest.mark.parametrize("other", [{"seed": 1}, {"stride": 4}, {"channels": 9}], ids=str)
def test_artifact_of_another_backbone_is_refused(artifact: Artifact, other: dict[str, int]) -> None:
    with pytest.raises(ArtifactError, match="calibrated for Planted"):
        DenoisedViT(tiny.backbone(stride=other.pop("stride", 8), **other), artifact)


def test_size_off_the_patch_grid_is_refused(extractor: DenoisedViT) -> None:
    with pytest.raises(SizeError, match="Nearest: 56 or 64"):
        extractor(images(1, 60, 56))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_float32_for_any_backbone_dtype(artifact: Artifact, dtype: torch.dtype) -> None:
    backbone = tiny.backbone().to(dtype=dtype)
    found = DenoisedViT(backbone, artifact)(images(1, 56, 56))
    assert found.dtype == torch.float32
    assert torch.equal(found, backbone(images(1, 56, 56)) - artifact.values)


def test_whole_extractor_can_be_converted_after_it_was_used(artifact: Artifact) -> None:
    extractor = DenoisedViT(tiny.backbone(), artifact)
    before = extractor(images(1, 56, 56))
    after = extractor.to(torch.bfloat16)(images(1, 56, 56))
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)


def test_artifact_follows_the_features_to_another_device(artifact: Artifact) -> None:
    extractor = DenoisedViT(tiny.backbone(), artifact)
    image = images(1, 56, 56)
    here = extractor(image)  # the term cached for this size is on the CPU now
    assert copy.deepcopy(extractor).to("meta")(image).device.type == "meta"
    assert torch.equal(extractor(image), here)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_artifact_follows_the_features_to_a_gpu_and_back(artifact: Artifact) -> None:
    extractor = DenoisedViT(tiny.backbone(), artifact)
    image = images(1, 56, 56)
    here = extractor(image)
    there = extractor.to("cuda")(image)
    assert there.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), here, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(extractor.to("cpu")(image), here)


def test_image_gradient_matches_that_of_the_backbone(extractor: DenoisedViT, backbone: Backbone) -> None:
    image, same = images(1, 40, 72).requires_grad_(), images(1, 40, 72).requires_grad_()
    weights = torch.randn(1, 5, 9, 6, generator=torch.Generator().manual_seed(1))
    (extractor(image) * weights).sum().backward()
    (backbone(same) * weights).sum().backward()
    assert image.grad is not None and same.grad is not None
    assert torch.equal(image.grad, same.grad)
    assert float(image.grad.abs().max()) > 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_work_after_use_without_gradients(extractor: DenoisedViT, context: type[torch.no_grad]) -> None:
    with context():
        assert not extractor(images(1, 40, 72)).requires_grad
    image = images(1, 40, 72).requires_grad_()
    extractor(image).square().sum().backward()
    assert image.grad is not None


def test_extractor_is_frozen_and_its_backbone_in_eval_mode(extractor: DenoisedViT) -> None:
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    assert not extractor.backbone.training


# --- with a denoiser ---


def denoiser_of(backbone: Backbone, grid: tuple[int, int] = (7, 7), seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    denoiser = Denoiser(backbone.embed_dim, grid, trained_for=describe(backbone)).requires_grad_(False).eval()
    denoiser.pos_embed.mul_(50)  # so that positions matter
    return denoiser


@pytest.fixture(scope="module")
def wide() -> Backbone:
    return tiny.backbone(channels=64)


@pytest.mark.parametrize("size", [(56, 56), (88, 88), (40, 72)], ids=str)
def test_features_are_denoised_backbone_features(wide: Backbone, size: tuple[int, int]) -> None:
    denoiser = denoiser_of(wide)
    image = images(2, *size)
    found = DenoisedViT(wide, denoiser)(image)
    assert found.shape == (2, size[0] // 8, size[1] // 8, 64)
    assert torch.equal(found, denoiser(wide(image)))
    assert not torch.allclose(found, wide(image), atol=0.1)


def test_denoiser_does_not_change_prefix_tokens() -> None:
    module = tiny.Planted(channels=64)

    def with_prefix(image: Tensor) -> Tensor:
        prefix = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 64) * image.mean((1, 2, 3))[:, None, None]
        return torch.cat([prefix, module(image).flatten(1, 2)], dim=1)

    backbone = tiny.plain(with_prefix)
    denoiser = denoiser_of(backbone)
    image = images(2, 40, 72)
    features, prefix = DenoisedViT(backbone, denoiser).forward_with_prefix(image)
    raw, expected = backbone.forward_with_prefix(image)
    assert prefix.shape == (2, 3, 64)
    assert torch.equal(prefix, expected)
    assert torch.equal(features, denoiser(raw))


def test_denoiser_of_other_weights_is_refused(wide: Backbone) -> None:
    with pytest.raises(DenoiserError, match=r"trained for Planted .*, got Planted"):
        DenoisedViT(tiny.backbone(channels=64, seed=1), denoiser_of(wide))


def test_denoiser_of_another_width_is_refused(backbone: Backbone, wide: Backbone) -> None:
    with pytest.raises(DenoiserError, match=r"denoiser has 64 channels, but Planted .* has 6\b"):
        DenoisedViT(backbone, denoiser_of(wide))


def test_denoiser_without_a_record_is_accepted_by_its_width(wide: Backbone) -> None:
    denoiser = denoiser_of(wide)
    denoiser.trained_for = None
    image = images(1, 56, 56)
    other = tiny.backbone(channels=64, seed=1)
    assert torch.equal(DenoisedViT(other, denoiser)(image), denoiser(other(image)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_denoised_features_are_float32_for_any_dtype(wide: Backbone, dtype: torch.dtype) -> None:
    image = images(1, 56, 56)
    expected = DenoisedViT(wide, denoiser_of(wide))(image)
    backbone = tiny.backbone(channels=64)
    found = DenoisedViT(backbone, denoiser_of(backbone)).to(dtype)(image)
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 0.03


def test_gradient_reaches_the_image_through_a_denoiser(wide: Backbone) -> None:
    image = images(1, 40, 72).requires_grad_()
    DenoisedViT(wide, denoiser_of(wide))(image).square().sum().backward()
    assert image.grad is not None and float(image.grad.abs().max()) > 0


def test_a_denoiser_moves_and_is_saved_with_the_extractor(wide: Backbone) -> None:
    extractor = DenoisedViT(wide, denoiser_of(wide))
    assert "denoiser.pos_embed" in extractor.state_dict()
    assert copy.deepcopy(extractor).to("meta")(images(1, 56, 56)).device.type == "meta"


# --- with position features ---


@pytest.mark.parametrize("size", [(56, 56), (40, 72)], ids=str)
def test_weighted_positions_are_added_to_clean_features(
    backbone: Backbone, wide: Backbone, artifact: Artifact, size: tuple[int, int]
) -> None:
    image, grid = images(2, *size), (size[0] // 8, size[1] // 8)
    for extractor, cleaner in ((backbone, artifact), (wide, denoiser_of(wide))):
        added = DenoisedViT(extractor, cleaner, positions=0.7)(image) - DenoisedViT(extractor, cleaner)(image)
        expected = 0.7 * sinusoidal_positions(grid, extractor.embed_dim)
        torch.testing.assert_close(added, expected.expand(2, -1, -1, -1), rtol=0, atol=1e-5)


def test_positions_follow_overlapping_patches() -> None:
    dense = tiny.backbone(channels=64, stride=4)
    image = images(1, 24, 40)
    added = DenoisedViT(dense, denoiser_of(dense), positions=1.0)(image) - denoiser_of(dense)(dense(image))
    # Five rows and nine columns, half a patch apart; the first channel is the sine of y.
    expected = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5]).sin()[:, None].expand(5, 9)
    torch.testing.assert_close(added[0, ..., 0], expected, rtol=0, atol=1e-5)


def test_zero_position_weight_changes_nothing(wide: Backbone) -> None:
    image = images(1, 40, 72)
    assert torch.equal(DenoisedViT(wide, denoiser_of(wide), positions=0.0)(image), denoiser_of(wide)(wide(image)))


def test_positions_are_independent_of_other_images(wide: Backbone) -> None:
    extractor = DenoisedViT(wide, denoiser_of(wide), positions=1.0)
    one, two = images(1, 40, 72), images(1, 40, 72, seed=1)
    expected = extractor(one)
    extractor(images(1, 72, 40))
    torch.testing.assert_close(extractor(torch.cat([two, 9 * two, one]))[2:], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", [-0.1, float("nan"), float("inf")])
def test_invalid_position_weights_are_refused(wide: Backbone, positions: float) -> None:
    with pytest.raises(ValueError, match=rf"finite weight of at least 0, got {positions}"):
        DenoisedViT(wide, denoiser_of(wide), positions=positions)


def test_positions_with_too_few_channels_are_refused() -> None:
    narrow = tiny.backbone(channels=3)
    artifact = tiny.artifact_of(narrow)
    assert DenoisedViT(narrow, artifact)(images(1, 56, 56)).shape == (1, 7, 7, 3)
    with pytest.raises(ValueError, match="at least 4 channels"):
        DenoisedViT(narrow, artifact, positions=1.0)


# --- moved, converted, compiled ---


def test_denoiser_is_moved_to_the_device_of_the_backbone() -> None:
    backbone = tiny.plain(nn.Conv2d(3, 64, 8, 8)).to("meta")
    extractor = DenoisedViT(backbone, Denoiser(64, (7, 7)), positions=1.0)
    assert extractor(images(1, 56, 56)).device.type == "meta"


def test_artifact_and_positions_move_with_the_extractor_in_float32(artifact: Artifact) -> None:
    extractor = DenoisedViT(tiny.backbone(), artifact, positions=1.0).to(torch.bfloat16)
    assert extractor.artifact is not None and torch.equal(extractor.artifact.values, artifact.values)
    expected = extractor.backbone(images(1, 56, 56)) - artifact.values + sinusoidal_positions((7, 7), 6)
    torch.testing.assert_close(extractor(images(1, 56, 56)), expected, rtol=0, atol=1e-6)
    moved = extractor.to("meta")
    assert moved.artifact is not None and moved.artifact.values.device.type == "meta"
    assert artifact.values.device.type == "cpu"  # the caller's artifact stays


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpu_features_are_float32_and_match_the_cpu(dtype: Literal["float32", "bfloat16"]) -> None:
    here = dv.load_backbone("test_vit", weights="random", dtype="float32", device="cpu")
    there = dv.load_backbone("test_vit", weights="random", dtype=dtype, device="cuda")
    image = images(2, 48, 80)
    for cleaners in ((denoiser_of(here), denoiser_of(here).to(dtype=there.dtype)), (tiny.artifact_of(here),) * 2):
        expected = DenoisedViT(here, cleaners[0], positions=0.5).forward_intermediates(image, [2])
        found = DenoisedViT(there, cleaners[1], positions=0.5).forward_intermediates(image, [2])
        for part, truth in ((found.features, expected.features), (found.layers[0], expected.layers[0])):
            assert part.device.type == "cuda" and part.dtype == torch.float32
            assert float((part.cpu() - truth).norm() / truth.norm()) < 0.03


class Counting:
    """A compiler backend that runs graphs unchanged and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def extractors() -> dict[str, Callable[[], DenoisedViT]]:
    def module() -> Backbone:
        torch.manual_seed(0)
        return tiny.plain(nn.Conv2d(3, 64, 8, 8))

    def timm(stride: int = 16) -> Backbone:
        # Its first block alone is quick to compile.
        return dv.load_backbone("test_vit", weights="random", dtype="float32", device="cpu", layer=0, stride=stride)

    return {
        "denoiser": lambda: DenoisedViT(timm(), denoiser_of(timm())),
        "denoiser, overlapping patches, positions": lambda: DenoisedViT(
            timm(stride=8), denoiser_of(timm(stride=8)), positions=0.5
        ),
        "artifact": lambda: DenoisedViT(module(), tiny.artifact_of(module())),
        "artifact, positions": lambda: DenoisedViT(module(), tiny.artifact_of(module()), positions=0.5),
    }


@pytest.mark.parametrize("which", extractors())
def test_compiled_extractor_matches_without_recompiling(which: str) -> None:
    extractor = extractors()[which]()
    expected = {size: extractor(images(2, *size)) for size in ((48, 64), (80, 112))}
    torch.compiler.reset()
    compiler = Counting()
    extractor.compile(backend=compiler, fullgraph=True)
    for size in ((48, 64), (80, 112)):
        torch.testing.assert_close(extractor(images(2, *size)), expected[size])
    graphs = compiler.graphs
    assert 1 <= graphs <= 2
    for size in ((48, 64), (80, 112)) * 2:  # alternating, so that the cached term would change at each call
        extractor.forward(images(1, 64, 48))  # not compiled: caches the term of another size
        torch.testing.assert_close(extractor(images(2, *size)), expected[size])
    assert compiler.graphs == graphs


def test_aot_eager_compiler_gives_the_same_features() -> None:
    extractor = extractors()["artifact, positions"]()
    torch.compiler.reset()
    compiled = torch.compile(extractor, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images(2, 40, 72)), extractor(images(2, 40, 72)))


def test_forward_intermediates_can_be_compiled() -> None:
    extractor = extractors()["denoiser"]()
    torch.compiler.reset()
    compiled = torch.compile(extractor.forward_intermediates, backend="eager", fullgraph=True)
    found, expected = (run(images(1, 48, 64), [1, -2]) for run in (compiled, extractor.forward_intermediates))
    torch.testing.assert_close(found.features, expected.features)
    torch.testing.assert_close(found.layers, expected.layers)


def test_bfloat16_stays_close_to_float32() -> None:
    """448 x 448 pixels have enough tokens for the blocked attention."""
    exact = extractors()["denoiser"]()
    image = images(1, 448, 448)
    low = copy.deepcopy(exact).to(torch.bfloat16)
    assert low.denoiser is not None and low.denoiser.pos_embed.dtype == low.backbone.dtype == torch.bfloat16
    with torch.inference_mode():
        found, expected = low(image), exact(image)
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 0.03
