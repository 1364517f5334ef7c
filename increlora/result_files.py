"""Result files, one per run: found, read, and what is read of them everywhere.

Both the benchmark, which writes them, and the analysis, which sees nothing else, read them; so this is neither's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from increlora.errors import UserError

FILE_NAME = "result.json"
# the classes that results name and where they are now: a moved file makes no run another one
MOVED = {
    "increlora.backbone.Backbone": "increlora.glue.backbone.Backbone",
    "increlora.synthetic.SyntheticEntailment": "increlora.glue.synthetic.SyntheticEntailment",
    "increlora.tasks.Task": "increlora.glue.tasks.Task",
    "increlora.train.Settings": "increlora.glue.settings.Settings",
}


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
