"""One result file per run: made, written atomically, read back, shown."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from increlora.errors import UserError
from increlora.files import changed_keys, writing
from increlora.matrices import rank_map

if TYPE_CHECKING:  # reading results must not cost the import of torch
    from increlora.glue.evaluate import Evaluation
    from increlora.glue.loop import Outcome
    from increlora.glue.tasks import TaskData

FILE_NAME = "result.json"
INPUTS = {"data": "data", "base": "pretrained weights", "pattern": "ranks (method.pattern)"}  # in words
SOURCES = ("--", ":/run.py", ":/increlora", ":/baselines", ":/configs")  # where a new file may change what is computed
# the classes that results name and where they are now: a moved file makes no run another one
MOVED = {
    "increlora.backbone.Backbone": "increlora.glue.backbone.Backbone",
    "increlora.synthetic.SyntheticEntailment": "increlora.glue.synthetic.SyntheticEntailment",
    "increlora.tasks.Task": "increlora.glue.tasks.Task",
    "increlora.train.Settings": "increlora.glue.settings.Settings",
}
PACKAGES = ("torch", "transformers", "datasets", "peft", "tokenizers", "numpy")


def build(
    run: Mapping[str, Any],
    config: Mapping[str, Any],
    data: "TaskData",
    outcome: "Outcome",
    code: Mapping[str, Any],
    inputs: Mapping[str, str | None],
) -> dict[str, Any]:
    """The content of a result file.

    Args:
        code: `code_state` from before the training.
        inputs: digests of what was read beside the data, by name: `base`, the pretrained weights.

    Scores, ranks and parameters of `best` (on the primary evaluation split), `last` and, with a
    held-out part of train, `clean` (chosen there, scored on the primary split) come from one and the
    same checkpoint each.
    """
    primary = next(iter(data.evaluation))
    found = {"best": outcome.best(primary), "last": outcome.curve[-1] if outcome.curve else None}
    if "holdout" in data.evaluation:
        found["clean"] = outcome.best("holdout")
    chosen = {name: evaluation for name, evaluation in found.items() if evaluation is not None}
    return {
        "status": outcome.status,
        "run": dict(run),
        "code": dict(code),
        "inputs": dict(inputs),
        "data": {
            "source": data.source,
            "sizes": data.sizes,
            "fingerprint": data.fingerprint,
            "truncated": data.truncated,
            "skipped": data.skipped,
        },
        "config": dict(config),
        "parameters": {name: evaluation.parameters for name, evaluation in chosen.items()},
        "scores": {name: _score(evaluation, primary) for name, evaluation in chosen.items()},
        "ranks": {"start": outcome.start_ranks} | {name: evaluation.ranks for name, evaluation in chosen.items()},
        "curve": [_point(evaluation) for evaluation in outcome.curve],
        "allocations": outcome.allocations,
        "cost": outcome.cost,
        "skipped_steps": outcome.skipped_steps,
    }


def _score(evaluation: "Evaluation", primary: str) -> dict[str, Any]:
    return {
        "score": evaluation.scores[primary]["score"],
        "step": evaluation.step,
        "metrics": evaluation.scores,
    }


def _point(evaluation: "Evaluation") -> dict[str, Any]:
    point = asdict(evaluation)
    point["total_rank"] = sum(point.pop("ranks").values())
    del point["parameters"]
    return point


def code_state(device: str) -> dict[str, Any]:
    """Commit, whether the tree is dirty, versions of what computes, the machine and the number of processes."""
    from increlora import distributed

    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no") or _git("status", "--porcelain", *SOURCES)),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": device,
        "processes": distributed.processes(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(run_dir: Path, result: Mapping[str, Any]) -> Path:
    """Write the result file whole or not at all.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    path = run_dir / FILE_NAME
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    text = json.dumps(result, indent=1) + "\n"
    with writing(path):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return path


