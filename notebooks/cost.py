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
# # What it costs
#
# Time, tokens and memory: first per step, measured side by side, then of whole runs.
#
# ## Per step
#
# `scripts/benchmark.py` runs one step of every method in turn, so that whatever else the machine does hits all alike.
# A point is one round: seconds of a step divided by those of LoRA's in the same round; the line is their median.
# IncreLoRA computes scores in some steps only (57 up to each growth until the budget is spent), so its cost lies
# between "not scoring" and "scoring"; below the table is what that comes to over two published recipes. With narrow
# layers a step takes its time to launch operations, as on a GPU with short sentences; it is CPU time there.

# %%
import itertools
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display

from increlora import result_files
from increlora.analysis import figures, selection
from increlora.analysis.looks import LOOKS, TASKS

figures.use_style()
ARMS = {
    "adalora": ("adalora", "AdaLoRA"),
    "houlsby": ("houlsby", "Houlsby adapter"),
    "pfeiffer": ("pfeiffer", "Pfeiffer adapter"),
    "bitfit": ("bitfit", "BitFit"),
    "increlora, not scoring": ("increlora", "IncreLoRA, not scoring"),
    "increlora, scoring": ("increlora", "IncreLoRA, scoring"),
    "increlora, after growth": ("increlora", "IncreLoRA, budget spent"),
    "increlora r2": ("increlora", "IncreLoRA r2, budget spent"),
    "increlora r8": ("increlora", "IncreLoRA r8, budget spent"),
    "increlora r8, growing": ("increlora", "IncreLoRA r8, not scoring"),
    "increlora r8, scoring": ("increlora", "IncreLoRA r8, scoring"),
    "increlora r24": ("increlora", "IncreLoRA r24, budget spent"),
    "full": ("full", "full fine-tuning"),
}
paths = sorted((selection.RESULTS / "benchmark").glob("*.json"))
files = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
# one shape of one file each; files of memory alone have none
benchmarks = [(measured, shape) for measured in files for shape in measured.get("shapes", {})]


def about(measured, shape):
    """Backbone, batch, precision and device of a benchmark, in one line."""
    options = measured["options"]
    narrow = ", narrow layers" if measured["measure"] == "launch" else ""
    batch = f"rank {options['rank']}, batch {shape.replace('x', ' × ')} tokens"
    return f"{options['backbone']}{narrow}, {batch}, {options['precision']}, {options['device']}"


for measured, shape in benchmarks:
    machine = "{processor}, {cores} cores, threads: {threads}, torch {torch}".format(**measured["about"])
    print(f"{about(measured, shape)}: n = {measured['options']['repeats']} rounds on {machine}")

# %%
heights = [0.8 + 0.17 * len(measured["shapes"][shape]["seconds"]) for measured, shape in benchmarks]
figure, grid = plt.subplots(
    len(benchmarks), 2, figsize=(7.6, sum(heights)), height_ratios=heights, squeeze=False, sharey="row"
)
for (time, memory), (measured, shape) in zip(grid, benchmarks, strict=True):
    of = measured["shapes"][shape]
    shown = [arm for arm in ARMS if arm in of["seconds"]]
    for height, arm in enumerate(shown):
        look = LOOKS[ARMS[arm][0]]
        ratios = np.array(of["seconds"][arm]) / np.array(of["seconds"]["lora"])
        figures.draw_with_median(time, height, ratios, look)
        if arm in of.get("memory", {}):
            figures.draw_with_median(memory, height, [of["memory"][arm] / of["memory"]["lora"]], look)
    panels = [(time, "seconds of a step / LoRA's"), (memory, "peak memory / LoRA's, one measurement")]
    if "memory" not in of:
        memory.set_axis_off()
        panels.pop()
    for axes, label in panels:
        axes.axvline(1, color=LOOKS["lora"].color, linewidth=1.2, zorder=1)
        axes.text(1.01, -0.62, "LoRA", color=LOOKS["lora"].color, va="top", fontsize=8)
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
    time.set_yticks(range(len(shown)), [ARMS[arm][1] for arm in shown])
    time.set_ylim(len(shown) - 0.5, -0.7)
    time.set_title(f"{about(measured, shape)}, n = {measured['options']['repeats']} rounds", loc="left", fontsize=9)
figures.save(figure, "cost_per_step")

