"""What figures show and how: the runs they choose, means and intervals as drawn, files that are the same every time."""

import itertools
import json
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from conftest import ROOT

from increlora.analysis import comparison, figures
from increlora.errors import UserError

matplotlib.use("agg")
import matplotlib.pyplot as plt

DRAW = """
import sys
import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
from increlora.analysis import figures
figures.use_style()
figure, axes = plt.subplots()
figures.draw_seeds(axes, 1.0, [1.0, 2.0, 4.0], figures.LOOKS["lora"], width=0.1)
axes.fill_between([0, 1], 0, 1)
axes.set_title("$W_q$")
figures.save(figure, sys.argv[1])
assert "torch" not in sys.modules and "pandas" not in sys.modules
"""


def a_run(method="lora", task="cola", seed=41, experiment="minilm_study", budget="r2", **parts):
    overrides = ["precision=bf16"] + ([f"experiment={experiment}"] if experiment else [])
    run = {"backbone": "minilm", "budget": budget, "method": method, "task": task, "seed": seed}
    return {"run": run | {"settings_from": "a test", "overrides": overrides}, **parts}


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """A results folder for runs of our own: call it with them."""
    monkeypatch.setattr(figures, "RESULTS", tmp_path)

    def write(*runs):
        for number, run in enumerate(runs):
            path = tmp_path / "runs" / str(number) / f"seed{run['run']['seed']}.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(run))

    return write


def test_every_method_has_a_look_of_its_own():
    methods = {path.stem for path in (ROOT / "configs" / "method").glob("*.yaml")}
    assert methods == set(figures.LOOKS)
    for a, b in itertools.combinations(figures.LOOKS.values(), 2):
        assert a.color != b.color and a.marker != b.marker and a.label != b.label


def test_published_methods_stay_apart_without_red_and_green():
    # Vienot et al. 1999, deuteranopia, in linear RGB: red and green become the same mixture of both
    published = [figures.LOOKS[name].color for name in ("increlora", "adalora", "lora", "full", "houlsby", "bitfit")]
    linear = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in published]) ** 2.2
    mixed = linear @ np.array([[0.29275, 0.29275, -0.02234], [0.70725, 0.70725, 0.02234], [0, 0, 1]])
    seen = np.clip(mixed, 0, 1) ** (1 / 2.2)
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(a - b) > 0.15


