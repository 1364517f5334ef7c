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
# # Do the same matrices grow with every seed?
#
# A rank map means something only if another seed gives a similar one. Two measures over all pairs of seeds of a task,
# from the ranks at the end:
#
# - Spearman's correlation of the two rank maps over all matrices.
# - Overlap: the share of the quarter of matrices with the highest ranks that two seeds have in common. Where a tie
#   crosses the cut, it is the expected share when ties are broken at random.
#
# Reference: the ranks of every seed dealt at random over the matrices, 9,999 times. Grey bands hold 95 % of the means
# that this gives; p is the share of dealings at least as similar as what was seen. Random growth draws its matrices,
# so it shows what the same schedule gives with no score at all and should lie in the band.
#
# More seeds: `python scripts/sweep.py study task.data_dir=GLUE`, then `python scripts/collect.py runs` and `make
# notebooks`.

# %%
import csv
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from scipy import stats

from increlora.analysis import figures, selection
from increlora.analysis.looks import LOOKS, SIX_KINDS, TASKS

figures.use_style()
METHODS = ("increlora", "adalora", "random_growth")
DEALINGS = 9999
panels = selection.panels(METHODS, needed=["increlora"])
print(selection.source_of(panels))


# %%
def standardised(ranks):
    """Ranks (seeds, matrices), scaled so that the mean product of two rows is their Spearman correlation."""
    places = stats.rankdata(ranks, axis=1)
    centred = places - places.mean(1, keepdims=True)
    return centred / centred.std(1, keepdims=True)


def membership(ranks):
    """Every matrix's chance to be in the top quarter, scaled so that the mean product of two rows is their overlap."""
    size = ranks.shape[1] // 4
    cut = -np.sort(-ranks, axis=1)[:, size - 1 : size]
    above, tied = ranks > cut, ranks == cut
    places_left = size - above.sum(1, keepdims=True)
    return (above + tied * places_left / tied.sum(1, keepdims=True)) * np.sqrt(ranks.shape[1] / size)


def similarity(rows):
    """Mean product of every pair of rows: (pairs,)."""
    return np.array([np.mean(a * b) for a, b in itertools.combinations(rows, 2)])


def reference(rows):
    """The mean of `similarity` when every row is dealt at random: (dealings,)."""
    random, seeds = np.random.default_rng(0), len(rows)
    dealt = np.array([random.permuted(rows, axis=1).sum(0) for _ in range(DEALINGS)])
    return (np.mean(dealt**2, axis=1) - np.mean((rows**2).sum(0))) / (seeds * (seeds - 1))  # square of a sum: all pairs


MEASURES = {"Spearman correlation": standardised, "overlap of the top quarter": membership}
measured, small = {}, []
for task, runs in panels.items():
    for method, seeds in runs.items():
        if len(seeds) < 2:
            small.append(f"{LOOKS[method].label} on {TASKS[task]}")
            continue
        ranks = np.array([list(run["ranks"]["last"].values()) for run in seeds.values()])
        for measure, rows_of in MEASURES.items():
            rows = rows_of(ranks)
            measured[task, method, measure] = (similarity(rows), reference(rows))
if small:
    print(f"n too small (one seed; two are the least): {', '.join(small)}")

