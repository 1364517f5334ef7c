"""The model card of an exported run: what was trained on what, scores, ranks, how to load it, how it was made."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from increlora.glue.finished_run import Trained
from increlora.glue.tasks import GLUE
from increlora.matrices import rank_map


def model_card(trained: Trained, kind: str, base: str | None) -> str:
    """`README.md`: what was trained on what, scores, labels, ranks, how to load it and how it was made.

    Args:
        kind: `peft` or `merged`.
        base: the base model's name.
    """
    run = trained.result["run"]
    sections = [
        _front_matter(run, kind, base),
        f"# {run['method']} on {run['task']} ({run['backbone']}, budget {run['budget']}, seed {run['seed']})",
        _what(trained, kind, base),
        "## Scores\n\n" + _scores(trained),
        "## Labels\n\n" + _labels(trained),
        *(["## Ranks\n\n" + _ranks(trained, kind)] if trained.method.ranks() else []),
        "## Use\n\n" + (_use_adapter(trained, base) if kind == "peft" else _use_merged(trained)),
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
    fields = " and ".join(f"`{name}`" for name in trained.task.fields)
    return (
        f"{form} {base or 'a random encoder'}, checkpoint `{trained.checkpoint}`. Input: {fields}, at most "
        f"{trained.task.max_length} tokens. Data: {source} (sha256 {trained.result['data']['fingerprint'][:12]})."
    )


def _scores(trained: Trained) -> str:
    score = trained.result["scores"][trained.checkpoint]
    rows = [
        f"| {split} | {metric} | {value:.4f} |"
        for split, metrics in score["metrics"].items()
        for metric, value in metrics.items()
        if metric != "score"
    ]
    chosen = ", chosen on dev and therefore optimistic" if trained.checkpoint == "best" else ""
    return "\n".join([f"After step {score['step']}{chosen}.\n", "| split | metric | value |", "|---|---|---|", *rows])


def _labels(trained: Trained) -> str:
    if trained.task.labels is None:
        return "One output, the score itself (regression)."
    return "\n".join(f"{i}. `{label}`" for i, label in enumerate(trained.task.labels))


def _ranks(trained: Trained, kind: str) -> str:
    ranks = trained.method.ranks()
    total = f"Total {sum(ranks.values())} over {len(ranks)} matrices."
    kept = sum(len(A) for A, _ in trained.method.factors().values()) if kind == "peft" else sum(ranks.values())
    if kept != sum(ranks.values()):
        total += f" The adapter's are {kept}: components outside the ranks that reach the output are in it."
    layers, kinds, cells = rank_map(ranks, trained.method.kinds)
    rows = [f"| {layer} | " + " | ".join(map(str, row)) + " |" for layer, row in zip(layers, cells, strict=True)]
    head = ["| layer | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    return "\n".join([total + "\n", *head, *rows])


def _use_adapter(trained: Trained, base: str | None) -> str:
    revision = f", revision={trained.backbone.revision!r}" if trained.backbone.revision else ""
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base = AutoModelForSequenceClassification.from_pretrained({base!r}, num_labels={trained.task.num_labels}{revision})
model = PeftModel.from_pretrained(base, "THIS_FOLDER").eval()  # .merge_and_unload() gives a plain model
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
inputs = tokenizer({", ".join(f"'{name} ...'" for name in trained.task.fields)}, truncation=True, return_tensors="pt")
model(**inputs).logits
```

The pooler and the classifier are part of the adapter; a warning that the base model's head is newly initialised
can be ignored."""


def _use_merged(trained: Trained) -> str:
    texts = (f"'{key}': '{name} ...'" for key, name in zip(("text", "text_pair"), trained.task.fields, strict=False))
    return f"""```python
from transformers import pipeline

classify = pipeline("text-classification", "THIS_FOLDER", truncation=True)
classify({{{", ".join(texts)}}})
```"""


def _made_by(trained: Trained, kind: str) -> str:
    run, code = trained.result["run"], trained.result["code"]
    groups = [f"{key}={run[key]}" for key in ("backbone", "budget", "method", "task", "seed")]
    commands = [
        shlex.join(["python", "run.py", *groups, *run["overrides"]]),
        shlex.join(["python", "scripts/export.py", "RUN_DIR", "--format", kind, "--checkpoint", trained.checkpoint]),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in code["versions"].items())
    return "```sh\n" + "\n".join(commands) + f"\n```\n\nCommit {code['commit']}; {versions}."
