"""What every method must keep to, whichever it is: a file in configs/method is tested by existing."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_KINDS
from torch import nn

from increlora import surgery
from increlora.errors import UserError
from increlora.glue import config
from increlora.glue.batching import epoch_batches
from increlora.glue.loop import train
from increlora.glue.tracker import Tracker

METHODS = sorted(path.stem for path in (ROOT / "configs" / "method").glob("*.yaml"))
SMALL = [
    "backbone=tiny", "backbone.architecture.initializer_range=0.2", "task=synthetic_entailment", "task.train_size=64",
    "task.dev_size=16", "train.epochs=20", "train.learning_rate=1e-2", "train.warmup_steps=4", "train.eval_interval=20",
    "train.log_interval=1", "train.progress=false", "tracker=jsonl", "device=cpu",
]  # fmt: skip
STEPS = 40
HEAD_PARAMETERS = 32 * 32 + 32 + 32 * 2 + 2
MATRICES = 12


class Losses(Tracker):
    """Keeps the training losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def log(self, step, values, ranks=None) -> None:
        self.losses.append(values["train/loss"])


def compose(name: str, pattern: str, *overrides: str):
    cfg = config.load([*SMALL, f"method={name}", *overrides])
    if "pattern" in cfg.method:
        cfg.method.pattern = pattern
    return cfg


def build(cfg) -> SimpleNamespace:
    parts = SimpleNamespace(**{key: config.build(cfg[key]) for key in ("method", "train", "task", "backbone")})
    parts.tokenizer = parts.backbone.tokenizer()
    parts.data = parts.task.load(parts.tokenizer)
    parts.model = parts.backbone.model(parts.task.num_labels, parts.task.head_dropout)
    return parts


def run(cfg) -> SimpleNamespace:
    """A whole run, and what it was before."""
    made, tracker, seen = build(cfg), Losses(), []
    before = {name: (p, p.detach().clone()) for name, p in made.model.named_parameters()}

    def watch(model, arguments, keywords):
        if model.training:
            seen.append(keywords["input_ids"])

    made.method.prepare(made.model, made.train.total_steps(len(made.data.train)))
    hook = made.model.register_forward_pre_hook(watch, with_kwargs=True)
    outcome = train(made.model, made.method, made.task, made.data, made.train, tracker, made.tokenizer.pad_token_id)
    hook.remove()
    made.model.eval()
    return SimpleNamespace(
        **vars(made),
        cfg=cfg,
        before=before,
        outcome=outcome,
        losses=tracker.losses,
        batches=seen,
        last=outcome.curve[-1],
    )


