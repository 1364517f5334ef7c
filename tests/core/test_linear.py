"""The grown layer against the dense formula, the penalty against a plain loop, growth and reserve."""

import pytest
import torch
from torch import nn

from increlora.linear import INIT_STD, Component, IncrementalLinear, OrthogonalPenalty


def component(base: nn.Linear, rank: int = 1, lambda_value: float = 1.0, seed: int = 0) -> Component:
    return Component(rank, base, lambda_value, torch.Generator().manual_seed(seed))


def linear(components: int = 2, alpha: float = 8.0, **kwargs) -> IncrementalLinear:
    base = nn.Linear(6, 4).double()
    layer = IncrementalLinear(base, alpha, **kwargs)
    for seed in range(components):
        layer.add_active(component(base, seed=seed))
    return layer


@pytest.mark.parametrize("shape", [(2, 5, 6), (5, 6), (6,), (0, 6), (2, 0, 6)])
def test_output_is_the_dense_formula(shape):
    layer = linear(components=3)
    x = torch.randn(*shape, dtype=torch.float64)
    A = torch.cat([c.A for c in layer.components])
    B = torch.cat([c.B for c in layer.components], dim=1)
    lambda_ = torch.cat([c.lambda_ for c in layer.components])
    delta = 8.0 / 3 * B @ torch.diag(lambda_) @ A
    torch.testing.assert_close(layer(x), x @ (layer.base.weight + delta).T + layer.base.bias)
    torch.testing.assert_close(layer.delta(), delta)


def test_the_update_starts_at_zero_and_components_at_their_deviation():
    base = nn.Linear(2000, 50)
    assert component(base, lambda_value=0.0).A.std().item() == pytest.approx(INIT_STD, rel=0.05)
    layer = IncrementalLinear(base, 8.0)
    layer.add_active(component(base, lambda_value=0.0))
    x = torch.randn(3, 2000)
    assert torch.equal(layer(x), base(x))


def test_growing_rescales_the_old_components():
    layer = linear(components=1)
    before = layer.delta()
    layer.add_reserve(component(layer.base, lambda_value=0.0, seed=9), learns=True)
    assert layer.rank == 1
    torch.testing.assert_close(layer.delta(), before)
    layer.activate_reserve()
    assert layer.rank == 2
    torch.testing.assert_close(layer.delta(), before / 2)


def test_reserve_with_advance_learning_reaches_the_output_and_learns():
    layer = linear(components=1)
    layer.add_reserve(component(layer.base, lambda_value=1e-5, seed=9), learns=True)
    layer(torch.randn(3, 6, dtype=torch.float64)).sum().backward()
    assert layer.reserve.A.grad.abs().sum() > 0 and layer.reserve.B.grad.abs().sum() > 0
    assert layer.reserve.lambda_.grad is None
    reserve = layer.reserve
    assert layer.activate_reserve() is reserve and reserve.lambda_.requires_grad and layer.reserve is None


def test_reserve_without_advance_learning_is_inert():
    layer = linear(components=1)
    x = torch.randn(3, 6, dtype=torch.float64)
    before = layer(x)
    layer.add_reserve(component(layer.base, lambda_value=0.0, seed=9), learns=False)
    layer(x).sum().backward()
    assert torch.equal(layer(x), before)
    assert all(p.grad is None and not p.requires_grad for p in layer.reserve.parameters())


def test_a_silenced_reserve_leaves_the_output_but_stays_in_the_penalty():
    layer = linear(components=1)
    layer.add_reserve(component(layer.base, lambda_value=1e-5, seed=9), learns=True)
    penalty = OrthogonalPenalty([layer])().item()
    layer.silence_reserve()
    assert layer.delta().allclose(8.0 * layer.components[0].B @ layer.components[0].A)
    assert OrthogonalPenalty([layer])().item() == penalty
    OrthogonalPenalty([layer])().backward()
    assert layer.reserve.A.grad.abs().sum() > 0


def test_penalty_is_the_plain_loop_over_matrices_of_different_rank_and_width():
    layers = [linear(components=n) for n in (1, 3, 2)]
    wide = IncrementalLinear(nn.Linear(9, 6).double(), 8.0)
    wide.add_active(component(wide.base, rank=4))
    layers.append(wide)
    norms = []
    for layer in layers:
        A = torch.cat([c.A for c in layer.components])
        B = torch.cat([c.B for c in layer.components], dim=1)
        for gram in (A @ A.T, B.T @ B):
            norms.append(((gram - torch.eye(len(gram), dtype=gram.dtype)) ** 2).sum().sqrt())
    torch.testing.assert_close(OrthogonalPenalty(layers)(), torch.stack(norms).mean())


def test_penalty_by_hand_and_its_gradient_at_the_optimum():
    base = nn.Linear(2, 2).double()
    layer = IncrementalLinear(base, 1.0)
    layer.add_active(component(base, rank=2))
    layer.components[0].A.data.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))  # A A^T - I = diag(3, 0)
    layer.components[0].B.data.copy_(torch.eye(2))  # 0
    penalty = OrthogonalPenalty([layer])()
    assert penalty.item() == pytest.approx(1.5)
    penalty.backward()
    assert torch.isfinite(layer.components[0].B.grad).all()


def test_merging_is_exact_and_gives_a_plain_layer():
    layer = linear(components=3).eval()
    x = torch.randn(2, 6, dtype=torch.float64)
    expected = layer(x)
    merged = layer.merged()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), expected)


def test_dropout_applies_to_the_update_only_and_only_in_training():
    layer = linear(dropout=0.5)
    x = torch.ones(400, 6, dtype=torch.float64)
    update = layer(x) - layer.base(x)
    assert update.std(dim=0).max() > 0
    layer.eval()
    torch.testing.assert_close(layer(x), x @ (layer.base.weight + layer.delta()).T + layer.base.bias)


def test_bf16_autocast_stays_close():
    layer = linear(components=3).float()
    x = torch.randn(64, 6)
    with torch.autocast("cpu", torch.bfloat16):
        h = layer(x)
    assert h.dtype == torch.bfloat16
    torch.testing.assert_close(h.float(), layer(x), rtol=0.05, atol=0.05)
