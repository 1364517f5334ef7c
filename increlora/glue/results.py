"""One result file per run: build it, write it atomically, compare it with what is asked for, show it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from increlora.errors import UserError
from increlora.files import as_json, write_text
from increlora.glue.identity import differences
from increlora.matrices import rank_map
from increlora.result_files import FILE_NAME, FORMAT, padding_share, read, sealed

if TYPE_CHECKING:  # reading results must not import torch
    from increlora.glue.evaluate import Evaluation
    from increlora.glue.loop import Outcome
    from increlora.glue.tasks import TaskData

INPUTS = {
    "base": "pretrained weights",
    "architecture": "config.json",
    "pattern": "ranks (method.pattern)",
    "source": "data (task.data_dir)",
    "folder": "pretrained weights (backbone.path)",
}  # where the name alone is not clear


def build(
    run: Mapping[str, Any],
    config: Mapping[str, Any],
    data: "TaskData",
    outcome: "Outcome",
    code: Mapping[str, Any],
    inputs: Mapping[str, str],
    weights: Mapping[str, str],
) -> dict[str, Any]:
    """The content of a result file.

    Args:
        code: `machine.code_state` from before the training.
        inputs: digests of what was read, by name (`identity.inputs`).
        weights: sha256 of the files of weights beside the result, by name (best, last).

    There are entries for `best` (on the primary evaluation split), for `last` and, with a held-out part of train, for
    `clean` (chosen there, scored on the primary split). Scores, ranks and parameters of an entry are of one checkpoint.
    """
    primary = next(iter(data.evaluation))
    found = {"best": outcome.best(primary), "last": outcome.curve[-1] if outcome.curve else None}
    if "holdout" in data.evaluation:
        found["clean"] = outcome.best("holdout")
    chosen = {name: evaluation for name, evaluation in found.items() if evaluation is not None}
    return {
        "format": FORMAT,
        "status": outcome.status,
        "run": dict(run),
        "code": dict(code),
        "inputs": dict(inputs),
        "weights": dict(weights),
        "data": {
            "source": place(data.source),
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


def place(source: str) -> str:
    """Where data came from, without what only one machine knows: of a folder with an absolute path the name."""
    return Path(source).name if Path(source).is_absolute() else source


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


def write(run_dir: Path, result: Mapping[str, Any]) -> Path:
    """Write the result file completely or not at all.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    path = run_dir / FILE_NAME
    write_text(path, as_json(sealed(result), indent=1) + "\n", follow=False)
    return path


def stored(
    run_dir: Path, config: Mapping[str, Any], inputs: Callable[[], Mapping[str, str]] = dict
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
    changed = differences(result["config"], config)
    if changed:
        raise UserError(
            f"{path} is the result of another configuration (it differs in {', '.join(changed[:5])}). "
            "Run with overwrite=true to replace it, or with another run_dir."
        )
    if other := changed_inputs(result, inputs()):
        raise UserError(
            f"{path} is the result of a run with other {in_words(other)} than those given now.\n"
            "Give those it was made with, or run with overwrite=true to replace it, or with another run_dir."
        )
    return result


def changed_inputs(result: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """The names of the inputs whose digest has changed; inputs that the result does not record are not compared."""
    recorded = {
        **result["inputs"],
        "source": result["data"]["source"],
        "folder": "given" if "architecture" in result["inputs"] else "none",  # recorded of a folder alone
    }
    return [name for name, digest in inputs.items() if digest != recorded.get(name, digest)]


def in_words(inputs: Sequence[str]) -> str:
    """Names of inputs in words."""
    return " and ".join(INPUTS.get(name, name) for name in inputs)


def summary(result: Mapping[str, Any]) -> str:
    """A finished run in a few lines: scores, ranks before and after, cost."""
    run, scores, cost = result["run"], result["scores"], result["cost"]
    names = [str(run[key]) for key in ("task", "method", "budget", "backbone")]
    lines = [f"{' / '.join(names)} / seed {run['seed']}: {result['status']}"]
    for name, score in scores.items():
        shown = "; ".join(
            ("" if number == 0 else f"{split}: ")  # the first split is that of the score
            + ", ".join(f"{m} {value:.4f}" for m, value in metrics.items() if m not in ("score", "loss"))
            for number, (split, metrics) in enumerate(score["metrics"].items())
        )
        lines.append(f"  {name:5s} score {score['score']:.4f} at step {score['step']} ({shown})")
    if result["parameters"].get("last"):
        lines.append("  parameters: " + ", ".join(f"{k} {v:,}" for k, v in result["parameters"]["last"].items()))
    lines.append(f"  {cost['steps']} steps in {cost['seconds']:.0f} s, padding {padding_share(cost):.1%}")
    if result["ranks"].get("last"):
        lines += ["  ranks before -> after (rows: layers)", *_rank_table(result)]
    return "\n".join(lines)


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
