"""What was trained, in other libraries' formats: a PEFT LoRA adapter or the merged model, with a model card.

`save_peft_adapter` takes a method and its model, wherever they were trained; everything else takes a finished run.

A PEFT adapter computes h = W0 x + b + lora_alpha / r * B A x. Here A carries lambda and alpha / rank, and
lora_alpha = r for every matrix, so that PEFT's own scale is exactly 1. Components that reach the output are kept
and no others: silent reserves and pruned triplets are dropped. The reserve that learns while ranks grow reaches
the output with lambda 1e-5; dropped, it would move the logits (of MiniLM on CoLA by up to 1.1e-5), so a
checkpoint from that phase keeps it, and its `rank_pattern` exceeds the ranks by the reserve's.
"""

import contextlib
import json
import os
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, TaskType
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from increlora.errors import UserError
from increlora.files import writing
from increlora.glue.tasks import GLUE
from increlora.matrices import rank_map
from increlora.method import Method

if TYPE_CHECKING:
    from increlora.glue.finished_run import Trained  # needs Hydra, which training code of one's own does not

# what PEFT adds to `modules_to_save` by itself, by task type
IMPLIED_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def save_peft_adapter(
    method: Method,
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    revision: str | None = None,
) -> None:
    """Write what was trained as a plain PEFT LoRA adapter: `adapter_config.json` and `adapter_model.safetensors`.

    The model is left as it is. On the base model the adapter gives the trained model's outputs; while ranks grow, the
    reserve that learns is part of it. It can be written before `merge` and after it. Of several processes, one writes.

    Args:
        method: prepared on `model`; IncreLoRA, a control, LoRA or AdaLoRA.
        model: what `method.prepare` was given, not what wraps it. Its head goes under `modules_to_save`.
        folder: absent or empty; it is there in full or not at all.
        base_model: the base model's name to write down; None: the name that `model` was loaded by, if any.
        task_type: PEFT's word for the class to load with, e.g. `CAUSAL_LM` or `SEQ_CLS`; None: `PeftModel`.
        revision: of the base model on the hub.

    Raises:
        UserError: the update is no product of low-rank factors, the folder is not empty or cannot be written, the
            model is another one or a wrapper, or its head is such that PEFT would not load it.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is there already; remove it, or choose another folder")
    base = base_model or getattr(model, "name_or_path", None) or None
    config, tensors = adapter(method, model, base, task_type, revision)
    with whole(folder) as made:
        _save(config, tensors, made)


def write_adapter(trained: "Trained", folder: Path, base: str | None = None) -> None:
    """Write a run's adapter to an empty folder: what `save_peft_adapter` writes, the tokenizer and `README.md`.

    Args:
        base: the base model's name to write down; None is `backbone.path` if given, else the hub's name.

    Raises:
        UserError: the update is no product of low-rank factors, or there is no base model to load under it.
    """
    base = base or base_model(trained)
    config, tensors = adapter(trained.method, trained.model, base, "SEQ_CLS", trained.backbone.revision)
    if base_model(trained) is None:
        raise UserError(
            f"backbone {trained.backbone.name} was drawn at random, so there is no base model to load an adapter on; "
            "the merged model can be written instead"
        )
    _save(config, tensors, folder)
    trained_tokenizer(trained).save_pretrained(folder)
    (folder / "README.md").write_text(model_card(trained, "peft", base), encoding="utf-8")


def adapter(
    method: Method, model: nn.Module, base: str | None, task_type: str | None, revision: str | None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """PEFT's description of the adapter, with ranks by matrix, and its tensors by the names that PEFT loads.

    Raises:
        UserError: see `save_peft_adapter`.
    """
    factors = method.factors()
    if not factors:
        raise UserError("every update is zero, so there is no adapter to write; train on, or use a later checkpoint")
    if task_type is not None and task_type not in list(TaskType):
        raise UserError(f"task_type '{task_type}' is none of PEFT's: {', '.join(TaskType)}")
    modules = dict(model.named_modules())
    absent = [name for name in factors if name not in modules]
    if absent:
        raise UserError(
            f"the model lacks {len(absent)} of the method's {len(factors)} matrices, e.g. {absent[0]}. "
            "Give the model that method.prepare was given, not what wraps it."
        )
    head = head_modules(method, model)
    ends = (*head, *IMPLIED_HEADS.get(task_type or "", ()))
    kept = [name for name in modules if name.endswith(ends)]  # what PEFT will load in full: it goes by the names' ends
    _check_head(method, model, kept, factors)
    tensors = {f"{name}.lora_A.weight": A for name, (A, _) in factors.items()}
    tensors |= {f"{name}.lora_B.weight": B for name, (_, B) in factors.items()}
    tensors |= {f"{name}.{key}": tensor for name in kept for key, tensor in modules[name].state_dict().items()}
    ranks = {_pattern(name, factors): len(A) for name, (A, _) in factors.items()}
    largest = max(ranks.values())
    auto = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config = LoraConfig(
        task_type=task_type,
        auto_mapping=auto if task_type is None else None,  # as PEFT does, for AutoPeftModel
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
        r=largest,
        lora_alpha=largest,
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(factors),
        modules_to_save=head or None,
    )
    return config, {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


def head_modules(method: Method, model: nn.Module) -> list[str]:
    """The largest modules that consist of nothing but the head."""
    return _modules_within(model, "", {name for name, _ in method.head_parameters(model)})


def _modules_within(module: nn.Module, name: str, parameters: set[str]) -> list[str]:
    below = {f"{name}.{parameter}".lstrip(".") for parameter, _ in module.named_parameters()}
    if below and below <= parameters:
        return [name]
    children = ((child, f"{name}.{key}".lstrip(".")) for key, child in module.named_children())
    return [found for child, full in children for found in _modules_within(child, full, parameters)]


def _check_head(method: Method, model: nn.Module, kept: list[str], matrices: Iterable[str]) -> None:
    """All of the head lies in the modules that are kept whole, and no matrix does."""
    inside = tuple(f"{name}." for name in kept)
    head = {id(parameter) for _, parameter in method.head_parameters(model)}
    everywhere = model.named_parameters(remove_duplicate=False)  # also a tied parameter's other names
    lost = [name for name, parameter in everywhere if id(parameter) in head and not name.startswith(inside)]
    if lost:
        raise UserError(
            f"{lost[0]} is trained, or tied to what is, in a module that is not all head; PEFT keeps whole modules. "
            "Save the merged model instead: method.merge(model)."
        )
    taken = [(matrix, name) for matrix in matrices for name in kept if f"{matrix}.".startswith(f"{name}.")]
    if taken:
        matrix, name = taken[0]
        raise UserError(
            f"{matrix} has an update, and PEFT would take it for a part of the head, {name}. "
            "Save the merged model instead: method.merge(model)."
        )


def _pattern(name: str, matrices: Iterable[str]) -> str:
    """The matrix in PEFT's patterns, which match the ends of names; anchored where another name ends alike."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in matrices) else name