# %%
rows = []
for measured, shape in benchmarks:
    of = measured["shapes"][shape]
    batch, length = map(int, shape.split("x"))
    for arm in ("lora", *(arm for arm in ARMS if arm in of["seconds"])):
        seconds = np.median(of["seconds"][arm])
        rows.append({
            "benchmark": about(measured, shape),
            "method": ARMS.get(arm, ("", "LoRA"))[1],
            "seconds a step": f"{seconds:.3f}", "tokens a second": f"{batch * length / seconds:,.0f}",
            "time / LoRA": f"{of['ratios'].get(arm, 1.0):.3f}",
            "operations": f"{of['operations'][arm]:,}" if "operations" in of else "",
            "peak memory, MB": f"{of['memory'][arm]:,.0f}" if arm in of.get("memory", {}) else "",
        })  # fmt: skip
display(pd.DataFrame(rows).set_index(["benchmark", "method"]))
for measured, shape in benchmarks:
    costs = measured["shapes"][shape]["ratios"].items()
    recipes = ", ".join(f"{name[7:]} {ratio:.3f}" for name, ratio in costs if name.startswith("recipe "))
    if recipes:
        print(f"IncreLoRA / LoRA over a whole recipe, {about(measured, shape)}: {recipes}")

# %% [markdown]
# ## Whole runs
#
# As recorded in the run files, one point per run, the line their median. Seconds include evaluation; memory is the
# largest resident size of the process. These runs shared two cores with each other and with other work, so their
# times are rough; the benchmark above is the measurement. Tokens are the same for every method of a task: all train
# on the same batches.

# %%
panels = selection.panels(tuple(LOOKS), needed=["increlora", "lora"])
print(selection.source_of(panels))
shown = [method for method in LOOKS if any(method in runs for runs in panels.values())]
figure, grid = plt.subplots(
    2, len(panels), figsize=(1.7 * len(panels) + 1.6, 0.42 * len(shown) + 1.6), squeeze=False, sharey=True
)
for (time, memory), (task, runs) in zip(grid.T, panels.items(), strict=True):
    for method, seeds in runs.items():
        costs = [run["cost"] for run in seeds.values()]
        height = shown.index(method)
        figures.draw_with_median(time, height, [cost["seconds"] / cost["steps"] for cost in costs], LOOKS[method])
        figures.draw_with_median(memory, height, [cost["peak_memory_mb"] / 1024 for cost in costs], LOOKS[method])
    time.set_title(f"{TASKS[task]}\n{selection.seeds_of(runs)}")
    for axes, label in ((time, "seconds a step"), (memory, "peak memory (GB)")):
        axes.set_xlabel(label)
        axes.set_xlim(0, 1.05 * axes.dataLim.xmax)
        axes.grid(axis="y", visible=False)
grid[0][0].set_yticks(range(len(shown)), [LOOKS[method].label for method in shown])
grid[0][0].set_ylim(len(shown) - 0.5, -0.5)
figures.save(figure, "cost_of_runs")


# %%
def mean_rank(run):
    """Total rank, averaged over the steps of training: what was trained on the way, not only what is left."""
    history = [*selection.rank_history(run), (run["cost"]["steps"], {})]
    parts = (sum(ranks.values()) * (after - step) for (step, ranks), (after, _) in itertools.pairwise(history))
    return sum(parts) / run["cost"]["steps"]


rows = []
for task, runs in panels.items():
    for method, seeds in runs.items():
        costs = [run["cost"] for run in seeds.values()]
        ranked = [run for run in seeds.values() if run["ranks"]["last"]]
        ends = [sum(run["ranks"]["last"].values()) for run in ranked]
        rows.append({
            "task": TASKS[task], "method": LOOKS[method].label, "seeds": len(seeds), "steps": f"{costs[0]['steps']:,}",
            "tokens": f"{np.mean([cost['tokens'] for cost in costs]):,.0f}",
            "padding": f"{np.mean([result_files.padding_share(cost) for cost in costs]):.1%}",
            "seconds": f"{np.median([cost['seconds'] for cost in costs]):,.0f}",
            "seconds a step": f"{np.median([cost['seconds'] / cost['steps'] for cost in costs]):.2f}",
            "peak memory, MB": f"{np.median([cost['peak_memory_mb'] for cost in costs]):,.0f}",
            "total rank at the end": f"{np.mean(ends):.0f}" if ranked else "",
            "over training": f"{np.mean([mean_rank(run) for run in ranked]):.1f}" if ranked else "",
        })  # fmt: skip
display(pd.DataFrame(rows).set_index(["task", "method"]))
