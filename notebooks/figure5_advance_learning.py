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
# when they become active. Without it they stay at their random start until chosen.
#
# Shown is the penalty of the paper, mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ (Frobenius) over all matrices, before its weight,
# every 20 steps. The left panel takes all components, the reserve included, as the paper does. There the frozen
# reserves of the run without advance learning keep the penalty up, though they are in no product. So the right panel
# takes the active components alone: what the model uses. Thin lines: one per seed; thick: their mean. Vertical lines:
# growth.
#
# The runs are the last part of study C (`results/studies/study_c.md`), description only. More of them:
# `python scripts/sweep.py study_c task.data_dir=GLUE`, then `python scripts/collect.py runs` and `make notebooks`.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display

from increlora.analysis import figures, selection

figures.use_style()


def penalties(run, of="orthogonal_penalty"):
    """(step, penalty) at every evaluation that recorded it."""
    points = [(point["step"], point.get(of)) for point in run["curve"]]
    return [(step, value) for step, value in points if value is not None]


runs = [
    run
    for run in selection.load(["increlora"])
    if selection.experiment(run) == "study_c" and "train.eval_interval=20" in run["run"]["overrides"]
]
arms = {
    label: selection.by_method(r for r in runs if r["config"]["method"]["advance_learning"] is with_it).get(
        "increlora", {}
    )
    for label, with_it in (("with advance learning", True), ("without", False))
}
arms = {label: seeds for label, seeds in arms.items() if seeds}
if len(arms) < 2:
    print("Runs are missing: python scripts/sweep.py study_c task.data_dir=GLUE; python scripts/collect.py runs")
for label, seeds in arms.items():
    print(f"{label}: seeds {', '.join(map(str, sorted(seeds)))}")

# %%
LOOKS = {"with advance learning": ("#D55E00", "-"), "without": ("#555555", (0, (5, 2)))}
PARTS = {
    "orthogonal_penalty": "all components, as in the paper",
    "orthogonal_penalty_active": "active components alone",
}
rows = []
if arms:
    figure, both = plt.subplots(1, 2, figsize=(8.6, 3.4))
    one = next(iter(next(iter(arms.values())).values()))
    growths = [change["step"] for change in one["allocations"]]
    for axes, (part, title) in zip(both, PARTS.items(), strict=True):
        for label, seeds in arms.items():
            color, dashes = LOOKS[label]
            curves = np.array([penalties(run, part) for run in seeds.values()])
            steps, values = curves[0, :, 0], curves[:, :, 1]
            axes.plot(steps, values.T, color=color, linewidth=0.6, alpha=0.4, linestyle=dashes)
            axes.plot(
                steps, values.mean(0), color=color, linewidth=2.2, linestyle=dashes, label=f"{label} (n = {len(seeds)})"
            )
            after = values[:, np.isin(steps, [step + 20 for step in growths])]  # the evaluation that follows a growth
            rows.append({
                "penalty of": title, "": label, "seeds": len(seeds), "20 steps after a growth": f"{after.mean():.3f}",
                "mean over training": f"{values.mean():.3f}", "at the end": f"{values[:, -1].mean():.3f}",
            })  # fmt: skip
        for number, step in enumerate(growths):
            axes.axvline(step, color="#AAAAAA", linewidth=0.8, zorder=0, label=None if number else "growth")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel("optimizer steps")
        axes.set_title(title)
    both[0].set_ylabel("orthogonal penalty, unweighted")
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figures.save(figure, "figure5_advance_learning")
    display(pd.DataFrame(rows).set_index(["penalty of", ""]))
