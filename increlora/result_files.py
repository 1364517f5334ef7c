"""Result files, one per run: found, read, and what is read of them everywhere.

Both the benchmark, which writes them, and the analysis, which sees nothing else, read them; so this is neither's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from increlora.errors import UserError

FILE_NAME = "result.json"
BACKBONE = "increlora.glue.backbone.Backbone"
# the classes that results name and where they are now: a moved file makes no run another one
MOVED = {
    "increlora.backbone.Backbone": BACKBONE,
    "increlora.synthetic.SyntheticEntailment": "increlora.glue.synthetic.SyntheticEntailment",
    "increlora.tasks.Task": "increlora.glue.tasks.Task",
    "increlora.train.Settings": "increlora.glue.settings.Settings",
}
# what older results do not say, because it followed from the architecture
TOKENIZERS: dict[str, dict[str, Any]] = {
    "deberta-v2": {"tokenizer_files": [["spm.model"], ["tokenizer.json"]], "sentencepiece": "spm.model"},
    "bert": {"tokenizer_files": [["tokenizer.json"], ["vocab.txt"]], "sentencepiece": None},
    "roberta": {"tokenizer_files": [["tokenizer.json"], ["vocab.json", "merges.txt"]], "sentencepiece": None},
}
OTHER_TOKENIZER: dict[str, Any] = {
    "tokenizer_files": [["tokenizer.json"], ["vocab.txt"], ["vocab.json", "merges.txt"]],
    "sentencepiece": None,
}


def read(path: Path) -> dict[str, Any]:
    """One result file.

    Raises:
        UserError: it is not there or is not a result file.
    """
    if not path.exists():
        refuse_unfinished(path.parent)
    try:
        return up_to_date(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the result file {path}: {error}") from None


def up_to_date(stored: Any) -> Any:
    """What a result or a checkpoint holds, as it would be written now: classes by where they are, no key missing."""
    if not isinstance(stored, dict):
        return stored
    found = {key: up_to_date(value) for key, value in stored.items()}
    if "_target_" in found:
        found["_target_"] = MOVED.get(found["_target_"], found["_target_"])
    if found.get("_target_") == BACKBONE and "tokenizer_files" not in found:
        found |= TOKENIZERS.get(found["architecture"]["model_type"], OTHER_TOKENIZER)
    return found


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
