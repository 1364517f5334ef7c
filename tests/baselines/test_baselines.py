"""Baselines and controls against their papers' formulas, PEFT's own code and plain arithmetic."""

import copy
import json
from collections import Counter

import pytest
import torch
from conftest import TINY_KINDS, tiny_batches
from naming import naming
from peft.tuners.adalora import RankAllocator
from torch import nn

from baselines.adalora import AdaLoRA
from baselines.adapters import Adapter, Adapters
from baselines.bitfit import BitFit
from baselines.controls import PermutedGrowth, RandomGrowth, ShuffledPattern, StaticPattern
from baselines.lora import LoRA
from increlora import result_files
from increlora.errors import UserError
from increlora.glue.loop import make_optimizer, take_step
from increlora.glue.settings import Settings
from increlora.groups import set_learning_rates

STEPS = 40
SETTINGS = Settings(learning_rate=1e-2, warmup_steps=5, batch_size=8, device="cpu")
NAME = "deberta.encoder.layer.1.intermediate.dense"


def start(model, method, steps: int = STEPS) -> torch.optim.Optimizer:
    method.prepare(model, steps)
    return make_optimizer(model, method, SETTINGS)


def go(model, method, optimizer, steps: range, total: int = STEPS, watch=None) -> None:
    """Take some steps of a run of `total` steps as the loop does."""
    scaler, batches = torch.amp.GradScaler("cpu", enabled=False), tiny_batches(total)
    model.train()
    for step in steps:
        set_learning_rates(optimizer, step, total, SETTINGS.warmup_steps)
        assert take_step(step, [batches[step]], lambda b: model(**b).loss, method, optimizer, SETTINGS, scaler).taken
        if watch:
            watch(step)


# LoRA


def test_lora_delta_is_alpha_over_rank_times_b_a(tiny_deberta):
    weight = tiny_deberta.get_submodule(NAME).weight.clone()
    method = LoRA(kinds=TINY_KINDS, rank=3, alpha=12)
    go(tiny_deberta, method, start(tiny_deberta, method), range(3))
    layer = method.layers[NAME]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.shape == (3, 16) and B.shape == (24, 3) and B.abs().sum() > 0
    x = torch.randn(5, 16, dtype=torch.double)
    expected = x @ weight.T + layer.base_layer.bias + 12 / 3 * (x @ A.T @ B.T)
    torch.testing.assert_close(layer.eval()(x), expected)
    method.merge(tiny_deberta)
    torch.testing.assert_close(tiny_deberta.get_submodule(NAME).weight, weight + 12 / 3 * B @ A)


@pytest.mark.parametrize("build", [LoRA, AdaLoRA])
def test_peft_adapts_exactly_the_named_matrices(tiny_deberta, build):
    method = build(kinds=TINY_KINDS, matrices=["query", "output"])
    method.prepare(tiny_deberta, STEPS)
    wrapped = {name for name, module in tiny_deberta.named_modules() if hasattr(module, "base_layer")}
    parts = ("attention.self.query_proj", "output.dense")
    assert wrapped == {f"deberta.encoder.layer.{layer}.{part}" for layer in (0, 1) for part in parts}
    assert set(method.ranks()) == wrapped and not hasattr(tiny_deberta, "peft_config")


# AdaLoRA


def adalora(**changes) -> AdaLoRA:
    given = dict(kinds=TINY_KINDS, target_rank=2, init_warmup=5, interval=3, final_steps=15, seed=1)
    return AdaLoRA(**(given | changes))


def cubic(t: int) -> int:
    """Total rank at step t: 12 matrices, rank 3 -> 2, t_i 5, t_f 15, T 40 (paper, section 3.3)."""
    if t <= 5:
        return 36
    return 24 if t >= 25 else int(24 + 12 * (1 - (t - 5) / 20) ** 3)


def test_adalora_ranks_follow_the_cubic_schedule_and_end_at_the_budget(tiny_deberta):
    method, totals = adalora(), {}
    go(tiny_deberta, method, start(tiny_deberta, method), range(STEPS),
       watch=lambda step: totals.update({step: sum(method.ranks().values())}))  # fmt: skip
    last_pruned = {t: max((p for p in range(6, t + 1) if p % 3 == 0), default=0) for t in range(25)}
    assert totals == {t: 24 if t >= 25 else cubic(last_pruned[t]) for t in range(STEPS)}
    values = torch.cat([layer.lora_E["default"].flatten() for layer in method.layers.values()])
    assert int((values != 0).sum()) == 24 == sum(method.ranks().values())
    for name, layer in method.layers.items():
        assert int((layer.lora_E["default"] != 0).sum()) == method.ranks()[name]


