"""The adapted layer against the dense formula: shapes, dropout, merging."""

import pytest
import torch
from torch import nn

from increlora.bank import Bank
from increlora.components import GroupSize
from increlora.linear import IncrementalLinear


def linear(rank: int = 3, dropout: float = 0.0) -> IncrementalLinear:
    torch.manual_seed(0)
    base = nn.Linear(6, 4).double()
    bank = Bank({"m": (4, 6)}, [GroupSize({4: rank, 6: rank}, rank)], alpha=8.0, dtype=torch.float64)
    bank.add_active("m", rank, 0, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    return IncrementalLinear(base, bank, "m", dropout)


@pytest.mark.parametrize("shape", [(2, 5, 6), (5, 6), (6,), (0, 6), (2, 0, 6)])
def test_output_is_the_dense_formula(shape):
    layer = linear()
    x = torch.randn(*shape, dtype=torch.float64)
    A, B = layer.bank.rows("m", 0)
    delta = 8.0 / 3 * B.t() @ torch.diag(layer.bank.lambdas("m")) @ A
    torch.testing.assert_close(layer(x), x @ (layer.base.weight + delta).T + layer.base.bias)
    torch.testing.assert_close(layer.delta(), delta)


def test_the_update_starts_at_zero():
    layer = linear()
    layer.bank.all_groups[0].lambda_.data.zero_()
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base(x))


def test_merging_is_exact_and_gives_a_plain_layer():
    layer = linear().eval()
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