def _save(config: LoraConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(copies, folder / "adapter_model.safetensors", metadata={"format": "pt"})  # copies: none may share memory
    config.save_pretrained(folder)


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `folder` (absent or empty so far) if nothing goes wrong."""
    with writing(folder, SafetensorError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as temporary:
            made = Path(temporary) / "export"
            made.mkdir()
            yield made
            os.replace(made, folder)


def write_merged(trained: "Trained", folder: Path) -> None:
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


def base_model(trained: "Trained") -> str | None:
    """The encoder's name as `from_pretrained` takes it; None if it was drawn at random."""
    return None if trained.backbone.weights == "random" else trained.backbone.path or trained.backbone.hub


def trained_tokenizer(trained: "Trained") -> Any:
    """The tokenizer; with `truncation=True` it cuts where the run did."""
    trained.tokenizer.model_max_length = trained.task.max_length
    return trained.tokenizer


# the model card


def model_card(trained: "Trained", kind: str, base: str | None) -> str:
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


def _what(trained: "Trained", kind: str, base: str | None) -> str:
    form = "PEFT LoRA adapter for" if kind == "peft" else "Merged model, made from"
    source = trained.result["data"]["source"]
    source = source if source.startswith(GLUE) or source == "synthetic" else "local files"
    fields = " and ".join(f"`{name}`" for name in trained.task.fields)
    return (
        f"{form} {base or 'a random encoder'}, checkpoint `{trained.checkpoint}`. Input: {fields}, at most "
        f"{trained.task.max_length} tokens. Data: {source} (sha256 {trained.result['data']['fingerprint'][:12]})."
    )


def _scores(trained: "Trained") -> str:
    score = trained.result["scores"][trained.checkpoint]
    rows = [
        f"| {split} | {metric} | {value:.4f} |"
        for split, metrics in score["metrics"].items()
        for metric, value in metrics.items()
        if metric != "score"
    ]
    chosen = ", chosen on dev and therefore optimistic" if trained.checkpoint == "best" else ""
    return "\n".join([f"After step {score['step']}{chosen}.\n", "| split | metric | value |", "|---|---|---|", *rows])


def _labels(trained: "Trained") -> str:
    if trained.task.labels is None:
        return "One output, the score itself (regression)."
    return "\n".join(f"{i}. `{label}`" for i, label in enumerate(trained.task.labels))


def _ranks(trained: "Trained", kind: str) -> str:
    ranks = trained.method.ranks()
    total = f"Total {sum(ranks.values())} over {len(ranks)} matrices."
    kept = sum(len(A) for A, _ in trained.method.factors().values()) if kind == "peft" else sum(ranks.values())
    if kept != sum(ranks.values()):
        total += f" The adapter's are {kept}: components outside the ranks that reach the output are in it."
    layers, kinds, cells = rank_map(ranks, trained.method.kinds)
    rows = [f"| {layer} | " + " | ".join(map(str, row)) + " |" for layer, row in zip(layers, cells, strict=True)]
    head = ["| layer | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    return "\n".join([total + "\n", *head, *rows])


def _use_adapter(trained: "Trained", base: str | None) -> str:
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


def _use_merged(trained: "Trained") -> str:
    texts = (f"'{key}': '{name} ...'" for key, name in zip(("text", "text_pair"), trained.task.fields, strict=False))
    return f"""```python
from transformers import pipeline

classify = pipeline("text-classification", "THIS_FOLDER", truncation=True)
classify({{{", ".join(texts)}}})
```"""


def _made_by(trained: "Trained", kind: str) -> str:
    run, code = trained.result["run"], trained.result["code"]
    groups = [f"{key}={run[key]}" for key in ("backbone", "budget", "method", "task", "seed")]
    commands = [
        shlex.join(["python", "run.py", *groups, *run["overrides"]]),
        shlex.join(["python", "scripts/export.py", "RUN_DIR", "--format", kind, "--checkpoint", trained.checkpoint]),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in code["versions"].items())
    return "```sh\n" + "\n".join(commands) + f"\n```\n\nCommit {code['commit']}; {versions}."
