"""The benchmarks run and report everything that has a bar; of their numbers only counts are asserted here."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_KINDS, tiny_batches
from in_process import load
from torch import nn
from warm_python import python

from baselines.authors import Authors
from increlora.algorithm import IncreLoRA
from increlora.glue import machine

benchmark = load(ROOT / "scripts" / "benchmark.py")


def measured(tmp_path, script, *arguments):
    """What a script wrote and what it printed."""
    command = [python(), ROOT / "scripts" / script, "--backbone", "tiny", *arguments]
    done = subprocess.run([*command, "--json", tmp_path / "out.json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "out.json").read_text()), done.stdout


def test_every_arm_is_measured_in_every_shape(tmp_path):
    arguments = ["--shapes", "2x8", "3x4", "--repeats", "2", "--rank", "3", "--no-memory"]
    result, printed = measured(tmp_path, "benchmark.py", *arguments)
    assert list(result["shapes"]) == ["2x8", "3x4"]
    for of in result["shapes"].values():
        assert all(len(values) == 2 and min(values) > 0 for values in of["seconds"].values())
        assert {"adalora", "houlsby", "pfeiffer", "bitfit", "full", "increlora, not scoring", "increlora, scoring",
                "increlora, after growth", "authors, growing", "peft, scoring / increlora",
                "peft, not scoring / increlora", "peft, after growth / increlora",
                "our loop / bare loop", "recipe RTE r2",
                "recipe MNLI r2", "growth event / step"} <= set(of["ratios"])  # fmt: skip
    assert "| increlora, scoring |" in printed and "| 2 x 8 | 3 x 4 |" in printed


def test_bf16_is_measured_too(tmp_path):
    arguments = ["--precision", "bf16", "--shapes", "2x8", "--repeats", "1", "--methods", "increlora", "--no-memory"]
    result, _ = measured(tmp_path, "benchmark.py", *arguments)
    assert {"evaluation increlora, merged", "lora, weights cast"} <= set(result["shapes"]["2x8"]["seconds"])


def test_peak_memory_of_an_arm(tmp_path):
    result, _ = measured(tmp_path, "benchmark.py", "--shapes", "2x8", "--repeats", "1", "--methods", "lora")
    assert result["shapes"]["2x8"]["memory"].keys() == {"lora"} and result["shapes"]["2x8"]["memory"]["lora"] > 50


def test_operations_do_not_depend_on_ranks(tmp_path):
    result, printed = measured(tmp_path, "benchmark.py", "--launch", "--repeats", "1")
    of = result["shapes"]["1x4"]
    counts = of["operations"]
    assert (
        counts["increlora r2"] == counts["increlora r8"] == counts["increlora r8, growing"] == counts["increlora r24"]
    )
    assert counts["increlora r8"] < counts["increlora r8, scoring"]
    assert of["growths"] == {
        "increlora r2": 1, "increlora r8": 7, "increlora r8, growing": 7, "increlora r8, scoring": 7,
        "increlora r24": 23,
    }  # fmt: skip
    # A and B of 12 matrices; pooler and classifier have a weight and a bias each
    assert of["tensors"]["lora"] == 2 * 12 + 4
    assert "| increlora r24 |" in printed


def test_counted_are_operations_that_touch_data():
    layer, x = nn.Linear(4, 3), torch.ones(2, 4)
    with benchmark.CountOperations() as forward:
        loss = layer(x).sum()
    assert forward.count == 2  # addmm, sum; the transpose is a view
    with benchmark.CountOperations() as backward:
        loss.backward()
    assert backward.count == 3  # ones_like; the weight's product, the bias's sum
    with benchmark.CountOperations() as nothing:
        torch.empty(3), x.view(-1).detach(), torch.empty_like(x), x.t(), x.new_empty(2), x.expand(2, 2, 4)
    assert nothing.count == 0


def test_ranks_are_spread_as_by_scores(tiny_deberta):
    method = IncreLoRA(kinds=TINY_KINDS, target_rank=8, top_h=1, **benchmark.GROWTH)
    method.prepare(tiny_deberta, benchmark.STEPS)
    benchmark.grow_to(3, method)
    ranks = list(method.ranks().values())
    assert sum(ranks) == 3 * len(ranks) and len(method.allocations) == 2 * len(ranks)
    assert sum(rank > 1 for rank in ranks) > len(ranks) / 2 and max(ranks) < 12


def test_the_authors_arithmetic_gives_the_same_loss_and_gradients(tiny_deberta):
    (batch,) = tiny_batches(1)
    batch["labels"] = batch["labels"].long()
    found = []
    for kind in (IncreLoRA, Authors):
        method = kind(kinds=TINY_KINDS, target_rank=3, top_h=5, **benchmark.GROWTH)
        model = copy.deepcopy(tiny_deberta)
        method.prepare(model, benchmark.STEPS)
        benchmark.grow_to(2, method)
        for group in method.bank.all_groups:
            if group.lambda_ is not None:
                nn.init.constant_(group.lambda_, 0.5)
        loss = model(**batch).loss + method.extra_loss()
        loss.backward()
        found.append({"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


def test_whole_runs_and_frozen_weights(tmp_path):
    arguments = ["--task", "synthetic_entailment", "--methods", "increlora", "--steps", "20"]
    result, printed = measured(tmp_path, "benchmark_memory.py", *arguments)
    run = result["runs"]["increlora"]
    assert run["peak_memory_mb"] > 50 and run["steps"] == 20 and run["growths"] > 1
    linear, everything = result["frozen"]["frozen weights of linear layers"], result["frozen"]["frozen weights"]
    assert linear["bf16"] == pytest.approx(linear["fp32"] / 2)
    assert everything["fp32"] - everything["bf16"] == pytest.approx(linear["fp32"] / 2)
    assert "| peak of a run, increlora, MB |" in printed


def test_many_results_are_collected_and_tabulated_beside_the_repository(capsys, monkeypatch):
    script = load(ROOT / "scripts" / "benchmark_results.py")
    monkeypatch.setattr(sys, "argv", ["benchmark_results.py", "--results", "3"])
    before = sorted((ROOT / "results").rglob("*"))
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["scripts/collect.py", "3", "results:"], ["scripts/tables.py", "3", "results:"],
    ]  # fmt: skip
    assert all(float(line.split()[-2]) > 10 for line in lines[1:])  # MB
    assert sorted((ROOT / "results").rglob("*")) == before


def test_a_measurement_says_what_it_ran_on_without_folders():
    about = machine.describe(["/a/b/benchmark.py", "--data", "/x/glue", "--json=/y/z.json"], "cpu")
    assert about["command"] == "python scripts/benchmark.py --data glue --json=z.json"
    assert about["torch"] == torch.__version__ and about["threads"] == torch.get_num_threads() and about["processor"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--shapes", "8"], "examples x tokens"), (["--launch", "--shapes", "1x4", "2x4"], "one shape")],
)
def test_what_cannot_be_measured_is_refused(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit):
        benchmark.parse()
    assert said in capsys.readouterr().err
