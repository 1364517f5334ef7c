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
# # Figure 5: what advance learning does to the orthogonal penalty
#
# With advance learning the components in reserve learn before they are chosen, so that they are close to orthogonal
# when they become active. Without it they stay at their random start until chosen, and keep the penalty up.
#
# Shown is the penalty of the paper, mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ (Frobenius) over all matrices, the reserve
# included, before its weight of 0.1, at every evaluation of short runs: MiniLM on CoLA, 300 steps
# (`configs/sweep/figure5_short.yaml`). Thin lines: one per seed; thick: their mean. Vertical lines: growth.
#
# The runs: `python scripts/sweep.py figure5_short task.data_dir=GLUE`, then `python scripts/collect.py runs` and
# `make notebooks`. Result files have the penalty along the curve since commit 1e06826; older ones are passed over.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display

from increlora.analysis import figures, selection

figures.use_style()


def penalties(run):
    """(step, penalty) at every evaluation that recorded it."""
    points = [(point["step"], point.get("orthogonal_penalty")) for point in run["curve"]]
    return [(step, value) for step, value in points if value is not None]


runs = [run for run in selection.short_runs("figure 5") if penalties(run)]
arms = {
    label: selection.by_method(r for r in runs if r["config"]["method"]["advance_learning"] is with_it).get(
        "increlora", {}
    )
    for label, with_it in (("with advance learning", True), ("without", False))
}
arms = {label: seeds for label, seeds in arms.items() if seeds}
if len(arms) < 2:
    print("Runs are missing: python scripts/sweep.py figure5_short task.data_dir=GLUE; python scripts/collect.py runs")
for label, seeds in arms.items():
    print(f"{label}: seeds {', '.join(map(str, sorted(seeds)))}")

# %%
LOOKS = {"with advance learning": ("#D55E00", "-"), "without": ("#555555", (0, (5, 2)))}
rows = []
if arms:
    figure, axes = plt.subplots(figsize=(5.6, 3.4))
    for label, seeds in arms.items():
        color, dashes = LOOKS[label]
        curves = np.array([penalties(run) for run in seeds.values()])
        steps, values = curves[0, :, 0], curves[:, :, 1]
        if len(seeds) > 1:
            axes.plot(steps, values.T, color=color, linewidth=0.6, alpha=0.4, linestyle=dashes)
        axes.plot(
            steps, values.mean(0), color=color, linewidth=2.2, linestyle=dashes, label=f"{label} (n = {len(seeds)})"
        )
        rows.append({
            "": label, "seeds": len(seeds), "at the first evaluation": f"{values[:, 0].mean():.3f}",
            "mean over training": f"{values.mean():.3f}", "at the end": f"{values[:, -1].mean():.3f}",
        })  # fmt: skip
    one = next(iter(seeds.values()))
    for number, change in enumerate(one["allocations"]):
        axes.axvline(change["step"], color="#AAAAAA", linewidth=0.8, zorder=0, label=None if number else "growth")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("orthogonal penalty, unweighted")
    axes.set_title(f"CoLA, MiniLM, average rank {one['config']['method']['target_rank']}")
    axes.legend(loc="best")
    figures.save(figure, "figure5_advance_learning")
    display(pd.DataFrame(rows).set_index(""))

# %% [markdown]
# The scores of these runs are those of a start of training, and no ablation of it: the paper's ablation is
# `experiment=no_advance_learning` and its neighbours.
