"""Sensitivity, uncertainty and G, against numbers worked out by hand and against autograd on a dense delta."""

import pytest
import torch
from conftest import TINY_KINDS, tiny_batches
from torch import nn

from increlora.algorithm import IncreLoRA
from increlora.bank import Bank
from increlora.components import GroupSize
from increlora.importance import DeltaGradient, ImportanceScore, sensitivity
from increlora.linear import IncrementalLinear


def test_sensitivity_by_hand():
    delta = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    gradient = torch.tensor([[2.0, 1.0], [-4.0, 9.0]])
    # |2| + |-2| + |-2| + |0| = 6; sqrt(2 * 2) = 2; elements: 4
    assert sensitivity(delta, gradient).item() == 3.0
    assert sensitivity(delta, gradient, "mean").item() == 1.5


def test_averages_by_hand():
    score = ImportanceScore(["a", "b"], beta1=0.5, beta2=0.8)
    score.update(torch.tensor([4.0, 0.0]))
    # a: I = .5*0 + .5*4 = 2; U = .8*0 + .2*|4 - 2| = .4; score .8
    assert score.scores() == pytest.approx({"a": 0.8, "b": 0.0})
    score.update(torch.tensor([1.0, 2.0]))
    # a: I = .5*2 + .5*1 = 1.5; U = .8*.4 + .2*|1 - 1.5| = .42; b: I = 1, U = .2
    assert score.scores() == pytest.approx({"a": 1.5 * 0.42, "b": 1.0 * 0.2})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_sensitivity_changes_nothing(bad):
    score = ImportanceScore(["a", "b"], 0.85, 0.85)
    score.update(torch.tensor([1.0, 2.0]))
    before = score.scores()
    score.update(torch.tensor([1.0, bad]))
    assert score.scores() == before


def grown_linear(inputs: int = 5, outputs: int = 3, rank: int = 2) -> IncrementalLinear:
    bank = Bank(
        {"m": (outputs, inputs)}, [GroupSize({inputs: rank, outputs: rank}, rank)], alpha=4.0, dtype=torch.float64
    )
    bank.add_active("m", rank, 0, torch.Generator().manual_seed(1))
    bank.all_groups[0].lambda_.data.fill_(0.7)
    bank.release(0)
    return IncrementalLinear(nn.Linear(inputs, outputs).double(), bank, "m")


def dense_gradient(linear: IncrementalLinear, loss_of_weight) -> torch.Tensor:
    """G the slow way: autograd through a materialised delta."""
    delta = linear.delta().detach().requires_grad_(True)
    return torch.autograd.grad(loss_of_weight(linear.base.weight.detach() + delta), delta)[0]


def test_two_uses_add_up():
    linear = grown_linear()
    x, y = torch.randn(4, 6, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    watcher = DeltaGradient(linear, 1, "sqrt", last_use_only=False)
    (linear(x).pow(2).sum() + linear(y).sin().sum()).backward()

    def loss(weight):
        bias = linear.base.bias
        return (x @ weight.T + bias).pow(2).sum() + (y @ weight.T + bias).sin().sum()

    expected = sensitivity(linear.delta(), dense_gradient(linear, loss))
    torch.testing.assert_close(watcher.finish(), expected.detach(), rtol=1e-12, atol=0)
    assert linear.watcher is None


def test_micro_batches_add_up():
    linear = grown_linear()
    x = torch.randn(6, 5, dtype=torch.float64)
    watcher = DeltaGradient(linear, 3, "sqrt", last_use_only=False)
    for part in x.chunk(3):
        linear(part).pow(3).sum().backward()
    expected = sensitivity(linear.delta(), dense_gradient(linear, lambda w: (x @ w.T + linear.base.bias).pow(3).sum()))
    torch.testing.assert_close(watcher.finish(), expected.detach(), rtol=1e-12, atol=0)


def test_last_use_only_keeps_the_gradient_that_arrives_last():
    linear = grown_linear()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    watcher = DeltaGradient(linear, 1, "sqrt", last_use_only=True)
    (linear(x).pow(2).sum() + linear(y).pow(3).sum()).backward()  # backward reaches the first use last
    bias = linear.base.bias
    expected = sensitivity(linear.delta(), dense_gradient(linear, lambda w: (x @ w.T + bias).pow(2).sum()))
    torch.testing.assert_close(watcher.finish(), expected.detach(), rtol=1e-12, atol=0)


def test_an_unused_output_and_an_unused_matrix_do_no_harm():
    linear = grown_linear()
    watcher = DeltaGradient(linear, 1, "sqrt", last_use_only=False)
    x = torch.randn(4, 5, dtype=torch.float64)
    linear(x)  # gets no gradient
    linear(x).pow(2).sum().backward()
    used_once = watcher.finish()
    watcher = DeltaGradient(linear, 1, "sqrt", last_use_only=False)
    linear(x).pow(2).sum().backward()
    torch.testing.assert_close(used_once, watcher.finish())
    assert DeltaGradient(linear, 1, "sqrt", last_use_only=False).finish() == 0


def test_half_precision_keeps_the_digits_of_the_score():
    linear = grown_linear(64, 48).float()
    linear.bank.float()
    x = torch.randn(256, 64)
    watcher = DeltaGradient(linear, 2, "sqrt", last_use_only=False)
    for part in x.chunk(2):
        with torch.autocast("cpu", torch.bfloat16):
            h = linear(part)
        h.float().pow(2).sum().backward()
    bias = linear.base.bias
    expected = sensitivity(linear.delta(), dense_gradient(linear, lambda w: (x @ w.T + bias).pow(2).sum()))
    torch.testing.assert_close(watcher.finish(), expected.detach(), rtol=0.01, atol=0)


def test_gradient_checkpointing_gives_the_same_sensitivity():
    from torch.utils.checkpoint import checkpoint

    linear, x = grown_linear(), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    values = []
    for call in (
        linear,
        lambda x: checkpoint(linear, x, use_reentrant=False),
        lambda x: checkpoint(linear, x, use_reentrant=True),
    ):
        watcher = DeltaGradient(linear, 1, "sqrt", last_use_only=False)
        call(x).pow(2).sum().backward()
        values.append(watcher.finish())
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])


def test_score_of_every_matrix_of_a_deberta_against_the_gradient_of_its_pretrained_weight(tiny_deberta):
    """An independent computation: d(loss)/d(delta) = d(loss)/d(W0), which autograd gives when W0 is unfrozen."""
    method = IncreLoRA(kinds=TINY_KINDS, target_rank=2, top_h=2, interval=5, init_warmup=5)
    method.prepare(tiny_deberta, 100)
    method.bank.all_groups[0].lambda_.data.fill_(3.0)
    for linear in method.linears.values():
        linear.base.weight.requires_grad_(True)
    method.begin_step(0)
    tiny_deberta(**tiny_batches(1)[0]).loss.backward()
    for watcher, linear in zip(method.watchers, method.linears.values(), strict=True):
        expected = sensitivity(linear.delta(), linear.base.weight.grad)
        torch.testing.assert_close(watcher.finish(), expected.detach(), rtol=1e-6, atol=0)
        assert expected > 0
