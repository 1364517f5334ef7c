# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Figure 4: score against average rank
#
# IncreLoRA and LoRA over budgets. The paper shows RTE and STS-B on DeBERTaV3-base at average ranks 2 to 24;
# `configs/sweep/figure4_budgets.yaml` is that figure and takes a GPU. Study C (`results/studies/study_c.md`) has it at
# MiniLM's size on STS-B, with a learning rate chosen for every method and budget. Scores are those of the last step, on
# dev and held-out examples together where a run was scored on both, as the study's tests take them. One faint point per
# seed, the mean as a full point, its 95 % interval as a line.
#
# The runs: `python scripts/sweep.py study_c task.data_dir=GLUE`, or `figure4_budgets` for the paper's, then
# `python scripts/collect.py runs` and `make notebooks`. Runs of both show as panels of their own.

# %%
import csv

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display

from increlora.analysis import comparison, figures, selection, study_c
from increlora.analysis.looks import BACKBONES, LOOKS, TASKS
from increlora.analysis.tables import interval_text

figures.use_style()
METHODS = ("increlora", "lora")


def of_the_paper(run):
    """Whether a run is one of `figure4_budgets`."""
    growth = "method.top_h=null" in run["run"]["overrides"] or run["run"]["method"] == "lora"
    return growth and run["run"]["backbone"] == "deberta_v3_base" and selection.experiment(run) is None


def of_study_c(run):
    """Whether a run of study C is one of its first part: all of the data, and nothing of the method switched off."""
    share, _, arm = study_c.cells(run)
    return share == "90%" and arm == LOOKS[run["run"]["method"]].label


def average_rank(run):
    """Mean rank of a matrix at the end."""
    return sum(run["ranks"]["last"].values()) / len(run["ranks"]["last"])


def score(run):
    """The last step's, in points: on dev and held-out examples together where the run was scored on both."""
    metrics = run["scores"]["last"]["metrics"]
    return selection.points(run, selection.JOINT if selection.JOINT in metrics else "dev")


loaded = selection.load(METHODS)
of_the_study = study_c.compared(selection.of_experiment(loaded, study_c.EXPERIMENT))
of_the_study = [run for run in of_the_study if run["run"]["seed"] in study_c.SIX]  # Table 2 has two more
grouped = {}  # (backbone, task) -> average rank -> runs
for run in [*filter(of_the_paper, loaded), *filter(of_study_c, of_the_study)]:
    place = grouped.setdefault((run["run"]["backbone"], run["run"]["task"]), {})
    place.setdefault(average_rank(run), []).append(run)
panels = {}
for place, budgets in grouped.items():
    found = {average: selection.by_method(runs) for average, runs in sorted(budgets.items())}
    if compared := {average: runs for average, runs in found.items() if set(runs) == set(METHODS)}:
        panels[place] = compared
if not panels:
    print("No runs yet: python scripts/sweep.py study_c task.data_dir=GLUE; python scripts/collect.py runs")
for (backbone, task), budgets in panels.items():
    for method in METHODS:
        counts = [f"{average:g} (n = {len(found.get(method, ()))})" for average, found in budgets.items()]
        print(f"{backbone}, {TASKS[task]}, {LOOKS[method].label}, average rank: {', '.join(counts)}")

# %%
if panels:
    figure, grid = plt.subplots(1, len(panels), figsize=(3.6 * len(panels) + 1, 3.5), squeeze=False)
    for axes, ((backbone, task), budgets) in zip(grid[0], panels.items(), strict=True):
        for shift, method in ((-0.1, "increlora"), (0.1, "lora")):
            look, means = LOOKS[method], {}
            for place, found in enumerate(budgets.values()):
                if method in found:
                    scores = [score(run) for run in found[method].values()]
                    figures.draw_seeds(axes, place + shift, scores, look, width=0.12)
                    means[place + shift] = sum(scores) / len(scores)
            axes.plot(means.keys(), means.values(), color=look.color, linewidth=1, zorder=1)
        axes.set_xticks(range(len(budgets)), [f"{average:g}" for average in budgets])
        axes.set_xlim(-0.5, len(budgets) - 0.5)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("average rank of a matrix at the end")
        counts = {(method, average): seeds for average, found in budgets.items() for method, seeds in found.items()}
        one = next(iter(next(iter(counts.values())).values()))
        axes.set_ylabel(figures.metric(one))
        steps, name = one["cost"]["steps"], BACKBONES.get(backbone, backbone)
        axes.set_title(f"{TASKS[task]}, {name}, {steps:,} steps\n{selection.seeds_of(counts)}")
    handles = [
        plt.Line2D([], [], color=LOOKS[m].color, marker=LOOKS[m].marker, linewidth=1, label=LOOKS[m].label)
        for m in METHODS
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    figures.save(figure, "figure4_score_against_average_rank")

# %%
rows = []
for (backbone, task), budgets in panels.items():
    for average, found in budgets.items():
        for method, seeds in found.items():
            last, best = [score(run) for run in seeds.values()], selection.scores(seeds, "best").values()
            parameters = [run["parameters"]["last"]["update"] for run in seeds.values()]
            rows.append({
                "backbone": backbone, "task": TASKS[task], "average rank": f"{average:g}",
                "method": LOOKS[method].label, "seeds": len(seeds),
                "update parameters": f"{sum(parameters) / len(parameters):,.0f}",
                "last": f"{sum(last) / len(last):.2f}", "best on dev": f"{sum(best) / len(best):.2f}",
                "95 % interval of last": interval_text(last),
            })  # fmt: skip
if rows:
    display(pd.DataFrame(rows).set_index(["backbone", "task", "average rank", "method"]))

# %% [markdown]
# IncreLoRA minus LoRA on the last step, paired by seed. Below six seeds no two-sided sign-flip test can reach 5 %:
# the interval is all there is to read.

# %%
rows = []
for (backbone, task), budgets in panels.items():
    for average, found in budgets.items():
        scores = {m: {seed: score(run) for seed, run in found.get(m, {}).items()} for m in METHODS}
        if seeds := comparison.common_seeds(scores):
            compared = comparison.compare(scores, *METHODS, seeds)
            rows.append({
                "backbone": backbone, "task": TASKS[task], "average rank": f"{average:g}", "seeds": len(seeds),
                "mean difference": f"{compared.mean:+.2f}",
                "95 % interval": interval_text(compared.differences),
            })  # fmt: skip
if rows:
    display(pd.DataFrame(rows).set_index(["backbone", "task", "average rank"]))

# %% [markdown]
# ## Published
#
# What is known of the paper's Figure 4, at second hand, on RTE with DeBERTaV3-base; it cannot share an axis with the
# runs above.

# %%
with (selection.RESULTS / "paper" / "published.csv").open(encoding="utf-8") as file:
    known = [row for row in csv.DictReader(file) if row["table"] == "Figure 4"]
display(pd.DataFrame(known)[["source", "task", "method", "value", "verified"]].set_index("source"))