def read(path: Path) -> dict[str, Any]:
    """One result file.

    Raises:
        UserError: it is not there or is not a result file.
    """
    if not path.exists():
        refuse_unfinished(path.parent)
    try:
        return with_moved_classes(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the result file {path}: {error}") from None


def with_moved_classes(stored: Any) -> Any:
    """What a result or a checkpoint holds, with every class (`_target_`) named by where it is now."""
    if not isinstance(stored, dict):
        return stored
    moved = {key: with_moved_classes(value) for key, value in stored.items()}
    if moved.get("_target_") in MOVED:
        moved["_target_"] = MOVED[moved["_target_"]]
    return moved


def refuse_unfinished(run_dir: Path) -> None:
    """Say of a directory without a result that its run can go on, if it can.

    Raises:
        UserError: it holds a checkpoint.
    """
    if (run_dir / "checkpoint.safetensors").exists():
        raise UserError(f"{run_dir}: the run is not finished; the command that started it goes on with it")


def stored(
    run_dir: Path, config: Mapping[str, Any], inputs: Callable[[], Mapping[str, str | None]] = dict
) -> dict[str, Any] | None:
    """The result of a finished run of this configuration, None if there is none yet.

    Args:
        inputs: gives the digests of the files that it would read now, by name; called if there is a result.

    Raises:
        UserError: the directory holds the result of another configuration, or of other files.
    """
    path = run_dir / FILE_NAME
    if not path.exists():
        return None
    result = read(path)
    changed = changed_keys(result["config"], config)
    if changed:
        raise UserError(
            f"{path} is the result of another configuration (it differs in {', '.join(changed[:5])}). "
            "Run with overwrite=true to replace it, or with another run_dir."
        )
    if other := changed_inputs(result, inputs()):
        words = " and ".join(INPUTS[name] for name in other)
        raise UserError(
            f"{path} is the result with {words} that have changed since, or lie elsewhere.\n"
            "Give those it was made with, or run with overwrite=true to replace it, or with another run_dir."
        )
    return result


def changed_inputs(result: Mapping[str, Any], inputs: Mapping[str, str | None]) -> list[str]:
    """The names of what a run read that has another digest now; what its result does not tell is not among them."""
    before = {"data": result["data"]["fingerprint"], **result.get("inputs", {})}
    return [name for name, digest in inputs.items() if digest != before.get(name, digest)]


def load_runs(root: Path) -> list[dict[str, Any]]:
    """Every result below a folder, in order of their paths."""
    return [
        read(path) for path in sorted(root.rglob("*.json")) if path.name == FILE_NAME or path.stem.startswith("seed")
    ]


def last_score(result: Mapping[str, Any], split: str) -> float:
    """The primary score on a split at the end of a run; the lowest possible if it diverged."""
    if result["status"] != "finished":
        return float("-inf")
    return result["curve"][-1]["scores"][split]["score"]


def summary(result: Mapping[str, Any]) -> str:
    """What a person wants to know of a finished run: scores, ranks before and after, cost."""
    run, scores, cost = result["run"], result["scores"], result["cost"]
    names = [str(run[key]) for key in ("task", "method", "budget", "backbone")]
    lines = [f"{' / '.join(names)} / seed {run['seed']}: {result['status']}"]
    for name, score in scores.items():
        metrics = {m: v for split in score["metrics"].values() for m, v in split.items() if m not in ("score", "loss")}
        shown = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
        lines.append(f"  {name:5s} score {score['score']:.4f} at step {score['step']} ({shown})")
    if result["parameters"].get("last"):
        lines.append("  parameters: " + ", ".join(f"{k} {v:,}" for k, v in result["parameters"]["last"].items()))
    lines.append(f"  {cost['steps']} steps in {cost['seconds']:.0f} s, padding {padding_share(cost):.1%}")
    if result["ranks"].get("last"):
        lines += ["  ranks before -> after (rows: layers)", *_rank_table(result)]
    return "\n".join(lines)


def padding_share(cost: Mapping[str, float]) -> float:
    """Padded tokens beyond real ones, as a share of the real ones."""
    return cost["padded_tokens"] / max(1, cost["tokens"])


def _rank_table(result: Mapping[str, Any]) -> list[str]:
    kinds = result["config"]["method"]["kinds"]
    layers, names, before = rank_map(result["ranks"]["start"], kinds)
    after = rank_map(result["ranks"]["last"], kinds)[2]
    width = max(len(name) for name in names) + 2
    rows = ["  layer" + "".join(name.rjust(width) for name in names)]
    for layer, old, new in zip(layers, before, after, strict=True):
        rows.append(f"  {layer:5d}" + "".join(f"{a} -> {b}".rjust(width) for a, b in zip(old, new, strict=True)))
    totals = sum(map(sum, before)), sum(map(sum, after))
    return [*rows, f"  total rank {totals[0]} -> {totals[1]}"]


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
        f"{cost['peak_memory_mb']:.0f} MB",
    ]
    return f"| {' | '.join(cells)} |"


# what a step costs

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
