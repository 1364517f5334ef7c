"""What was trained, in other libraries' formats: a PEFT LoRA adapter or the merged model, with a model card.

A PEFT adapter computes h = W0 x + b + lora_alpha / r * B A x. Here A carries lambda and alpha / rank, and
lora_alpha = r for every matrix, so that PEFT's own scale is exactly 1. Components that reach the output are kept
and no others: silent reserves and pruned triplets are dropped. The reserve that learns while ranks grow reaches
the output with lambda 1e-5; dropped, it would move the logits (of MiniLM on CoLA by up to 1.1e-5), so a
checkpoint from that phase keeps it, and its `rank_pattern` exceeds the ranks by the reserve's.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from increlora.errors import UserError
from increlora.matrices import rank_map
from increlora.tasks import GLUE
from increlora.trained import Trained


def write_adapter(trained: Trained, folder: Path, base: str | None = None) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors`, the tokenizer and `README.md`.

    Args:
        base: the base model's name to write down; None is `backbone.path` if given, else the hub's name.

    Raises:
        UserError: the update is no product of low-rank factors, or there is no base model to load under it.
    """
    factors = trained.method.factors()
    if base_model(trained) is None:
        raise UserError(
            f"backbone {trained.backbone.name} was drawn at random, so there is no base model to load an adapter on; "
            "the merged model can be written instead"
        )
    if not factors:
        raise UserError(f"every update of the checkpoint '{trained.checkpoint}' is zero; use a later one")
    base = base or base_model(trained)
    prefix = "base_model.model"
    tensors = {f"{prefix}.{name}.lora_A.weight": A for name, (A, _) in factors.items()}
    tensors |= {f"{prefix}.{name}.lora_B.weight": B for name, (_, B) in factors.items()}
    tensors |= {f"{prefix}.{name}": p.detach() for name, p in trained.method.head_parameters(trained.model)}
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    adapter_config(trained, base).save_pretrained(folder)
    trained_tokenizer(trained).save_pretrained(folder)
    (folder / "README.md").write_text(model_card(trained, "peft", base), encoding="utf-8")


def adapter_config(trained: Trained, base: str | None) -> LoraConfig:
    """PEFT's description of the adapter: ranks by matrix, and the head under `modules_to_save`."""
    ranks = {name: len(A) for name, (A, _) in trained.method.factors().items()}
    largest = max(ranks.values())
    return LoraConfig(
        task_type="SEQ_CLS",
        base_model_name_or_path=base,
        revision=trained.backbone.revision,
        inference_mode=True,
        r=largest,
        lora_alpha=largest,
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(ranks),
        modules_to_save=head_modules(trained),
    )


def write_merged(trained: Trained, folder: Path) -> None:
    """Write the model with the update folded in, the tokenizer and `README.md`; `trained.model` is merged afterwards.

    Raises:
        UserError: the method cannot be merged.
    """
    trained.method.merge(trained.model)
    labels = trained.task.labels or ["score"]
    trained.model.config.id2label = dict(enumerate(labels))
    trained.model.config.label2id = {label: i for i, label in enumerate(labels)}
    trained.model.config.problem_type = "single_label_classification" if trained.task.labels else "regression"
    trained.model.save_pretrained(folder)
    trained_tokenizer(trained).save_pretrained(folder)
    (folder / "README.md").write_text(model_card(trained, "merged", base_model(trained)), encoding="utf-8")


def base_model(trained: Trained) -> str | None:
    """The encoder's name as `from_pretrained` takes it; None if it was drawn at random."""
    return None if trained.backbone.weights == "random" else trained.backbone.path or trained.backbone.hub


def head_modules(trained: Trained) -> list[str]:
    """The largest modules that consist of nothing but the head."""
    head = {name for name, _ in trained.method.head_parameters(trained.model)}
    return _modules_within(trained.model, "", head)


def _modules_within(module: nn.Module, name: str, parameters: set[str]) -> list[str]:
    below = {f"{name}.{parameter}".lstrip(".") for parameter, _ in module.named_parameters()}
    if below and below <= parameters:
        return [name]
    children = ((child, f"{name}.{key}".lstrip(".")) for key, child in module.named_children())
    return [found for child, full in children for found in _modules_within(child, full, parameters)]


def trained_tokenizer(trained: Trained) -> Any:
    """The tokenizer; with `truncation=True` it cuts where the run did."""
    trained.tokenizer.model_max_length = trained.task.max_length
    return trained.tokenizer


# the model card


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
