"""The bank: factors against the dense formula, and views that are never stale, whatever calls the matrices."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from increlora.bank import INIT_STD, Bank
from increlora.components import GroupSize
from increlora.linear import IncrementalLinear
from increlora.orthogonality import orthogonal_penalty

WIDTHS = {"first": (7, 5), "second": (5, 7), "third": (5, 5)}  # (out, in)
RANKS = {"first": 1, "second": 3, "third": 2}
ALPHA = 8.0


class Net(nn.Module):
    """Three layers, of which the last is used twice; activation checkpointing on request."""

    def __init__(self, **linears: nn.Module):
        super().__init__()
        self.layers = nn.ModuleDict(linears)
        self.reentrant: bool | None = None
        self.skip = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in ("first", "second", "third", "third"):
            if name != self.skip:
                layer = self.layers[name]
                x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
                x = torch.tanh(x)
        return x


class Made(NamedTuple):
    net: Net
    bank: Bank
    dense: Net  # the same with the update in the weights, for an independent gradient


def make(dtype: torch.dtype = torch.float64, reserve: bool = True) -> Made:
    """A net with components of random size, a reserve for each matrix and one growth of the second."""
    torch.manual_seed(3)
    bases = {name: nn.Linear(width, height).to(dtype) for name, (height, width) in WIDTHS.items()}
    rows = {5: 1 + 3 + 2 + 2, 7: 1 + 3}
    groups = [GroupSize(rows, 6), GroupSize({5: 4, 7: 2}, 0), GroupSize({5: 2, 7: 2}, 1)]
    bank = Bank(WIDTHS, groups, alpha=ALPHA, reserve_lambda=0.01, dtype=dtype)
    net = Net(**{name: IncrementalLinear(base, bank, f"layers.{name}") for name, base in bases.items()})
    bank.matrices = {f"layers.{name}": matrix for name, matrix in bank.matrices.items()}
    bank.attach(net)
    generator = torch.Generator().manual_seed(1)
    for name, rank in RANKS.items():
        bank.add_active(f"layers.{name}", rank, 0, generator)
    if reserve:
        for name in RANKS:
            bank.add_reserve(f"layers.{name}", 1, 1, generator, learns=True)
        bank.activate_reserve("layers.second", 1, 2)
        bank.add_reserve("layers.second", 1, 2, generator, learns=True)
    for group in range(len(groups) if reserve else 1):
        bank.release(group)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.mul_(20)
        for group in bank.all_groups:
            if group.trains and group.lambda_ is not None:
                group.lambda_.copy_(torch.randn(len(group.lambda_), generator=generator))
    return Made(net, bank, dense_twin(net, bank, bases))


def dense_twin(net: Net, bank: Bank, bases: dict[str, nn.Linear]) -> Net:
    twin = Net(**copy.deepcopy(bases))
    with torch.no_grad():
        for name, layer in twin.layers.items():
            layer.weight += dense(bank, f"layers.{name}")
    return twin.requires_grad_(True)


def dense(bank: Bank, name: str) -> torch.Tensor:
    """alpha / rank * B diag(lambda) A, component by component from the bank's rows."""
    matrix = bank.matrices[name]
    delta = torch.zeros(matrix.out_features, matrix.in_features, dtype=bank.like.dtype)
    for index, component in enumerate(matrix.used):
        A, B = bank.rows(name, index)
        if component.lambda_group < 0:
            lambda_ = torch.full((component.rank,), bank.reserve_lambda, dtype=A.dtype)
        else:
            start = component.lambda_row
            lambda_ = bank.all_groups[component.lambda_group].lambda_[start : start + component.rank]
        delta += ALPHA / matrix.rank * B.t() @ torch.diag(lambda_) @ A
    return delta.detach()