def test_adalora_prunes_what_pefts_allocator_prunes(tiny_deberta):
    other = copy.deepcopy(tiny_deberta)
    ours, peft = adalora(), adalora()
    optimizers = [start(tiny_deberta, ours), start(other, peft)]
    peft.tuner.rankallocator = RankAllocator(other, peft.config, "default")
    for model, method, optimizer in ((tiny_deberta, ours, optimizers[0]), (other, peft, optimizers[1])):
        go(model, method, optimizer, range(STEPS))
    assert ours.config.rank_pattern == peft.config.rank_pattern and ours.allocations == peft.allocations
    assert all(torch.equal(a, b) for a, b in zip(tiny_deberta.parameters(), other.parameters(), strict=True))


def test_adalora_ties_end_at_the_budget_where_pefts_allocator_ends_below(tiny_deberta):
    method = adalora()
    method.prepare(tiny_deberta, STEPS)
    peft, ours = RankAllocator(tiny_deberta, method.config, "default"), method.tuner.rankallocator
    for allocator in (peft, ours):
        for name, parameter in tiny_deberta.named_parameters():
            if name.endswith(".default") and parameter.requires_grad:
                allocator.exp_avg_ipt[name] = allocator.exp_avg_unc[name] = torch.ones_like(parameter)
    assert sum(map(sum, peft.mask_to_budget(tiny_deberta, 24).values())) == 0
    kept = ours.mask_to_budget(tiny_deberta, 24)
    assert sum(map(sum, kept.values())) == 24 and list(kept.values())[:8] == [[True] * 3] * 8  # the earlier ones


def test_adalora_delta_and_scores_by_hand(tiny_deberta):
    method = adalora(alpha=6)
    go(tiny_deberta, method, start(tiny_deberta, method), range(4))
    layer = method.layers[NAME]
    P, L, Q = (getattr(layer, f"lora_{f}")["default"] for f in "BEA")
    delta = sum(P[:, i : i + 1] * L[i] @ Q[i : i + 1] for i in range(3)) * 6 / (3 + 1e-5)
    x = torch.randn(5, 16, dtype=torch.double)
    torch.testing.assert_close(layer.eval()(x), layer.base_layer(x) + x @ delta.T)
    allocator, scores = method.tuner.rankallocator, []
    for name, layer in method.layers.items():
        s = {f: allocator.exp_avg_ipt[f"{name}.lora_{f}.default"] * allocator.exp_avg_unc[f"{name}.lora_{f}.default"]
             for f in "BEA"}  # fmt: skip
        wide, high = layer.base_layer.in_features, layer.base_layer.out_features
        scores += [float(s["E"][i, 0] + s["A"][i].sum() / wide + s["B"][:, i].sum() / high) for i in range(3)]
    for budget in (24, 7):
        masks = allocator.mask_to_budget(tiny_deberta, budget)
        kept = [flag for mask in masks.values() for flag in mask]
        assert kept == [score >= sorted(scores)[-budget] for score in scores]


def test_adalora_penalty_is_the_plain_loop_and_no_part_of_the_model_loss(tiny_deberta):
    method = adalora(orth_weight=0.3)
    method.prepare(tiny_deberta, STEPS)
    norms = []
    for layer in method.layers.values():
        for gram in (
            layer.lora_A["default"] @ layer.lora_A["default"].T,
            layer.lora_B["default"].T @ layer.lora_B["default"],
        ):
            norms.append(((gram - torch.eye(3)) ** 2).sum().sqrt())
    torch.testing.assert_close(method.extra_loss(), 0.3 * sum(norms) / len(norms))
    batch = tiny_batches(1)[0]
    tiny_deberta.eval()
    out = tiny_deberta(**batch)
    torch.testing.assert_close(out.loss.double(), nn.functional.cross_entropy(out.logits, batch["labels"]))


def test_adalora_counts_pruned_triplets_as_reserve(tiny_deberta):
    method = adalora()
    go(tiny_deberta, method, start(tiny_deberta, method), range(STEPS))
    counts = method.parameters_by_kind(tiny_deberta)
    size = {name: layer.in_features + layer.out_features + 1 for name, layer in method.layers.items()}
    assert counts["update"] == sum(rank * size[name] for name, rank in method.ranks().items())
    assert counts["reserve"] == sum((3 - rank) * size[name] for name, rank in method.ranks().items())


