"""What a step costs, as tables: measured ratios beside the bars set beforehand, seconds, operations, memory."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Measured = Mapping[str, Any]  # what scripts/benchmark.py or scripts/benchmark_memory.py wrote

# every bar was set before the measurement; ratios are to PEFT's LoRA of rank 8
EVERYWHERE = {
    "our loop / bare loop": 1.03, "growth event / step": 1.00, "memory increlora, not scoring": 1.02,
    "peft, scoring / increlora": 1.05, "peft, not scoring / increlora": 1.05, "peft, after growth / increlora": 1.05,
}  # fmt: skip
# precision and shape -> an encoder of base size: a step without scores, growing or afterwards; a step with scores
STEPS = {
    ("fp32", "8x128"): (0.95, 1.25),
    ("bf16", "8x128"): (0.90, 1.20),
    ("bf16", "32x12"): (0.80, None),
    ("bf16", "32x64"): (0.85, None),
}
RECIPES = {"recipe RTE r2": 1.00, "recipe MNLI r2": 0.92}  # base size, bf16
LAUNCH = {
    "increlora r2": 0.85, "increlora r8": 0.95, "increlora r8, growing": 0.95, "increlora r8, scoring": 1.30,
    "increlora r24": 1.10,
}  # fmt: skip
OPERATIONS, OPERATIONS_SCORING = 2179, 2900
TENSORS = 200  # in the optimizer, at rank 8 grown by single ranks
PADDING = 0.06
SPEED = 6.0  # times the authors' examples a second on RTE, at least
PEAK_OF_RUNS = 1.05  # IncreLoRA to LoRA, whole runs in the same loop
PEAK_MB = 5 * 1024  # of a whole run of IncreLoRA, base size, batches of 32
FROZEN = 0.55  # bf16 to fp32


def benchmark_table(measured: Measured) -> str:
    """The tables of one file of results/benchmark, and what it was measured with; Markdown."""
    about = measured["about"]
    machine = f"{about['processor']}, {about['cores']} cores, threads: {about['threads']}, torch {about['torch']}"
    machine += f", {about['gpu']}" if about["gpu"] else ""
    return f"{TABLES[measured['measure']](measured)}\n\n`{about['command']}` on {machine}"


def bars_of_steps(options: Mapping[str, Any], shape: str) -> dict[str, float]:
    """What a step of this encoder, precision and shape may cost at most."""
    found = dict(EVERYWHERE)
    if options["backbone"].endswith("_base"):
        idle, scoring = STEPS.get((options["precision"], shape), (None, None))
        if idle:
            found |= {"increlora, not scoring": idle, "increlora, after growth": idle}
        if scoring:
            found["increlora, scoring"] = scoring
        if options["precision"] == "bf16":
            found |= RECIPES
        # of two LoRAs: in the same loop, and as PEFT alone runs it
        ours = {name: bar for name, bar in found.items() if name.startswith(("increlora", "recipe"))}
        found |= {f"{name} / lora, weights cast": bar for name, bar in ours.items()}
    return found


def steps_table(measured: Measured) -> str:
    """Whole steps of several shapes: ratios to LoRA's, then seconds, speed and memory."""
    shapes, options = measured["shapes"], measured["options"]
    bars = {shape: bars_of_steps(options, shape) for shape in shapes}
    titles = [shape.replace("x", " x ") for shape in shapes]
    rows = [
        [name, *(_beside(of["ratios"].get(name), bars[shape].get(name)) for shape, of in shapes.items())]
        for name in _names(of["ratios"] for of in shapes.values())
    ]
    ratios = _markdown(["to LoRA's, medians of paired rounds", *titles], rows)
    rows = [
        [name, *(_absolute(name, shape, of) for shape, of in shapes.items())]
        for name in _names(of["seconds"] for of in shapes.values())
    ]
    parts = [ratios, _markdown(["seconds a step, tokens a second, peak memory", *titles], rows)]
    if rows := _rows_of_data(measured):
        parts.append(_markdown(["on GLUE's lengths", "measured"], rows))
    return "\n\n".join(parts)


