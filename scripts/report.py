"""One run as one HTML file that needs nothing else: scores, ranks over time, cost, configuration, how to repeat it.

    python scripts/report.py RUN_DIR [--output FILE]

RUN_DIR holds a `result.json`; a result file itself will do too. The report is written beside it, as `.html`.
"""

import argparse
import math
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from matplotlib.ticker import MaxNLocator

from increlora import result_files
from increlora.analysis.selection import rank_history
from increlora.errors import UserError
from increlora.files import write_text
from increlora.glue import config, identity
from increlora.matrices import kind_of, layer_of, rank_map

TEMPLATE = "report.html.jinja"
LEFT, RIGHT, HEIGHT, LINE = 52, 690, 220, 24  # of the curve in its drawing, 720 units wide, and of a line of text
MAPS = 12  # ranks over time are shown in at most so many maps


@config.guarded
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="run directory, or a result file")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write; default: beside the result file")
    arguments = parser.parse_args()
    path = arguments.run / result_files.FILE_NAME if arguments.run.is_dir() else arguments.run
    output = arguments.output or path.with_suffix(".html")
    page = report(result_files.read(path))
    if output.resolve() == path.resolve():
        raise UserError(f"--output {output} is the result file itself, which the report would replace")
    write_text(output, page)
    print(f"report: {output}")


def report(result: Mapping[str, Any]) -> str:
    """The page: the same text for the same result, everything in it escaped."""
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"metric": metric, "number": number, "signed": signed}
    primary = result["config"]["task"]["primary"]
    return pages.get_template(TEMPLATE).render(
        result,
        primary=primary if isinstance(primary, str) else "mean of " + " and ".join(primary),
        drawing=draw(result) if result["curve"] else None,
        growth=growth(result) if result["ranks"]["start"] else None,
        padding=result_files.padding_share(result["cost"]),
        command=command(result),
        resolved=yaml.safe_dump(result["config"], sort_keys=False, allow_unicode=True, width=1000),
    )


def command(result: Mapping[str, Any]) -> str:
    """The command line of a run, from its identity."""
    run, processes = result["run"], result["code"].get("processes", 1)  # early results do not say
    launcher = ["python"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]
    return shlex.join([*launcher, "run.py", *(f"{key}={run[key]}" for key in identity.KEYS), *run["overrides"]])


# numbers as text


def metric(value: float, name: str = "score") -> str:
    """A metric times 100, as the tables of results show it; a loss as it is."""
    return f"{value:.4f}" if name == "loss" else f"{100 * value:.2f}"


def number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"


def signed(value: int) -> str:
    return f"{value:+d}".replace("-", "\N{MINUS SIGN}")


# the drawing of the scores


def draw(result: Mapping[str, Any]) -> dict[str, Any]:
    """The score of every split over the steps, the chosen evaluations and the changes of ranks, in drawing units."""
    curve, marks = result["curve"], chosen(result["scores"])
    values = {split: [100 * point["scores"][split]["score"] for point in curve] for split in curve[0]["scores"]}
    lowest, highest = min(map(min, values.values())), max(map(max, values.values()))
    steps, ticks = result["cost"]["steps"], nice(lowest, max(highest, lowest + 1))
    top = LINE * len(marks) + 14
    x, y = scale(0, steps, LEFT, RIGHT), scale(ticks[0], ticks[-1], top + HEIGHT, top)
    at = [x(point["step"]) for point in curve]
    return {
        "left": LEFT,
        "right": RIGHT,
        "bottom": top + HEIGHT,
        "x_ticks": [(step, x(step)) for step in nice(0, steps) if step <= steps],
        "y_ticks": [(tick, y(tick)) for tick in ticks],
        "lines": {split: list(zip(at, map(y, values[split]), strict=True)) for split in values},
        "marks": [{**m, "x": x(m["step"]), "y": y(100 * m["score"]), "line": LINE * i} for i, m in enumerate(marks, 1)],
        "changes": [x(change["step"]) for change in result["allocations"]],
    }


def chosen(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The evaluations that are the best, the last and the clean one, the latest first."""
    steps = sorted({score["step"]: score["score"] for score in scores.values()}.items(), reverse=True)
    return [
        {"name": " and ".join(name for name in scores if scores[name]["step"] == step), "step": step, "score": score}
        for step, score in steps
    ]


def nice(low: float, high: float) -> list[float]:
    """Round numbers around a range."""
    return MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high).tolist()


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1)


# ranks


def growth(result: Mapping[str, Any]) -> dict[str, Any]:
    """Ranks as maps, layer x kind of matrix: at the start, over time, at the end; and every change of them."""
    kinds, history = result["config"]["method"]["kinds"], rank_history(result)
    layers, names, start = rank_map(history[0][1], kinds)
    shown = sorted({0, *range(len(history) - 1, 0, -math.ceil(len(history) / MAPS))})
    maps = [(history[moment][0], rank_map(history[moment][1], kinds)[2]) for moment in shown]
    return {
        "layers": layers,
        "kinds": names,
        "maps": maps,
        "start": start,
        "end": maps[-1][1],
        "highest": max(1, *(rank for _, ranks in history for rank in ranks.values())),
        "totals": [sum(ranks.values()) for _, ranks in history],
        "changes": [
            {
                "step": change["step"],
                "added": [(f"layer {layer_of(m)} {kind_of(m, kinds)}", by) for m, by in change["added"].items()],
                "cells": rank_map(dict.fromkeys(history[0][1], 0) | change["added"], kinds)[2],
                "scores": rank_map(change["scores"], kinds)[2],
            }
            for change in result["allocations"]
        ],
    }


if __name__ == "__main__":
    main()
