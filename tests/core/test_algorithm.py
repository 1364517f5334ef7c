"""IncreLoRA as a whole on a tiny DeBERTa: growth, reserve, groups, budget, state, merge."""

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import TINY_KINDS, tiny_batches

from increlora import groups
from increlora.algorithm import IncreLoRA
from increlora.errors import UserError
from increlora.glue.loop import make_optimizer, take_step
from increlora.glue.settings import Settings
from increlora.groups import set_learning_rates
from increlora.linear import IncrementalLinear

STEPS = 40


def increlora(**changes) -> IncreLoRA:
    given = dict(kinds=TINY_KINDS, target_rank=2, top_h=5, interval=5, init_warmup=5, seed=1)
    return IncreLoRA(**(given | changes))


def run(model, method: IncreLoRA, steps: int = STEPS, watch=None) -> torch.optim.Optimizer:
    """Train for a few steps as the loop does."""
    settings = Settings(learning_rate=1e-2, warmup_steps=5, batch_size=8, device="cpu")
    method.prepare(model, steps)
    optimizer = make_optimizer(model, method, settings)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model.train()
    for step, batch in enumerate(tiny_batches(steps)):
        set_learning_rates(optimizer, step, steps, settings.warmup_steps)
        take_step(step, [batch], lambda b: model(**b).loss, method, optimizer, settings, scaler)
        if watch:
            watch(step, optimizer)
    return optimizer


def test_ranks_end_exactly_at_the_budget_and_allocations_tell_how(tiny_deberta):
    method = increlora()
    run(tiny_deberta, method)
    assert method.total_rank == 24 == method.allocator.budget
    assert [a.step for a in method.allocations] == [10, 15, 20]
    assert [len(a.added) for a in method.allocations] == [5, 5, 2]  # 12 to add, 5 per growth
    added = Counter({name: 1 for name in method.linears})
    for allocation in method.allocations:
        added.update(allocation.added)
        top = sorted(allocation.scores, key=allocation.scores.get, reverse=True)[: len(allocation.added)]
        assert set(top) == set(allocation.added)
    assert dict(added) == method.ranks()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"interval": 0}, "`interval` must be at least 1, it is 0"),
        ({"top_h": 0}, "`top_h` must be at least 1, it is 0"),
        ({"rank_step": 0}, "`rank_step` must be at least 1, it is 0"),
        ({"target_rank": 1.5}, "`target_rank` must be a whole number, it is 1.5"),
        ({"top_h": "many"}, "`top_h` must be a whole number or null, it is 'many'"),
        ({"orth_weight": "abc"}, "`orth_weight` must be a number, it is 'abc'"),
        ({"alpha": float("inf")}, "`alpha` must be a number, it is inf"),
        ({"advance_learning": "flase"}, "`advance_learning` must be true or false, it is 'flase'"),
        ({"scoring_window": 0.5}, "`scoring_window` must be a whole number or a word, it is 0.5"),
        ({"scoring_window": "some"}, "`scoring_window` must be auto, all or a number above 0"),
        ({"orth_weight": -0.1}, "`orth_weight` must not be negative, it is -0.1"),
    ],
)
def test_impossible_values_are_refused(tiny_deberta, changes, said):
    with pytest.raises(UserError) as error:
        increlora(**({"top_h": None} | changes)).prepare(tiny_deberta, STEPS)
    assert said in str(error.value)


def test_every_parameter_is_in_one_group_from_the_start_and_trains_from_its_birth_on(tiny_deberta):
    method, began = increlora(), {}

    def watch(step, optimizer):
        for number, group in enumerate(optimizer.param_groups):
            if any(parameter in optimizer.state for parameter in group["params"]):
                began.setdefault(number, step)

    optimizer = run(tiny_deberta, method, watch=watch)
    assert [group["born"] for group in optimizer.param_groups] == [0, 0, 1, 11, 16, 21]
    assert list(began.values()) == [0, 0, 1, 11, 16, 21]
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert len(names) == len(set(names))
    by_name = dict(tiny_deberta.named_parameters())
    for group in optimizer.param_groups:
        assert all(by_name[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))
    trained = {name for name, p in by_name.items() if p.requires_grad}
    assert trained == set(names)


