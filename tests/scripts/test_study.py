"""What a study says from its result files alone, and which runs it asks for next; the simulation of its rule."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from increlora import result_files
from increlora.analysis import comparison, decision, selection, study_c
from increlora.analysis.sequential import HELPS, HURTS, SAME, Plan
from increlora.errors import UserError
from increlora.glue import config, sweep_plan

STUDIES = sorted((ROOT / "configs" / "study").glob("*.yaml"))


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


study_decision, simulation = script("study_decision"), script("simulate_rule")
PLAN = Plan(
    about="a test", experiment="trial", method="increlora", controls=["random_growth", "uniform"], split="dev+holdout",
    seeds={"stsb": 30, "mrpc": 18}, first_seed=47, tuning_seeds=[45, 46], expected_sd={"stsb": [0.1], "mrpc": [0.1]},
    standard_error=1.0, most=1.0, margin=0.3,
)  # fmt: skip


def write(folder: Path, task: str, method: str, seed: int, score: float, rate: float = 1e-3, **changes) -> None:
    run = {
        "run": {"task": task, "method": method, "seed": seed, "budget": "r2", "overrides": ["experiment=trial"]},
        "code": {"gpu": None},
        "status": "finished",
        "config": {"train": {"learning_rate": rate, "precision": "fp32"}, "method": {}},
        "scores": {
            "last": {"score": 0.1, "step": 1, "metrics": {"dev": {"score": 0.1}, "dev+holdout": {"score": score}}}
        },
        "curve": [{"step": 1, "scores": {"holdout": {"score": rate}}}],  # the highest rate is chosen
    }
    path = folder / f"{task}-{method}-{rate}" / f"seed{seed}.json"
    path.parent.mkdir(exist_ok=True, parents=True)
    empty = {part: kind() for part, kind in result_files.PARTS.items()} | {"cost": {"seconds": 1.0, "steps": 1}}
    path.write_text(json.dumps(empty | run | changes))


def study(folder: Path, better: dict[str, float], seeds: range) -> None:
    """Runs of all methods: IncreLoRA is better than a control by so many points, with an SD of .3."""
    random = np.random.default_rng(0)
    for task in PLAN.seeds:
        for seed in (45, 46, *seeds):
            for rate in (1e-3, 3e-3) if seed < 47 else (3e-3,):
                ours = 0.8 + 0.02 * random.standard_normal()
                write(folder, task, "increlora", seed, ours, rate)
                for control, points in better.items():
                    noise = 0.3 * random.standard_normal()
                    write(folder, task, control, seed, ours - (points + noise) / 100, rate)


def lines(folder: Path) -> list[str]:
    return list(study_decision.report(PLAN, decision.read(PLAN, result_files.load_runs(folder))))


def test_before_the_first_run_it_asks_for_the_first_look(tmp_path):
    assert lines(tmp_path)[1:] == [
        "pilot: not complete; the runs that choose learning rates are part of the first look",
        "next:",
        "python scripts/sweep.py trial task=stsb seed=$(seq -s, 47 56) method=increlora,random_growth,uniform "
        "task.data_dir=GLUE --jobs 2",
        "python scripts/sweep.py trial task=mrpc seed=$(seq -s, 47 52) method=increlora,random_growth,uniform "
        "task.data_dir=GLUE --jobs 2",
    ]


def test_a_look_decides_what_it_can_and_asks_for_the_rest(tmp_path):
    study(tmp_path, {"random_growth": 1.0, "uniform": 0.2}, range(47, 57))
    found = lines(tmp_path)
    assert (
        "against random_growth: helps, look 1 of 3" in found
        and "against uniform: not decided yet, look 1 of 3" in found
    )
    assert found[found.index("next:") + 1].endswith(
        "task=stsb seed=$(seq -s, 47 66) method=increlora,uniform task.data_dir=GLUE --jobs 2"
    )
    write(tmp_path, "stsb", "random_growth", 57, 0.0, 3e-3)  # what comes after a look does not change it
    write(tmp_path, "stsb", "increlora", 57, 0.9, 3e-3)
    assert lines(tmp_path) == found
    (tmp_path / "mrpc-uniform-0.003" / "seed48.json").unlink()
    assert "against uniform: no look yet" in lines(tmp_path)


def test_a_study_ends_by_its_rule_and_says_what_it_counted(tmp_path):
    study(tmp_path, {"random_growth": -1.0, "uniform": 0.0}, range(47, 77))
    write(tmp_path, "mrpc", "lora", 47, 0.5)  # of no comparison
    found = lines(tmp_path)
    assert found[-1] == "the study has ended by its rule"
    assert "against random_growth: hurts, look 1 of 3" in found
    assert any(line.startswith("against uniform: does not help, look ") for line in found)
    assert "  pairs more than 10 points apart: none" in found


def test_the_mean_and_the_count_of_far_pairs_by_hand(tmp_path):
    study(tmp_path, {"random_growth": 1.0, "uniform": 0.2}, range(47, 57))
    for seed in range(47, 57):
        write(tmp_path, "stsb", "increlora", seed, 0.5 + seed / 1000, 3e-3)
        write(tmp_path, "stsb", "uniform", seed, 0.5 + seed / 1000 - (0.001 if seed > 47 else 0.2), 3e-3)
    found = lines(tmp_path)
    assert any(line.startswith("  stsb: +2.09 [") and line.endswith("10 seeds") for line in found)  # (20 + 9 * .1) / 10
    assert "  pairs more than 10 points apart: stsb 1" in found


def test_the_tables_and_the_verdicts_say_the_same(tmp_path):
    nothing = decision.progress(PLAN, decision.read(PLAN, []))
    assert decision.tables(PLAN, nothing, []) == {} and decision.verdict(nothing, "uniform") == "undecided"
    study(tmp_path, {"random_growth": 1.0, "uniform": 0.0}, range(47, 77))
    runs = result_files.load_runs(tmp_path)
    now = decision.progress(PLAN, decision.read(PLAN, runs))
    rows = {row[0]: row[1:] for row in decision.tables(PLAN, now, runs)["trial_outcomes"].rows}
    assert rows["random growth"][:2] == ["helps", "1 of 3"] and rows["uniform ranks"][0] == "does not help"
    assert rows["random growth"][4].endswith("(10)") and rows["random growth"][5].endswith("(6)")
    found = lines(tmp_path)
    mean = next(line for line in found[found.index("against random_growth: helps, look 1 of 3") :] if "mean" in line)
    assert rows["random growth"][2] in mean
    assert all(any(cell.removesuffix(" (10)") in line for line in found) for cell in rows["random growth"][3:5])
    words = {"random_growth": "supported", "uniform": "no effect"}
    assert {control: decision.verdict(now, control) for control in words} == words


def test_readme_says_of_study_a_what_its_runs_say():
    plan = Plan.of(config.read_study("study_a"), "study_a")
    now = decision.progress(plan, decision.read(plan, result_files.load_runs(ROOT / "results" / "runs")))
    states = {state.control: state for state in now.states}
    assert {control: state.outcome for control, state in states.items()} == {
        "random_growth": SAME, "permuted_growth": SAME, "uniform": HURTS,
    }  # fmt: skip
    used = states["uniform"].used
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    seeds = [len(used[task]) for task in ("stsb", "sst2", "mrpc")]
    assert "(STS-B, SST-2 and MRPC with {}, {} and {} paired seeds)".format(*seeds) in page
    assert f"growth at random scores the same within {plan.margin} points" in page
    last = states["uniform"].looks[-1]
    low, high = last.interval(plan.bounds()[0][0])
    assert f"equal ranks from the start score {-last.mean:.2f} [{-high:.2f}, {-low:.2f}] points *more*" in page


@pytest.fixture(scope="module")
def runs() -> list[dict]:
    """The committed runs of study C."""
    return selection.of_experiment(result_files.load_runs(ROOT / "results" / "runs"), study_c.EXPERIMENT)


def test_readme_says_of_figure_4_what_its_runs_say(runs):
    study = study_c.Study(runs)
    over_all, falling = study_c.outcomes(study, "Figure 4")
    assert over_all.word == falling.word == "supported"
    by_budget = {budget: list(study.over_lora(budget=budget).values()) for budget in ("r1", "r2", "r4", "r8", "r16")}
    assert max(by_budget, key=lambda budget: np.mean(by_budget[budget])) == "r1"
    found = comparison.interval(over_all.values, method="t")
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    number = f"{np.mean(over_all.values):.2f} [{found.low:.2f}, {found.high:.2f}]"
    assert f"by {number} points over r2 to r16: supported" in page
    repeats = result_files.load_runs(ROOT / "results" / "repeats")
    again, again_falling = study_c.outcomes(study_c.Study(study_c.with_repeats(runs, repeats)), "Figure 4")
    assert (again.word, again_falling.word) == ("supported", "undecided")
    told = f"(p = {falling.p:.3f}), and undecided if all of them come from one processor (p = {again_falling.p:.3f})"
    assert told.replace("0.", ".") in page
    claims = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    said = f"the first test stays supported and the second is undecided (p = {again_falling.p:.3f})"
    assert claims.count(said.replace("0.", ".")) == 2  # a row for each test


def test_readme_says_of_table_2_what_its_runs_say(runs):
    found = {outcome.question: outcome for outcome in study_c.outcomes(study_c.Study(runs), "Table 2")}
    assert {question: outcome.word for question, outcome in found.items()} == {
        "orthogonality": "undecided", "advance learning": "no effect", "restart warmup": "no effect",
    }  # fmt: skip
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(found["orthogonality"].values) == 8 and "(eight seeds) the score is the same within" in page
    assert f"within {study_c.MARGIN} points without advance learning and without restart warmup" in page


def test_readme_says_of_little_data_what_its_runs_say(runs):
    study = study_c.Study(runs)
    first, second = study_c.outcomes(study, "low resource")
    assert first.word == second.word == "undecided"  # the second is not made after the first
    over = list(study.over_lora(data=0.04).values())
    below, around = -np.mean(over), comparison.interval(over, method="t")
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    number = f"{below:.1f} [{-around.high:.1f}, {-around.low:.1f}]"
    assert f"on 2 % of train (115 examples) the mean is {number} points *below* LoRA's" in page
    found = comparison.interval(first.values, method="t")
    told = f"{-np.mean(first.values):.2f} points *smaller* on 2 % than on 50 % [{found.low:.2f}, {found.high:.2f}]"
    assert told in (ROOT / "results" / "README.md").read_text(encoding="utf-8")


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    write(tmp_path, "stsb", "uniform", 47, 0.5)
    write(tmp_path / "copy", "stsb", "uniform", 47, 0.6)
    with pytest.raises(UserError, match="stsb uniform has two runs with seed 47"):
        lines(tmp_path)
    on_dev = {"last": {"score": 0.5, "step": 1, "metrics": {"dev": {"score": 0.5}}}}
    write(tmp_path / "other", "stsb", "uniform", 47, 0.5, scores=on_dev)
    with pytest.raises(UserError, match=r"^stsb uniform 47: no score on dev\+holdout"):
        lines(tmp_path / "other")
    write(tmp_path / "mixed", "stsb", "uniform", 47, 0.5)
    write(tmp_path / "mixed", "stsb", "increlora", 47, 0.5, code={"gpu": "H200"})
    with pytest.raises(UserError, match="stsb seed 47 in trial: increlora ran in fp32 on H200 and uniform ran in"):
        lines(tmp_path / "mixed")


def test_one_typed_rate_for_all_arms_is_refused(tmp_path):
    study(tmp_path, {"random_growth": 1.0, "uniform": 0.2}, range(47, 50))
    write(tmp_path, "stsb", "uniform", 50, 0.5, 1e-3)
    with pytest.raises(
        UserError, match=r"^stsb uniform: the runs of seeds 50 and 47 in trial differ in train.learning_ra"
    ):
        lines(tmp_path)


def test_a_diverged_run_ends_only_the_control_that_needs_it(tmp_path):
    study(tmp_path, {"random_growth": 0.1, "uniform": 0.1}, range(47, 57))
    grown = {"learning_rate": 3e-3, "precision": "fp32"}
    for path in tmp_path.rglob("stsb-uniform-0.003/seed*.json"):  # as permuted growth does
        made = json.loads(path.read_text())
        path.write_text(json.dumps(made | {"config": {"train": grown, "method": {"pattern": "a run of IncreLoRA"}}}))
    for rate, seed in ((0.001, 45), (0.003, 50)):
        path = tmp_path / f"stsb-increlora-{rate}" / f"seed{seed}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "diverged"}))
        (tmp_path / f"stsb-uniform-{rate}" / f"seed{seed}.json").unlink()
    found = lines(tmp_path)
    assert "against uniform: the next look cannot be: a run of increlora that it needs has diverged" in found
    assert "against uniform: undecided" in found and "against random_growth: not decided yet, look 1 of 3" in found
    assert [line.split("method=")[1].split()[0] for line in found if line.startswith("python")] == [
        "increlora,random_growth"
    ] * 2
    (tmp_path / "mrpc-random_growth-0.003" / "seed45.json").unlink()  # one that only was not run yet
    assert lines(tmp_path)[1].startswith("pilot: not complete")


def test_a_pilot_without_spread_is_refused(tmp_path):
    study(tmp_path, {"random_growth": 0.1, "uniform": 0.1}, range(47, 48))
    for path in tmp_path.rglob("mrpc-*/seed4[56].json"):
        made = json.loads(path.read_text())
        made["scores"]["last"]["metrics"]["dev+holdout"]["score"] = 0.68
        path.write_text(json.dumps(made))
    with pytest.raises(UserError, match="differences of mrpc do not vary over the tuning seeds"):
        lines(tmp_path)


def test_the_simulation_finds_what_is_there_and_errs_as_rarely_as_the_plan_says():
    plan = Plan.of(config.read_study("study_a"), "study_a")
    sd = {"stsb": 0.4, "sst2": 0.5, "mrpc": 0.76}
    none, _, wrong = simulation.simulate(plan, 0.0, 0.0, sd, 1000, controls=3)
    assert wrong.any(0).mean() <= 0.05 and np.array_equal(wrong, (none == HELPS) | (none == HURTS))
    assert np.mean(none == SAME) > 0.9
    half, look, wrong = simulation.simulate(plan, 0.5, 0.0, sd, 1000)
    assert np.mean(half == HELPS) > 0.95 and not wrong.any() and set(np.unique(look)) <= {1, 2, 3}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_is_a_plan_whose_sweep_has_its_runs(path):
    plan = Plan.of(config.read_study(path.stem), path.stem)
    described = sweep_plan.read_sweep(plan.experiment)
    runs = [run for run in sweep_plan.expand(described, {}, {}) if run.settings["seed"] not in plan.tuning_seeds]
    for task, seeds in plan.seeds.items():
        wanted = set(range(plan.first_seed, plan.first_seed + int(seeds * plan.most)))
        for method in (plan.method, *plan.controls):
            there = {r.settings["seed"] for r in runs if (r.settings["task"], r.settings["method"]) == (task, method)}
            assert there == wanted
    assert path.read_text().startswith(f"# python scripts/study_decision.py {path.stem}")
