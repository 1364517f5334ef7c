"""The numbers of the tables by hand, on made-up runs."""

import pytest

from increlora.analysis import selection
from increlora.analysis.glue_table import glue
from increlora.analysis.study_tables import ablation, differences, learning_rates, study
from increlora.analysis.tables import Table
from increlora.errors import UserError


def run(method: str, seed: int, last: float, task: str = "stsb", rate: float = 1e-3, metrics=None, **other) -> dict:
    """A made-up result: best is 1 point above last, clean half a point below."""
    metrics = metrics or {"dev": {"score": last, "accuracy": last, "f1": last}}
    points = {"last": last, "best": last + 0.01, "clean": last - 0.005}
    return {
        "status": "finished",
        "run": {"method": method, "seed": seed, "task": task, "budget": "r2", "backbone": "minilm", "overrides": []},
        "config": {"train": {"learning_rate": rate}},
        "scores": {name: {"score": score, "step": 1, "metrics": metrics} for name, score in points.items()},
        "curve": [{"scores": {"holdout": {"score": last}}}],
        **other,
    }


def cells(table, *first: str) -> list[str]:
    """The rest of the row that begins so."""
    (row,) = (row for row in table.rows if tuple(row[: len(first)]) == first)
    return row[len(first) :]


def test_study_by_hand():
    runs = selection.by_method(
        [run("increlora", 1, 0.80), run("increlora", 2, 0.82), run("increlora", 3, 0.84),
         run("lora", 1, 0.79), run("lora", 2, 0.80), run("lora", 3, 0.84, status="diverged")]
    )  # fmt: skip
    made = study("some", {"stsb": runs})
    # SD of 80, 82, 84 is 2; t(.975, 2) = 4.3027, 4.3027 * 2 / sqrt(3) = 4.968
    expected = ["82.00 ± 2.00 (3)", "83.00 ± 2.00 (3)", "81.50 ± 2.00 (3)", "[77.03, 86.97]", "0", "0.001"]
    assert cells(made["some"], "STS-B", "IncreLoRA") == expected
    assert cells(made["some"], "STS-B", "LoRA")[4] == "1"
    # differences 1, 2, 0: mean 1, SD 1, 4.3027 / sqrt(3) = 2.484; of 8 sign flips 4 reach |mean| (one is 0)
    last, p, seeds, _, best, clean = cells(made["some_differences"], "STS-B", "LoRA")
    assert (last, p, seeds, best, clean) == ("+1.00 [-1.48, +3.48]", "0.500", "3", "+1.00", "+1.00")


def test_a_method_and_a_task_that_are_not_listed_are_tabulated_under_their_own_names():
    runs = [run(method, 1, 0.8, "answers") for method in ("mine", "increlora")]
    made = study("some", {"answers": selection.by_method(runs)})["some"]
    assert [row[:3] for row in made.rows] == [["answers", name, "80.00 (1)"] for name in ("IncreLoRA", "mine")]
    assert [row[:2] for row in learning_rates("some", runs).rows] == [row[:2] for row in made.rows]


def test_summary_by_hand():
    runs = selection.by_method(
        [run("increlora", seed, score) for seed, score in ((1, 0.80), (2, 0.82), (3, 0.84))]
        + [run("random_growth", seed, score) for seed, score in ((1, 0.79), (2, 0.80), (3, 0.84))]
    )
    table = study("some", {"stsb": runs, "cola": selection.by_method([run("uniform", 1, 0.5, "cola")])})["some_summary"]
    assert table.columns == ["task", "IncreLoRA", "minus random growth [95 %]", "minus uniform ranks [95 %]", "seeds"]
    # the differences of test_study_by_hand; uniform ranks have no run on STS-B, IncreLoRA has none on CoLA
    assert table.rows == [["STS-B", "82.00 ± 2.00 (3)", "+1.00 [-1.48, +3.48]", "", "3"]]


def test_seeds_that_only_one_method_has_are_not_compared():
    runs = selection.by_method([run("increlora", 1, 0.8), run("increlora", 2, 0.9), run("lora", 2, 0.85)])
    assert cells(differences("some", {"stsb": runs}), "STS-B", "LoRA")[:3] == ["+5.00", "1.000", "1"]


def test_learning_rates_by_hand():
    trials = [run("lora", 40, score, rate=rate) for rate, score in ((3e-4, 0.7), (1e-3, 0.9), (3e-3, 0.99))]
    trials[2]["status"] = "diverged"
    assert cells(learning_rates("some", trials), "STS-B", "LoRA") == [
        "0.0003: 70.00", "0.001: **90.00**", "0.003: -inf", "",
    ]  # fmt: skip
    trials += [run("lora", 41, score, rate=rate) for rate, score in ((3e-4, 0.98), (1e-3, 0.7), (3e-3, 0.99))]
    assert cells(learning_rates("some", trials), "STS-B", "LoRA") == [  # means over two seeds
        "0.0003: **84.00**", "0.001: 80.00", "0.003: -inf", "yes",
    ]  # fmt: skip