def test_without_restart_warmup_new_groups_follow_the_first_schedule(tiny_deberta):
    optimizer = run(tiny_deberta, increlora(restart_warmup=False))
    assert {group["born"] for group in optimizer.param_groups} == {0}
    assert len({group["lr"] for group in optimizer.param_groups}) == 1


def test_new_groups_keep_the_peak_rate_as_in_the_authors_code(tiny_deberta):
    optimizer = run(tiny_deberta, increlora(restart_warmup=False, new_groups_at_peak=True))
    first, later = optimizer.param_groups[:2], optimizer.param_groups[2:]
    assert all(group["lr"] < group["initial_lr"] for group in first)
    assert len(later) == 4 and all(group["lr"] == group["initial_lr"] for group in later)


def test_the_authors_adamw_adds_epsilon_before_the_bias_correction():
    parameter, gradients, rate = torch.nn.Parameter(torch.tensor([0.5], dtype=torch.float64)), (3e-8, -1e-8, 2e-8), 0.1
    optimizer = torch.optim.AdamW([parameter], lr=rate, weight_decay=0.0)
    optimizer.param_groups[0]["born"] = 4
    value, first, second = 0.5, 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
        groups.set_epsilon_before_correction(optimizer, step=3 + t)
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        corrected_rate = rate * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)  # as transformers 4.4.2 writes it
        value -= corrected_rate * first / (math.sqrt(second) + 1e-8)
        assert parameter.item() == pytest.approx(value, rel=1e-12)


def reserves(method: IncreLoRA) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Copies of A and the transposed B of every matrix's reserve, the component after the active ones."""
    return {
        name: tuple(rows.detach().clone() for rows in method.bank.rows(name, matrix.active))
        for name, matrix in method.bank.matrices.items()
    }


def test_reserve_is_made_at_step_zero_learns_with_frozen_lambda_and_is_silenced_at_the_end(tiny_deberta):
    method, seen, reaches = increlora(), {}, {}

    def watch(step, optimizer):
        if step in (0, 9, 25):
            seen[step] = reserves(method)
            reaches[step] = [matrix.reserve_learns for matrix in method.bank.matrices.values()]

    run(tiny_deberta, method, watch=watch)
    assert all(reaches[0] + reaches[9]) and not any(reaches[25])  # the budget is spent at step 20
    last = reserves(method)
    for name in method.linears:
        assert not torch.equal(seen[0][name][0], seen[9][name][0])  # learned in advance
        assert not torch.equal(seen[0][name][1], seen[9][name][1])
        assert not torch.equal(seen[25][name][0], last[name][0])  # the penalty goes on
    lambdas = [n for n, p in tiny_deberta.named_parameters() if n.endswith("lambda_") and p.requires_grad]
    assert sum(tiny_deberta.get_parameter(name).numel() for name in lambdas) == 24  # of the ranks, not of reserves


def test_a_new_rank_starts_with_the_lambda_of_its_reserve(tiny_deberta):
    method = increlora(reserve_lambda=0.25)
    method.prepare(tiny_deberta, STEPS)
    method.importance.update(torch.ones(len(method.linears)))
    for step in (0, 10):
        method.allocate(step)
    grown = [name for name, rank in method.ranks().items() if rank == 2]
    assert len(grown) == 5 and all(method.bank.lambdas(name).tolist() == [0.0, 0.25] for name in grown)


def test_without_advance_learning_the_reserve_waits_inert(tiny_deberta):
    method, seen = increlora(advance_learning=False), {}

    def watch(step, optimizer):
        if step in (0, 9):
            seen[step] = reserves(method)

    optimizer = run(tiny_deberta, method, watch=watch)
    assert all(torch.equal(seen[0][n][0], seen[9][n][0]) for n in method.linears)
    assert method.total_rank == 24
    # a chosen component trains whole: rows of both widths and lambdas, in the group of its growth
    assert [group["born"] for group in optimizer.param_groups] == [0, 0, 11, 16, 21]
    for number, allocation in enumerate(method.allocations):
        for name in allocation.added:
            component = next(c for c in method.bank.matrices[name].components[1:] if c.lambda_group == number + 2)
            assert component.group == number + 2


