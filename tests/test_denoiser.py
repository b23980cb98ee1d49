"""The one-pass denoiser: its output for published weights against a plain computation, and other properties."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from denoising_vit import Denoiser, load_denoiser
from denoising_vit.backbones.passes import BlockedAttention
from denoising_vit.denoiser import module as denoiser_module

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, Tensor]

LAYERS = {"norm1": (1,), "attn.qkv": (3, 1), "attn.proj": (1, 1), "norm2": (1,), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}


def chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=chance(seed))


def names(blocks: int) -> list[str]:
    """Prefix of the layers' names for each block."""
    return ["denoiser."] if blocks == 1 else [f"denoiser.{number}." for number in range(blocks)]


def published_state(channels: int, places: int, blocks: int = 1, seed: int = 0) -> State:
    """The tensors of a published checkpoint, with random values."""
    source = chance(seed)
    state = {"pos_embed": torch.randn(1, places, channels, generator=source) * 0.5}
    for before in names(blocks):
        for layer, sides in LAYERS.items():
            shape = tuple(side * channels for side in sides)
            weight = torch.randn(shape, generator=source)
            state[f"{before}{layer}.weight"] = 1 + 0.2 * weight if len(shape) == 1 else weight * shape[1] ** -0.5
            state[f"{before}{layer}.bias"] = torch.randn(shape[0], generator=source) * 0.2
    return state