@pytest.fixture(scope="module")
def pattern(tmp_path_factory) -> str:
    """A result file for the methods that need one: its ranks sum to the budget, its growths fit the schedule."""
    model = config.build(config.load(SMALL).backbone).model(2)
    names = list(surgery.find_matrices(model, TINY_KINDS))
    folder = tmp_path_factory.mktemp("finished")
    ranks = dict(zip(names, [1, 3, 2, 2, 1, 3, 4, 1, 2, 2, 1, 2], strict=True))
    growths = [{"step": step, "added": dict.fromkeys(names[step // 4 - 2 :: 4], 1)} for step in (8, 12, 16, 20)]
    result = {"status": "finished", "ranks": {"last": ranks}, "allocations": growths}
    (folder / "result.json").write_text(json.dumps(result))
    return str(folder)


@pytest.fixture(scope="module", params=METHODS)
def done(request, pattern) -> SimpleNamespace:
    return run(compose(request.param, pattern))


@torch.no_grad()
def outputs(model: nn.Module):
    ids = torch.arange(60, 92).view(4, 8)
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))


def logits(model: nn.Module) -> torch.Tensor:
    return outputs(model).logits


def test_it_trains(done):
    assert done.outcome.status == "finished" and len(done.losses) == STEPS
    assert sum(done.losses[-6:]) < 0.85 * sum(done.losses[:6])


def test_frozen_weights_stay_bit_for_bit_and_trained_ones_move(done):
    frozen = [name for name, (p, _) in done.before.items() if not p.requires_grad]
    assert all(torch.equal(done.before[name][0], done.before[name][1]) for name in frozen)
    assert all(p.grad is None for p, _ in done.before.values() if not p.requires_grad)
    head = [(p, start) for name, (p, start) in done.before.items() if name.startswith(("pooler.", "classifier."))]
    assert head and all(not torch.equal(p, start) for p, start in head)


def test_parameters_are_reported_truly(done):
    """No fewer than have moved, and no more than the tensors hold (a bank keeps rows of zeros for growths to come)."""
    counts, parameters = done.last.parameters, dict(done.model.named_parameters())
    fresh = build(done.cfg)
    fresh.method.prepare(fresh.model, STEPS)
    start = dict(fresh.model.named_parameters())
    moved = sum(int((p != start[name]).sum()) for name, p in parameters.items())
    held = sum(p.numel() for p in parameters.values() if p.requires_grad)
    assert moved <= counts["update"] + counts["reserve"] + counts["head"] <= held
    assert counts["head"] == HEAD_PARAMETERS and (counts["update"] > 0 or not done.last.ranks)
    spare = held - counts["update"] - counts["reserve"] - counts["head"]
    assert counts["total"] == sum(p.numel() for p in parameters.values()) - spare


def test_the_encoder_says_something_else_after_training_exactly_if_a_parameter_of_it_is_counted(done):
    fresh = build(done.cfg).model
    hidden = [outputs(model.base_model).last_hidden_state for model in (fresh, done.model)]
    assert torch.equal(*hidden) == (done.last.parameters["update"] == 0)


def test_it_ends_at_its_budget_as_planned(done):
    fresh = build(done.cfg)
    fresh.method.prepare(fresh.model, STEPS)
    if not done.last.ranks:
        assert fresh.method.planned_ranks() == {} and not done.outcome.allocations
        return
    assert sum(done.last.ranks.values()) == done.cfg.budget.rank * MATRICES
    changes = {a["step"]: sum(a["added"].values()) for a in done.outcome.allocations if sum(a["added"].values())}
    total, counted = sum(done.outcome.start_ranks.values()), {}
    for step, change in changes.items():
        total += change
        counted[step] = total
    assert {0: sum(done.outcome.start_ranks.values())} | counted == fresh.method.planned_ranks()


def test_added_ranks_lead_from_the_first_to_the_last(done):
    ranks = dict(done.outcome.start_ranks)
    for allocation in done.outcome.allocations:
        for name, added in allocation["added"].items():
            assert added != 0
            ranks[name] += added
    assert ranks == done.last.ranks


def test_it_merges_without_changing_outputs_or_says_that_it_cannot(done):
    model, method = copy.deepcopy((done.model, done.method))
    expected = logits(model)
    if not method.can_merge:
        with pytest.raises(UserError, match="cannot be folded"):
            method.merge(model)
        return
    method.merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)
    assert {name for name, _ in model.named_parameters()} == set(done.before)
    assert all(type(m) is nn.Linear for m in surgery.find_matrices(model, TINY_KINDS).values())
    for name, rank in done.last.ranks.items():
        delta = model.get_submodule(name).weight - done.before[f"{name}.weight"][1]
        assert torch.linalg.matrix_rank(delta.double(), atol=1e-5) == rank, name


def test_the_same_seed_gives_the_same_run(done, pattern):
    again = run(compose(done.cfg.method.name, pattern))
    assert again.losses == done.losses

    def points(outcome):
        return [dataclasses.asdict(dataclasses.replace(point, seconds=0.0)) for point in outcome.curve]

    assert points(again.outcome) == points(done.outcome)
    assert again.outcome.allocations == done.outcome.allocations
    other = dict(again.model.named_parameters())
    assert all(torch.equal(p, other[name]) for name, p in done.model.named_parameters())


def test_data_order_and_head_start_depend_on_the_seed_alone(done):
    split, settings = done.data.train, done.train
    order = [b for epoch in range(20) for b in epoch_batches(split.lengths, settings.batch_size, settings.seed, epoch)]
    assert len(done.batches) == len(order) == STEPS
    for batch, indices in zip(done.batches, order, strict=True):
        assert [[t for t in row if t] for row in batch.tolist()] == [split.input_ids[i] for i in indices]
    fresh = done.backbone.model(done.task.num_labels)
    assert all(torch.equal(p, done.before[name][1]) for name, p in fresh.named_parameters())


def test_its_start_draws_from_its_own_stream_and_leaves_the_encoder(done, pattern):
    starts = {}
    for seed in (41, 42):
        made = build(compose(done.cfg.method.name, pattern, f"seed={seed}", "backbone.seed=41"))
        before, state = logits(made.model), torch.get_rng_state()
        made.method.prepare(made.model, STEPS)
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(logits(made.model), before, rtol=0, atol=0.02)  # adapters: nearly
        starts[seed] = dict(made.model.named_parameters())
    new = [name for name in starts[41] if name not in done.before and starts[41][name].requires_grad]
    drawn = [name for name in new if starts[41][name].unique().numel() > 1 and name in starts[42]]
    assert all(not torch.equal(starts[41][name], starts[42][name]) for name in drawn)


def test_state_and_weights_give_the_model_back(done, pattern):
    state, weights = copy.deepcopy((done.method.state_dict(), done.method.trained_state(done.model)))
    assert_plain(state)
    made = build(done.cfg)
    made.method.prepare(made.model, STEPS)
    made.method.load_state_dict(state)
    assert not made.model.load_state_dict(weights, strict=False).unexpected_keys
    assert torch.equal(logits(made.model), logits(done.model))
    assert made.method.ranks() == done.method.ranks() and made.method.scores() == done.method.scores()
    assert made.method.parameters_by_kind(made.model) == done.last.parameters
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (made.model, done.model)]
    assert flags[0] == flags[1]
    assert [vars(a) for a in made.method.allocations] == done.outcome.allocations


def assert_plain(value) -> None:
    """JSON values and tensors only, so that a checkpoint never unpickles a class."""
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            assert_plain(item)
    else:
        assert value is None or type(value) in (bool, int, float, str, torch.Tensor)


def test_metrics_are_numbers_under_known_keys(done):
    for key, value in done.method.metrics().items():
        assert key.startswith(("train/", "rank/", "score/", "budget/")) and type(value) is float


def test_frozen_weights_held_in_bf16_change_no_bit(done, pattern, monkeypatch):
    """Autocast rounds them in every use; here they are rounded once, with the same losses, scores and weights."""
    growth = ["method.top_h=3"] if "top_h" in done.cfg.method else []  # as in the longer run, which a pattern fits
    cfg = compose(done.cfg.method.name, pattern, "precision=bf16", "train.max_steps=24", *growth)
    held = run(cfg)
    monkeypatch.setattr(surgery, "hold_frozen_layers_in", lambda model, dtype: None)
    cast = run(cfg)
    assert held.losses == cast.losses and held.last.scores == cast.last.scores
    assert held.outcome.allocations == cast.outcome.allocations
    trained = [held.method.trained_state(held.model), cast.method.trained_state(cast.model)]
    assert all(torch.equal(a, trained[1][name]) for name, a in trained[0].items())
    assert not any(p.dtype == torch.bfloat16 for p in cast.model.parameters())
    if not all(p.requires_grad for p in held.model.parameters()):
        assert any(p.dtype == torch.bfloat16 for p in held.model.parameters() if not p.requires_grad)
