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
# # Figure 6: where the ranks end
#
# The rank of every matrix at the end of training, layer by kind of matrix, under IncreLoRA (which grows) and AdaLoRA
# (which prunes); the paper shows this for SST-2. Every cell is the mean over the seeds; the maps of a figure share one
# scale, and all methods the same total rank. How much of such a map is chance is the question of
# `stability_of_rank_maps`.
#
# More runs: `python scripts/sweep.py study_b task.data_dir=GLUE`, then `python scripts/collect.py runs` and `make
# notebooks`.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display

from increlora.analysis import base_size, figures, selection
from increlora.analysis.looks import LOOKS, SIX_KINDS, TASKS

figures.use_style()
METHODS = ("increlora", "adalora")


def mean_maps(panels):
    """(task, method) -> layers, kinds, and the mean over seeds of the ranks at the end."""
    maps = {}
    for task, runs in panels.items():
        for method, seeds in runs.items():
            laid_out = [figures.rank_map(run, run["ranks"]["last"]) for run in seeds.values()]
            maps[task, method] = (*laid_out[0][:2], np.mean([cells for *_, cells in laid_out], axis=0))
    return maps


def drawn(panels, maps, height):
    """One map per task and method, all on one scale."""
    highest = max(cells.max() for *_, cells in maps.values())
    figure, grid = plt.subplots(
        len(METHODS), len(panels), figsize=(2.7 * len(panels) + 0.9, height), squeeze=False, sharex=True, sharey=True
    )
    for column, (task, runs) in enumerate(panels.items()):
        for axes, method in zip(grid[:, column], METHODS, strict=True):
            if (task, method) not in maps:
                axes.set_axis_off()
                continue
            layers, kinds, cells = maps[task, method]
            image = figures.draw_rank_map(axes, cells, layers, kinds, highest)
            axes.set_title(f"{TASKS[task]}, {LOOKS[method].label}\n{selection.seeds_of({method: runs[method]})}")
    for axes in grid[:, 0]:
        axes.set_ylabel("layer")
    figure.colorbar(image, ax=grid, label="rank at the end, mean over seeds", shrink=0.6, aspect=30)
    return figure


def shares(maps):
    """The share of all ranks by kind of matrix."""
    rows = []
    for (task, method), (_, kinds, cells) in maps.items():
        by_kind = {kind: f"{share:.0%}" for kind, share in zip(kinds, cells.sum(0) / cells.sum(), strict=True)}
        total = {"total rank": f"{cells.sum():.0f}", "highest cell": f"{cells.max():.1f}"}
        rows.append({"task": TASKS[task], "method": LOOKS[method].label, **total, **by_kind})
    return pd.DataFrame(rows).set_index(["task", "method"])


# %% [markdown]
# ## MPNet-base: twelve layers and six kinds, as in the paper
#
# Study B (`results/studies/study_b.md`). An empty place is an arm that was not run.

# %%
base_panels = selection.panels(METHODS, needed=["increlora"], experiments=[base_size.EXPERIMENT])
base_maps = mean_maps(base_panels)
print(selection.source_of(base_panels))
figure = drawn(base_panels, base_maps, 8.6)
figures.save(figure, "figure6_rank_map")

# %%
print("share of all ranks by kind of matrix")
display(shares(base_maps))

# %% [markdown]
# Beside the published allocation: where a re-run of the authors' code by others added ranks (DeBERTaV3-base, RTE, six
# seeds; `results/paper/allocation.csv`). It says how many ranks every kind and every layer got, not every matrix.

# %%
published = base_size.published_allocation(selection.RESULTS / "paper" / "allocation.csv")
kinds = list(SIX_KINDS)
layers = list(published["layer"])
series = {
    "DeBERTaV3-base, RTE, published": ({axis: list(of.values()) for axis, of in published.items()}, "#222222", "X")
}
for (task, runs), color, marker in zip(base_panels.items(), ("#0072B2", "#009E73", "#D55E00"), "sDo", strict=False):
    added = []
    for run in runs["increlora"].values():
        gained = {name: rank - run["ranks"]["start"][name] for name, rank in run["ranks"]["last"].items()}
        added.append(figures.rank_map(run, gained)[2])
    cells = np.mean(added, axis=0)
    series[f"MPNet-base, {TASKS[task]}"] = ({"kind": cells.sum(0), "layer": cells.sum(1)}, color, marker)
figure, both = plt.subplots(1, 2, figsize=(8.6, 3.4), width_ratios=(1, 1.5))
for axes, axis, labels in ((both[0], "kind", SIX_KINDS.values()), (both[1], "layer", layers)):
    for label, (values, color, marker) in series.items():
        first = label.endswith("published")
        size = {"linewidth": 1.6, "markersize": 8} if first else {"linewidth": 0.9, "markersize": 5}
        axes.plot(range(len(values[axis])), values[axis], color=color, marker=marker, label=label, **size)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel({"kind": "kind of matrix", "layer": "layer"}[axis])
both[0].set_ylabel("ranks added (of 72), mean over seeds")
figure.legend(*both[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
figures.save(figure, "figure6_against_published")

# %% [markdown]
# The correlations with these numbers, their intervals and the verdict are in the tables of study B
# (`results/README.md`).
#
# ## MiniLM: six layers

# %%
panels = selection.panels(METHODS, needed=METHODS)
maps = mean_maps(panels)
print(selection.source_of(panels))
figure = drawn(panels, maps, 5.2)
figures.save(figure, "figure6_rank_map_minilm")

# %%
print("share of all ranks by kind of matrix")
display(shares(maps))
