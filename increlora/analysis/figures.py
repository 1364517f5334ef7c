"""What all figures share: one style, files that are the same every time, seeds, differences and rank maps drawn."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from increlora import matrices
from increlora.analysis import comparison, selection
from increlora.analysis.looks import KINDS, METRICS, Look
from increlora.analysis.selection import Run

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
    path = selection.RESULTS / "figures" / f"{name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def _refuse_cut_data(figure: Figure, name: str) -> None:
    for axes in figure.axes:
        for data, view in zip(axes.dataLim.get_points().T, axes.viewLim.get_points().T, strict=True):  # x, then y
            if np.isfinite(data).all() and (data.min() < view.min() or data.max() > view.max()):
                raise ValueError(f"{name}: an axis from {view.min():g} to {view.max():g} cuts data off at {data}")


# what is drawn


def metric(run: Run) -> str:
    """The label of a score axis."""
    primary = run["config"]["task"]["primary"]
    name = primary if isinstance(primary, str) else "+".join(primary)
    return METRICS.get(name, f"{name} (×100)")


def rank_map(run: Run, ranks: Mapping[str, int]) -> tuple[list[int], list[str], NDArray]:
    """Layers, labels of the kinds of matrices, and the ranks as (layers, kinds)."""
    layers, kinds, cells = matrices.rank_map(ranks, run["config"]["method"]["kinds"])
    return layers, [KINDS.get(kind, kind) for kind in kinds], np.array(cells)


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
