"""Write the tables of results/, README and docs/ from the result files alone.

python scripts/tables.py            # or: make tables
python scripts/tables.py --check    # exit 1 if a table is stale

Scores are in per cent. last is the last step; best is the best on dev over training, the paper's protocol and
optimistic; clean is scored once on dev at the checkpoint chosen on held-out training data.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from increlora.analysis import comparison, figures
from increlora.analysis.figures import LOOKS, PROTOCOLS, TASKS, Run, Runs
from increlora.errors import UserError
from increlora.glue import results

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "results" / "tables"
PAGES = (ROOT / "README.md", ROOT / "results" / "README.md", ROOT / "docs" / "cost.md")  # tables stand between markers
PUBLISHED = ROOT / "results" / "paper" / "published.csv"
GLUE = ("mnli_m", "mnli_mm", "sst2", "cola", "qqp_acc", "qqp_f1", "qnli", "rte", "mrpc", "stsb")
# published name and parameters -> our method and budget
SAME_AS = {
    ("Full FT", "184M"): ("full", None), ("BitFit", "0.1M"): ("bitfit", None),
    ("HAdapter", "0.31M"): ("houlsby", "r2"), ("HAdapter", "0.61M"): ("houlsby", "r4"),
    ("HAdapter", "1.22M"): ("houlsby", "r8"), ("PAdapter", "0.30M"): ("pfeiffer", "r2"),
    ("PAdapter", "0.60M"): ("pfeiffer", "r4"), ("PAdapter", "1.18M"): ("pfeiffer", "r8"),
    ("LoRA r=2", "0.33M"): ("lora", "r2"), ("LoRA r=8", "1.33M"): ("lora", "r8"),
    ("AdaLoRA", "0.32M"): ("adalora", "r2"), ("AdaLoRA", "1.27M"): ("adalora", "r8"),
    ("IncreLoRA r=2", "0.3M"): ("increlora", "r2"),
}  # fmt: skip
ABLATION = ("raw_growth", "only_orthogonality", "only_advance_learning", "only_restart_warmup", "no_orthogonality",
            "no_advance_learning", "no_restart_warmup")  # fmt: skip
CONTROLS = ("random_growth", "uniform")  # what the study asks about


@dataclass
class Table:
    """A table with a caption that says what its numbers are."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join([f"{self.caption}\n", *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"

    def latex(self) -> str:
        """A table for \\usepackage{booktabs}."""
        head, *rows = (f"{' & '.join(map(_escaped, line))} \\\\" for line in (self.columns, *self.rows))
        begin = ["\\begin{table}", f"\\caption{{{_escaped(self.caption)}}}"]
        begin += [f"\\begin{{tabular}}{{{'l' * len(self.columns)}}}", "\\toprule", head, "\\midrule"]
        return "\n".join([*begin, *rows, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


def _escaped(text: str) -> str:
    text = text.replace("**", "").replace("`", "").replace("±", "$\\pm$").replace("−", "$-$")
    return re.sub(r"(?<!\\)([%_&#])", r"\\\1", text)


# numbers as text


def spread(scores: Iterable[float]) -> str:
    """Mean, SD and number: `84.20 ± 0.31 (6)`."""
    values = list(scores)
    if not values:
        return ""
    sd = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{sd} ({len(values)})"


def interval(scores: Iterable[float]) -> str:
    """The 95 % interval of a mean, nothing for a single score."""
    values = list(scores)
    return figures.interval_text(values) if len(values) > 1 else ""


# the study


def study(experiment: str, tasks: Mapping[str, Runs]) -> dict[str, Table]:
    """The tables of an experiment over tasks, methods and seeds.

    Args:
        tasks: task -> method -> seed -> run, without the runs that chose learning rates.
    """
    rows = [
        [TASKS[task], LOOKS[method].label, *(spread(figures.scores(runs, p).values()) for p in PROTOCOLS),
         interval(figures.scores(runs, "last").values()), _diverged(runs), _one([_rate(run) for run in runs.values()])]
        for task, methods in tasks.items()
        for method, runs in methods.items()
    ]  # fmt: skip
    columns = ["task", "method", *PROTOCOLS, "95 % interval of last", "diverged", "learning rate"]
    caption = f"{experiment}: mean ± SD over seeds (number of seeds), per cent."
    controls = {
        task: {m: methods[m] for m in methods if m == "increlora" or m in CONTROLS} for task, methods in tasks.items()
    }
    return {
        experiment: Table(caption, columns, rows),
        f"{experiment}_differences": differences(experiment, tasks),
        f"{experiment}_controls": differences(experiment, controls),
    }


def differences(experiment: str, tasks: Mapping[str, Runs]) -> Table:
    """IncreLoRA minus every other method over the seeds that both have."""
    rows = []
    for task, methods in tasks.items():
        for other in methods:
            if other != "increlora" and set(methods[other]) & set(methods.get("increlora", ())):
                rows.append([TASKS[task], LOOKS[other].label, *_difference(methods, other)])
    columns = ["task", "IncreLoRA minus", "last, difference [95 %]", "p (sign flip)", "seeds", "seeds it would need",
               "best", "clean"]  # fmt: skip
    caption = (
        f"{experiment}: paired differences in points, positive where IncreLoRA is better; p is not adjusted: "
        "the protocol fixes the order of tests. The seeds it would need show a true difference of this size and spread "
        "with 80 % power."
    )
    return Table(caption, columns, rows)


def _difference(methods: Runs, other: str) -> list[str]:
    compared = {}
    for protocol in PROTOCOLS:
        scores = {name: figures.scores(methods[name], protocol) for name in ("increlora", other)}
        if seeds := comparison.common_seeds(scores):
            compared[protocol] = comparison.compare(scores, "increlora", other, seeds)
    last = compared["last"]
    span = f" [{last.interval.low:+.2f}, {last.interval.high:+.2f}]" if last.interval else ""
    needed = str(last.seeds_needed(abs(last.mean))) if last.sd and last.mean else ""
    means = [f"{compared[p].mean:+.2f}" if p in compared else "" for p in ("best", "clean")]
    return [f"{last.mean:+.2f}{span}", f"{last.p:.3f}", str(len(last.seeds)), needed, *means]


def learning_rates(experiment: str, trials: Iterable[Run]) -> Table:
    """Score of the last step on the held-out tenth by learning rate; the chosen one in bold."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for run in trials:
        found.setdefault((run["run"]["task"], run["run"]["method"]), {})[_rate(run)] = 100 * results.last_score(
            run, "holdout"
        )
    rows = []
    for (task, method), by_rate in sorted(found.items(), key=lambda item: _order(*item[0])):
        best = max(by_rate, key=by_rate.get)
        cells = [f"{rate:g}: {f'**{s:.2f}**' if rate == best else f'{s:.2f}'}" for rate, s in sorted(by_rate.items())]
        rows.append([TASKS[task], LOOKS[method].label, *cells, *[""] * (3 - len(cells))])
    caption = (
        f"{experiment}: learning rate: score of the last step on the held-out tenth of train, seed "
        f"{figures.TUNING_SEED} (per cent); the best is used for all other seeds."
    )
    return Table(caption, ["task", "method", "trial", "trial", "trial"], rows)


def _order(task: str, method: str) -> tuple[int, int]:
    return list(TASKS).index(task), list(LOOKS).index(method)


def _rate(run: Run) -> float:
    return run["config"]["train"]["learning_rate"]


def _one(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values)))


def _diverged(runs: Mapping[int, Run]) -> str:
    return str(sum(run["status"] == "diverged" for run in runs.values()))


# GLUE with DeBERTaV3-base


def glue(runs: Sequence[Run], published: Sequence[Mapping[str, str]]) -> Table:
    """Published rows of Table 1 with our rows below each, and the gap of the same protocol (best on dev)."""
    rows = []
    for (name, parameters), (method, budget) in SAME_AS.items():
        paper = {r["task"]: float(r["value"]) for r in published
                 if (r["method"], r["params"], r["table"]) == (name, parameters, "Table 1") and r["value"]}  # fmt: skip
        rows.append(
            [f"{name} {parameters}", "published", *_glue_cells({t: f"{v:.2f}" for t, v in paper.items()}, paper)]
        )
        ours = [r for r in runs if r["run"]["method"] == method and budget in (None, r["run"]["budget"])]
        for protocol in PROTOCOLS:
            scores = _glue_scores(ours, protocol)
            if scores:
                means = {task: float(np.mean(values)) for task, values in scores.items()}
                rows.append(["", protocol, *_glue_cells({t: spread(v) for t, v in scores.items()}, means)])
                if protocol == "best":
                    gaps = {task: f"{means[task] - paper[task]:+.2f}" for task in means if task in paper}
                    rows.append(["", "best − published", *_glue_cells(gaps, {})])
    caption = (
        "GLUE dev, DeBERTaV3-base: published rows, ours where there are runs: mean ± SD (seeds). Averages over eight "
        "tasks: `both` takes the means of MNLI m and mm and of QQP accuracy and F1, `plain` MNLI-m and QQP accuracy."
    )
    return Table(caption, ["method", "number", *GLUE, "average, both", "average, plain"], rows)


def _glue_cells(cells: Mapping[str, str], values: Mapping[str, float]) -> list[str]:
    averages = []
    for convention in ("both", "plain"):
        try:
            averages.append(f"{comparison.glue_average(values, convention):.2f}")
        except UserError:  # a task is missing
            averages.append("")
    return [*(cells.get(task, "") for task in GLUE), *averages]


def _glue_scores(runs: Sequence[Run], protocol: str) -> dict[str, list[float]]:
    """Column of the GLUE table -> our scores over seeds, each metric at the checkpoint that the protocol chose."""
    scores: dict[str, list[float]] = {}
    for run in one_per_seed(runs):
        if protocol in run["scores"]:
            for column, value in _columns(run["run"]["task"], run["scores"][protocol]["metrics"]).items():
                scores.setdefault(column, []).append(100 * value)
    return scores


def _columns(task: str, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    if task == "mnli":
        return {"mnli_m": metrics["dev_matched"]["accuracy"], "mnli_mm": metrics["dev_mismatched"]["accuracy"]}
    if task == "qqp":
        return {"qqp_acc": metrics["dev"]["accuracy"], "qqp_f1": metrics["dev"]["f1"]}
    if task == "mrpc":
        return {"mrpc": metrics["dev"]["accuracy"]}
    return {task: metrics["dev"]["score"]} if task in GLUE else {}


def one_per_seed(runs: Iterable[Run]) -> list[Run]:
    """The same runs, by task and seed.

    Raises:
        UserError: two of one method, task and seed.
    """
    by_task: dict[str, list[Run]] = {}
    for run in runs:
        by_task.setdefault(run["run"]["task"], []).append(run)
    return [run for found in by_task.values() for seeds in figures.by_method(found).values() for run in seeds.values()]


def ablation(runs: Sequence[Run]) -> Table:
    """IncreLoRA as it is and without parts of it, by backbone, budget and task."""
    cells: dict[tuple[str, ...], dict[str | None, list[Run]]] = {}
    for run in runs:
        name = figures.experiment(run)
        if run["run"]["method"] == "increlora" and is_published(run, name) and name in (None, *ABLATION):
            cell = tuple(run["run"][key] for key in ("backbone", "budget", "task"))
            cells.setdefault(cell, {}).setdefault(name, []).append(run)
    rows = []
    for (backbone, budget, task), variants in sorted(cells.items()):
        for name in (None, *ABLATION) if set(variants) - {None} else ():
            seeds = {run["run"]["seed"]: run for run in one_per_seed(variants.get(name, []))}
            scores = [spread(figures.scores(seeds, protocol).values()) for protocol in PROTOCOLS]
            rows.append([backbone, budget, TASKS[task], name or "IncreLoRA", *scores])
    caption = "Ablation (paper, Table 2): mean ± SD over seeds (number of seeds), per cent."
    return Table(caption, ["backbone", "budget", "task", "variant", *PROTOCOLS], rows)


# the first runs


def runs_of(experiment: str) -> list[Run]:
    """The committed runs of an experiment, by task and method."""
    runs = results.load_runs(ROOT / "results" / "runs")
    runs = [result for result in runs if figures.experiment(result) == experiment]
    return sorted(runs, key=lambda result: (result["run"]["task"], result["run"]["method"]))


def four_tasks() -> str:
    """The best value over training of every metric of the tasks' first runs."""
    rows = ["| task | best on dev over training, each metric by itself | total rank | seconds |", "|---|---|---|---|"]
    for result in runs_of("minilm_5_epochs"):
        curve = [point["scores"]["dev"] for point in result["curve"]]
        metrics = [metric for metric in curve[0] if metric not in ("loss", "score")]
        best = ", ".join(f"{metric} {max(scores[metric] for scores in curve):.4f}" for metric in metrics)
        total = sum(result["ranks"]["last"].values())
        rows.append(f"| {result['run']['task']} | {best} | {total} | {result['cost']['seconds']:.0f} |")
    return "\n".join(rows)


# files


def insert(text: str, name: str, content: str) -> str:
    """The text with the part between the markers `name` replaced."""
    return re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.S)


def built() -> dict[str, Table]:
    """Name -> table, of what there are runs for; the published rows are always there."""
    runs = results.load_runs(ROOT / "results" / "runs")
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        published = list(csv.DictReader(file))
    ours = [r for r in runs if r["run"]["backbone"] == "deberta_v3_base" and is_published(r)]
    found = {"glue_deberta_v3_base": glue(ours, published)}
    ablated = ablation(runs)
    if ablated.rows:
        found["ablation"] = ablated
    of_study = runs_of("minilm_study")
    if of_study:
        trials = [r for r in of_study if r["run"]["seed"] == figures.TUNING_SEED]
        tasks = {t: figures.by_method(r for r in of_study if r["run"]["task"] == t and r not in trials) for t in TASKS}
        found |= study("minilm_study", {task: methods for task, methods in tasks.items() if methods})
        found["minilm_study_learning_rates"] = learning_rates("minilm_study", trials)
    return found


def is_published(run: Run, experiment: str | None = None) -> bool:
    """Whether a run has the settings of its recipe, of which an experiment changes what it says, and no others."""
    return all(o.startswith("precision=") or o == f"experiment={experiment}" for o in run["run"]["overrides"])


def tables() -> dict[Path, str]:
    """Path -> content of every generated file."""
    pages = {path: path.read_text(encoding="utf-8") for path in PAGES}
    content = {
        "every_method_once": results.runs_table(runs_of("minilm_comparison")) + "\n",
        "four_tasks": four_tasks() + "\n",
    }
    for path in sorted((ROOT / "results" / "benchmark").glob("*.json")):
        measured = json.loads(path.read_text(encoding="utf-8"))
        content[f"benchmark_{path.stem}"] = results.benchmark_table(measured) + "\n"
    files = {TABLES / f"{name}.md": text for name, text in content.items()}
    for name, table in built().items():
        content[name] = table.markdown()
        files |= {TABLES / f"{name}.md": table.markdown(), TABLES / f"{name}.tex": table.latex()}
    for name, text in content.items():
        pages = {path: insert(page, name, text.rstrip()) for path, page in pages.items()}
    return files | pages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    check = parser.parse_args().check
    wanted = tables()
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