def test_a_saved_figure_is_the_same_in_another_process(tmp_path):
    for name in ("a", "b"):
        environment = {"INCRELORA_RESULTS": str(tmp_path), "PYTHONHASHSEED": "random", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", DRAW, name], cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
    a, b = ((tmp_path / "figures" / f"{name}.svg").read_text() for name in ("a", "b"))
    assert a == b
    assert "<dc:date>" not in a and "Matplotlib v" not in a and str(tmp_path) not in a


def test_a_figure_that_cuts_its_data_off_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    figure, (left, right) = plt.subplots(1, 2, sharey=True)
    left.plot([0, 1], [0, 4])
    left.set_ylim(bottom=0)  # also fixes the top, for both
    right.plot([0, 1], [0, 7])
    with pytest.raises(ValueError, match="fig: an axis from 0 to 4"):
        figures.save(figure, "fig")
    left.set_ylim(0, 8)
    figures.save(figure, "fig")
    assert (tmp_path / "figures" / "fig.svg").exists()
    plt.close(figure)


def test_the_study_comes_before_older_runs_task_by_task(committed):
    committed(
        a_run(task="cola", experiment="minilm_comparison"),
        a_run(task="cola", seed=42),
        a_run(task="mrpc", experiment="minilm_comparison"),
        a_run(task="mrpc", experiment="minilm_5_epochs"),
        a_run(task="rte", experiment=None),
        a_run(task="stsb", budget="r8"),
    )
    shown = figures.panels(["lora"])
    assert list(shown) == ["cola", "mrpc"]
    assert list(shown["cola"]["lora"]) == [42]
    assert figures.experiment(shown["mrpc"]["lora"][41]) == "minilm_comparison"


def test_an_experiment_without_a_needed_method_is_passed_over(committed):
    older = [a_run(method, experiment="minilm_comparison") for method in ("lora", "full")]
    committed(*older, a_run("lora"), a_run("lora", task="mrpc"))
    shown = figures.panels(["lora", "full"], needed=["lora", "full"])
    assert list(shown) == ["cola"] and list(shown["cola"]) == ["lora", "full"]
    assert figures.experiment(shown["cola"]["lora"][41]) == "minilm_comparison"


def test_nothing_to_show_is_said(committed):
    committed(a_run("lora"))
    with pytest.raises(UserError, match="no task has results of adalora"):
        figures.panels(["adalora"])


def test_the_seed_that_chose_learning_rates_is_left_out(committed):
    committed(a_run(seed=40), a_run(seed=41))
    assert [run["run"]["seed"] for run in figures.load()] == [41]


def test_two_runs_of_one_seed_are_refused():
    with pytest.raises(UserError, match="lora on cola has two runs with seed 41 in minilm_study"):
        figures.by_method([a_run(), a_run()])


def test_a_method_without_a_look_is_refused():
    with pytest.raises(UserError, match=r"'mine'.*LOOKS"):
        figures.by_method([a_run("mine")])


def test_short_runs_are_told_by_what_they_are_for(committed):
    meant, other = a_run(experiment=None), a_run(experiment=None)
    meant["run"]["settings_from"], other["run"]["settings_from"] = "figure 4 in 9 steps", "figure 44 in 9 steps"
    committed(meant, other)
    assert figures.short_runs("figure 4") == [meant]


def test_counts_of_seeds_in_words():
    runs = {"lora": dict.fromkeys([1, 2, 3], a_run()), "full": {1: a_run()}}
    assert figures.seeds_of(runs) == "n = 1 to 3 seeds"
    assert figures.seeds_of({"full": runs["full"]}) == "n = 1 seed"
    assert figures.source_of({"cola": runs}) == "minilm, minilm_study: CoLA (n = 1 to 3 seeds)"


def test_scores_of_a_protocol_are_in_per_cent():
    runs = {41: a_run(scores={"last": {"score": 0.5}}), 42: a_run(scores={"last": {"score": 1}, "clean": {"score": 0}})}
    assert figures.scores(runs, "last") == {41: 50, 42: 100}
    assert figures.scores(runs, "clean") == {42: 0}


def test_ranks_over_training_follow_growth_and_pruning():
    changes = [{"step": 5, "added": {"a": 2}}, {"step": 9, "added": {"a": -1, "b": -1}}]
    run = a_run(ranks={"start": {"a": 1, "b": 1}}, allocations=changes)
    assert figures.rank_history(run) == [(0, {"a": 1, "b": 1}), (5, {"a": 3, "b": 1}), (9, {"a": 2, "b": 0})]
    assert run["ranks"]["start"] == {"a": 1, "b": 1}


def test_committed_runs_end_where_their_changes_lead():
    committed = figures.load()
    assert len(committed) > 100
    for run in committed:
        assert figures.rank_history(run)[-1][1] == run["ranks"]["last"]


def test_several_seeds_are_drawn_with_mean_and_interval():
    figure, axes = plt.subplots()
    figures.draw_seeds(axes, 2.0, [1.0, 2.0, 3.0], figures.LOOKS["lora"], width=0.2)
    seeds, interval, mean = axes.collections
    assert seeds.get_offsets().tolist() == [[1.9, 1.0], [2.0, 2.0], [2.1, 3.0]]
    assert mean.get_offsets().tolist() == [[2.0, 2.0]]
    ends = interval.get_segments()[0][:, 1]
    assert ends == pytest.approx([2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5], abs=1e-4)  # t of 2 degrees, SD 1
    plt.close(figure)


def test_one_seed_is_a_point_without_an_interval():
    figure, axes = plt.subplots()
    figures.draw_seeds(axes, 2.0, [1.0], figures.LOOKS["lora"])
    assert len(axes.collections) == 1
    scores = {"increlora": {41: 2.0}, "uniform": {41: 1.0}}
    figures.draw_differences(axes, 0, comparison.compare(scores, "increlora", "uniform"), figures.LOOKS["uniform"])
    assert axes.collections[1].get_facecolor().tolist() == [[1, 1, 1, 1]]
    figures.draw_with_median(axes, 0, [1.0], figures.LOOKS["lora"])
    assert len(axes.collections) == 3
    assert figures.interval_text([1.0]) == "n too small"
    assert figures.interval_text([1.0, 2.0, 3.0]) == "[-0.48, 4.48]"
    plt.close(figure)


def test_cells_of_a_rank_map_are_written_out():
    figure, axes = plt.subplots()
    figures.draw_rank_map(axes, np.array([[1, 2], [0, 4]]), [0, 1], ["q", "k"], 4)
    assert [text.get_text() for text in axes.texts] == ["1", "2", "0", "4"]
    figures.draw_rank_map(axes, np.array([[1.5, 2.0]]), [0], ["q", "k"], 4)
    assert [text.get_text() for text in axes.texts[4:]] == ["1.5", "2.0"]
    plt.close(figure)
