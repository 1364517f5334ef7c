"""The loop on tiny models: steps, evaluation, skipped batches, divergence, accumulation, bf16."""

import copy
import json
import math
import random

import pytest
import torch
from conftest import TINY_KINDS, tiny_batches
from naming import naming

from increlora import groups
from increlora.algorithm import IncreLoRA
from increlora.errors import UserError
from increlora.glue.evaluate import evaluate, predict
from increlora.glue.loop import make_optimizer, take_step, train
from increlora.glue.settings import Settings, warn_of_bf16
from increlora.glue.tasks import Split, Task, TaskData
from increlora.glue.tracker import Tracker
from increlora.groups import set_learning_rates
from increlora.method import Method

TASK = Task(
    name="parity", fields=["text"], labels=["even", "odd"], metrics=["accuracy"], primary="accuracy", max_length=16
)


def split(name: str, size: int, seed: int) -> Split:
    """Random token rows of different lengths; the label is whether the first token is odd."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (size,), generator=generator).tolist()
    rows = [torch.randint(4, 50, (n,), generator=generator).tolist() for n in lengths]
    return Split(name, rows, None, [row[0] % 2 for row in rows])


def data(train_size: int = 100, **more: Split) -> TaskData:
    evaluation = {"dev": split("dev", 37, 1), **more}
    sizes = {"train": train_size} | {name: len(s) for name, s in evaluation.items()}
    return TaskData(split("train", train_size, 0), evaluation, "made up", sizes, "0", dict.fromkeys(sizes, 0))


def settings(**changes) -> Settings:
    given = dict(
        learning_rate=5e-3, batch_size=10, epochs=3, warmup_steps=4, eval_interval=7, log_interval=5, device="cpu",
        progress=False, eval_batch_size=8,
    )  # fmt: skip
    return Settings(**(given | changes))


def increlora(**changes) -> IncreLoRA:
    return IncreLoRA(**(dict(kinds=TINY_KINDS, target_rank=2, top_h=5, interval=4, init_warmup=4) | changes))


def run(model, method, folder, given=None, made=None):
    tracker = Tracker()
    tracker.start(folder, {"seed": 41}, {"method": {"kinds": TINY_KINDS}})
    made, given = made or data(), given or settings()
    method.prepare(model, given.total_steps(len(made.train)))
    outcome = train(model, method, TASK, made, given, tracker)
    tracker.finish(outcome.status, {})
    return outcome, [json.loads(line) for line in tracker.path.read_text().splitlines()]


def test_a_run_evaluates_every_interval_and_at_the_end(tiny_deberta, tmp_path):
    outcome, lines = run(tiny_deberta, increlora(), tmp_path)
    assert outcome.status == "finished" and outcome.skipped_steps == 0
    assert [e.step for e in outcome.curve] == [7, 14, 21, 28, 30]  # 10 batches x 3 epochs
    assert outcome.curve[-1].epoch == pytest.approx(3)
    assert sum(outcome.curve[-1].ranks.values()) == 24 and sum(outcome.start_ranks.values()) == 12
    assert outcome.cost["steps"] == 30 and outcome.cost["tokens"] > outcome.cost["padded_tokens"] > 0
    logged = [line["step"] for line in lines if "train/loss" in line]
    assert logged == [5, 10, 15, 20, 25, 30]
    by_matrix = [line["step"] for line in lines if any(key.startswith("score/") for key in line)]
    assert by_matrix == [7, 9, 13, 14, 17, 21, 28, 30]  # where the run is evaluated, and after a growth
    assert all(("rank/" in " ".join(line)) == ("score/" in " ".join(line)) for line in lines)
    grown = {line["step"]: sum(line["ranks"].values()) for line in lines if "ranks" in line}
    assert grown == {9: 17, 13: 22, 17: 24}  # growth happens within steps 8, 12, 16


def test_best_takes_the_earliest_of_equals_and_its_own_ranks(tiny_deberta, tmp_path):
    outcome, _ = run(tiny_deberta, increlora(), tmp_path)
    scores = [e.scores["dev"]["score"] for e in outcome.curve]
    best = outcome.best("dev")
    assert best is outcome.curve[scores.index(max(scores))]


def test_training_lowers_the_loss_for_full_fine_tuning_too(tiny_deberta, tmp_path):
    outcome, lines = run(tiny_deberta, Method(), tmp_path, settings(epochs=15, learning_rate=2e-3))
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert outcome.start_ranks == {} and outcome.curve[-1].parameters["reserve"] == 0


def test_prediction_is_in_the_order_of_the_split_and_batch_size_does_not_matter(tiny_deberta):
    made = data()
    dev = made.evaluation["dev"]
    a, loss_a = predict(tiny_deberta, dev, TASK, settings(eval_batch_size=1))
    b, loss_b = predict(tiny_deberta, dev, TASK, settings(eval_batch_size=16))
    assert torch.equal(a, b) and loss_a == pytest.approx(loss_b)
    one_by_one = [tiny_deberta(torch.tensor([row])).logits.argmax().item() for row in dev.input_ids]
    assert a.tolist() == one_by_one
    accuracy = sum(p == y for p, y in zip(one_by_one, dev.labels, strict=True)) / len(dev)
    assert evaluate(tiny_deberta, TASK, made, settings())["dev"]["accuracy"] == pytest.approx(accuracy)


def test_the_penalty_never_enters_a_reported_loss(tiny_deberta, tmp_path):
    other = copy.deepcopy(tiny_deberta)
    lines = [
        run(model, increlora(orth_weight=weight), tmp_path / str(weight), settings(log_interval=1))[1]
        for model, weight in ((tiny_deberta, 0.0), (other, 1000.0))
    ]
    assert lines[0][0]["train/loss"] == lines[1][0]["train/loss"]  # the first step: same weights
    assert max(line["train/loss"] for line in lines[1] if "train/loss" in line) < 10


def test_accumulation_gives_the_same_decisions_and_scores(tiny_deberta, tmp_path):
    outcomes = [
        run(copy.deepcopy(tiny_deberta), increlora(), tmp_path / str(k), settings(accumulation=k))[0] for k in (1, 2, 5)
    ]
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0].allocations, other.allocations, strict=True):
            assert a["added"] == b["added"] and a["step"] == b["step"]
            assert list(a["scores"].values()) == pytest.approx(list(b["scores"].values()), rel=1e-4)


def test_the_same_seed_gives_the_same_run(tiny_deberta, tmp_path):
    outcomes = [run(copy.deepcopy(tiny_deberta), increlora(dropout=0.1), tmp_path / name)[0] for name in "ab"]
    assert [e.scores for e in outcomes[0].curve] == [e.scores for e in outcomes[1].curve]
    assert outcomes[0].allocations == outcomes[1].allocations


class Poison(torch.nn.Module):
    """A classifier whose output is not finite in chosen training forwards."""

    def __init__(self, model, bad: set[int]):
        super().__init__()
        self.model, self.bad, self.count = model, bad, 0

    def forward(self, **batch):
        output = self.model(**batch)
        if self.training:
            if self.count in self.bad:
                output.logits = output.logits * math.inf
            self.count += 1
        return output


def test_non_finite_steps_are_skipped_counted_and_cost_no_growth(tiny_deberta, tmp_path):
    kinds = {name: f"model\\.{pattern}" for name, pattern in TINY_KINDS.items()}
    poisoned = Poison(tiny_deberta, {0, 8, 9, 14})
    outcome, lines = run(poisoned, increlora(kinds=kinds), tmp_path)
    assert outcome.status == "finished" and outcome.skipped_steps == 4 and poisoned.count == 34
    assert [a["step"] for a in outcome.allocations] == [8, 12, 16]
    assert sum(outcome.curve[-1].ranks.values()) == 24
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    assert lines[-2]["train/skipped_steps"] == 4


def test_thirty_runs_with_non_finite_steps_at_random_all_finish_within_the_budget(tiny_deberta, tmp_path):
    kinds = {name: f"model\\.{pattern}" for name, pattern in TINY_KINDS.items()}
    small = data(60)
    for seed in range(30):
        moments = random.Random(seed)
        bad = {moments.randrange(24) for _ in range(moments.randrange(1, 9))}
        poisoned = Poison(copy.deepcopy(tiny_deberta), bad)
        outcome, _ = run(poisoned, increlora(kinds=kinds), tmp_path / str(seed), settings(epochs=4), small)
        assert outcome.status == "finished" and outcome.cost["steps"] == 24
        assert outcome.skipped_steps == len([b for b in bad if b < poisoned.count])
        assert sum(outcome.curve[-1].ranks.values()) == 24
        assert [a["step"] for a in outcome.allocations] == [8, 12, 16]
        assert all(math.isfinite(v) for a in outcome.allocations for v in a["scores"].values())


def test_scores_are_free_of_the_loss_scale(tiny_deberta):
    scores = []
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        model, method = copy.deepcopy(tiny_deberta), increlora()
        method.prepare(model, 30)
        optimizer = make_optimizer(model, method, settings())
        for step, batch in enumerate(tiny_batches(4)):
            set_learning_rates(optimizer, step, 30, settings().warmup_steps)
            report = take_step(step, [batch], lambda b, m=model: m(**b).loss, method, optimizer, settings(), scaler)
            assert report.taken
        scores.append(method.scores())
    assert list(scores[1].values()) == pytest.approx(list(scores[0].values()), rel=1e-6)
    assert all(score > 0 for score in scores[0].values())


def test_a_model_that_stays_non_finite_ends_as_diverged(tiny_deberta, tmp_path):
    kinds = {name: f"model\\.{pattern}" for name, pattern in TINY_KINDS.items()}
    poisoned = Poison(tiny_deberta, set(range(10, 1000)))
    outcome, _ = run(poisoned, increlora(kinds=kinds), tmp_path, settings(max_skipped=6))
    assert outcome.status == "diverged" and outcome.skipped_steps == 6 and outcome.cost["steps"] == 10
    assert [e.step for e in outcome.curve] == [7, 10]  # where it stayed has a score too


def test_a_run_that_diverges_at_once_has_the_score_of_its_start(tiny_deberta, tmp_path):
    kinds = {name: f"model\\.{pattern}" for name, pattern in TINY_KINDS.items()}
    poisoned = Poison(tiny_deberta, set(range(1000)))
    outcome, _ = run(poisoned, increlora(kinds=kinds), tmp_path, settings(max_skipped=6))
    assert outcome.status == "diverged" and [e.step for e in outcome.curve] == [0]
    assert 0 <= outcome.curve[0].scores["dev"]["accuracy"] <= 1


def test_bf16_autocast_trains_and_reaches_the_budget(tiny_deberta, tmp_path):
    outcome, _ = run(tiny_deberta.float(), increlora(), tmp_path, settings(precision="bf16"))
    assert outcome.status == "finished" and sum(outcome.curve[-1].ranks.values()) == 24
    assert all(p.dtype == torch.float32 for p in tiny_deberta.parameters() if p.requires_grad)


def test_a_holdout_split_is_evaluated_beside_dev(tiny_deberta, tmp_path):
    outcome, lines = run(tiny_deberta, increlora(), tmp_path, made=data(holdout=split("holdout", 11, 5)))
    assert list(outcome.curve[0].scores) == ["dev", "holdout"]
    assert any("eval/holdout/accuracy" in line and "eval/accuracy" in line for line in lines)


def test_impossible_settings_are_refused():
    for changes, said in [
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16"),
        ({"accumulation": 3}, "must divide `batch_size`"),
        ({"epochs": 0}, "`epochs` must be above 0"),
        ({"device": "quantum"}, "device must be auto, cpu"),
        ({"device": "mps"}, "device must be auto, cpu"),
        ({"learning_rate": -1.0}, "`learning_rate` must be above 0, it is -1.0"),
        ({"learning_rate": math.nan}, "`learning_rate` must be a number, it is nan"),
        ({"learning_rate": "abc"}, "`learning_rate` must be a number, it is 'abc'"),
        ({"batch_size": "abc"}, "`batch_size` must be a whole number, it is 'abc'"),
        ({"accumulation": 2.0}, "`accumulation` must be a whole number, it is 2.0"),
        ({"max_steps": -3}, "`max_steps` must be above 0, it is -3"),
        ({"max_steps": 0}, "`max_steps` must be above 0, it is 0"),
        ({"eval_interval": 0}, "above 0, it is 0 (train.warmup_steps, if nothing else is given)"),
        ({"max_steps": "all"}, "`max_steps` must be a whole number or null, it is 'all'"),
        ({"weight_decay": -1}, "`weight_decay` must not be negative, it is -1"),
        ({"warmup_steps": -1}, "`warmup_steps` must not be negative, it is -1"),
        ({"progress": "no"}, "`progress` must be true or false, it is 'no'"),
    ]:
        with naming((changes, said)):
            with pytest.raises(UserError) as error:
                settings(**changes).torch_device  # noqa: B018
            assert said in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_absent_is_refused():
    with pytest.raises(UserError, match="0 GPUs"):
        settings(device="cuda").torch_device  # noqa: B018
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        settings(precision="fp16")


def test_bf16_on_a_processor_without_it_is_told(caplog, monkeypatch):
    for capability, precision, told in [("AVX2", "bf16", 1), ("AVX2", "fp32", 0), ("AVX512", "bf16", 0)]:
        with naming((capability, precision)):
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
            caplog.clear()
            warn_of_bf16.cache_clear()
            for _ in range(2):  # said once
                settings(precision=precision, device="cpu")
            assert caplog.text.count("this processor has no matrix products in bf16") == told


def test_steps_of_a_run():
    assert settings(batch_size=32, epochs=50).total_steps(2490) == 3900
    assert settings(batch_size=32, epochs=0.5).total_steps(3668) == 58
    assert settings(batch_size=32, epochs=5, max_steps=20).total_steps(2490) == 20


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")  # each makes a GPU wait


@pytest.mark.parametrize("step", [0, 6, 7])  # not scored, scored, scored by two
def test_a_step_reads_the_device_once(tiny_deberta, monkeypatch, step):
    method, given = increlora(interval=8, init_warmup=8, scoring_window=3), settings(max_steps=100, epochs=100)
    method.prepare(tiny_deberta, 100)
    method.order.next = step  # as if the steps before had been taken
    optimizer = make_optimizer(tiny_deberta, method, given)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    reads = []
    for name in READS:
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, _name=name, _original=original, **k: (reads.append(_name), _original(self, *a, **k))[1],
        )

    def loss_of(batch):
        before = len(reads)
        loss = tiny_deberta(**batch).loss
        del reads[before:]  # what transformers reads in its forward is not ours
        return loss

    take_step(step, tiny_batches(2), loss_of, method, optimizer, given, scaler)
    assert reads == ["tolist"]


def test_gradients_are_not_clipped_where_no_norm_is_given(tiny_deberta):
    models = [tiny_deberta, copy.deepcopy(tiny_deberta), copy.deepcopy(tiny_deberta)]
    norms = []
    for model, limit in zip(models, (None, 1e9, 1e-3), strict=True):
        method, given = Method(), settings(max_grad_norm=limit)
        method.prepare(model, 10)
        optimizer = torch.optim.SGD(groups.parameter_groups(method, model, 0.0), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        norms.append(
            take_step(
                0, tiny_batches(1), lambda b, m=model: m(**b).loss, method, optimizer, given, scaler
            ).gradient_norm
        )
    same, free, clipped = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(same, free) and not torch.allclose(same, clipped) and norms[0] == norms[1] == norms[2]
