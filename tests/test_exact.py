"""The exact solver against planted truths and a dense solve, and its guarantees."""

from __future__ import annotations

import math
from typing import Any, TypedDict, Unpack

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from denoising_vit.decomposition import exact
from denoising_vit.decomposition.exact import ExactSolver
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.statistics import Statistics
from denoising_vit.errors import PlanError
from denoising_vit.views.plan import ViewPlan

PATCH = 14


class Penalties(TypedDict):
    smoothness: float
    shrinkage: float


DEFAULT = Penalties(smoothness=DenoiseOptions().smoothness, shrinkage=DenoiseOptions().shrinkage)
EXACT = Penalties(smoothness=1e-8, shrinkage=1e-8)


def make_plan(views: int, grid: tuple[int, int] = (12, 12), **more: Any) -> ViewPlan:
    more = {"taper": DenoiseOptions().taper} | more
    return ViewPlan.make(views, size=(grid[0] * PATCH, grid[1] * PATCH), patch_size=PATCH, **more)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mean_free(artifact: Tensor) -> Tensor:
    return artifact - artifact.mean((0, 1))


def smooth_field(rows: int, columns: int) -> Tensor:
    """A few waves, (rows, columns, 4)."""
    y, x = torch.meshgrid(
        (torch.arange(rows, dtype=torch.float64) + 0.5) / rows,
        (torch.arange(columns, dtype=torch.float64) + 0.5) / columns,
        indexing="ij",
    )
    waves = [torch.sin(2 * math.pi * (a * x + b * y)) for a, b in ((1, 0), (0, 1), (1, 1), (2, -1))]
    return torch.stack(waves, dim=-1)


def views_of(plan: ViewPlan, field: Tensor, artifact: Tensor) -> Tensor:
    """Noise-free features, (V, h, w, C)."""
    wy, wx = plan.weights
    return torch.einsum("vyr,rsc,vxs->vyxc", wy, field, wx) + artifact


def fit(
    plan: ViewPlan, features: Tensor, *, offsets: bool = False, **penalties: Unpack[Penalties]
) -> tuple[Tensor, Tensor]:
    statistics = sums_of(plan, features)
    return ExactSolver(plan, offsets=offsets, **penalties).solve(statistics.b, statistics.g, statistics.s)


def sums_of(plan: ViewPlan, features: Tensor) -> Statistics:
    statistics = Statistics(plan, features.shape[-1])
    for batch in features.split(8):
        statistics.add(batch)
    return statistics


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def patch_weights(plan: ViewPlan) -> Tensor:
    """(V, h, w)."""
    rows, columns = plan.windows
    return rows[:, :, None] * columns[:, None, :]


def dense_normal_equations(plan: ViewPlan, smoothness: float, shrinkage: float) -> Tensor:
    """The whole system written out: unknowns are the nodes of F row by row, then the positions of G."""
    wy, wx = plan.weights
    h, w = plan.grid
    ry, rx = plan.resolution
    rows = [
        torch.cat([torch.kron(wy[v], wx[v]), torch.eye(h * w, dtype=torch.float64)], dim=1) for v in range(len(plan))
    ]
    design, weights = torch.cat(rows), patch_weights(plan).flatten()
    normal = design.T @ (weights[:, None] * design)
    field_index = torch.arange(ry * rx).view(ry, rx)
    pairs = [*zip(field_index[1:].flatten(), field_index[:-1].flatten(), strict=True)]
    pairs += [*zip(field_index[:, 1:].flatten(), field_index[:, :-1].flatten(), strict=True)]
    scale = smoothness * float(weights.sum()) / (ry * rx)
    for i, j in pairs:
        normal[i, i] += scale
        normal[j, j] += scale
        normal[i, j] -= scale
        normal[j, i] -= scale
    normal.diagonal()[ry * rx :] += shrinkage * float(weights.sum()) / (h * w)
    return normal


