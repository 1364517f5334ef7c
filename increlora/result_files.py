"""Result files, one per run: find them, read them, and the values that every reader needs.

The benchmark writes and reads them, the analysis reads nothing else; so this module belongs to neither room.
"""

import hashlib
import json
import math
import re
import statistics
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from increlora.errors import UserError, first_line
from increlora.files import as_json

Value = TypeVar("Value")

FORMAT = 3  # with a checksum; `_upgraded` says how earlier ones differ
FILE_NAME = "result.json"
PARTS: dict[str, type] = {  # of every result
    "status": str, "run": dict, "code": dict, "data": dict, "config": dict, "parameters": dict, "scores": dict,
    "ranks": dict, "curve": list, "allocations": list, "cost": dict, "skipped_steps": int,
}  # fmt: skip
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


def read(path: Path, needed: Collection[str] = tuple(PARTS)) -> dict[str, Any]:
    """One result file of any format, as if it were of today's; every reader of results comes here.

    Args:
        needed: the parts that it must have.

    Raises:
        UserError: it is not there, is not JSON, is of a later format, does not have its checksum, or its parts are not
            those of a result.
    """
    if not path.exists():
        refuse_unfinished(path.parent)
    elif not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no regular file, so it is not the result of a run")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the result file {path}: {first_line(error)}") from None
    number = result.get("format", 1) if isinstance(result, dict) else FORMAT
    if number not in range(1, FORMAT + 1):
        raise UserError(f"{path} is of result format {number}, this code reads 1 to {FORMAT}: use a later version")
    claims = isinstance(result, dict) and (number > 2 or "checksum" in result)
    if claims and result.get("checksum") != _checksum(result):
        raise UserError(f"{path} was changed or is damaged: its content does not have its checksum")
    if isinstance(result, dict):
        result.pop("checksum", None)
    parts = result if isinstance(result, dict) else {}
    missing = [part for part in needed if not isinstance(parts.get(part), PARTS[part])]
    if missing:
        raise UserError(
            f"{path} is not the result of a run: it has no {', '.join(missing[:3])}.\n"
            "Give a run directory, or a result file as run.py wrote it."
        )
    try:
        _check_values(result)
        return _upgraded(result)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the result of a run: {first_line(error)}") from None


def _check_values(result: Mapping[str, Any]) -> None:
    """What every reader takes for granted below the parts.

    Raises:
        AttributeError, KeyError, TypeError: it is missing, or of another type.
    """
    for key in ("backbone", "budget", "method", "task"):  # parts of a path
        name = result.get("run", {}).get(key, "")
        if not isinstance(name, str) or re.search(r"[/\\]|^\.\.?$", name):
            raise TypeError(f"a {key} that is no name, {name!r}")
    if type(seed := result.get("run", {}).get("seed", 0)) is not int:
        raise TypeError(f"a seed that is no whole number, {seed!r}")
    for score in result.get("scores", {}).values():
        if not isinstance(score["step"], int) or not isinstance(score["score"], int | float | None):
            raise TypeError(f"a score of {score['score']!r} at step {score['step']!r}")
    for of_split in _metrics(result):
        for value in of_split.values():
            if not isinstance(value, int | float | None):
                raise TypeError(f"a metric of {value!r}")
    for part in ("inputs", "weights"):
        if not isinstance(result.get(part, {}), dict):
            raise TypeError(f"{part} that are no mapping")
    for name in ("seconds", "steps") if "cost" in result else ():
        if not isinstance(result["cost"][name], int | float):
            raise TypeError(f"a cost with {name} {result['cost'][name]!r}")


def _metrics(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The metrics on one split after another, of the scores and of the curve."""
    for score in result.get("scores", {}).values():
        yield from score["metrics"].values()
    for point in result.get("curve", ()):
        yield from point["scores"].values()


def sealed(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result as plain data with the checksum of its content."""
    plain = json.loads(as_json(result))
    return plain | {"checksum": _checksum(plain)}


def _checksum(result: Mapping[str, Any]) -> str:
    content = {key: value for key, value in result.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _upgraded(result: dict[str, Any]) -> dict[str, Any]:
    """A result of any format as one of today's; a metric that is null was not a number.

    Format 1 has no `format`. Its `run.overrides` hold `settings_from`, its `run.recipe` is the one that the names
    suggest, and its `inputs` lack the data's digest.
    """
    if "config" in result:
        result["config"] = up_to_date(result["config"])
    if result.get("format", 1) < 2:
        result["format"] = 2
        if "run" in result:
            result["run"] = _run_of_format_1(result["run"])
        if "data" in result:
            read = {"data": result["data"].get("fingerprint"), **result.get("inputs", {})}
            result["inputs"] = {name: digest for name, digest in read.items() if digest is not None}
    for score in result.get("scores", {}).values():
        score["score"] = math.nan if score["score"] is None else score["score"]
    for of_split in _metrics(result):
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
    """Refuse a directory whose run has a checkpoint and no result yet.

    Raises:
        UserError: it holds a checkpoint.
    """
    if (run_dir / "checkpoint.safetensors").exists():
        raise UserError(f"{run_dir}: the run is not finished; the command that started it continues it")


def load_runs(root: Path, passed_over: list[str] | None = None, without: Collection[str] = ()) -> list[dict[str, Any]]:
    """Every result below a folder, in order of their paths.

    Args:
        passed_over: takes a sentence for each file that cannot be used; without it such a file is an error.
        without: parts that are checked and then dropped; the allocations are half of what thousands of results need.

    Raises:
        UserError: a file cannot be used.
    """
    found = []
    equal: dict[str, Any] = {}
    for path in sorted(root.rglob("*.json")):
        if path.name == FILE_NAME or path.stem.startswith("seed"):
            try:
                result = read(path)
            except UserError as error:
                if passed_over is None:
                    raise
                passed_over.append(str(error))
                continue
            found.append({part: _shared(part, value, equal) for part, value in result.items() if part not in without})
    return found


def _shared(part: str, value: Any, equal: dict[str, Any]) -> Any:
    """A part of a result; words and settings are in memory once, for thousands of results have the same."""
    value = _with_shared_words(value)
    if part == "config":
        return {key: equal.setdefault(json.dumps(held), held) for key, held in value.items()}
    return value


def _with_shared_words(value: Any) -> Any:
    if isinstance(value, dict):
        return {sys.intern(key): _with_shared_words(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_shared_words(item) for item in value]
    return sys.intern(value) if isinstance(value, str) else value


def last_score(result: Mapping[str, Any], split: str) -> float:
    """The primary score on a split at the end of a run; the lowest possible if it diverged.

    Raises:
        UserError: the run was not scored on this split.
    """
    if result["status"] != "finished":
        return float("-inf")
    scores = result["curve"][-1]["scores"]
    if split not in scores:
        raise UserError(f"a run has no scores on the split {split}; it has them on {', '.join(scores)}")
    return scores[split]["score"]


def trial_means(scores: Mapping[Value, Sequence[float]]) -> dict[Value, float]:
    """Tried value -> its mean score, so rounded that the order of additions makes no value better than its equals."""
    return {value: round(statistics.fmean(found), 9) for value, found in scores.items()}


def padding_share(cost: Mapping[str, float]) -> float:
    """Padded tokens beyond real ones, as a share of the real ones."""
    return cost["padded_tokens"] / max(1, cost["tokens"])