VALUES = {"mnli_m": 90, "mnli_mm": 92, "sst2": 95, "cola": 70, "qqp_acc": 91, "qqp_f1": 89, "qnli": 94, "rte": 85,
          "mrpc": 90, "stsb": 91}  # fmt: skip
PUBLISHED = [
    {"table": "Table 1", "method": "LoRA r=2", "params": "0.33M", "task": task, "value": str(value)}
    for task, value in VALUES.items()
]


def test_glue_by_hand():
    mnli = {"dev_matched": {"accuracy": 0.91}, "dev_mismatched": {"accuracy": 0.9}}
    qqp = {"dev": {"accuracy": 0.92, "f1": 0.88, "score": 0.9}}
    ours = [run("lora", 1, 0.9, "mnli", metrics=mnli), run("lora", 1, 0.9, "qqp", metrics=qqp),
            run("lora", 1, 0.84, "rte"), run("lora", 2, 0.86, "rte"), run("adalora", 1, 0.1, "rte")]  # fmt: skip
    table = glue(ours, PUBLISHED)
    paper = dict(zip(table.columns[2:], cells(table, "LoRA r=2 0.33M", "published"), strict=True))
    # (91 + 95 + 70 + 90 + 94 + 85 + 90 + 91) / 8 and (90 + 95 + 70 + 91 + 94 + 85 + 90 + 91) / 8
    assert (paper["average, both"], paper["average, plain"]) == ("88.25", "88.25")
    start = [row[0] for row in table.rows].index("LoRA r=2 0.33M")
    last, best, gap, clean = (dict(zip(table.columns, row, strict=True)) for row in table.rows[start + 1 : start + 5])
    assert [row["number"] for row in (last, best, gap, clean)] == ["last", "best", "best − published", "clean"]
    assert (best["mnli_m"], best["mnli_mm"]) == ("91.00 (1)", "90.00 (1)")
    assert (best["qqp_acc"], best["qqp_f1"]) == ("92.00 (1)", "88.00 (1)")
    assert best["rte"] == "85.00 ± 1.41 (2)" and best["average, both"] == "" and best["cola"] == ""
    assert (gap["mnli_m"], gap["qqp_f1"], gap["rte"]) == ("+1.00", "-1.00", "+0.00")


def test_ablation_by_hand():
    full, raw = run("increlora", 1, 0.8), run("increlora", 1, 0.7)
    raw["run"] |= {"overrides": ["experiment=raw_growth"]}
    table = ablation([full, raw])
    assert cells(table, "minilm", "r2", "STS-B", "IncreLoRA")[0] == "80.00 (1)"
    assert cells(table, "minilm", "r2", "STS-B", "raw_growth")[0] == "70.00 (1)"
    assert ablation([full]).rows == []
    # the same seed at another budget, and with a setting of another sweep, is something else
    others = run("increlora", 1, 0.9), run("increlora", 1, 0.1)
    others[0]["run"] |= {"budget": "r8"}
    others[1]["run"] |= {"overrides": ["method.top_h=null"]}
    assert ablation([full, raw, *others]).rows == table.rows


def test_what_would_count_twice_or_is_of_another_sweep_is_not_mixed_in():
    published = run("lora", 1, 0.9, "rte")
    published["run"] |= {"overrides": ["precision=bf16"]}
    low_resource = run("lora", 2, 0.5, "rte")
    low_resource["run"] |= {"overrides": ["precision=bf16", "task.train_fraction=0.01"]}
    assert selection.is_published(published) and not selection.is_published(low_resource)
    with pytest.raises(UserError, match="lora on rte has two runs with seed 1"):
        glue([published, run("lora", 1, 0.8, "rte")], PUBLISHED)


def test_markdown_and_latex():
    table = Table("per cent: 5 %", ["a_b", "c"], [["**1**", "2 ± 3 & −4"]])
    assert table.markdown() == "per cent: 5 %\n\n| a_b | c |\n| --- | --- |\n| **1** | 2 ± 3 & −4 |\n"
    assert table.latex().splitlines()[1:6] == [
        r"\caption{per cent: 5 \%}", r"\begin{tabular}{ll}", r"\toprule", r"a\_b & c \\", r"\midrule",
    ]  # fmt: skip
    assert r"1 & 2 $\pm$ 3 \& $-$4 \\" in table.latex()