def test_what_one_matrix_draws_does_not_depend_on_the_growth_of_others(tiny_deberta):
    """Every reserve of a matrix is the same, however often and beside whom it grew."""
    drawn = []
    for top_h in (5, 2):
        method, model = increlora(top_h=top_h, target_rank=3, rank_step=1, orth_weight=0.0), copy.deepcopy(tiny_deberta)
        method.prepare(model, 1000)
        method.importance.update(torch.ones(len(method.linears)))
        method.allocate(0)
        for step in range(10, 1000, 5):
            method.allocate(step)
        rows = {
            (name, index): method.bank.rows(name, index)
            for name, matrix in method.bank.matrices.items()
            for index in range(len(matrix.components))
        }
        drawn.append({key: tuple(part.tolist() for part in parts) for key, parts in rows.items()})
    shared = set(drawn[0]) & set(drawn[1])
    assert len(shared) > 24 and all(drawn[0][key] == drawn[1][key] for key in shared)


def test_parameters_by_kind_are_counted_truly(tiny_deberta):
    method = increlora()
    run(tiny_deberta, method)
    counts = method.parameters_by_kind(tiny_deberta)
    update = sum(
        rank * (method.linears[name].in_features + method.linears[name].out_features + 1)
        for name, rank in method.ranks().items()
    )
    reserve = sum(linear.in_features + linear.out_features for linear in method.linears.values())
    assert counts["update"] == update and counts["reserve"] == reserve
    assert counts["head"] == 16 * 16 + 16 + 16 * 2 + 2
    # nothing else moves: the optimizer's tensors hold zeros beside them
    held = sum(int((p != 0).sum()) for p in method.bank.parameters())
    assert held == update + reserve
    frozen = sum(p.numel() for n, p in tiny_deberta.named_parameters() if ".base." in n or not p.requires_grad)
    assert counts["total"] == frozen + counts["head"] + update + reserve


def test_state_round_trip_rebuilds_structure_weights_and_scores(tiny_deberta):
    other = copy.deepcopy(tiny_deberta)
    method = increlora()
    run(tiny_deberta, method)
    state, weights = copy.deepcopy(method.state_dict()), method.trained_state(tiny_deberta)
    rebuilt = increlora()
    rebuilt.prepare(other, STEPS)
    rebuilt.load_state_dict(state)
    missing = other.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert rebuilt.ranks() == method.ranks() and rebuilt.scores() == method.scores()
    assert [vars(a) for a in rebuilt.allocations] == [vars(a) for a in method.allocations]
    flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (tiny_deberta, other)]
    assert flags[0] == flags[1]
    batch = tiny_batches(1)[0]
    for model in (tiny_deberta, other):
        model.eval()
    assert torch.equal(tiny_deberta(**batch).logits, other(**batch).logits)


def test_merge_keeps_the_outputs_and_leaves_plain_layers(tiny_deberta):
    method = increlora()
    run(tiny_deberta, method)
    tiny_deberta.eval()
    batch = tiny_batches(1)[0]
    before = tiny_deberta(**batch).logits
    method.merge(tiny_deberta)
    assert not any(isinstance(m, IncrementalLinear) for m in tiny_deberta.modules())
    torch.testing.assert_close(tiny_deberta(**batch).logits, before, rtol=0, atol=1e-10)