def _absolute(name: str, shape: str, of: Measured) -> str:
    if name not in of["seconds"]:
        return ""
    batch, length = map(int, shape.split("x"))
    median = statistics.median(of["seconds"][name])
    peak = f", {of['memory'][name]:,.0f} MB" if name in of.get("memory", {}) else ""
    return f"{median:.3f} s, {batch * length / median:,.0f}/s{peak}"


def _rows_of_data(measured: Measured) -> list[list[str]]:
    rows = [
        [f"padding {task}", f"{share:.1%}{_missed(share > PADDING)} (at most {PADDING:.0%})"]
        for task, share in measured.get("padding", {}).items()
    ]
    if speed := measured.get("rte"):
        what = f"RTE r2 recipe, examples a second: {speed['ours']:.2f} against the authors' {speed['authors']:.2f}"
        rows.append([what, f"{speed['ratio']:.2f}{_missed(speed['ratio'] < SPEED)} (at least {SPEED:g})"])
    return rows


def launch_table(measured: Measured) -> str:
    """Steps that take their time to launch operations: ratios to LoRA's, operations, tensors."""
    (of,) = measured["shapes"].values()
    barred = measured["options"]["backbone"] == "deberta_v3_base"
    rows = []
    for name, seconds in of["seconds"].items():
        ours = barred and name.startswith("increlora")
        most = OPERATIONS_SCORING if name.endswith("scoring") else OPERATIONS
        rows.append([
            name,
            _beside(of["ratios"].get(name, 1.0), LAUNCH.get(name) if barred else None),
            _counted(of["operations"][name], most if ours else None),
            _counted(of["tensors"][name], TENSORS if ours and name.startswith("increlora r8") else None),
            str(of["growths"].get(name, "")),
            f"{1e3 * statistics.median(seconds):.1f}",
        ])  # fmt: skip
    titles = ["arm", "step / LoRA's", "operations", "tensors in the optimizer", "growths before", "milliseconds a step"]
    return _markdown(titles, rows)


def memory_table(measured: Measured) -> str:
    """Whole runs, and the frozen weights of their model."""
    runs, options, frozen = measured["runs"], measured["options"], measured["frozen"]
    large = options["backbone"].endswith("_base") and options["batch"] == 32
    rows = []
    for name, cost in runs.items():
        bar = PEAK_MB if name == "increlora" and large else None
        rows.append([f"peak of a run, {name}, MB", _counted(round(cost["peak_memory_mb"]), bar)])
    if {"increlora", "lora"} <= set(runs):
        ratio = runs["increlora"]["peak_memory_mb"] / runs["lora"]["peak_memory_mb"]
        rows.append(["peak of a run, increlora / lora", _beside(ratio, PEAK_OF_RUNS)])
    for name, megabytes in frozen.items():
        ratio = megabytes["bf16"] / megabytes["fp32"]
        what = f"{name} in bf16 / in fp32 ({megabytes['bf16']:,.0f} / {megabytes['fp32']:,.0f} MB)"
        rows.append([what, _beside(ratio, FROZEN)])
    return _markdown(["memory", "measured"], rows)


TABLES = {"steps": steps_table, "launch": launch_table, "memory": memory_table}


def _names(found: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for names in found for name in names))


def _beside(value: float | None, bar: float | None) -> str:
    """A ratio beside its bar, if both are there."""
    if value is None:
        return ""
    return f"{value:.3f}" if bar is None else f"{value:.3f}{_missed(value > bar)} (at most {bar:.2f})"


def _counted(value: int, bar: int | None) -> str:
    return f"{value:,}" if bar is None else f"{value:,}{_missed(value > bar)} (at most {bar:,})"


def _missed(missed: bool) -> str:
    return " **missed**" if missed else ""


def _markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