@pytest.mark.parametrize("cut", [3, 15, 24, 25, 26, 33])
def test_adalora_resumes_exactly(tiny_deberta, cut):
    other = copy.deepcopy(tiny_deberta)
    method = adalora()
    optimizer = start(tiny_deberta, method)
    go(tiny_deberta, method, optimizer, range(cut))
    state = copy.deepcopy((method.state_dict(), method.trained_state(tiny_deberta), optimizer.state_dict()))
    go(tiny_deberta, method, optimizer, range(cut, STEPS))
    resumed = adalora()
    resumed_optimizer = start(other, resumed)
    resumed.load_state_dict(state[0])
    other.load_state_dict(state[1], strict=False)
    resumed_optimizer.load_state_dict(state[2])
    go(other, resumed, resumed_optimizer, range(cut, STEPS))
    assert resumed.ranks() == method.ranks() and resumed.allocations == method.allocations
    assert all(torch.equal(a, b) for a, b in zip(tiny_deberta.parameters(), other.parameters(), strict=True))


def test_adalora_derives_its_schedule_near_the_published_shares():
    assert AdaLoRA().schedule(3900) == (557, 6, 1950)
    assert AdaLoRA().schedule(12) == (1, 1, 6)
    assert AdaLoRA(init_warmup=600, interval=1, final_steps=1800).schedule(3900) == (600, 1, 1800)
    assert [AdaLoRA(target_rank=r).peft_config(["a"], 100).init_r for r in (1, 2, 4, 8, 12, 16, 24)] == [
        2, 3, 6, 12, 18, 24, 36,
    ]  # fmt: skip


def test_adalora_refuses_what_cannot_work(tiny_deberta):
    for changes, said in [
        ({"init_warmup": 600, "final_steps": 1800}, "init_warmup 600 + final_steps 1800 must be below the 40"),
        ({"init_warmup": 20, "final_steps": 20}, "must be below the 40 training steps"),
        ({"final_steps": 0}, "final_steps at least 1"),
        ({"interval": 0}, "interval 0 and final_steps at least 1"),
        ({"init_rank": 2}, "`init_rank` 2 must be above `target_rank` 2"),
        ({"target_rank": 0, "init_rank": 1}, "must be at least 1"),
        ({"alpha": "abc"}, "`alpha` must be a number, it is 'abc'"),
        ({"beta1": 1.0}, "`beta1`"),
        ({"dropout": 1.0}, "`dropout`"),
        ({"orth_weight": -1}, "`orth_weight`"),
    ]:
        with naming((changes, said)):
            with pytest.raises(UserError) as error:
                adalora(**changes).prepare(tiny_deberta, STEPS)
            assert said in str(error.value)


# BitFit, adapters


def test_bitfit_trains_every_bias_of_the_encoder_and_the_head_alone(tiny_deberta):
    BitFit().prepare(tiny_deberta, STEPS)
    trained = {name: p.numel() for name, p in tiny_deberta.named_parameters() if p.requires_grad}
    per_layer = 4 * 16 + 16 + 24 + 16 + 16  # q k v o, LayerNorm, two of the FFN, LayerNorm
    around = 2 * 16  # LayerNorms of the embeddings and of the relative positions
    assert sum(n for name, n in trained.items() if name.startswith("deberta.")) == 2 * per_layer + around
    assert all(name.startswith(("pooler.", "classifier.")) or name.endswith(".bias") for name in trained)


def adapters(**changes) -> Adapters:
    given = dict(kinds=TINY_KINDS, matrices=["attention_output", "output"], bottleneck=5)
    return Adapters(**(given | changes))


@pytest.mark.parametrize(("matrices", "count"), [(["attention_output", "output"], 4), (["output"], 2)])
def test_adapters_stand_where_the_papers_put_them_and_count_as_they_should(tiny_deberta, matrices, count):
    method = adapters(matrices=matrices)
    method.prepare(tiny_deberta, STEPS)
    places = [name for name, module in tiny_deberta.named_modules() if isinstance(module, Adapter)]
    assert len(places) == count and all(name.endswith("output.dense") for name in places)
    assert method.parameters_by_kind(tiny_deberta)["update"] == count * (2 * 16 * 5 + 5 + 16)