def test_frozen_weights_do_not_move(tiny_deberta):
    before = {n: p.clone() for n, p in tiny_deberta.named_parameters() if "pooler" not in n and "classifier" not in n}
    run(tiny_deberta, increlora())
    after = {n.replace(".base.", "."): p for n, p in tiny_deberta.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_only_the_window_before_each_growth_is_scored(tiny_deberta):
    method = increlora(scoring_window="auto")
    assert method.window == 57 and 0.85**57 < 1e-4 < 0.85**56
    assert increlora(beta1=0.5, beta2=0.9, scoring_window="auto").window == 88  # ln 1e-4 / ln 0.9 = 87.4
    assert increlora(scoring_window="all").window == float("inf")
    method = increlora(scoring_window=2)
    method.prepare(tiny_deberta, STEPS)
    assert [step for step in range(21) if method.scores_at(step)] == [9, 10, 14, 15, 19, 20]


def test_a_window_and_all_steps_decide_the_same(tiny_deberta):
    """Growth every 70 steps: 13 steps of each interval go unscored, 57 decide."""
    methods = []
    for window in ("all", "auto"):
        method = increlora(interval=70, init_warmup=70, top_h=4, scoring_window=window)
        run(copy.deepcopy(tiny_deberta), method, steps=300)
        methods.append(method)
    for a, b in zip(*(m.allocations for m in methods), strict=True):
        assert (a.step, a.added) == (b.step, b.added)
        # the scores, too, differ by no more than what was forgotten
        assert list(b.scores.values()) == pytest.approx(list(a.scores.values()), rel=5e-3)
    assert methods[0].ranks() == methods[1].ranks() and len(methods[0].allocations) == 3


def test_a_non_finite_step_changes_nothing_and_growth_comes_at_the_next_good_batch(tiny_deberta):
    settings = Settings(learning_rate=1e-2, warmup_steps=5, batch_size=8, device="cpu")
    method = increlora()
    method.prepare(tiny_deberta, STEPS)
    optimizer = make_optimizer(tiny_deberta, method, settings)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = tiny_batches(1)[0]

    def step_with(factor: float, step: int) -> bool:
        return take_step(
            step, [batch], lambda b: tiny_deberta(**b).loss * factor, method, optimizer, settings, scaler
        ).taken

    for step in range(10):
        assert step_with(1.0, step)
    before = copy.deepcopy((method.state_dict(), method.trained_state(tiny_deberta)))
    assert not step_with(float("nan"), 10) and not step_with(float("inf"), 10)
    assert str((method.state_dict(), method.trained_state(tiny_deberta))) == str(before)
    assert step_with(1.0, 10) and method.allocations[-1].step == 10


def test_the_penalty_is_no_part_of_the_score_or_of_the_reported_loss(tiny_deberta):
    other = copy.deepcopy(tiny_deberta)
    batch = tiny_batches(1)[0]
    sensitivities = []
    for model, weight in ((tiny_deberta, 0.0), (other, 10.0)):
        method = increlora(orth_weight=weight)
        method.prepare(model, STEPS)
        method.bank.all_groups[0].lambda_.data.fill_(1.0)
        method.begin_step(0)
        (model(**batch).loss + method.extra_loss()).backward()
        sensitivities.append(torch.stack([w.finish() for w in method.watchers]))
    torch.testing.assert_close(sensitivities[0], sensitivities[1])


def test_a_model_on_several_devices_is_refused(tiny_deberta):
    tiny_deberta.deberta.encoder.layer[1].to("meta")
    with pytest.raises(UserError, match=r"several devices \(cpu, meta\)"):
        increlora().prepare(tiny_deberta, STEPS)


def test_a_sequential_model_keeps_its_layers(tiny_deberta):
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3)
    before, features = layers(x), layers[:-1](x)
    method = increlora(kinds={"layer": r"\d+"}, head=None, top_h=None)
    method.prepare(layers, STEPS)
    assert len(layers) == 3 and torch.equal(layers(x), before) and torch.equal(layers[:-1](x), features)
    assert sum(p.requires_grad for p in layers.parameters()) == 4  # rows of widths 2, 3 and 4, lambdas
    method.merge(layers)
    assert [type(layer).__name__ for layer in layers] == ["Linear", "Tanh", "Linear"]
    assert list(layers.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


class Chain(torch.nn.ModuleList):
    def forward(self, x):
        for layer in self:
            x = layer(x).tanh()
        return x


class Children(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    forward = Chain.forward

    def __iter__(self):
        return self.children()


def test_a_container_that_calls_its_layers_keeps_them_and_other_code_that_calls_children_is_told(tiny_deberta):
    chain, x = Chain(torch.nn.Linear(3, 3) for _ in range(3)), torch.randn(5, 3)
    before = chain(x)
    increlora(kinds={"layer": r"\d+"}, head=None, top_h=None).prepare(chain, STEPS)
    assert len(chain) == 3 and torch.equal(chain(x), before)
    model = Children()
    increlora(kinds={"layer": "one|two"}, head=None, top_h=None).prepare(model, STEPS)
    with pytest.raises(UserError, match="let it call its own layers by name"):
        model(x)


def test_a_layer_is_prepared_in_the_mode_in_which_the_model_is(tiny_deberta):
    model = tiny_deberta.eval()
    increlora(dropout=0.5).prepare(model, STEPS)
    assert not any(module.training for name, module in model.named_modules() if "increlora" not in name)


def test_weights_that_were_swapped_for_a_forward_leave_no_trace_in_the_penalty(tiny_deberta):
    """As a moving average of the weights does (`param.data`), in a forward with gradients and without backward."""
    method = increlora(orth_weight=1.0)
    method.prepare(tiny_deberta, STEPS)
    method.begin_step(0)
    expected = method.extra_loss().item()
    kept = [parameter.data.clone() for parameter in method.bank.parameters()]
    for parameter in method.bank.parameters():
        parameter.data.mul_(0.5)
    tiny_deberta(input_ids=torch.ones(1, 4, dtype=torch.long))
    for parameter, value in zip(method.bank.parameters(), kept, strict=True):
        parameter.data.copy_(value)
    method.begin_step(0)
    assert method.extra_loss().item() == expected


def test_the_last_growth_takes_what_is_left_of_the_budget(tiny_deberta):
    """84 ranks by steps of 5: 16 matrices gain 5, one gains 4."""
    method = increlora(target_rank=8, rank_step=5, top_h=6)
    run(tiny_deberta, method)
    assert method.total_rank == 96 == sum(method.ranks().values())
    gained = [rank for allocation in method.allocations for rank in allocation.added.values()]
    assert sorted(gained) == [4] + [5] * 16
    plan = method.planned_ranks()
    assert plan == {0: 12, 10: 42, 15: 72, 20: 96}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta1": 1.0}, "`beta1` must be in"),
        ({"score_reduction": "max"}, "sqrt or mean"),
        ({"scoring_window": 0}, "`scoring_window` must be auto, all or a number above 0"),
        ({"scoring_window": "some"}, "`scoring_window` must be auto, all or a number above 0"),
        ({"matrices": ["query", "quary"]}, "quary; the backbone has: query, key"),
        ({"matrices": "query"}, "`matrices` must be a list of kinds, it is 'query'"),
        (
            {"kinds": {"dense": r".*pooler\.dense"}},
            "pooler.dense: `kinds` adapts it, which freezes it, and `head` trains",
        ),
        ({"head": "("}, "`head` must be a regular expression, it is '('"),
        ({"rank_epsilon": -1.0}, "`rank_epsilon` must not be negative"),
        ({"kinds": {"query": r".*\.q_proj"}}, "no linear layer matches matrix kind 'query'"),
        ({"interval": 20, "top_h": 1}, "the growth schedule does not fit: 12 growths"),
    ],
)
def test_impossible_settings_are_refused(tiny_deberta, changes, said):
    with pytest.raises(UserError) as error:
        increlora(**changes).prepare(tiny_deberta, STEPS)
    assert said in str(error.value)


def test_the_penalty_of_active_components_and_of_reserves_apart_by_hand(tiny_deberta):
    method, seen = increlora(), []

    def by_hand(first, last) -> float:
        norms = []
        for name, matrix in method.bank.matrices.items():
            for factor in (0, 1):  # A, then B transposed
                rows = [method.bank.rows(name, i)[factor].detach().numpy() for i in range(len(matrix.components))]
                chosen = np.concatenate(rows[first(matrix) : last(matrix)])
                norms.append(np.sqrt(((chosen @ chosen.T - np.eye(len(chosen))) ** 2).sum()))
        return float(np.mean(norms))

    def watch(step, optimizer):
        if step == 12:  # after the first growth
            active = by_hand(lambda matrix: 0, lambda matrix: matrix.active)
            reserve = by_hand(lambda matrix: matrix.active, lambda matrix: None)
            seen.append((method.orthogonal_penalties(), active, reserve, method.orthogonal_penalty().item()))

    run(tiny_deberta, method, watch=watch)
    ((found, active, reserve, every),) = seen
    assert found == pytest.approx({"all": every, "active": active, "reserve": reserve}, rel=1e-5)
    assert len({round(value, 4) for value in found.values()}) == 3
