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
# # Does the score matter? IncreLoRA against its controls
#
# Each control has the same final budget as IncreLoRA and differs in one decision:
#
# - uniform ranks: every matrix has the target rank from the start;
# - random growth: the same schedule, but the matrices that grow are drawn;
# - static pattern: the ranks that a run of IncreLoRA ended with, given from the start and trained from scratch;
# - shuffled pattern: those ranks, dealt at random over the matrices.
#
# Shown is IncreLoRA minus the control, paired by seed: the same data order, the same start of the head. Right of zero
# favours IncreLoRA. One faint point per seed, the mean as a full point, its 95 % interval as a line; where there is
# only one seed, a hollow point, from which nothing follows. The protocol of the study, written before its runs, is in
# `results/README.md`; its primary number is the score of the last step.
#
# More runs: `python scripts/sweep.py study task.data_dir=GLUE` (uniform ranks, random growth) and
# `scripts/first_runs.sh GLUE` (the patterns), then `python scripts/collect.py runs` and `make notebooks`.

# %%
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display

from increlora.analysis import figures, selection
from increlora.analysis.comparison import ALPHA, common_seeds, compare
from increlora.analysis.looks import LOOKS, TASKS
from increlora.analysis.selection import PROTOCOLS
from increlora.analysis.tables import interval_text

figures.use_style()
CONTROLS = ("random_growth", "uniform", "static_pattern", "shuffled_pattern")
panels = {}  # control -> task -> method -> seed -> run; every control from the first experiment that has it
for control in CONTROLS:
    pair = ("increlora", control)
    panels[control] = selection.panels(pair, needed=pair)
    print(f"{LOOKS[control].label}: {selection.source_of(panels[control])}")


# %%
def compared(control, task, protocol):
    """IncreLoRA against a control over the seeds that both have; None if they have none."""
    runs = panels[control][task]
    scores = {method: selection.scores(of_method, protocol) for method, of_method in runs.items()}
    seeds = common_seeds(scores)
    diverged = {
        method: [seed for seed, run in of_method.items() if run["status"] == "diverged"]
        for method, of_method in runs.items()
    }
    return compare(scores, "increlora", control, seeds, diverged) if seeds else None


comparisons = {
    (control, task, protocol): comparison
    for control in CONTROLS
    for task in panels[control]
    for protocol in PROTOCOLS
    if (comparison := compared(control, task, protocol))
}
protocols = [protocol for protocol in PROTOCOLS if any(key[2] == protocol for key in comparisons)]
rows = [key[:2] for key in comparisons if key[2] == "last"]
ABOUT = {"last": "last step (primary)", "best": "best on dev", "clean": "chosen on held-out data"}

figure, grid = plt.subplots(
    1,
    len(protocols),
    figsize=(2.5 * len(protocols) + 2, 0.36 * len(rows) + 1.2),
    squeeze=False,
    sharex=True,
    sharey=True,
)
for axes, protocol in zip(grid[0], protocols, strict=True):
    axes.axvline(0, color="#444444", linewidth=1)
    for height, (control, task) in enumerate(rows):
        if comparison := comparisons.get((control, task, protocol)):
            figures.draw_differences(axes, height, comparison, LOOKS[control])
    axes.set_title(ABOUT[protocol])
    axes.grid(axis="y", visible=False)
names = [f"{LOOKS[c].label}, {TASKS[t]}, n = {len(comparisons[c, t, 'last'].seeds)}" for c, t in rows]
grid[0][0].set_yticks(range(len(rows)), names)
grid[0][0].set_ylim(len(rows) - 0.5, -0.5)
figure.supxlabel("IncreLoRA minus control (points of the task's metric, ×100)", fontsize=9)
figures.save(figure, "controls")

# %%
table = []
for (control, task, protocol), comparison in comparisons.items():
    several = len(comparison.seeds) > 1
    table.append({
        "against": LOOKS[control].label, "task": TASKS[task], "score": protocol, "seeds": len(comparison.seeds),
        "mean difference": f"{comparison.mean:+.2f}", "SD": f"{comparison.sd:.2f}" if several else "",
        "95 % interval": interval_text(comparison.differences),
        "seeds to show 1 point": comparison.seeds_needed(1.0) if several else "",
        "diverged": f"{comparison.diverged[0]}, {comparison.diverged[1]}",
    })  # fmt: skip
display(pd.DataFrame(table).set_index(["against", "task", "score"]))

# %% [markdown]
# Seeds to show 1 point: how many seeds a true difference of one point would take at this SD, at 5 % and a power of 80
# %; with few seeds a rough number. Diverged: runs of IncreLoRA and of the control that diverged; they are among the
# differences.
#
# ## The study's tests, in their fixed order
#
# On the score of the last step, each at 5 %, two-sided (paired sign flips), and only if all before it were
# significant: together they stay at 5 %.

# %%
ORDER = (("stsb", "random_growth"), ("stsb", "uniform"), ("cola", "random_growth"), ("cola", "uniform"))
SEEDS = set(range(41, 47))


def study(task, control):
    """The comparison, if the study has run it with at least one seed."""
    comparison = comparisons.get((control, task, "last"))
    shown = panels[control].get(task, {}).get(control, {})
    return comparison if any(selection.experiment(run) == "minilm_study" for run in shown.values()) else None


def outcome(comparison, going_on):
    """What the test says, in words."""
    if comparison is None or not SEEDS.issubset(comparison.seeds):
        return "n too small: runs are missing"
    if not going_on:
        return "not tested: one before it was not significant"
    if comparison.p > ALPHA:
        return "not significant"
    return f"significant, in favour of {'IncreLoRA' if comparison.mean > 0 else 'the control'}"


table, going_on = [], True
for task, control in ORDER:
    comparison = study(task, control)
    words = outcome(comparison, going_on)
    table.append({
        "test": f"{TASKS[task]} against {LOOKS[control].label}",
        "seeds": f"{len(SEEDS & set(comparison.seeds)) if comparison else 0} of {len(SEEDS)}",
        "p": f"{comparison.p:.4f}" if words.startswith(("significant", "not significant")) else "",
        "outcome": words,
    })  # fmt: skip
    going_on = going_on and words.startswith("significant")
display(pd.DataFrame(table).set_index("test"))