@pytest.mark.parametrize(
    ("activation", "f"), [("swish", lambda z: z * torch.sigmoid(z)), ("relu", lambda z: z.clamp(min=0))]
)
def test_adapter_by_hand_and_near_identity_at_the_start(activation, f):
    torch.manual_seed(0)
    base = nn.Linear(6, 64)
    adapter = Adapter(base, 5, activation, torch.Generator().manual_seed(0))
    x = torch.randn(3, 6)
    h = base(x)
    z = h @ adapter.down.weight.T + adapter.down.bias
    torch.testing.assert_close(adapter(x), h + f(z) @ adapter.up.weight.T + adapter.up.bias)
    assert (adapter(x) - h).abs().max() < 1e-2 * h.abs().max()
    for linear in (adapter.down, adapter.up):
        assert linear.weight.abs().max() <= 0.02 and linear.weight.std() > 0.007 and not linear.bias.any()


@pytest.mark.parametrize("changes", [{"bottleneck": 0}, {"activation": "tanh"}])
def test_adapters_refuse_what_cannot_work(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        adapters(**changes)


# controls


def grown(model, seed: int, keyed_by: str = "") -> RandomGrowth:
    method = RandomGrowth(
        kinds=TINY_KINDS, target_rank=2, top_h=5, interval=5, init_warmup=5, seed=seed, keyed_by=keyed_by
    )
    go(model, method, start(model, method), range(STEPS))
    return method


def test_random_growth_ends_at_the_budget_scores_nothing_and_depends_on_the_seed(tiny_deberta):
    a, again, b = (grown(copy.deepcopy(tiny_deberta), seed) for seed in (1, 1, 2))
    for method in (a, b):
        assert sum(method.ranks().values()) == 24 and [x.step for x in method.allocations] == [10, 15, 20]
        assert not method.watchers and not method.scores()
    assert a.ranks() == again.ranks() != b.ranks()
    one, other = (grown(copy.deepcopy(tiny_deberta), 1, task) for task in ("stsb", "mrpc"))
    assert one.ranks() != other.ranks()


def finished(folder, model, ranks=None, status="finished") -> str:
    names = list(RandomGrowth(kinds=TINY_KINDS).adapted_matrices(model))
    ranks = dict(zip(names, ranks or [5, 1, 1, 1, 2, 2, 3, 1, 1, 1, 2, 4], strict=True))
    (folder / result_files.FILE_NAME).write_text(json.dumps({"status": status, "ranks": {"start": {}, "last": ranks}}))
    return str(folder)


def grown_run(folder, model, growths: dict[int, list[int]]) -> str:
    """A result file by hand: step -> positions of the matrices that grow by one rank."""
    names = list(RandomGrowth(kinds=TINY_KINDS).adapted_matrices(model))
    added = [{"step": step, "added": {names[i]: 1 for i in grow}, "scores": {}} for step, grow in growths.items()]
    (folder / result_files.FILE_NAME).write_text(json.dumps({"status": "finished", "ranks": {}, "allocations": added}))
    return str(folder)


def histories(model, growths) -> dict[str, tuple[int, ...]]:
    """Matrix -> the steps at which it grew."""
    names = list(RandomGrowth(kinds=TINY_KINDS).adapted_matrices(model))
    return {name: tuple(step for step, added in growths if added.get(name)) for name in names}


def test_permuted_growth_keeps_steps_and_concentration_and_changes_the_place(tiny_deberta, tmp_path):
    growths = {10: [0, 1, 4, 5, 11], 15: [0, 4, 5, 10, 11], 20: [0, 5]}  # 0 to 3, 6 to 9: squares; 4, 10 and 5, 11 not
    pattern = grown_run(tmp_path, tiny_deberta, growths)
    given = json.loads((tmp_path / result_files.FILE_NAME).read_text())["allocations"]
    before = histories(tiny_deberta, [(growth["step"], growth["added"]) for growth in given])
    shapes = {name: tuple(tiny_deberta.get_submodule(name).weight.shape) for name in before}
    found = []
    for seed, task in ((1, "stsb"), (1, "stsb"), (2, "stsb"), (1, "mrpc")):
        model = copy.deepcopy(tiny_deberta)
        settings = dict(kinds=TINY_KINDS, target_rank=2, top_h=5, interval=5, init_warmup=5)
        method = PermutedGrowth(**settings, seed=seed, keyed_by=task, pattern=pattern)
        go(model, method, start(model, method), range(STEPS))
        after = histories(tiny_deberta, [(growth.step, growth.added) for growth in method.allocations])
        assert method.ranks() == {name: 1 + len(steps) for name, steps in after.items()} and not method.scores()
        assert Counter((shapes[n], after[n]) for n in after) == Counter((shapes[n], before[n]) for n in before)
        found.append(after)
    assert found[0] == found[1] and before not in found and found[2] != found[0] != found[3] != found[2]


def test_growths_that_do_not_fit_are_refused(tiny_deberta, tmp_path):
    def said(growths, **changes) -> str:
        pattern = grown_run(tmp_path, tiny_deberta, growths)
        given = dict(kinds=TINY_KINDS, target_rank=2, top_h=5, interval=5, init_warmup=5, pattern=pattern)
        with pytest.raises(UserError) as error:
            PermutedGrowth(**(given | changes)).prepare(copy.deepcopy(tiny_deberta), STEPS)
        return str(error.value)

    fits = {10: [0, 1, 2, 3, 4], 15: [0, 1, 2, 3, 4], 20: [0, 1]}
    assert "rank {0: 12, 10: 17, 15: 22, 20: 24}" in said(fits, top_h=4)
    assert "this run plans {0: 12, 6: 17, 12: 22, 18: 24}" in said(fits, interval=6, init_warmup=1)
    assert "12 matrices" not in said({}) and "is not a finished run with ranks" in said({})
    assert "this model has 2" in said(fits, matrices=["query"])


def fixed(kind, pattern, **changes):
    given = dict(kinds=TINY_KINDS, target_rank=2, init_rank=2, interval=5, init_warmup=5, pattern=pattern)
    return kind(**(given | changes))


@pytest.mark.parametrize("as_file", [False, True])
def test_static_pattern_trains_the_given_ranks_from_scratch(tiny_deberta, tmp_path, as_file):
    pattern = finished(tmp_path, tiny_deberta) + (f"/{result_files.FILE_NAME}" if as_file else "")
    method = fixed(StaticPattern, pattern)
    optimizer = start(tiny_deberta, method)
    assert list(method.ranks().values()) == [5, 1, 1, 1, 2, 2, 3, 1, 1, 1, 2, 4]
    go(tiny_deberta, method, optimizer, range(STEPS))
    assert list(method.ranks().values()) == [5, 1, 1, 1, 2, 2, 3, 1, 1, 1, 2, 4] and not method.allocations
    counts = method.parameters_by_kind(tiny_deberta)
    assert counts["reserve"] == 0
    assert counts["update"] == sum(n * (m.in_features + m.out_features + 1) for n, m in
                                   zip(method.ranks().values(), method.linears.values(), strict=True))  # fmt: skip


def test_static_pattern_leaves_a_matrix_of_rank_zero_alone(tiny_deberta, tmp_path):
    method = fixed(StaticPattern, finished(tmp_path, tiny_deberta, [0, 6, 1, 1, 2, 2, 3, 1, 1, 1, 2, 4]))
    go(tiny_deberta, method, start(tiny_deberta, method), range(3))
    assert list(method.ranks().values()) == [0, 6, 1, 1, 2, 2, 3, 1, 1, 1, 2, 4] and len(method.linears) == 11
    assert type(tiny_deberta.get_submodule(next(iter(method.ranks())))) is nn.Linear


def test_shuffled_pattern_deals_the_same_ranks_by_the_seed(tiny_deberta, tmp_path):
    pattern = finished(tmp_path, tiny_deberta)
    dealt = []
    for seed in (1, 1, 2):
        method = fixed(ShuffledPattern, pattern, seed=seed)
        method.prepare(copy.deepcopy(tiny_deberta), STEPS)
        dealt.append(method.ranks())
    given = json.loads((tmp_path / result_files.FILE_NAME).read_text())["ranks"]["last"]
    assert dealt[0] == dealt[1] != dealt[2] and given not in dealt
    assert all(Counter(ranks.values()) == Counter(given.values()) and list(ranks) == list(given) for ranks in dealt)


def test_patterns_that_do_not_fit_are_refused(tiny_deberta, tmp_path):
    def said(pattern, **changes) -> str:
        with pytest.raises(UserError) as error:
            fixed(StaticPattern, pattern, **changes).prepare(tiny_deberta, STEPS)
        return str(error.value)

    assert "`pattern` is missing" in said(None)
    assert "cannot read ranks from" in said(str(tmp_path))
    assert "status diverged" in said(finished(tmp_path, tiny_deberta, status="diverged"))
    pattern = finished(tmp_path, tiny_deberta)
    assert "total rank of 24, the budget is 48 (4 x 12 matrices)" in said(pattern, target_rank=4, init_rank=4)
    assert "they differ in 10" in said(pattern, matrices=["query"])
    for text in ("[1]", "{}", "no json", '{"status": "finished", "ranks": {"last": {}}}'):
        (tmp_path / result_files.FILE_NAME).write_text(text)
        assert str(tmp_path) in said(str(tmp_path))
