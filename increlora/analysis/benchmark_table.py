"""What a step costs, as a table: measured ratios beside the bars set beforehand, seconds, memory."""

import statistics
from collections.abc import Mapping
from typing import Any

BARS = {
    "increlora, not scoring": 1.00, "increlora, after growth": 1.00, "increlora, scoring": 1.30,
    "recipe RTE r2": 1.06, "recipe MNLI r2": 1.02, "growth event / step": 1.00, "our loop / bare loop": 1.03,
    "memory increlora, not scoring": 1.02,
}  # fmt: skip
PADDING_BAR = 0.06
SPEED_BAR = 6.0  # times the authors' examples per second on RTE, at least


def benchmark_table(measured: Mapping[str, Any]) -> str:
    """What `scripts/benchmark.py --json` wrote: ratios beside the bars set beforehand, seconds, memory; Markdown."""
    rows = ["| what (medians of paired ratios to LoRA) | measured | bar |", "|---|---|---|"]
    for name, value in measured["ratios"].items():
        bar = f"at most {BARS[name]:.2f}" if name in BARS else ""
        rows.append(f"| {name} | {value:.3f}{_missed(name in BARS and value > BARS[name])} | {bar} |")
    for task, share in measured.get("padding", {}).items():
        rows.append(f"| padding {task} | {share:.1%}{_missed(share > PADDING_BAR)} | at most {PADDING_BAR:.0%} |")
    if speed := measured.get("rte"):
        rows.append(
            f"| RTE r2 recipe, examples a second: {speed['ours']:.2f} against the authors' {speed['authors']:.2f} "
            f"| {speed['ratio']:.2f}{_missed(speed['ratio'] < SPEED_BAR)} | at least {SPEED_BAR:g} |"
        )
    tokens = measured["options"]["batch"] * measured["options"]["length"]
    rows += ["", "| arm | seconds a step | tokens a second | peak memory |", "|---|---|---|---|"]
    for name, values in measured["seconds"].items():
        median = statistics.median(values)
        peak = f"{measured['memory'][name]:.0f} MB" if name in measured.get("memory", {}) else ""
        rows.append(f"| {name} | {median:.3f} | {tokens / median:.0f} | {peak} |")
    return "\n".join(rows)


def _missed(missed: bool) -> str:
    return " **missed**" if missed else ""
