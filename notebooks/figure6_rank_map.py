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
# (which prunes); the paper shows this for SST-2. Every cell is the mean over the seeds; all maps share one scale, and
# all methods the same total rank. How much of such a map is chance is the question of `stability_of_rank_maps`.
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
maps = {}
for task, runs in panels.items():
    for method, seeds in runs.items():
        laid_out = [figures.rank_map(run, run["ranks"]["last"]) for run in seeds.values()]
        maps[task, method] = (*laid_out[0][:2], np.mean([cells for *_, cells in laid_out], axis=0))
highest = max(cells.max() for *_, cells in maps.values())

figure, grid = plt.subplots(
    len(METHODS), len(panels), figsize=(2.7 * len(panels) + 0.9, 5.2), squeeze=False, sharex=True, sharey=True
)
for column, (task, runs) in enumerate(panels.items()):
    for axes, method in zip(grid[:, column], METHODS, strict=True):
        layers, kinds, cells = maps[task, method]
        image = figures.draw_rank_map(axes, cells, layers, kinds, highest)
        axes.set_title(f"{TASKS[task]}, {LOOKS[method].label}\n{selection.seeds_of({method: runs[method]})}")
for axes in grid[:, 0]:
    axes.set_ylabel("layer")
figure.colorbar(image, ax=grid, label="rank at the end, mean over seeds", shrink=0.6, aspect=30)
figures.save(figure, "figure6_rank_map")

# %%
rows = []
for (task, method), (_, kinds, cells) in maps.items():
    shares = {kind: f"{share:.0%}" for kind, share in zip(kinds, cells.sum(0) / cells.sum(), strict=True)}
    total = {"total rank": f"{cells.sum():.0f}", "highest cell": f"{cells.max():.1f}"}
    rows.append({"task": TASKS[task], "method": LOOKS[method].label, **total, **shares})
print("share of all ranks by kind of matrix")
display(pd.DataFrame(rows).set_index(["task", "method"]))
