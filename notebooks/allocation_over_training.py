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
# # How the allocation comes about
#
# The rank map of IncreLoRA after each growth, for one run per task (its smallest seed; other seeds grow other
# matrices, see `stability_of_rank_maps`). A frame marks the matrices that have just grown. At most eight maps per
# task are shown, evenly chosen over the growths, with the first and the last among them; where some are left out, a
# frame marks all growth since the map before. The second figure has all seeds: which kinds of matrices the ranks go
# to, step by step.
#
# More runs: `python scripts/sweep.py study task.data_dir=GLUE`, then `python scripts/collect.py runs` and `make
# notebooks`.

# %%
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from increlora.analysis import figures, selection
from increlora.analysis.looks import TASKS

figures.use_style()
panels = selection.panels(("increlora",))
print(selection.source_of(panels))
MAPS = 8

# %%
histories = {}
for task, runs in panels.items():
    seed, run = next(iter(runs["increlora"].items()))
    history = [(step, *figures.rank_map(run, ranks)) for step, ranks in selection.rank_history(run)]
    chosen = sorted(set(np.linspace(0, len(history) - 1, min(MAPS, len(history))).round().astype(int)))
    histories[task] = (seed, [history[index] for index in chosen], len(history) - 1)

highest = max(shown[-1][-1].max() for _, shown, _ in histories.values())
columns = max(len(shown) for _, shown, _ in histories.values())
figure, grid = plt.subplots(
    len(histories), columns, figsize=(1.55 * columns + 0.8, 1.85 * len(histories) + 0.2), squeeze=False,
    sharex=True, sharey=True,
)  # fmt: skip
for row, (task, (seed, shown, growths)) in zip(grid, histories.items(), strict=True):
    before = shown[0][-1]
    for axes, (step, layers, kinds, cells) in zip(row, shown, strict=False):
        image = figures.draw_rank_map(axes, cells, layers, kinds, highest)
        for layer, kind in np.argwhere(cells > before):
            frame = {"fill": False, "edgecolor": "#D55E00", "linewidth": 1.4}
            axes.add_patch(Rectangle((kind - 0.45, layer - 0.45), 0.9, 0.9, **frame))
        axes.set_title(
            f"step {step}: {cells.sum()}" if step else f"start: {cells.sum()}", fontsize=8.5, weight="normal"
        )
        axes.tick_params(labelsize=7)
        before = cells
    for axes in row[len(shown) :]:
        axes.set_visible(False)
    row[0].set_ylabel(f"{TASKS[task]}, seed {seed}\n{growths} growths\nlayer", fontsize=8.5)
figure.colorbar(image, ax=grid, label="rank", shrink=0.5, aspect=25)
figure.supxlabel("kind of matrix; above each map: step and total rank", fontsize=9)
figures.save(figure, "allocation_over_training")

# %% [markdown]
# Ranks added so far by kind of matrix, mean over the seeds. There are as many matrices of each of the six kinds, so
# chance would give them the same.

# %%
COLORS = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#E69F00")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 1)))
figure, grid = plt.subplots(1, len(panels), figsize=(2.4 * len(panels) + 1.4, 3), squeeze=False, sharey=True)
for axes, (task, runs) in zip(grid[0], panels.items(), strict=True):
    seeds = list(runs["increlora"].values())
    added = []
    for run in seeds:
        history = selection.rank_history(run)
        steps = [step for step, _ in history]
        maps = np.array([figures.rank_map(run, ranks)[2].sum(0) for _, ranks in history])
        added.append(maps - maps[0])
    kinds = figures.rank_map(run, run["ranks"]["start"])[1]
    end = steps[-1] + (steps[-1] - steps[-2])
    added = np.array(added)  # (seeds, growths + 1, kinds)
    for kind, (label, color, dashes) in enumerate(zip(kinds, COLORS, DASHES, strict=True)):
        values = added[:, :, kind]
        line = {"color": color, "linestyle": dashes, "linewidth": 2, "label": label}
        axes.step([*steps, end], [*values.mean(0), values[:, -1].mean()], where="post", **line)
    axes.set_title(f"{TASKS[task]}, {selection.seeds_of(runs)}")
    axes.set_xlabel("optimizer steps")
grid[0][0].set_ylabel("ranks added so far")
handles, labels = grid[0][0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside right center")
figures.save(figure, "allocation_by_kind")
