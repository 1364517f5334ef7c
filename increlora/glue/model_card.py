"""The model card of an exported run: what was trained on what, scores, ranks, how to load it, how it was made."""

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from increlora.files import shown
from increlora.glue.finished_run import Trained
from increlora.glue.tasks import GLUE
from increlora.matrices import rank_map


def model_card(trained: Trained, kind: str, base: str | None, tokenizer: str = "THIS_FOLDER") -> str:
    """`README.md`: what was trained on what, scores, labels, ranks, how to load it and how it was made.

    Args:
        kind: `peft` or `merged`.
        base: the base model's name.
        tokenizer: where an adapter's users load the tokenizer from.
    """
    run = trained.result["run"]
    title = f"{run['method']} on {run['task']} ({run['backbone']}, budget {run['budget']}, seed {run['seed']})"
    sections = [
        _front_matter(run, kind, base),
        f"# {plain(title)}",
        _what(trained, kind, base),
        "## Scores\n\n" + _scores(trained),
        "## Labels\n\n" + _labels(trained),
        *(["## Ranks\n\n" + _ranks(trained, kind)] if trained.method.ranks() else []),
        "## Use\n\n" + (_use_adapter(trained, base, tokenizer) if kind == "peft" else _use_merged(trained)),
        "## Made by\n\n" + _made_by(trained, kind),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(run: Mapping[str, Any], kind: str, base: str | None) -> str:
    lines = [f"base_model: {json.dumps(base)}"] if base else []
    lines += [f"library_name: {'peft' if kind == 'peft' else 'transformers'}", "pipeline_tag: text-classification"]
    return "\n".join(["---", *lines, f"tags: [{json.dumps(run['method'])}, {json.dumps(run['task'])}]", "---"])


def _what(trained: Trained, kind: str, base: str | None) -> str:
    form = "PEFT LoRA adapter for" if kind == "peft" else "Merged model, made from"
    source = trained.result["data"]["source"]
    source = source if source.startswith(GLUE) or source == "synthetic" else "local files"
    fields = " and ".join(code(name) for name in trained.task.fields)
    return (
        f"{form} {plain(base or 'a random encoder')}, checkpoint `{trained.checkpoint}`. Input: {fields}, at most "
        f"{trained.task.max_length} tokens. Data: {plain(source)} (sha256 "
        f"{plain(trained.result['data']['fingerprint'][:12])})."
    )


def _scores(trained: Trained) -> str:
    score = trained.result["scores"][trained.checkpoint]
    rows = [
        f"| {plain(split)} | {plain(metric)} | {value:.4f} |"
        for split, metrics in score["metrics"].items()
        for metric, value in metrics.items()
        if metric != "score"
    ]
    chosen = ", chosen on dev and therefore optimistic" if trained.checkpoint == "best" else ""
    return "\n".join(
        [f"After step {plain(score['step'])}{chosen}.\n", "| split | metric | value |", "|---|---|---|", *rows]
    )


def _labels(trained: Trained) -> str:
    if trained.task.labels is None:
        return "One output, the score itself (regression)."
    return "\n".join(f"{i}. {code(label)}" for i, label in enumerate(trained.task.labels))


def _ranks(trained: Trained, kind: str) -> str:
    ranks = trained.method.ranks()
    total = f"Total {sum(ranks.values())} over {len(ranks)} matrices."
    kept = sum(len(A) for A, _ in trained.method.factors().values()) if kind == "peft" else sum(ranks.values())
    if kept != sum(ranks.values()):
        total += f" The adapter's are {kept}: components outside the ranks that reach the output are in it."
    layers, kinds, cells = rank_map(ranks, trained.method.kinds)
    rows = [f"| {layer} | " + " | ".join(map(str, row)) + " |" for layer, row in zip(layers, cells, strict=True)]
    head = ["| layer | " + " | ".join(map(plain, kinds)) + " |", "|---" * (len(kinds) + 1) + "|"]
    return "\n".join([total + "\n", *head, *rows])


def _use_adapter(trained: Trained, base: str | None, tokenizer: str) -> str:
    revision = f", revision={trained.backbone.revision!r}" if trained.backbone.revision else ""
    texts = ", ".join(repr(f"{name} ...") for name in trained.task.fields)
    use = fenced(
        "python",
        f"""from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base = AutoModelForSequenceClassification.from_pretrained({base!r}, num_labels={trained.task.num_labels}{revision})
model = PeftModel.from_pretrained(base, "THIS_FOLDER").eval()  # .merge_and_unload() gives a plain model
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
inputs = tokenizer({texts}, truncation=True, max_length={trained.task.max_length}, return_tensors="pt")
model(**inputs).logits""",
    )
    return f"""{use}

The pooler and the classifier are part of the adapter; a warning that the base model's head is newly initialised
can be ignored."""


def _use_merged(trained: Trained) -> str:
    texts = {key: f"{name} ..." for key, name in zip(("text", "text_pair"), trained.task.fields, strict=False)}
    return fenced(
        "python",
        f"""from transformers import pipeline

classify = pipeline("text-classification", "THIS_FOLDER", truncation=True)
classify({texts})""",
    )


def _made_by(trained: Trained, kind: str) -> str:
    run, state = trained.result["run"], trained.result["code"]
    groups = [f"{key}={run[key]}" for key in ("backbone", "budget", "method", "task", "seed")]
    commands = [
        shlex.join(["python", "run.py", *groups, *run["overrides"]]),
        shlex.join(["python", "scripts/export.py", "RUN_DIR", "--format", kind, "--checkpoint", trained.checkpoint]),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in state["versions"].items())
    made_by = f"Commit {state['commit']}; {versions}."
    return fenced("sh", "\n".join(commands)) + f"\n\n{plain(made_by)}"


# a result file may be a stranger's: what it says is shown as text and is never markup


def plain(text: object) -> str:
    """Text for Markdown: one line, and nothing in it is markup."""
    return re.sub(r"[\\`*\[\]<>|#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", shown(str(text)))


def code(text: object) -> str:
    """Text as code within a line of Markdown."""
    line = shown(str(text))
    ticks = _ticks(line, 1)
    return f"{ticks}{line}{ticks}" if "`" not in line else f"{ticks} {line} {ticks}"


def fenced(language: str, text: str) -> str:
    """Text as a block of code, which nothing in it can end."""
    ticks = _ticks(text, 3)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _ticks(text: str, least: int) -> str:
    """More backticks than any row of them in the text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))