def with_offsets(normal: Tensor, plan: ViewPlan) -> Tensor:
    """The same system with one more unknown for each view, a constant."""
    wy, wx = plan.weights
    weights = patch_weights(plan)
    onto_field = torch.einsum("vyr,vyx,vxs->rsv", wy, weights, wx).flatten(0, 1)
    coupling = torch.cat([onto_field, weights.flatten(1).T])  # (unknowns, V)
    each = weights.sum((1, 2))
    penalised = torch.diag(each + exact._OFFSET_SHRINKAGE * each.mean())
    return torch.cat([torch.cat([normal, coupling], 1), torch.cat([coupling.T, penalised], 1)])


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize(
    "penalties", [DEFAULT, Penalties(smoothness=0.3, shrinkage=0.2), Penalties(smoothness=0.0, shrinkage=1e-6)]
)
@pytest.mark.parametrize("taper", [0.0, 0.3])
def test_equals_a_dense_solve(penalties: Penalties, taper: float, offsets: bool) -> None:
    plan = make_plan(24, grid=(5, 7), resolution=(11, 13), seed=3, taper=taper)
    features = noise(24, 5, 7, 3)
    field, artifact = fit(plan, features, offsets=offsets, **penalties)
    wy, wx = plan.weights
    weighed = features * patch_weights(plan)[..., None]
    b = torch.einsum("vyr,vyxc,vxs->rsc", wy, weighed, wx).flatten(0, 1)
    g = weighed.sum(0).flatten(0, 1)
    normal, right = dense_normal_equations(plan, **penalties), torch.cat([b, g])
    if offsets:
        normal, right = with_offsets(normal, plan), torch.cat([right, weighed.sum((1, 2))])
    truth = torch.linalg.solve(normal, right)
    assert error(field.flatten(0, 1), truth[: 11 * 13]) < 1e-7
    assert error(artifact.flatten(0, 1), truth[11 * 13 : 11 * 13 + 35]) < 1e-7


@pytest.mark.parametrize(("stride", "taper"), [(14, 0.0), (14, 0.3), (7, 0.3)])
def test_planted_field_and_artifact_are_recovered(stride: int, taper: float) -> None:
    plan = ViewPlan.make(64, size=(11 * PATCH, 13 * PATCH), patch_size=PATCH, stride=stride, taper=taper)
    field, artifact = noise(*plan.resolution, 3), mean_free(noise(*plan.grid, 3, seed=1))
    found_field, found_artifact = fit(plan, views_of(plan, field, artifact), **EXACT)
    assert error(found_field, field) < 1e-5
    assert error(found_artifact, artifact) < 1e-5


def test_default_penalties_barely_change_a_smooth_field() -> None:
    plan = make_plan(64, grid=(16, 16))
    field, artifact = smooth_field(*plan.resolution), 0.5 * mean_free(noise(*plan.grid, 4))
    found_field, found_artifact = fit(plan, views_of(plan, field, artifact), **DEFAULT)
    assert error(found_field, field) < 2e-2
    assert error(found_artifact, artifact) < 2e-2


def test_error_falls_with_the_square_root_of_views() -> None:
    counts = [64, 128, 256, 512, 1024]
    errors = []
    for views in counts:
        plan = make_plan(views, grid=(10, 10))
        field, artifact = smooth_field(*plan.resolution), mean_free(noise(*plan.grid, 4))
        features = views_of(plan, field, artifact)
        found, _ = fit(plan, features + noise(*features.shape, seed=views), **EXACT)
        errors.append(error(found, field))
    slope = torch.linalg.lstsq(
        torch.tensor([[math.log(views), 1.0] for views in counts]), torch.tensor(errors).log()[:, None]
    ).solution[0]
    assert -0.6 < float(slope) < -0.4


def checkerboard(h: int, w: int) -> Tensor:
    return ((torch.arange(h)[:, None] + torch.arange(w)) % 2).double() * 2 - 1