def by_hand(state: State, features: Tensor, position: Tensor | None = None) -> Tensor:
    """(B, h, w, C) -> (B, h, w, C) in float64, written from the paper; no code of the package."""
    state = {name: value.double() for name, value in state.items()}
    batch, h, w, channels = features.shape
    position = state["pos_embed"] if position is None else position.double()
    x = features.double().reshape(batch, h * w, channels) + position  # (B, h, w, C) -> (B, h w, C)
    blocks = len([name for name in state if name.endswith("norm1.weight")])
    for before in names(blocks):
        own = {name.removeprefix(before): value for name, value in state.items() if name.startswith(before)}
        qkv = normed(x, own, "norm1") @ own["attn.qkv.weight"].T + own["attn.qkv.bias"]
        heads = []
        for head in range(channels // 64):
            at = [slice(part * channels + head * 64, part * channels + (head + 1) * 64) for part in range(3)]
            query, key, value = (qkv[..., here] for here in at)
            scores = query @ key.transpose(1, 2) / 8  # the root of 64
            shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
            heads.append(shares @ value)
        x = x + torch.cat(heads, -1) @ own["attn.proj.weight"].T + own["attn.proj.bias"]
        hidden = normed(x, own, "norm2") @ own["mlp.fc1.weight"].T + own["mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + hidden @ own["mlp.fc2.weight"].T + own["mlp.fc2.bias"]
    return x.reshape(batch, h, w, channels)  # (B, h w, C) -> (B, h, w, C)


def normed(x: Tensor, own: State, layer: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * own[f"{layer}.weight"] + own[f"{layer}.bias"]


def assert_by_hand(found: Tensor, state: State, features: Tensor, position: Tensor | None = None) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand(state, features, position).float(), rtol=1e-4, atol=2e-5)


def filled(channels: int = 64, grid: tuple[int, int] = (5, 3), blocks: int = 1, seed: int = 0) -> Denoiser:
    """A frozen denoiser in which the values of all tensors matter."""
    denoiser = Denoiser(channels, grid, blocks)
    denoiser.load_state_dict(published_state(channels, grid[0] * grid[1], blocks, seed))
    return denoiser.requires_grad_(False).eval()


# Output, for each layout of published checkpoints


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("layout", ["alone", "with optimizer", "with the backbone", "bare"])
@pytest.mark.parametrize("channels", [64, 128, 384])
def test_published_checkpoints_match_the_paper(channels: int, layout: str, blocks: int, tmp_path: Path) -> None:
    state = published_state(channels, 25, blocks)
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}
    vit = {"vit.cls_token": torch.ones(1, 1, 8), "vit.model.patch_embed.proj.weight": torch.ones(8, 3, 2, 2)}
    content: dict[str, object] = {
        "alone": {"denoiser": state},
        "with optimizer": {"denoiser": state, "optimizer": optimizer, "step": 50_000},
        "with the backbone": {"denoiser": vit | state, "step": 3},
        "bare": dict(state),
    }
    path = tmp_path / "published.pth"
    torch.save(content[layout], path)
    denoiser = load_denoiser(path)
    assert (denoiser.embed_dim, denoiser.grid, denoiser.blocks) == (channels, (5, 5), blocks)
    features = features_of(2, 5, 5, channels)
    assert_by_hand(denoiser(features), state, features)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_parameters_are_named_and_shaped_as_published(blocks: int) -> None:
    expected = {name: value.shape for name, value in published_state(128, 15, blocks).items()}
    assert {name: value.shape for name, value in Denoiser(128, (5, 3), blocks).state_dict().items()} == expected


def test_norms_use_an_epsilon_of_1e_6() -> None:
    """Not the 1e-5 of torch; the difference shows for small features."""
    state = published_state(64, 15)
    state["pos_embed"] *= 1e-3
    denoiser = filled()
    denoiser.load_state_dict(state)
    features = features_of(1, 5, 3, 64) * 1e-3
    assert_by_hand(denoiser(features), state, features)


def test_block_has_no_residual_or_norm_around_it() -> None:
    """Residual connections are inside the block only, so features that it cancels do not return."""
    state = {name: torch.zeros_like(value) for name, value in published_state(64, 15).items()}
    denoiser = filled()
    denoiser.load_state_dict(state)
    features = features_of(1, 5, 3, 64)
    assert torch.equal(denoiser(features), features)  # neither doubled by an outer residual nor normalised


# Grids


@pytest.mark.parametrize("grid", [(7, 7), (3, 11), (11, 3), (1, 1), (4, 5)], ids=str)
def test_position_is_resampled_to_other_grids_as_timm_does(grid: tuple[int, int]) -> None:
    state = published_state(64, 25)
    denoiser = filled(grid=(5, 5))
    position = resample_abs_pos_embed(state["pos_embed"], list(grid), old_size=[5, 5], num_prefix_tokens=0)
    features = features_of(2, *grid, 64)
    assert_by_hand(denoiser(features), state, features, position)


@pytest.mark.parametrize("grid", [(8, 6), (3, 5), (7, 2), (15, 1)], ids=str)
def test_position_of_a_non_square_grid_is_resampled_from_its_shape(grid: tuple[int, int]) -> None:
    denoiser = filled(grid=(5, 3))
    planes = denoiser.pos_embed.detach().unflatten(1, (5, 3)).movedim(-1, 1)  # (1, h w, C) -> (1, C, h, w)
    resampled = F.interpolate(planes, grid, mode="bicubic", antialias=True)
    expected = resampled.flatten(2).transpose(1, 2)  # (1, C, h, w) -> (1, h w, C)
    torch.testing.assert_close(denoiser.position(*grid), expected, rtol=1e-5, atol=1e-5)
    features = features_of(1, *grid, 64)
    assert_by_hand(denoiser(features), published_state(64, 15), features, expected)


def test_position_of_its_own_grid_is_not_resampled() -> None:
    denoiser = filled(grid=(5, 3))
    assert torch.equal(denoiser.position(5, 3), denoiser.pos_embed)
    assert denoiser.position(3, 5).shape == (1, 15, 64)
    assert not torch.allclose(denoiser.position(3, 5), denoiser.pos_embed)


def test_rows_of_the_grid_run_down() -> None:
    denoiser = filled(grid=(5, 3))
    down = torch.arange(5.0)[:, None].expand(5, 3).reshape(1, 15, 1).expand(1, 15, 64)  # (h, w) -> (1, h w, C)
    denoiser.pos_embed.data = down.contiguous()
    position = denoiser.position(10, 6).unflatten(1, (10, 6))[0, ..., 0]
    assert bool((position.diff(dim=0) > 0).all())
    assert float(position.diff(dim=1).abs().max()) < 1e-5


# Precision


@pytest.mark.parametrize("blocks", [1, 2])
def test_bfloat16_is_close_to_float32_and_uses_fast_attention(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    class Counted(BlockedAttention):
        def __init__(self) -> None:
            super().__init__()
            used.append(1)

    monkeypatch.setattr(denoiser_module, "BlockedAttention", Counted)
    denoiser = filled(128, (17, 19), blocks)
    features = features_of(2, 17, 19, 128)  # more tokens than the fast attention requires
    with torch.no_grad():
        expected = denoiser(features)
        assert not used
        found = copy.deepcopy(denoiser).bfloat16()(features)
    assert used
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_output_is_float32_for_any_input_precision(dtype: torch.dtype) -> None:
    denoiser = filled()
    features = features_of(1, 5, 3, 64).to(dtype)
    found = denoiser(features)
    assert found.dtype == torch.float32
    assert_by_hand(found, published_state(64, 15), features.float())


# Gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(5, 3), (17, 19)], ids=str)
def test_gradients_reach_every_parameter(grid: tuple[int, int], dtype: torch.dtype) -> None:
    """With many tokens in bfloat16, the fast attention would block them."""
    features, aim = features_of(2, *grid, 128), features_of(2, *grid, 128, seed=1)

    def gradients(precision: torch.dtype) -> State:
        denoiser = filled(128, grid).to(precision).train().requires_grad_(True)
        (denoiser(features) - aim).square().mean().backward()
        grads = {name: value.grad for name, value in denoiser.named_parameters()}
        assert all(grad is not None and bool(grad.abs().max() > 0) for grad in grads.values())
        return {name: grad.float() for name, grad in grads.items() if grad is not None}

    found, expected = gradients(dtype), gradients(torch.float32)
    for name, grad in found.items():
        alike = F.cosine_similarity(grad.flatten(), expected[name].flatten(), dim=0)
        assert float(alike) > 0.98, name


def test_gradients_of_a_frozen_denoiser_reach_the_features() -> None:
    features = features_of(1, 17, 19, 64).requires_grad_()
    filled(64, (17, 19)).bfloat16()(features).square().sum().backward()
    assert features.grad is not None and bool((features.grad.abs().amax(-1) > 0).all())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_does_not_prevent_later_training(context: type[torch.no_grad]) -> None:
    denoiser = filled(64, (17, 19)).bfloat16()
    with context():
        assert not denoiser(features_of(1, 20, 17, 64)).requires_grad
    denoiser.requires_grad_(True)
    denoiser(features_of(1, 20, 17, 64)).sum().backward()
    assert denoiser.pos_embed.grad is not None


def test_gradients_reach_a_resampled_position() -> None:
    denoiser = filled().requires_grad_(True)
    denoiser(features_of(1, 8, 4, 64)).square().sum().backward()
    assert denoiser.pos_embed.grad is not None
    assert bool((denoiser.pos_embed.grad.abs().sum(-1) > 0).all())


# Other properties


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_of_a_batch_are_independent(dtype: torch.dtype) -> None:
    denoiser = filled(128, (17, 16)).to(dtype)
    features = features_of(3, 17, 16, 128)
    with torch.no_grad():
        together = denoiser(features)
        alone = torch.cat([denoiser(one[None]) for one in features])
    error = float((together - alone).norm() / alone.norm())
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)
    assert not torch.allclose(together[0], together[1], atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_deterministic_and_input_unchanged(dtype: torch.dtype) -> None:
    denoiser = filled(64, (17, 16)).to(dtype)
    features = features_of(2, 17, 16, 64).to(dtype)
    before = features.clone()
    with torch.no_grad():
        first = denoiser(features)
        denoiser(features_of(1, 20, 20, 64))
        assert torch.equal(denoiser(features), first)
    assert torch.equal(features, before)


def test_features_need_not_be_contiguous() -> None:
    denoiser = filled()
    features = features_of(2, 64, 5, 3).permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)
    assert torch.equal(denoiser(features), denoiser(features.contiguous()))


def test_new_denoiser_has_small_positions_and_a_descriptive_repr() -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(64, (37, 37))
    assert float(denoiser.pos_embed.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert all(value.requires_grad for value in denoiser.parameters())
    assert "C 64, grid 37 x 37, blocks 1" in repr(denoiser)
    assert (denoiser.trained_for, denoiser.info) == (None, {})


# Invalid input


@pytest.mark.parametrize(
    "shape", [(5, 3, 64), (1, 15, 64, 1, 1), (15, 64), (1, 5, 3, 65), (1, 5, 3, 128), (1, 64, 5, 3)], ids=str
)
def test_features_of_another_shape_are_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected features \(B, h, w, 64\), got \(") as caught:
        filled()(torch.zeros(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("channels", [0, 1, 63, 65, 100, -64])
def test_channels_must_be_a_multiple_of_64(channels: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 64 channels, got {channels}"):
        Denoiser(channels)


@pytest.mark.parametrize("blocks", [0, -1])
def test_fewer_than_one_block_is_rejected(blocks: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1 block, got {blocks}"):
        Denoiser(64, blocks=blocks)


@pytest.mark.parametrize("grid", [(0, 3), (3, 0), (-2, -3)], ids=str)
def test_empty_grid_is_rejected(grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="grid"):
        Denoiser(64, grid)
