"""Sweeps: which runs there are, what depends on what; a kill or a failure loses nothing and repeats nothing."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from in_process import load
from naming import naming
from warm_python import python

from increlora.errors import UserError
from increlora.glue import config, sweep_plan
from increlora.glue.sweep_engine import Sweep, estimate

SCRIPT = ROOT / "scripts" / "sweep.py"
sweep = load(SCRIPT)

BEST = {"best_of": [0.1, 0.2, 0.3], "split": "holdout", "seed": 40}
STUDY = {
    "about": "for this test",
    "common": {"budget": "r2", "train.learning_rate": BEST},
    "where": {"method=lora": {"method.dropout": 0.5}, "task=rte": {"train.epochs": 7}},
    "runs": [{"task": ["rte", "cola"], "seed": [1, 2], "method": ["lora", "full"]}],
}


def result(score: float, status: str = "finished") -> dict:
    return {
        "status": status,
        "curve": [{"scores": {"holdout": {"score": value}}} for value in (0.99, score)],
        "cost": {"seconds": 10.0},
    }


def test_product_by_hand():
    block = {"a": [1, 2], "b": "x", "c": [3, 4]}
    assert list(sweep_plan.product(block)) == [
        {"a": 1, "b": "x", "c": 3}, {"a": 1, "b": "x", "c": 4}, {"a": 2, "b": "x", "c": 3}, {"a": 2, "b": "x", "c": 4},
    ]  # fmt: skip


def test_every_run_comes_after_those_it_needs_and_none_comes_twice():
    runs = sweep_plan.expand(STUDY, {}, {"device": "cpu"})
    # 8 runs, and 3 trials for each of 4 pairs of task and method
    assert len(runs) == 8 + 12
    for position, run in enumerate(runs):
        assert all(runs.index(need) < position for need in run.needs)
        assert run.settings["device"] == "cpu" and run.settings["budget"] == "r2"
        assert ("method.dropout" in run.settings) == (run.settings["method"] == "lora")
        assert ("train.epochs" in run.settings) == (run.settings["task"] == "rte")
    trials = [run for run in runs if not run.needs]
    assert {run.settings["seed"] for run in trials} == {40}
    assert sorted(run.settings["train.learning_rate"] for run in trials) == sorted([0.1, 0.2, 0.3] * 4)


def test_an_override_chooses_among_values_or_goes_to_every_run():
    chosen, extra = sweep_plan.parted(STUDY, ["task=rte", "seed=1,2", "task.data_dir=x=y"])
    assert chosen == {"task": ["rte"], "seed": ["1", "2"]} and extra == {"task.data_dir": "x=y"}
    assert len(sweep_plan.expand(STUDY, chosen, extra)) == 2 * 2 + 2 * 3
    for wrong, words in (("task=mnli", "rte"), ("seed", "key=value")):
        with pytest.raises(UserError, match=words):
            sweep_plan.parted(STUDY, [wrong])


def test_the_best_trial_is_the_best_at_its_end():
    for scores, best in [((0.5, 0.7, 0.6), 0.2), ((0.7, 0.7, 0.6), 0.1), ((0.5, 0.6, 0.9), 0.2)]:
        with naming((scores, best)):
            runs = sweep_plan.expand(STUDY, {"task": ["rte"], "seed": ["1"], "method": ["lora"]}, {})
            (run,) = (run for run in runs if run.needs)
            for trial, score in zip(run.needs, scores, strict=True):  # one that diverged is never best
                trial.result = result(score, "diverged" if score == 0.9 else "finished")
            assert sweep_plan.final(run, "train.learning_rate") == best


def test_a_value_may_be_chosen_by_the_mean_over_seeds():
    study = {**STUDY, "common": {"train.learning_rate": BEST | {"seed": [40, 41]}}}
    (run,) = (
        run for run in sweep_plan.expand(study, {"task": ["rte"], "seed": ["1"], "method": ["lora"]}, {}) if run.needs
    )
    for trial in run.needs:  # rates .1, .2, .3; alone, seed 40 would choose .3 and seed 41 .1
        rate, seed = trial.settings["train.learning_rate"], trial.settings["seed"]
        trial.result = result({(0.1, 40): 0.1, (0.1, 41): 0.9, (0.2, 40): 0.7, (0.2, 41): 0.8, (0.3, 40): 0.8}.get(
            (rate, seed), 0.5))  # fmt: skip
    assert len(run.needs) == 6 and sweep_plan.final(run, "train.learning_rate") == 0.2


def test_a_run_may_use_the_directory_of_another():
    pattern = {"run_with": {"method": "increlora"}}
    blocks = [{"task": "rte", "seed": [1, 2], "method": "static_pattern", "method.pattern": pattern}]
    runs = sweep_plan.expand({"about": "", "runs": blocks}, {}, {})
    needing = [run for run in runs if run.needs]
    assert [run.settings["seed"] for run in needing] == [1, 2] and len(runs) == 4
    for run in needing:
        (need,) = run.needs
        assert need.settings == {"task": "rte", "seed": run.settings["seed"], "method": "increlora"}
        sweep_plan.resolve(need)
        sweep_plan.resolve(run)
        assert run.overrides[-1] == f"method.pattern={need.directory}" and need.directory.parts[-2:][0] == "rte"
        assert config.load(run.overrides).method.pattern == str(need.directory)


def test_a_run_that_depends_on_another_method_has_what_the_sweep_says_of_that_method():
    where = {
        "method=increlora": {"method.top_h": 3, "method.orth_weight": 0.3},
        "method=permuted_growth": {"method.top_h": 3, "method.pattern": {"run_with": {"method": "increlora"}}},
        "method=increlora task=rte": {"method.top_h": 5},
    }
    block = {"task": ["cola", "rte"], "seed": 1, "method": ["increlora", "permuted_growth"]}
    runs = sweep_plan.expand(
        {"about": "", "common": {"train.learning_rate": BEST}, "where": where, "runs": [block]}, {}, {}
    )
    assert len(runs) == 4 + 2 * 2 * 3  # a permuted growth uses the growth of the same seed and rate
    for run in runs:
        told = run.settings
        assert told["method.top_h"] == (5 if (told["method"], told["task"]) == ("increlora", "rte") else 3)
        for need in run.sources.get("method.pattern", []):
            same = ("task", "seed", "train.learning_rate")
            assert need.settings["method"] == "increlora" and all(need.settings[k] == told[k] for k in same)
    written = [{"seed": 1, "method": "increlora", "method.orth_weight": [0.0, 0.3]}]
    found = sweep_plan.expand({"about": "", "where": where, "runs": written}, {}, {})
    assert [run.settings["method.orth_weight"] for run in found] == [0.0, 0.3]  # a block says it


def test_runs_that_would_share_a_directory_are_refused():
    for name in ("task.data_dir", "backbone.path"):
        sweep = {"about": "", "runs": [{name: ["fold1", "fold2"], "task": "rte", "seed": 1}]}
        with pytest.raises(UserError, match=f"^{name}=fold2: a run with other values of it has the same directory"):
            sweep_plan.expand(sweep, {}, {})
        assert len(sweep_plan.expand(sweep, {name: ["fold2"]}, {})) == 1


def test_what_is_given_on_the_command_line_counts_in_conditions_and_leaves_trials_their_seeds():
    sweep = {
        "about": "", "common": {"task": "stsb", "train.learning_rate": BEST | {"seed": [39, 40]}},
        "where": {"task=stsb": {"train.max_steps": 40}}, "runs": [{"method": ["lora"]}],
    }  # fmt: skip
    runs = sweep_plan.expand(sweep, {}, {"task": "rte", "seed": "41"})
    assert {run.settings["task"] for run in runs} == {"rte"} and not any("train.max_steps" in r.settings for r in runs)
    assert sorted(str(run.settings["seed"]) for run in runs) == ["39"] * 3 + ["40"] * 3 + ["41"]


def test_a_pattern_that_only_other_results_know_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = {"method": "static_pattern", "seed": 1, "method.pattern": {"run_with": {"method": "increlora"}}}
    (source, run) = sweep_plan.expand({"about": "", "runs": [block]}, {}, {})
    sweep_plan.resolve(source)
    source.result = {"status": "finished"}  # as --known has it
    with pytest.raises(
        UserError, match=f"^static_pattern seed 1 needs the run directory {source.directory}; the result"
    ):
        sweep_plan.resolve(run)


def test_values_as_hydra_reads_them():
    values = ["runs/a=b,c=1/seed1", 1e-5, "r2", "données", "it's here", "a&b", "~/x", "C:\\a b\\", "it's\\", "", '"q"']
    for value in values:
        assert config.load([f"settings_from={sweep_plan.quoted(value)}"]).settings_from == value
    assert config.load([f"run_dir={sweep_plan.quoted(None)}"]).run_dir is None


def test_the_time_left_is_that_of_finished_runs_like_it():
    runs = [sweep_plan.Run({"task": task, "method": "lora"}) for task in ("rte", "rte", "cola")]
    queue = Sweep.__new__(Sweep)
    queue.runs, queue.jobs, queue.cluster = runs, 2, None
    assert estimate(runs[1], queue.typical()) is None
    runs[0].state, runs[0].result = "finished", result(0.5)
    assert estimate(runs[1], queue.typical()) == estimate(runs[2], queue.typical()) == 10.0
    assert queue.counts() == "1/3 (10 s left)"


def test_every_run_of_every_sweep_composes():
    for path in sorted((ROOT / "configs" / "sweep").glob("*.yaml")):
        with naming(path):
            described = sweep_plan.read_sweep(path.stem)
            assert path.read_text().startswith(f"# python scripts/sweep.py {path.stem}") and described["about"]
            seen = set()
            for run in sweep_plan.expand(described, {}, {}):
                kind = tuple(str(run.settings.get(key)) for key in ("method", "budget", "experiment", "recipe"))
                if kind not in seen and not run.needs:
                    seen.add(kind)
                    sweep_plan.resolve(run)
            assert seen


def test_directories_and_configurations_are_those_of_hydra():
    """The plan composes few runs and works out the others."""
    tricky = [
        ["seed=3", "settings_from='a = ${seed}'"], ["recipe=null", "seed=4"], ["seed=5", "~recipe"],
        ["task=rte", "method=lora", "recipe=increlora/r8/rte", "method.alpha=3"][:2], ["experiment=study_a", "seed=47"],
        ["experiment=minilm_5_epochs", "task=mrpc", "method=adalora"], ["compat=authors", "seed=41", "compat=null"],
        ["seed=1", "+method.kinds.more=x"], ["task.holdout=0.1", "device=cpu", "seed=9"], ["budget=r8", "seed=000"],
    ]  # fmt: skip
    sampled = []
    for name in ("study_a", "study_b", "study_c", "table1", "table2_ablation", "low_resource", "controls"):
        runs = [run for run in sweep_plan.expand(sweep_plan.read_sweep(name), {}, {}) if not run.needs]
        for run in runs[:: max(1, len(runs) // 3)]:
            sampled.append([f"{key}={sweep_plan.quoted(value)}" for key, value in run.settings.items()])
    for overrides in [*tricky, *sampled]:
        with naming(overrides):
            cfg = config.load(overrides)
            identity = config.identity(cfg, overrides)
            assert sweep_plan.directory(overrides) == config.run_directory(cfg, identity)
            plain = json.loads(json.dumps(config.resolved(cfg)))
            assert sweep_plan.resolved(overrides)[0] == plain


def test_a_wrong_key_is_told_by_the_plan():
    run = sweep_plan.expand({"about": "", "runs": [{"method": "lora", "method.nosuch": 1}]}, {}, {})[0]
    with pytest.raises(UserError, match=r"Could not override 'method.nosuch'"):
        sweep_plan.resolve(run)


def test_bad_sweeps(tmp_path):
    (tmp_path / "odd.yaml").write_text("about: x\nrun: []\n")
    for arguments, words in ((["nosuch"], "there is: controls"), ([str(tmp_path / "odd.yaml")], "a sweep has about")):
        done = subprocess.run([python(), SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") <= 2


BLOCKS = "a list of blocks of override"
DEPENDS = "a value that depends on other runs is"
BAD = {
    "broken YAML": ("about: x\nruns: [{task: rte}\n", "cannot be read as YAML: while parsing a flow sequence"),
    "not UTF-8": (b"about: \xff\nruns: []\n", "cannot be read as YAML: 'utf-8' codec"),
    "a list": ("- about: x\n- runs: []\n", "a sweep has about, runs"),
    "a number": ("3\n", "cannot be read as YAML: Invalid loaded object type"),
    "runs of words": ("about: x\nruns: [task=rte]\n", BLOCKS),
    "runs as one block": ("about: x\nruns: {task: rte}\n", BLOCKS),
    "no runs": ("about: x\nruns:\n", BLOCKS),
    "common as a list": ("about: x\ncommon: [budget=r2]\nruns: []\n", "common is not a mapping of override"),
    "where of a tried value": (
        "about: x\nwhere: {a=1: {b: 2}}\nruns: [{a: {best_of: [1, 2], split: dev, seed: 1}}]\n",
        "is about a, which trials choose",
    ),
    "where as a list": ("about: x\nwhere: [task=rte]\nruns: []\n", "where is not a mapping of override"),
    "where that nothing has": ("about: x\nwhere: {method=lroa: {a: 1}}\nruns: [{method: lora}]\n", "no method=lroa"),
    "where without overrides": ("about: x\nwhere: {task=rte: 3}\nruns: []\n", "where task=rte is not a mapping"),
    "best_of without seed": ("about: x\nruns: [{a: {best_of: [1, 2], split: dev}}]\n", f"a: {DEPENDS}"),
    "best_of without split": ("about: x\nruns: [{a: [1, {best_of: [1, 2], seed: 1}]}]\n", f"a: {DEPENDS}"),
    "best_of one value": ("about: x\ncommon: {a: {best_of: 1, split: dev, seed: 1}}\nruns: []\n", f"a: {DEPENDS}"),
    "best_of no seed": ("about: x\ncommon: {a: {best_of: [1], split: dev, seed: []}}\nruns: []\n", f"a: {DEPENDS}"),
    "best_of nothing": ("about: x\ncommon: {a: {best_of: [], split: dev, seed: 1}}\nruns: []\n", f"a: {DEPENDS}"),
    "run_with words": ("about: x\nwhere: {b=1: {a: {run_with: method=lora}}}\nruns: []\n", f"a: {DEPENDS}"),
    "neither of them": ("about: x\nruns: [{a: {best: [1, 2]}}]\n", f"a: {DEPENDS}"),
}  # fmt: skip


def test_a_bad_file_is_named(tmp_path):
    for content, said in BAD.values():
        with naming((content, said)):
            path = tmp_path / "bad.yaml"
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            with pytest.raises(UserError) as raised:
                sweep_plan.read_sweep(str(path))
            message = str(raised.value)
            assert message.startswith(str(path)) and said in message and "\n" not in message


REFUSED = {
    "--jobs 0": "at least one run",
    "--jobs -1": "at least one run",
    "--known nix": "no such folder",
    "overwrite=true": "a sweep does not run again what is finished; delete",
    "++overwrite=true": "a sweep does not run again what is finished; delete",
    "run_dir=here": "every run of a sweep has a directory of its own; start",
}


def test_what_a_sweep_cannot_do_is_refused(tmp_path, monkeypatch, capsys):
    for arguments, said in REFUSED.items():
        with naming((arguments, said)):
            path = write_sweep(tmp_path, [{"seed": 1}])
            monkeypatch.chdir(tmp_path)
            monkeypatch.setattr(sys, "argv", ["sweep.py", str(path), *arguments.split(), "--dry-run"])
            with pytest.raises(SystemExit) as stop:
                sweep.main()
            error = capsys.readouterr().err
            assert stop.value.code == 2 and error.startswith(f"error: {arguments}: {said}") and error.count("\n") <= 2


def test_what_a_sweep_cannot_do_is_refused_in_its_file_too():
    for block in ({"common": {"overwrite": True}, "runs": [{"seed": 1}]}, {"runs": [{"run_dir": "here"}]}):
        with pytest.raises(UserError, match=r"^(overwrite=True|run_dir=here): "):
            sweep_plan.expand(block, {}, {})


# real runs

SMALL = {
    "backbone": "tiny", "task": "synthetic_entailment", "task.train_size": 200, "task.dev_size": 40, "device": "cpu",
    "train.batch_size": 10, "train.epochs": 1000, "train.max_steps": 120, "train.checkpoint_interval": 5,
    "train.warmup_steps": 5, "tracker": "jsonl",
}  # fmt: skip


def write_sweep(folder: Path, blocks: list[dict], **common) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({"about": "small", "common": SMALL | common, "runs": blocks}))
    return path


def start(path: Path, *arguments: str) -> subprocess.Popen:
    command = [python(), SCRIPT, path, *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, cwd=path.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def held(lock: Path) -> bool:
    """Whether a run still holds its directory."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_stopped_in_the_middle_and_started_again(tmp_path, number):
    path = write_sweep(tmp_path, [{"seed": [1, 2, 3], "method": "lora"}])
    first = start(path)

    def files(name: str) -> list[Path]:
        return sorted(tmp_path.rglob(name))

    def cut_off() -> list[Path]:
        return [f.parent for f in files("checkpoint.safetensors") if not (f.parent / "result.json").exists()]

    wait_for(lambda: files("result.json") and cut_off())
    first.send_signal(number)
    out, _ = first.communicate(timeout=60)
    assert first.returncode == (-9 if number == signal.SIGKILL else 130), out
    (finished,) = files("result.json")
    before = finished.stat().st_mtime_ns
    wait_for(lambda: not any(map(held, files(".lock"))))  # no orphan goes on
    (cut,) = cut_off()
    assert not (cut / "result.json").exists()
    second = start(path)
    out, _ = second.communicate(timeout=500)
    assert second.returncode == 0 and "3 finished" in out, out
    assert finished.stat().st_mtime_ns == before
    assert "continuing from step" in (cut / "sweep.log").read_text()
    assert all(json.loads(file.read_text())["cost"]["steps"] == 120 for file in files("result.json"))
    third = start(path)
    out, _ = third.communicate(timeout=60)
    assert third.returncode == 0 and "3 finished" in out and "finished, last" not in out


def test_a_failure_is_tried_again_and_stops_nothing_else(tmp_path):
    choice = {"best_of": [1e-3, 1e-2], "split": "dev", "seed": 1}
    blocks = [
        {"method": "lora", "seed": 2, "method.rank": 0},  # refused when it is built
        {"method": "lora", "seed": 3, "method.rank": 0, "train.learning_rate": choice},  # its trials fail
        {"method": "lora", "seed": [4], "train.learning_rate": choice},
    ]
    path = write_sweep(tmp_path, blocks, **{"train.max_steps": 2})
    done = start(path, "--jobs", "2")
    out, _ = done.communicate(timeout=500)
    assert done.returncode == 1
    assert "3 finished, 4 failed" in out or "4 failed, 3 finished" in out, out
    assert out.count("failed, will be tried again") == 3 and "error: method.rank must be at least 1" in out
    assert "not run: a run that it needs failed" in out
    assert len(list(tmp_path.rglob("result.json"))) == 3