def stripes(h: int, w: int) -> Tensor:
    return ((torch.arange(w) // 2) % 2).double().expand(h, w) * 2 - 1


def hot_tokens(h: int, w: int) -> Tensor:
    hot = torch.zeros(h, w, dtype=torch.float64)
    hot[2, 3] = hot[h - 2, w - 4] = 20.0
    return hot


@pytest.mark.parametrize("pattern", [checkerboard, stripes, hot_tokens])
def test_patterns_fixed_to_the_view_move_into_the_artifact(pattern: Any) -> None:
    plan = make_plan(64, grid=(16, 16))
    content = smooth_field(*plan.resolution)
    direction = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    planted = mean_free(pattern(*plan.grid)[..., None] * direction)
    features = views_of(plan, content, planted) + 0.1 * noise(64, *plan.grid, 4)
    clean, _ = fit(plan, views_of(plan, content, torch.zeros_like(planted)), **DEFAULT)
    field, artifact = fit(plan, features, **DEFAULT)
    wy, wx = plan.weights

    def on_the_grid(nodes: Tensor) -> Tensor:
        return torch.einsum("yr,rsc,xs->yxc", wy[0], nodes, wx[0])

    left = on_the_grid(field - clean)
    share = float((mean_free(left) * planted).sum() / planted.square().sum())
    assert abs(share) < 0.01  # fraction of the pattern that is left in the semantic map
    assert error(artifact, planted) < 0.05


def test_artifact_has_mean_zero_and_a_constant_goes_to_the_field() -> None:
    plan = make_plan(32)
    features = noise(32, *plan.grid, 2)
    field, artifact = fit(plan, features, **DEFAULT)
    shifted_field, shifted_artifact = fit(plan, features + 7.5, **DEFAULT)
    assert artifact.mean((0, 1)).abs().max() < 1e-12
    assert torch.allclose(shifted_artifact, artifact, atol=1e-9)
    assert torch.allclose(shifted_field, field + 7.5, atol=1e-9)


def test_offset_of_each_view_stays_out_of_field_and_artifact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exact, "_OFFSET_SHRINKAGE", 1e-8)
    plan = make_plan(32)
    field, artifact = smooth_field(*plan.resolution), mean_free(noise(*plan.grid, 4, seed=1))
    moved = noise(32, 4, seed=2)
    features = views_of(plan, field, artifact) + (moved - moved.mean(0))[:, None, None]
    found_field, found_artifact = fit(plan, features, offsets=True, **EXACT)
    assert error(found_field, field) < 1e-4 and error(found_artifact, artifact) < 1e-4
    without = fit(plan, features, **EXACT)
    assert error(without[0], field) > 0.3


def test_offsets_need_the_sums_of_each_view() -> None:
    plan = make_plan(32)
    sums = sums_of(plan, noise(32, *plan.grid, 2))
    with pytest.raises(ValueError, match="offsets need the sums of each view"):
        ExactSolver(plan, offsets=True, **DEFAULT).solve(sums.b, sums.g)


@pytest.mark.parametrize("offsets", [False, True])
def test_known_artifact_is_subtracted_before_the_field_is_fitted(offsets: bool) -> None:
    plan = make_plan(32)
    artifact = noise(*plan.grid, 2, seed=5)
    features = noise(32, *plan.grid, 2)
    with_it, without = Statistics(plan, 2), Statistics(plan, 2)
    with_it.add(features + artifact)
    without.add(features)
    solver = ExactSolver(plan, offsets=offsets, **DEFAULT)
    known = solver.solve_field(with_it.b, artifact, with_it.s)
    assert torch.allclose(known, solver.solve_field(without.b, torch.zeros_like(artifact), without.s), atol=1e-10)
    if not offsets:
        assert torch.equal(known, solver.solve_field(with_it.b, artifact))  # s is not used


def test_project_and_spread_are_adjoint() -> None:
    plan = make_plan(9, grid=(5, 7), resolution=(11, 13))
    solver = ExactSolver(plan, **DEFAULT)
    field, artifact = noise(11, 13, 2), noise(5, 7, 2, seed=1)
    assert torch.allclose((solver.project(field) * artifact).sum(), (field * solver.spread(artifact)).sum())
    weighed = views_of(plan, field, torch.zeros_like(artifact)) * patch_weights(plan)[..., None]
    assert torch.allclose(solver.project(field), weighed.sum(0))


def test_channels_are_solved_independently() -> None:
    plan = make_plan(32)
    features = noise(32, *plan.grid, 6)
    together = fit(plan, features, **DEFAULT)
    for part in (slice(0, 2), slice(2, 6)):
        alone = fit(plan, features[..., part], **DEFAULT)
        assert all(torch.allclose(a[..., part], b, atol=1e-10) for a, b in zip(together, alone, strict=True))


def test_too_few_views_are_refused_with_the_number_needed() -> None:
    plan = make_plan(4)  # 4 views of 144 patches for 576 nodes and 144 positions
    with pytest.raises(PlanError, match=r"4 views of 12 x 12 patches are too few .* expected at least 5"):
        ExactSolver(plan, **DEFAULT).factorise(artifact_known=False)
    ExactSolver(plan, **DEFAULT).factorise(artifact_known=True)


def test_undetermined_nodes_without_smoothness_raise() -> None:
    plan = ViewPlan.make(8, size=(70, 70), patch_size=PATCH, resolution=12, seed=1)
    with pytest.raises(PlanError, match="more smoothness"):
        ExactSolver(plan, smoothness=0.0, shrinkage=0.0).factorise(artifact_known=True)


def test_negative_penalties_are_refused() -> None:
    with pytest.raises(PlanError, match="at least 0"):
        ExactSolver(make_plan(8), smoothness=-1.0, shrinkage=0.0)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_no_tensor_of_size_nodes_times_positions_is_created() -> None:
    plan = make_plan(16, grid=(24, 24), resolution=64)
    nodes, positions = 64 * 64, 24 * 24
    solver = ExactSolver(plan, **DEFAULT)
    with LargestTensor() as record:
        solver.factorise(artifact_known=False)
        solver.solve(noise(64, 64, 2), noise(24, 24, 2))
    assert record.numbers < nodes * positions / 4
    assert record.numbers < nodes * nodes / 4
