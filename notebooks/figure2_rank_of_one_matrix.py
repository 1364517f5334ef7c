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
# # Figure 2: the rank of one matrix over training
#
# The paper's argument for growing: AdaLoRA starts every matrix at 1.5 times the average rank and prunes, so no matrix
# can end above where it started. IncreLoRA starts at rank 1 and has no such cap.
#
# Shown is the matrix that ends with the highest mean rank under IncreLoRA, the case in which a cap would matter most,
# and the same matrix under AdaLoRA. Thin lines: one per seed; thick: their mean. The table counts how many matrices
# end above the cap.
#
# More runs: `python scripts/sweep.py study task.data_dir=GLUE`, then `python scripts/collect.py runs` and `make
# notebooks`.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display

from increlora.analysis import figures, selection
from increlora.analysis.looks import LOOKS, TASKS

figures.use_style()
METHODS = ("increlora", "adalora")
panels = selection.panels(METHODS, needed=METHODS)
print(selection.source_of(panels))


# %%
def ranks_at(run, matrix, steps):
    """Rank of a matrix at each of these steps."""
    changes = [(step, ranks[matrix]) for step, ranks in selection.rank_history(run)]
    when, rank = map(np.array, zip(*changes, strict=True))
    return rank[np.searchsorted(when, steps, side="right") - 1]


def most_grown(runs):
    """The matrix with the highest mean rank at the end; of equals the first in the model."""
    return max(runs[0]["ranks"]["last"], key=lambda name: sum(run["ranks"]["last"][name] for run in runs))


def cap(seeds):
    """The rank at which every matrix starts."""
    return max(next(iter(seeds.values()))["ranks"]["start"].values())


def words(matrix):
    """`layer 3, intermediate.dense` of a module's name."""
    layer, _, rest = matrix.partition(".layer.")[2].partition(".")
    return f"layer {layer}, {rest}"


figure, grid = plt.subplots(1, len(panels), figsize=(2.6 * len(panels) + 1.2, 3.1), squeeze=False, sharey=True)
rows = []
for axes, (task, runs) in zip(grid[0], panels.items(), strict=True):
    matrix = most_grown(list(runs["increlora"].values()))
    for method in METHODS:
        look, seeds = LOOKS[method], list(runs[method].values())
        steps = np.arange(seeds[0]["cost"]["steps"] + 1)
        ranks = np.array([ranks_at(run, matrix, steps) for run in seeds])
        if len(seeds) > 1:
            axes.step(steps, ranks.T, where="post", color=look.color, linewidth=0.7, alpha=0.35)
        axes.step(steps, ranks.mean(0), where="post", color=look.color, linewidth=2.2, label=look.label)
        above = [sum(rank > cap(runs["adalora"]) for rank in run["ranks"]["last"].values()) for run in seeds]
        highest = max(max(run["ranks"]["last"].values()) for run in seeds)
        rows.append({
            "task": TASKS[task], "method": look.label, "seeds": len(seeds), "matrix": words(matrix),
            "its final rank, mean": f"{ranks[:, -1].mean():.2f}", "highest rank of any matrix": highest,
            "matrices above AdaLoRA's cap, mean": f"{np.mean(above):.2f} of {len(seeds[0]['ranks']['last'])}",
        })  # fmt: skip
    dashes = {"linestyle": (0, (4, 3)), "linewidth": 1.2, "color": LOOKS["adalora"].color}
    axes.axhline(cap(runs["adalora"]), label="AdaLoRA's cap: the rank it starts at", **dashes)
    axes.set_title(f"{TASKS[task]}, {selection.seeds_of(runs)}\n", loc="left")
    axes.text(0, 1.02, words(matrix), transform=axes.transAxes, fontsize=8, color="#444444")
    axes.set_xlabel("optimizer steps")
grid[0][0].set_ylabel("rank of the matrix")
grid[0][0].set_ylim(bottom=0)
grid[0][0].yaxis.get_major_locator().set_params(integer=True)
handles, labels = grid[0][0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside upper center", ncols=3)
figures.save(figure, "figure2_rank_of_one_matrix")

# %%
display(pd.DataFrame(rows).set_index(["task", "method"]))