# %%
tasks = [task for task in panels if any(key[0] == task for key in measured)]
if tasks:
    figure, grid = plt.subplots(
        2, len(tasks), figsize=(2.5 * len(tasks) + 1.2, 5.4), squeeze=False, sharey="row", sharex="col"
    )
    for column, task in enumerate(tasks):
        shown = [method for method in METHODS if (task, method, "Spearman correlation") in measured]
        for axes, measure in zip(grid[:, column], MEASURES, strict=True):
            for place, method in enumerate(shown):
                pairs, dealt = measured[task, method, measure]
                look, spread = LOOKS[method], np.linspace(-0.2, 0.2, len(measured[task, method, measure][0]))
                band = np.quantile(dealt, (0.025, 0.975))
                axes.fill_between([place - 0.36, place + 0.36], *band, color="#CCCCCC", linewidth=0)
                axes.scatter(place + spread, pairs, s=14, color=look.color, marker=look.marker, alpha=0.4, linewidths=0)
                axes.hlines(pairs.mean(), place - 0.36, place + 0.36, color=look.color, linewidth=2.4)
            axes.grid(axis="x", visible=False)
            axes.set_xticks(range(len(shown)), [LOOKS[method].label.replace(" ", "\n") for method in shown])
            axes.set_xlim(-0.6, len(shown) - 0.4)
        grid[0, column].set_title(f"{TASKS[task]}\n{selection.seeds_of({m: panels[task][m] for m in shown})}")
    for axes, measure in zip(grid[:, 0], MEASURES, strict=True):
        axes.set_ylabel(f"{measure}\nof two seeds")
    handles = [
        plt.Line2D([], [], linestyle="none", marker="o", color="#777777", markersize=4, label="a pair of seeds"),
        plt.Line2D([], [], color="#777777", linewidth=2.4, label="mean over pairs"),
        plt.Rectangle((0, 0), 1, 1, color="#CCCCCC", label="95 % of the means, ranks dealt at random"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figures.save(figure, "stability_of_rank_maps")
else:
    print("n too small everywhere: nothing to draw")

# %%
rows = []
for (task, method, measure), (pairs, dealt) in measured.items():
    rows.append({
        "task": TASKS[task], "method": LOOKS[method].label, "measure": measure,
        "seeds": len(panels[task][method]), "pairs": len(pairs), "mean": f"{pairs.mean():.3f}",
        "lowest": f"{pairs.min():.3f}", "highest": f"{pairs.max():.3f}", "dealt, mean": f"{dealt.mean():.3f}",
        "p": f"{(1 + np.sum(dealt >= pairs.mean() - 1e-12)) / (1 + DEALINGS):.4f}",
    })  # fmt: skip
if rows:
    display(pd.DataFrame(rows).set_index(["task", "method", "measure"]))

# %% [markdown]
# ## Against a published allocation
#
# Known of a re-run of the authors' code on RTE with DeBERTaV3-base (six seeds, r2): the mean number of ranks added by
# kind of matrix and by layer (`results/paper/allocation.csv`). That model has twelve layers, MiniLM six, so single
# matrices have no counterpart. What can be compared: the shares of the six kinds, which both models have, and the
# shares of the layers by relative depth, two of DeBERTa's against one of MiniLM's. Backbone, length of training and,
# but for RTE, the task differ: agreement would say something, disagreement says little. MiniLM stays near chance on
# RTE, so its ranks there are those of a model that has learned little.

# %%
with (selection.RESULTS / "paper" / "allocation.csv").open(encoding="utf-8") as file:
    known = list(csv.DictReader(file))
published = {
    axis: {row["name"]: float(row["ranks_added"]) for row in known if row["axis"] == axis} for axis in ("kind", "layer")
}
kinds_known = np.array([published["kind"][kind] for kind in SIX_KINDS])
sixths_known = np.array(list(published["layer"].values())).reshape(6, 2).sum(1)

added = {}  # task -> seeds, ranks added (layers, kinds), mean over the seeds
for task, runs in panels.items():
    maps = [
        figures.rank_map(run, run["ranks"]["last"])[2] - figures.rank_map(run, run["ranks"]["start"])[2]
        for run in runs["increlora"].values()
    ]
    added[task] = (len(maps), np.mean(maps, axis=0))


def shares(values):
    return 100 * values / values.sum()


SERIES = (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "D"), ("#CC79A7", "^"), ("#56B4E9", "v"))
curves = {"RTE, DeBERTaV3-base, published, n = 6": (kinds_known, sixths_known, "#222222", "X")}
for (task, (count, cells)), (color, marker) in zip(added.items(), SERIES, strict=False):
    curves[f"{TASKS[task]}, MiniLM, n = {count}"] = (cells.sum(0), cells.sum(1), color, marker)
figure, both = plt.subplots(1, 2, figsize=(7.6, 3.6), sharey=True)
for number, (label, (*values, color, marker)) in enumerate(curves.items()):
    shift = 0.12 * (number - (len(curves) - 1) / 2)
    for axes, of_axis in zip(both, values, strict=True):
        first = number == 0
        axes.plot(
            np.arange(6) + shift, shares(of_axis), color=color, marker=marker, linestyle="none",
            markersize=9 if first else 6, label=label, zorder=3 if first else 2,
        )  # fmt: skip
for axes, title in zip(both, ("by kind of matrix", "by relative depth"), strict=True):
    axes.axhline(100 / 6, color="#888888", linewidth=0.9, linestyle=":", label="all the same", zorder=1)
    axes.set_title(title)
    axes.grid(axis="x", visible=False)
    for edge in range(5):
        axes.axvline(edge + 0.5, color="#DDDDDD", linewidth=0.6)
both[0].set_xticks(range(6), SIX_KINDS.values())
both[1].set_xticks(range(6), ["first\nsixth", "2nd", "3rd", "4th", "5th", "last\nsixth"])
both[0].set_ylabel("share of the ranks added (%)")
both[0].set_ylim(bottom=-1)
figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
figures.save(figure, "stability_against_published")


# %%
def exact_spearman(a, b):
    """Spearman's correlation of six values, and the share of all 720 orders that correlate at least as much."""
    a, b = stats.rankdata(a), np.array(list(itertools.permutations(stats.rankdata(b))))
    a, b = a - a.mean(), b - b.mean(1, keepdims=True)
    correlations = b @ a / np.sqrt((a @ a) * (b**2).sum(1))
    return correlations[0], np.mean(correlations >= correlations[0] - 1e-12)


rows = []
for task, (count, cells) in added.items():
    (kind, kind_p), (depth, depth_p) = (
        exact_spearman(of_axis, against)
        for of_axis, against in ((cells.sum(0), kinds_known), (cells.sum(1), sixths_known))
    )
    rows.append({
        "task (MiniLM)": TASKS[task], "seeds": count, "kinds, Spearman": f"{kind:+.2f}", "p, kinds": f"{kind_p:.3f}",
        "depth, Spearman": f"{depth:+.2f}", "p, depth": f"{depth_p:.3f}",
    })  # fmt: skip
print("against the published allocation, over six values each; p one-sided, exact")
display(pd.DataFrame(rows).set_index("task (MiniLM)"))
