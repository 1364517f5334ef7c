"""The update of a method, trained in any loop, as a PEFT LoRA adapter.

A PEFT adapter computes h = W0 x + b + lora_alpha / r * B A x. Here A carries lambda and alpha / rank, and
lora_alpha = r for every matrix, so that PEFT's own scale is exactly 1. Components that reach the output are kept
and no others: silenced reserves and pruned triplets are dropped. While ranks grow, the reserve that learns reaches
the output with lambda 1e-5. Without it the logits would change (of MiniLM on CoLA by up to 1.1e-5). So the adapter of
a checkpoint from that phase keeps it, and its `rank_pattern` is larger than the ranks by that of the reserve.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from peft import LoraConfig, TaskType
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from increlora.errors import UserError
from increlora.files import writing
from increlora.method import Method

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
        folder: absent or empty; after an error it is not there.
        base_model: the base model's name to write down; None: the name that `model` was loaded by, if any.
        task_type: PEFT's word for the class to load with, e.g. `CAUSAL_LM` or `SEQ_CLS`; None: `PeftModel`.
        revision: of the base model on the hub.

    Raises:
        UserError: the update is no product of low-rank factors, the folder is not empty or cannot be written, the
            model is another one or a wrapper, or its head is such that PEFT would not load it.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already; remove it, or choose another folder")
    base = base_model or getattr(model, "name_or_path", None) or None
    config, tensors = adapter(method, model, base, task_type, revision)
    with whole(folder) as made:
        save_tensors(config, tensors, made)


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
    kept = [name for name in modules if name.endswith(ends)]  # what PEFT will load in full, by the ends of names
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
            f"{lost[0]} is trained, or tied to such a parameter, in a module that is only partly head; PEFT keeps "
            "whole modules. Save the merged model instead: method.merge(model)."
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


def save_tensors(config: LoraConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write what `adapter` gave, under the names that PEFT reads, to a folder that is there."""
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
