"""Table 1 of the paper: published scores on GLUE with ours below each, and the gap between them."""

from collections.abc import Mapping, Sequence

import numpy as np

from increlora.analysis import comparison, selection
from increlora.analysis.selection import PROTOCOLS, Run
from increlora.analysis.tables import Table, spread
from increlora.errors import UserError

GLUE = ("mnli_m", "mnli_mm", "sst2", "cola", "qqp_acc", "qqp_f1", "qnli", "rte", "mrpc", "stsb")
# published name and parameters -> our method and budget
SAME_AS = {
    ("Full FT", "184M"): ("full", None), ("BitFit", "0.1M"): ("bitfit", None),
    ("HAdapter", "0.31M"): ("houlsby", "r2"), ("HAdapter", "0.61M"): ("houlsby", "r4"),
    ("HAdapter", "1.22M"): ("houlsby", "r8"), ("PAdapter", "0.30M"): ("pfeiffer", "r2"),
    ("PAdapter", "0.60M"): ("pfeiffer", "r4"), ("PAdapter", "1.18M"): ("pfeiffer", "r8"),
    ("LoRA r=2", "0.33M"): ("lora", "r2"), ("LoRA r=8", "1.33M"): ("lora", "r8"),
    ("AdaLoRA", "0.32M"): ("adalora", "r2"), ("AdaLoRA", "1.27M"): ("adalora", "r8"),
    ("IncreLoRA r=2", "0.34M"): ("increlora", "r2"), ("IncreLoRA r=8", "1.33M"): ("increlora", "r8"),
}  # fmt: skip


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
        "tasks: `both` takes the means of MNLI m and mm and of QQP accuracy and F1, `plain` MNLI-m and QQP accuracy. "
        "IncreLoRA's rows are transcribed, and their STS-B is Pearson alone (results/paper/README.md)."
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
    for run in selection.one_per_seed(runs):
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
