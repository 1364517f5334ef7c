"""Which runs figures and tables choose, and what they read of them."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from increlora import result_files
from increlora.analysis import selection
from increlora.errors import UserError


def a_run(method="lora", task="cola", seed=41, experiment="minilm_study", budget="r2", **parts):
    overrides = ["precision=bf16"] + ([f"experiment={experiment}"] if experiment else [])
    run = {"backbone": "minilm", "budget": budget, "method": method, "task": task, "seed": seed}
    return {"run": run | {"settings_from": "a test", "overrides": overrides}, **parts}


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """A results folder for runs of our own: call it with them."""
    monkeypatch.setattr(selection, "RESULTS", tmp_path)

    def write(*runs):
        for number, run in enumerate(runs):
            path = tmp_path / "runs" / str(number) / f"seed{run['run']['seed']}.json"
            path.parent.mkdir(parents=True)
            empty = {part: kind() for part, kind in result_files.PARTS.items()} | {"cost": {"seconds": 1.0, "steps": 1}}
            path.write_text(json.dumps(empty | run))

    return write


def test_the_study_comes_before_older_runs_task_by_task(committed):
    committed(
        a_run(task="cola", experiment="minilm_comparison"),
        a_run(task="cola", seed=42),
        a_run(task="mrpc", experiment="minilm_comparison"),
        a_run(task="mrpc", experiment="minilm_5_epochs"),
        a_run(task="rte", experiment=None),
        a_run(task="stsb", budget="r8"),
    )
    shown = selection.panels(["lora"])
    assert list(shown) == ["cola", "mrpc"]
    assert list(shown["cola"]["lora"]) == [42]
    assert selection.experiment(shown["mrpc"]["lora"][41]) == "minilm_comparison"


def test_an_experiment_without_a_needed_method_is_passed_over(committed):
    older = [a_run(method, experiment="minilm_comparison") for method in ("lora", "full")]
    committed(*older, a_run("lora"), a_run("lora", task="mrpc"))
    shown = selection.panels(["lora", "full"], needed=["lora", "full"])
    assert list(shown) == ["cola"] and list(shown["cola"]) == ["lora", "full"]
    assert selection.experiment(shown["cola"]["lora"][41]) == "minilm_comparison"


def test_nothing_to_show_is_said(committed):
    committed(a_run("lora"))
    with pytest.raises(UserError, match="no task has results of adalora"):
        selection.panels(["adalora"])


def test_the_seed_that_chose_learning_rates_is_left_out(committed):
    committed(a_run(seed=40), a_run(seed=41))
    assert [run["run"]["seed"] for run in selection.load()] == [41]


def test_two_runs_of_one_seed_are_refused():
    with pytest.raises(UserError, match="lora on cola has two runs with seed 41 in minilm_study"):
        selection.by_method([a_run(), a_run()])


def test_arms_of_a_seed_that_did_not_run_alike_are_refused():
    def run(method, seed, precision, gpu, **code):
        return a_run(method, seed=seed, config={"train": {"precision": precision}}, code={"gpu": gpu} | code)

    alike = [run("lora", 41, "bf16", "H200"), run("full", 41, "bf16", "H200"), run("lora", 42, "fp32", None)]
    selection.ran_alike(alike)
    other = "cola seed 42 in minilm_study: lora ran in fp32 on CPU and full ran in "
    began_elsewhere = run("full", 42, "fp32", None, machines_of_sessions=["H200", "CPU"])
    for second, told in [
        (run("full", 42, "bf16", None), "bf16 on CPU"), (run("full", 42, "fp32", "H200"), "fp32 on H200"),
        (began_elsewhere, "fp32 on H200 and CPU"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=f"^{other}{told}; "):
            selection.ran_alike([*alike, second])


def test_an_arm_has_one_recipe_and_the_rate_that_its_trials_chose():
    def run(seed, rate, score=0.5, budget="r2", **more):
        made = a_run(seed=seed, budget=budget, config={"train": {"learning_rate": rate}}, status="finished", **more)
        return made | {"curve": [{"scores": {"holdout": {"score": score}}}]}

    trials = [run(45, 1e-3, 280 / 367), run(46, 1e-3, 271 / 367), run(45, 3e-3, 0.5), run(46, 3e-3, 0.9)]
    equal = [run(45, 6e-3, 282 / 367), run(46, 6e-3, 269 / 367)]  # 551 of 734, as 1e-3 has
    selection.one_arm([run(47, 1e-3), run(48, 1e-3)], [*trials, *equal], "lora")
    selection.one_arm([run(47, 6e-3)], [*trials, *equal], "lora")
    assert list(selection.trial_means(selection.by_rate([*equal, *trials], "lora"))) == [1e-3, 3e-3, 6e-3]
    with pytest.raises(UserError, match=r"^lora: the runs in minilm_study have learning rate 0.003, its trials chose "
                                        r"0.001 or 0.006$"):  # fmt: skip
        selection.one_arm([run(47, 3e-3)], [*trials, *equal], "lora")
    selection.one_arm([run(47, 3e-3)], trials[:3], "lora")  # a trial is missing: they have chosen nothing yet
    for other, told in [(run(48, 3e-3), "train.learning_rate=0.001, train.learning_rate=0.003"),
                        (run(48, 1e-3, budget="r8"), "budget=r2, budget=r8")]:  # fmt: skip
        with pytest.raises(UserError, match=f"^lora: the runs of seeds 47 and 48 in minilm_study differ in {told}$"):
            selection.one_arm([run(47, 1e-3), other], [], "lora")
    with pytest.raises(UserError, match=r"^lora at rate 0.001 has two runs with seed 45"):
        selection.by_rate([*trials, trials[0]], "lora")


def test_methods_and_tasks_that_are_not_listed_come_last_under_their_own_names(committed):
    runs = [a_run(method, task=task) for task in ("zebra", "answers", "cola") for method in ("mine", "lora", "full")]
    committed(*runs)
    shown = selection.panels(["mine", "lora", "full"])
    assert list(shown) == ["cola", "answers", "zebra"]
    assert list(shown["zebra"]) == ["lora", "full", "mine"]
    assert selection.source_of({"answers": shown["answers"]}) == "minilm, minilm_study: answers (n = 1 seed)"


def test_counts_of_seeds_in_words():
    runs = {"lora": dict.fromkeys([1, 2, 3], a_run()), "full": {1: a_run()}}
    assert selection.seeds_of(runs) == "n = 1 to 3 seeds"
    assert selection.seeds_of({"full": runs["full"]}) == "n = 1 seed"
    assert selection.source_of({"cola": runs}) == "minilm, minilm_study: CoLA (n = 1 to 3 seeds)"


def test_scores_of_a_protocol_are_in_per_cent():
    runs = {41: a_run(scores={"last": {"score": 0.5}}), 42: a_run(scores={"last": {"score": 1}, "clean": {"score": 0}})}
    assert selection.scores(runs, "last") == {41: 50, 42: 100}
    assert selection.scores(runs, "clean") == {42: 0}


def test_ranks_over_training_follow_growth_and_pruning():
    changes = [{"step": 5, "added": {"a": 2}}, {"step": 9, "added": {"a": -1, "b": -1}}]
    run = a_run(ranks={"start": {"a": 1, "b": 1}}, allocations=changes)
    assert selection.rank_history(run) == [(0, {"a": 1, "b": 1}), (5, {"a": 3, "b": 1}), (9, {"a": 2, "b": 0})]
    assert run["ranks"]["start"] == {"a": 1, "b": 1}


def test_committed_runs_end_where_their_changes_lead():
    committed = selection.load()
    assert len(committed) > 100
    for run in committed:
        assert selection.rank_history(run)[-1][1] == run["ranks"]["last"]


def test_tables_need_no_drawing_and_no_result_needs_torch():
    """Neither matplotlib nor torch is imported: reading results costs the libraries for numbers alone."""
    names = ("benchmark_table", "comparison", "glue_table", "looks", "selection", "study_tables", "tables")
    code = f"""
import sys
from increlora.analysis import {", ".join(names)}
assert selection.load()
assert not {{"torch", "matplotlib", "transformers", "hydra"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
