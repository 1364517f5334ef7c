"""What all figures share: which runs they show, how a method looks, and vector files that are the same every time."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from increlora.analysis import comparison
from increlora.errors import UserError
from increlora.glue import results

RESULTS = Path(os.environ.get("INCRELORA_RESULTS", Path(__file__).resolve().parents[2] / "results"))
EXPERIMENTS = ("minilm_study", "minilm_comparison", "minilm_5_epochs")  # what is shown, the first that has it
TUNING_SEED = 40  # chose the learning rates of the study, and so is in no figure
PROTOCOLS = ("last", "best", "clean")

Run = Mapping[str, Any]  # the content of a result file
Runs = dict[str, dict[int, Run]]  # method -> seed -> run


@dataclass(frozen=True)
class Look:
    """How a method looks, in every figure."""

    label: str
    color: str
    marker: str


# Okabe and Ito's palette for published methods, Tol's muted one for controls: colour-blind readers tell them apart
LOOKS = {
    "increlora": Look("IncreLoRA", "#D55E00", "o"),
    "adalora": Look("AdaLoRA", "#009E73", "^"),
    "lora": Look("LoRA", "#0072B2", "s"),
    "houlsby": Look("Houlsby adapter", "#E69F00", "P"),
    "pfeiffer": Look("Pfeiffer adapter", "#56B4E9", "X"),
    "bitfit": Look("BitFit", "#CC79A7", "v"),
    "full": Look("full fine-tuning", "#000000", "D"),
    "uniform": Look("uniform ranks", "#332288", "h"),
    "random_growth": Look("random growth", "#882255", "p"),
    "static_pattern": Look("static pattern", "#999933", "*"),
    "shuffled_pattern": Look("shuffled pattern", "#777777", "d"),
}
TASKS = {
    "stsb": "STS-B", "cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "sst2": "SST-2", "qnli": "QNLI", "qqp": "QQP",
    "mnli": "MNLI", "wnli": "WNLI",
}  # fmt: skip
BACKBONES = {"minilm": "MiniLM", "deberta_v3_base": "DeBERTaV3-base"}
KINDS = {
    "query": "$W_q$", "key": "$W_k$", "value": "$W_v$", "attention_output": "$W_o$", "intermediate": "$W_{f1}$",
    "output": "$W_{f2}$",
}  # fmt: skip
METRICS = {
    "accuracy": "accuracy (%)",
    "matthews_correlation": "Matthews correlation (×100)",
    "pearson+spearmanr": "mean of Pearson and Spearman (×100)",
}
STYLE = {
    "figure.dpi": 110, "figure.constrained_layout.use": True, "savefig.bbox": "tight", "savefig.pad_inches": 0.05,
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.labelsize": 9, "legend.fontsize": 8.5,
    "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "lines.linewidth": 1.6,
    "axes.edgecolor": "#444444", "xtick.color": "#444444", "ytick.color": "#444444",
    "svg.fonttype": "path", "svg.hashsalt": "increlora",
}  # fmt: skip


def use_style() -> None:
    """Make every figure drawn from here on look like the others."""
    mpl.rcdefaults()
    mpl.rcParams.update(STYLE)


def save(figure: Figure, name: str) -> None:
    """Write results/figures/<name>.svg: no date, no version, the same bytes for the same figure.

    Raises:
        ValueError: an axis ends before its data do.
    """
    _refuse_cut_data(figure, name)
    path = RESULTS / "figures" / f"{name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def _refuse_cut_data(figure: Figure, name: str) -> None:
    for axes in figure.axes:
        for data, view in zip(axes.dataLim.get_points().T, axes.viewLim.get_points().T, strict=True):  # x, then y
            if np.isfinite(data).all() and (data.min() < view.min() or data.max() > view.max()):
                raise ValueError(f"{name}: an axis from {view.min():g} to {view.max():g} cuts data off at {data}")


# which runs


def experiment(run: Run) -> str | None:
    """The experiment that a run was asked for with, None if with none."""
    chosen = [override for override in run["run"]["overrides"] if override.startswith("experiment=")]
    return chosen[0].partition("=")[2] if chosen else None


def load(method: Collection[str] | None = None) -> list[Run]:
    """The committed runs, by default of all methods, without those that chose learning rates."""
    runs = results.load_runs(RESULTS / "runs")
    return [run for run in runs if run["run"]["seed"] != TUNING_SEED and (not method or run["run"]["method"] in method)]


def by_method(runs: Iterable[Run]) -> Runs:
    """Method -> seed -> run, in the order of `LOOKS` and of the seeds.

    Raises:
        UserError: a method has no look, or two runs with one seed: which of them is meant?
    """
    runs = list(runs)
    if unknown := {run["run"]["method"] for run in runs} - set(LOOKS):
        raise UserError(
            f"the method '{min(unknown)}' has no color and marker yet: add it to LOOKS in increlora/analysis/figures.py"
        )
    found: Runs = {}
    for run in sorted(runs, key=lambda run: (list(LOOKS).index(run["run"]["method"]), run["run"]["seed"])):
        method, seed = run["run"]["method"], run["run"]["seed"]
        if seed in found.setdefault(method, {}):
            raise UserError(
                f"{method} on {run['run']['task']} has two runs with seed {seed} in {experiment(run)}; "
                "keep the one that is meant in results/runs."
            )
        found[method][seed] = run
    return found


def panels(methods: Sequence[str], needed: Collection[str] = (), budget: str = "r2") -> dict[str, Runs]:
    """Task -> method -> seed -> run: what to show of these methods, one experiment per task.

    Args:
        methods: what to show.
        needed: methods without which an experiment is passed over; default: any of `methods` will do.
        budget: of these runs only.

    Raises:
        UserError: there is nothing to show.
    """
    runs = [run for run in load(methods) if run["run"]["budget"] == budget]
    shown = {}
    for task, name in ((task, name) for task in TASKS for name in EXPERIMENTS):
        found = by_method(run for run in runs if run["run"]["task"] == task and experiment(run) == name)
        if found and task not in shown and set(needed) <= set(found):
            shown[task] = found
    if not shown:
        raise UserError(f"no task has results of {' and '.join(needed or methods)} in {RESULTS.name}/runs")
    return shown


def short_runs(purpose: str) -> list[Run]:
    """The runs whose `settings_from` begins with what they are for, e.g. `figure 4` (configs/sweep/figure4.yaml)."""
    return [run for run in load() if run["run"]["settings_from"].startswith(f"{purpose} ")]


def seeds_of(runs: Runs) -> str:
    """How many seeds, in words for a title: `n = 6 seeds`, or `n = 1 to 6 seeds`."""
    counts = sorted({len(seeds) for seeds in runs.values()})
    return f"n = {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seed{'s' * (counts[-1] > 1)}"


def source_of(panels: Mapping[str, Runs]) -> str:
    """Which runs a figure shows, in one line: backbone, experiment and tasks."""
    told: dict[str, list[str]] = {}
    for task, runs in panels.items():
        run = next(iter(next(iter(runs.values())).values()))
        told.setdefault(f"{run['run']['backbone']}, {experiment(run)}", []).append(f"{TASKS[task]} ({seeds_of(runs)})")
    return "; ".join(f"{source}: {', '.join(tasks)}" for source, tasks in told.items())


# what is read from them


def scores(runs: Mapping[int, Run], protocol: str) -> dict[int, float]:
    """Seed -> score times 100, of the runs that have it: last, best (on dev) or clean (chosen on held-out data)."""
    return {seed: 100 * run["scores"][protocol]["score"] for seed, run in runs.items() if protocol in run["scores"]}


def metric(run: Run) -> str:
    """The label of a score axis."""
    primary = run["config"]["task"]["primary"]
    return METRICS[primary if isinstance(primary, str) else "+".join(primary)]


def rank_history(run: Run) -> list[tuple[int, dict[str, int]]]:
    """(step, matrix -> rank from that step on): at the start, and after every change."""
    history = [(0, dict(run["ranks"]["start"]))]
    for change in run["allocations"]:
        ranks = history[-1][1]
        history.append((change["step"], ranks | {name: ranks[name] + by for name, by in change["added"].items()}))
    return history


def rank_map(run: Run, ranks: Mapping[str, int]) -> tuple[list[int], list[str], NDArray]:
    """Layers, labels of the kinds of matrices, and the ranks as (layers, kinds)."""
    layers, kinds, cells = results.rank_map(ranks, run["config"]["method"]["kinds"])
    return layers, [KINDS.get(kind, kind) for kind in kinds], np.array(cells)


# drawing


def draw_seeds(axes: Axes, x: float | ArrayLike, values: Collection[float], look: Look, width: float = 0.0) -> None:
    """One faint point per seed, the mean as a full one, and its 95 % interval where there are two seeds or more.

    Args:
        x: one position for all or one per seed; the mean stands at their mean.
        width: over which seeds of one position are spread, so that equal scores stay visible.
    """
    values = np.array(list(values))
    x = np.broadcast_to(np.asarray(x, dtype=float), values.shape)
    spread = np.linspace(-width / 2, width / 2, len(values)) if len(values) > 1 else 0.0
    if len(values) > 1:
        axes.scatter(x + spread, values, s=16, color=look.color, marker=look.marker, alpha=0.35, linewidths=0)
        interval = comparison.interval(values)
        axes.vlines(x.mean(), interval.low, interval.high, color=look.color, linewidth=1.4)
    mean = {"s": 46, "color": look.color, "marker": look.marker, "edgecolors": "white", "linewidths": 0.7, "zorder": 3}
    axes.scatter(x.mean(), values.mean(), **mean)


def draw_differences(axes: Axes, y: float, compared: comparison.Comparison, look: Look) -> None:
    """A row of a comparison: mean and interval, a faint point per seed below; with one seed a hollow point, no more."""
    if compared.interval is None:
        axes.scatter(compared.mean, y, s=36, facecolors="white", edgecolors=look.color, marker=look.marker, zorder=3)
        return
    axes.hlines(y, compared.interval.low, compared.interval.high, color=look.color, linewidth=1.4)
    faint = {"color": look.color, "marker": look.marker, "alpha": 0.35, "linewidths": 0}
    axes.scatter(compared.differences, [y + 0.25] * len(compared.differences), s=16, **faint)
    mean = {"s": 46, "color": look.color, "marker": look.marker, "edgecolors": "white", "linewidths": 0.7, "zorder": 3}
    axes.scatter(compared.mean, y, **mean)


def draw_with_median(axes: Axes, y: float, values: Sequence[float], look: Look) -> None:
    """A row of measurements: one point each, and their median as a line if there are several."""
    several = len(values) > 1
    points = {"s": 24 if several else 40, "alpha": 0.45 if several else 1.0, "linewidths": 0}
    axes.scatter(values, [y] * len(values), color=look.color, marker=look.marker, **points)
    if several:
        axes.vlines(np.median(values), y - 0.33, y + 0.33, color=look.color, linewidth=2.2)


def draw_rank_map(axes: Axes, cells: NDArray, layers: Sequence[int], kinds: Sequence[str], highest: float) -> Any:
    """A map, layer (bottom is first) x kind, one number per cell, white at 0 and darkest at `highest`."""
    image = axes.imshow(cells, cmap="Blues", vmin=0, vmax=highest, origin="lower", aspect="auto")
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    decimals = 0 if np.equal(cells, np.round(cells)).all() else 1
    for (row, column), value in np.ndenumerate(cells):
        color = "white" if value > 0.6 * highest else "#222222"
        axes.text(column, row, f"{value:.{decimals}f}", ha="center", va="center", color=color, fontsize=7.5)
    return image


def interval_text(values: Collection[float]) -> str:
    """The 95 % interval of a mean as a table shows it; with one seed, why there is none."""
    if len(values) < 2:
        return "n too small"
    interval = comparison.interval(list(values))
    return f"[{interval.low:.2f}, {interval.high:.2f}]"
