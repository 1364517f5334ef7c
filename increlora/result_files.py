"""Result files, one per run: find them, read them, and the values that every reader needs.

The benchmark writes and reads them, the analysis reads nothing else; so this module belongs to neither room.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from increlora.errors import UserError, first_line

FORMAT = 2  # `_upgraded` says how earlier ones differ
FILE_NAME = "result.json"
# the classes that finished runs name, and where they are now
MOVED = {
    "increlora.backbone.Backbone": "increlora.glue.backbone.Backbone",
    "increlora.synthetic.SyntheticEntailment": "increlora.glue.synthetic.SyntheticEntailment",
    "increlora.tasks.Task": "increlora.glue.tasks.Task",
    "increlora.train.Settings": "increlora.glue.settings.Settings",
}


def read(path: Path) -> dict[str, Any]:
    """One result file of any format, as if it were of today's; every reader of results comes here.

    Raises:
        UserError: it is not there, is not JSON, is of a later format, or its parts are not those of a result.
    """
    if not path.exists():
        refuse_unfinished(path.parent)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the result file {path}: {error}") from None
    number = result.get("format", 1) if isinstance(result, dict) else FORMAT
    if number not in range(1, FORMAT + 1):
        raise UserError(f"{path} is of result format {number}, this code reads 1 to {FORMAT}: use a later version")
    try:
        return _upgraded(result) if isinstance(result, dict) else result
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path} is not the result of a run: {first_line(error)}") from None


def _upgraded(result: dict[str, Any]) -> dict[str, Any]:
    """A result of any format as one of today's; a metric that is null was not a number.

    Format 1 has no `format`. Its `run.overrides` hold `settings_from`, its `run.recipe` is the one that the names
    suggest, and its `inputs` lack the data's digest.
    """
    if result.get("format", 1) < 2:
        result["format"] = 2
        if "run" in result:
            result["run"] = _run_of_format_1(result["run"])
        if "data" in result:
            read = {"data": result["data"].get("fingerprint"), **result.get("inputs", {})}
            result["inputs"] = {name: digest for name, digest in read.items() if digest is not None}
    metrics = [score.get("metrics", {}) for score in result.get("scores", {}).values()]
    metrics += [point.get("scores", {}) for point in result.get("curve", [])]
    for of_split in (values for splits in metrics for values in splits.values()):
        of_split.update({name: math.nan for name, value in of_split.items() if value is None})
    return result


def _run_of_format_1(run: dict[str, Any]) -> dict[str, Any]:
    overrides = [override for override in run.get("overrides", []) if not override.startswith("settings_from=")]
    recipe = run.get("recipe")
    for override in overrides:
        name, _, choice = override.partition("=")
        if name in ("recipe", "~recipe"):
            recipe = choice or None
    return {**run, "overrides": overrides, "recipe": recipe}


def with_moved_classes(stored: Any) -> Any:
    """A stored configuration with every class (`_target_`) named by where it is now, so that it can be built."""
    if not isinstance(stored, dict):
        return stored
    moved = {key: with_moved_classes(value) for key, value in stored.items()}
    if moved.get("_target_") in MOVED:
        moved["_target_"] = MOVED[moved["_target_"]]
    return moved


def refuse_unfinished(run_dir: Path) -> None:
    """Refuse a directory whose run has a checkpoint and no result yet.

    Raises:
        UserError: it holds a checkpoint.
    """
    if (run_dir / "checkpoint.safetensors").exists():
        raise UserError(f"{run_dir}: the run is not finished; the command that started it continues it")


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


def padding_share(cost: Mapping[str, float]) -> float:
    """Padded tokens beyond real ones, as a share of the real ones."""
    return cost["padded_tokens"] / max(1, cost["tokens"])
