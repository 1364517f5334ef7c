"""What all tables share: Markdown and LaTeX, numbers as text; one row per run."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

import numpy as np

from increlora.analysis import comparison


@dataclass
class Table:
    """A table with a caption that says what its numbers are."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join([f"{self.caption}\n", *map(_row, lines)]) + "\n"

    def latex(self) -> str:
        """A table for \\usepackage{booktabs}."""
        head, *rows = (f"{' & '.join(map(_escaped, line))} \\\\" for line in (self.columns, *self.rows))
        begin = ["\\begin{table}", f"\\caption{{{_escaped(self.caption)}}}"]
        begin += [f"\\begin{{tabular}}{{{'l' * len(self.columns)}}}", "\\toprule", head, "\\midrule"]
        return "\n".join([*begin, *rows, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


def _row(cells: Iterable[str]) -> str:
    """A row of Markdown; what a cell says ends no cell and no row."""
    lines = (" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return f"| {' | '.join(lines)} |"


WORDS = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$", "−": "$-$"}


def _escaped(text: str) -> str:
    """Text for LaTeX: nothing in it is a command."""
    text = text.replace("**", "").replace("`", "")
    return re.sub(r"[\\~^±−%_&#${}]", lambda found: WORDS.get(found[0], f"\\{found[0]}"), text)


# numbers as text


def spread(scores: Iterable[float]) -> str:
    """Mean, SD and number: `84.20 ± 0.31 (6)`."""
    values = list(scores)
    if not values:
        return ""
    sd = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{sd} ({len(values)})"


def interval_text(values: Collection[float]) -> str:
    """The 95 % interval of a mean as a table shows it; with one seed, the reason why there is none."""
    if len(values) < 2:
        return "n too small"
    interval = comparison.interval(list(values))
    return f"[{interval.low:.2f}, {interval.high:.2f}]"


def with_interval(mean: SupportsFloat, low: SupportsFloat, high: SupportsFloat) -> str:
    """A difference and its interval: `+0.31 [-0.10, +0.72]`."""
    return f"{float(mean):+.2f} [{float(low):+.2f}, {float(high):+.2f}]"


# one row per run


def runs_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """One Markdown row per run: score, parameters, ranks, time, memory; in the order given."""
    head = (
        "| task | method | best on dev (step) | last | update | reserve | head | total rank | seconds | peak memory |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *(_run_row(result) for result in runs)])


def _run_row(result: Mapping[str, Any]) -> str:
    run, scores, cost = result["run"], result["scores"], result["cost"]
    parameters = result["parameters"]["last"]
    cells = [
        run["task"],
        run["method"],
        f"{100 * scores['best']['score']:.2f} ({scores['best']['step']})",
        f"{100 * scores['last']['score']:.2f}",
        *(f"{parameters[kind]:,}" for kind in ("update", "reserve", "head")),
        str(sum(result["ranks"]["last"].values()) or ""),
        f"{cost['seconds']:.0f}",
        f"{cost['peak_memory_mb']:.0f} MB" if cost["peak_memory_mb"] else "",
    ]
    return _row(cells)


def best_of_every_metric(runs: Iterable[Mapping[str, Any]]) -> str:
    """One Markdown row per run: the best value over training of every metric by itself; in the order given."""
    rows = ["| task | best on dev over training, each metric by itself | total rank | seconds |", "|---|---|---|---|"]
    for result in runs:
        curve = [point["scores"]["dev"] for point in result["curve"]]
        metrics = [metric for metric in curve[0] if metric not in ("loss", "score")]
        best = ", ".join(f"{metric} {max(scores[metric] for scores in curve):.4f}" for metric in metrics)
        total = sum(result["ranks"]["last"].values())
        rows.append(_row([result["run"]["task"], best, str(total), f"{result['cost']['seconds']:.0f}"]))
    return "\n".join(rows)