def gradients(net: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def backward(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.zero_grad()
    loss = net(x).pow(2).sum()
    loss.backward()
    return loss.detach()


def test_outputs_and_factors_are_those_of_the_dense_formula():
    net, bank, twin = make()
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(net(x), twin(x))
    for name in WIDTHS:
        A, B = bank.factors(f"layers.{name}")
        torch.testing.assert_close(B @ A, dense(bank, f"layers.{name}"))
        alone = torch.randn(4, WIDTHS[name][1], dtype=torch.float64)
        torch.testing.assert_close(net.layers[name](alone), twin.layers[name](alone))


def test_gradients_are_those_of_autograd_through_the_dense_formula():
    net, bank, twin = make()
    x = torch.randn(6, 5, dtype=torch.float64)
    backward(net, x)
    backward(twin, x)
    for name in WIDTHS:
        G = twin.layers[name].weight.grad
        matrix = bank.matrices[f"layers.{name}"]
        for index, component in enumerate(matrix.used):
            group = bank.all_groups[component.group]
            A, B = bank.rows(f"layers.{name}", index)
            lambda_ = bank.reserve_lambda
            if component.lambda_group >= 0:
                held = bank.all_groups[component.lambda_group].lambda_
                lambda_ = held[component.lambda_row :][: component.rank].unsqueeze(1)
                expected = ALPHA / matrix.rank * torch.einsum("ro,oi,ri->r", B, G, A)
                torch.testing.assert_close(held.grad[component.lambda_row :][: component.rank], expected)
            scale = ALPHA / matrix.rank * lambda_
            found_A = group.rows[str(matrix.in_features)].grad[component.A_row :][: component.rank]
            found_B = group.rows[str(matrix.out_features)].grad[component.B_row :][: component.rank]
            torch.testing.assert_close(found_A, scale * (B @ G))
            torch.testing.assert_close(found_B, scale * (A @ G.t()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(reentrant):
    net = make().net
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    backward(net, x)
    expected = gradients(net)
    net.reentrant = reentrant
    for _ in range(2):  # the second backward finds nothing of the first
        backward(net, x)
        for name, gradient in gradients(net).items():
            torch.testing.assert_close(gradient, expected[name])


def test_views_follow_the_parameters_the_grad_mode_and_what_is_loaded():
    net, bank, _ = make()
    x = torch.randn(4, 5, dtype=torch.float64)
    saved = copy.deepcopy(net.state_dict())

    def is_fresh() -> None:
        with torch.no_grad():
            torch.testing.assert_close(net(x), dense_twin(net, bank, bases(net))(x))
        torch.testing.assert_close(net(x), dense_twin(net, bank, bases(net))(x))
        with torch.inference_mode():
            torch.testing.assert_close(net(x), dense_twin(net, bank, bases(net))(x))

    is_fresh()
    optimizer = torch.optim.AdamW((p for p in bank.parameters() if p.requires_grad), lr=0.1, fused=True)
    for _ in range(2):
        backward(net, x)
        optimizer.step()
        is_fresh()
    for parameter in bank.parameters():
        parameter.data.mul_(1.1)  # past autograd's counter of versions
    is_fresh()
    net.load_state_dict(saved)
    is_fresh()
    bank.silence_reserves()
    is_fresh()


def bases(net: Net) -> dict[str, nn.Linear]:
    return {name: layer.base for name, layer in net.layers.items()}


def test_micro_batches_and_two_forwards_before_one_backward_add_up():
    net = make().net
    x = torch.randn(6, 5, dtype=torch.float64)
    backward(net, x)
    expected = gradients(net)
    net.zero_grad()
    for part in x.chunk(3):
        net(part).pow(2).sum().backward()
    together = gradients(net)
    net.zero_grad()
    sum(net(part).pow(2).sum() for part in x.chunk(2)).backward()
    for name, gradient in gradients(net).items():
        torch.testing.assert_close(gradient, expected[name])
        torch.testing.assert_close(together[name], expected[name])


def test_a_matrix_called_by_itself_after_an_update_computes_with_the_new_values():
    net, bank, _ = make()
    x = torch.randn(4, 5, dtype=torch.float64)
    optimizer = torch.optim.SGD((p for p in bank.parameters() if p.requires_grad), lr=0.1)
    layer = net.layers["third"]
    for _ in range(3):
        optimizer.zero_grad()
        (net(x).sum() + layer(x).pow(2).sum() + layer(x).sum()).backward()
        optimizer.step()
        expected = x @ (layer.base.weight + dense(bank, "layers.third")).t() + layer.base.bias
        torch.testing.assert_close(layer(x), expected)


def test_a_skipped_matrix_gets_zeros_and_the_others_what_is_theirs():
    net, bank, _ = make()
    net.skip = "third"
    backward(net, torch.randn(4, 5, dtype=torch.float64))
    component = bank.matrices["layers.third"].components[0]
    assert not bank.all_groups[0].rows["5"].grad[component.A_row :][: component.rank].any()
    component = bank.matrices["layers.first"].components[0]
    assert bank.all_groups[0].rows["5"].grad[component.A_row].any()


def test_a_forward_that_fails_leaves_no_pass_behind():
    net, bank, twin = make()
    with pytest.raises(RuntimeError):
        net(torch.randn(4, 3, dtype=torch.float64))
    assert bank.depth == 0
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(net(x), twin(x))


def test_copies_compute_with_their_own_bank():
    net = make().net
    x = torch.randn(4, 5, dtype=torch.float64)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in twin.increlora_bank.parameters():
            parameter.zero_()
    assert not torch.allclose(net(x), twin(x))
    assert torch.allclose(twin(x), Net(**bases(twin))(x))


def test_half_precision_rounds_the_factors_once_and_gradients_arrive_in_full():
    net, bank, twin = make(torch.float32)
    x = torch.randn(16, 5)
    with torch.autocast("cpu", torch.bfloat16):
        h = net(x)
    h.float().pow(2).sum().backward()
    torch.testing.assert_close(h.float(), twin(x), rtol=0.1, atol=0.1)
    assert all(p.grad.dtype == torch.float32 for p in bank.parameters() if p.grad is not None)
    net.layers.to(torch.bfloat16)  # a model in half precision, its components in full
    torch.testing.assert_close(net(x.bfloat16()).float(), twin(x), rtol=0.1, atol=0.1)


def test_structure_round_trip_and_an_earlier_structure_over_a_later_one():
    made, early = make(), make(reserve=False)
    structure, weights = made.bank.structure(), made.net.state_dict()
    early_structure, early_weights = early.bank.structure(), copy.deepcopy(early.net.state_dict())
    x = torch.randn(4, 5, dtype=torch.float64)
    expected, expected_early = made.net(x), early.net(x)
    early.bank.load_structure(structure)
    early.net.load_state_dict(weights)
    torch.testing.assert_close(early.net(x), expected)
    assert [p.requires_grad for p in early.bank.parameters()] == [p.requires_grad for p in made.bank.parameters()]
    made.bank.load_structure(early_structure)
    made.net.load_state_dict(early_weights)
    torch.testing.assert_close(made.net(x), expected_early)
    later = [p for group in made.bank.all_groups[1:] for p in group.parameters()]
    assert not any(p.requires_grad or p.any() for p in later)


def test_growing_rescales_the_old_components_and_the_reserve_starts_where_it_was():
    bank = make(reserve=False).bank
    generator = torch.Generator().manual_seed(9)
    before = dense(bank, "layers.second")
    bank.add_reserve("layers.second", 1, 1, generator, learns=True)
    A, B = (rows.clone() for rows in bank.rows("layers.second", -1))
    torch.testing.assert_close(dense(bank, "layers.second"), before + ALPHA / 3 * 0.01 * B.t() @ A)
    bank.activate_reserve("layers.second", 1, 2)
    assert bank.matrices["layers.second"].rank == 4
    torch.testing.assert_close(dense(bank, "layers.second"), before * 3 / 4 + ALPHA / 4 * 0.01 * B.t() @ A)


def test_an_inert_reserve_reaches_no_output_and_moves_into_its_group_when_it_is_chosen():
    net, bank, _ = make(reserve=False)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(4, 5, dtype=torch.float64)
    before = net(x)
    bank.add_reserve("layers.second", 1, 1, generator, learns=False)
    assert torch.equal(net(x), before)
    waited = [rows.clone() for rows in bank.rows("layers.second", -1)]
    place = bank.activate_inert_reserve("layers.second", 1, 2)
    bank.add_reserve("layers.second", 1, 1, generator, learns=False, place=place)
    chosen = bank.matrices["layers.second"].components[1]
    assert (chosen.group, chosen.lambda_group) == (2, 2)
    assert all(torch.equal(a, b) for a, b in zip(waited, bank.rows("layers.second", 1), strict=True))
    assert not torch.equal(waited[0], bank.rows("layers.second", -1)[0])  # the next one waits in the same place
    assert bank.matrices["layers.second"].components[2].group == 1


def test_a_part_of_a_reserve_can_be_activated():
    bank = Bank(
        {"m": (4, 6)}, [GroupSize({4: 1, 6: 1}, 1), GroupSize({4: 3, 6: 3}, 0), GroupSize({4: 3, 6: 3}, 2)], alpha=1.0
    )
    generator = torch.Generator().manual_seed(0)
    bank.add_active("m", 1, 0, generator)
    bank.add_reserve("m", 3, 1, generator, learns=True)
    A = bank.rows("m", -1)[0].clone()
    bank.activate_reserve("m", 2, 2)
    matrix = bank.matrices["m"]
    assert (matrix.rank, matrix.reserve.rank) == (3, 1)
    assert torch.equal(bank.rows("m", 1)[0], A[:2]) and torch.equal(bank.rows("m", 2)[0], A[2:])


def test_components_start_at_their_deviation():
    bank = Bank({"m": (50, 2000)}, [GroupSize({50: 1, 2000: 1}, 1)], alpha=1.0)
    bank.add_active("m", 1, 0, torch.Generator().manual_seed(0))
    assert bank.rows("m", 0)[0].std().item() == pytest.approx(INIT_STD, rel=0.05)
    assert bank.lambdas("m").tolist() == [0.0]


def test_penalty_is_the_plain_loop_and_so_is_its_gradient():
    bank = make().bank
    norms = []
    for name, matrix in bank.matrices.items():
        rows = [bank.rows(name, index) for index in range(len(matrix.components))]
        for R in (torch.cat(several) for several in zip(*rows, strict=True)):
            norms.append(((R @ R.t() - torch.eye(len(R), dtype=R.dtype)) ** 2).sum().sqrt())
    expected = torch.stack(norms).mean()
    trained = [p for p in bank.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, trained, allow_unused=True)
    found = orthogonal_penalty(bank.stacks())
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, trained, allow_unused=True), wanted, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b))


def test_penalty_by_hand_and_its_gradient_at_the_optimum():
    rows = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    penalty = orthogonal_penalty([(rows, torch.eye(2).expand(2, 2, 2))])
    assert penalty.item() == pytest.approx(1.5)  # R R^T - I = diag(3, 0) and 0
    penalty.backward()
    # half of 2 (R R^T - I) R / 3 = diag(2, 0), and 0
    assert rows.grad.tolist() == [[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]


def test_penalty_shares_the_rows_of_the_forward_and_both_gradients_arrive():
    net, bank, _ = make()
    x = torch.randn(4, 5, dtype=torch.float64)
    net.zero_grad()
    net(x).pow(2).sum().backward()
    orthogonal_penalty(bank.stacks()).backward()
    apart = gradients(net)
    net.zero_grad()
    (net(x).pow(2).sum() + orthogonal_penalty(bank.stacks())).backward()
    for name, gradient in gradients(net).items():
        torch.testing.assert_close(gradient, apart[name])
