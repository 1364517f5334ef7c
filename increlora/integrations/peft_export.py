"""The update of a method, trained in any loop, as a PEFT LoRA adapter.

A PEFT adapter computes h = W0 x + b + lora_alpha / r * B A x. Here A carries lambda and alpha / rank, and
lora_alpha = r for every matrix, so that PEFT's own scale is exactly 1. Components that reach the output are kept
and no others: silenced reserves and pruned triplets are dropped. While ranks grow, the reserve that learns reaches
the output with lambda 1e-5. Without it the logits would change (of MiniLM on CoLA by up to 1.1e-5). So the adapter of
a checkpoint from that phase keeps it, and its `rank_pattern` is larger than the ranks by that of the reserve.
"""

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType
from peft.import_utils import is_transformers_ge_v5
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from increlora import base_weights
from increlora.components import NAME
from increlora.errors import UserError
from increlora.files import writing
from increlora.method import Method

IN_FILE = "base_model.model."  # begins the names of a PEFT file
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
    pad_to: int | None = None,
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
        pad_to: the rank of every matrix in the adapter, filled up with zeros; None: its own. With one rank for all, the
            adapter has no `rank_pattern`, which some servers and PEFT's hotswap do not know.

    Where the base model can be loaded from this machine, it is loaded once more, and everything that the adapter does
    not hold is compared with it.

    Raises:
        UserError: the update is no product of low-rank factors, or of a higher rank than `pad_to`; the folder is not
            empty or cannot be written; the model is another one or a wrapper; its head is such that PEFT would not load
            it; or the base model with the adapter would not be the trained model: something else trained, changed since
            `prepare`, or is new.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already; remove it, or choose another folder")
    method.warn_of_an_early_end("save_peft_adapter")
    base = base_model or getattr(model, "name_or_path", None) or None
    config, tensors = adapter(method, model, base, task_type, revision, pad_to)
    refuse_taken_for_experts(config, getattr(model, "config", None))
    _compare_with_base(method, model, config, tensors, [base_model, getattr(model, "name_or_path", None)], revision)
    with whole(folder) as made:
        save_tensors(config, tensors, made)


def adapter(
    method: Method, model: nn.Module, base: str | None, task_type: str | None, revision: str | None,
    pad_to: int | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:  # fmt: skip
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
    _check_head(method, model, kept)
    _check_rest(method, model, kept, factors)
    auto = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config, tensors = plain_lora(
        factors, pad_to,
        task_type=task_type,
        auto_mapping=auto if task_type is None else None,  # as PEFT does, for AutoPeftModel
        base_model_name_or_path=base,
        revision=revision,
        modules_to_save=head or None,
    )  # fmt: skip
    kept_whole = {f"{name}.{key}": tensor for name in kept for key, tensor in modules[name].state_dict().items()}
    return config, tensors | {f"{IN_FILE}{name}": tensor for name, tensor in kept_whole.items()}


def plain_lora(
    factors: Mapping[str, tuple[Tensor, Tensor]], pad_to: int | None, **description: Any
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A LoRA with the update B A of every matrix, where PEFT's own scale is 1, and its tensors by PEFT's names.

    Args:
        factors: A (r, in) and B (out, r) by the name of the matrix.
        pad_to: see `save_peft_adapter`.
        description: other fields of the configuration.

    Raises:
        UserError: a matrix has a higher rank than `pad_to`.
    """
    ranks = {name: len(A) for name, (A, _) in factors.items()}
    name, largest = max(ranks.items(), key=lambda item: item[1])
    if pad_to is not None:
        if type(pad_to) is not int or pad_to < largest:
            raise UserError(
                f"`pad_to` must be a whole number that no rank exceeds; it is {pad_to!r}, {name} has rank {largest}. "
                "Give a larger one, or train with a `max_rank` (while ranks grow, the reserve counts too)"
            )
        factors = {name: (_padded(A, pad_to), _padded(B.t(), pad_to).t()) for name, (A, B) in factors.items()}
        largest, pattern = pad_to, {}
    else:
        pattern = {_pattern(name, ranks): rank for name, rank in ranks.items()}
    config = LoraConfig(
        inference_mode=True, r=largest, lora_alpha=largest, rank_pattern=pattern, alpha_pattern=dict(pattern),
        target_modules=list(factors), **description,
    )  # fmt: skip
    tensors = {f"{IN_FILE}{name}.lora_A.weight": A for name, (A, _) in factors.items()}
    return config, tensors | {f"{IN_FILE}{name}.lora_B.weight": B for name, (_, B) in factors.items()}


def refuse_taken_for_experts(config: LoraConfig, of_model: Any) -> None:
    """Refuse a LoRA of which PEFT drops a part when it loads it.

    PEFT converts the LoRA of some mixtures of experts from an older layout, where it takes every `gate_proj` for one of
    an expert.

    Args:
        config: of the LoRA.
        of_model: the configuration of the base model; None: not known.

    Raises:
        UserError: layers outside of the experts have such names.
    """
    if getattr(of_model, "model_type", None) is None or not is_transformers_ge_v5:
        return
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    stand_in, converted = nn.Module(), copy.deepcopy(config)
    stand_in.config = of_model
    with contextlib.suppress(ValueError):  # of what it takes for one fused layer, a part is not adapted
        convert_peft_config_for_transformers(converted, stand_in, None)
        if set(converted.target_modules or ()) == set(config.target_modules or ()):
            return
    raise UserError(
        f"PEFT takes gate_proj, up_proj and down_proj in a LoRA of {of_model.model_type} for those of experts, and "
        "would drop the updates of the layers here that have these names: train without them, or merge the adapter"
    )


def _padded(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])


def head_modules(method: Method, model: nn.Module) -> list[str]:
    """The largest modules that consist of nothing but the head."""
    return _modules_within(model, "", {name for name, _ in method.head_parameters(model)})


def _modules_within(module: nn.Module, name: str, parameters: set[str]) -> list[str]:
    below = {f"{name}.{parameter}".lstrip(".") for parameter, _ in module.named_parameters()}
    if below and below <= parameters:
        return [name]
    children = ((child, f"{name}.{key}".lstrip(".")) for key, child in module.named_children())
    return [found for child, full in children for found in _modules_within(child, full, parameters)]


def _check_head(method: Method, model: nn.Module, kept: list[str]) -> None:
    """All of the head lies in the modules that are kept whole."""
    inside = tuple(f"{name}." for name in kept)
    head = {id(parameter) for _, parameter in method.head_parameters(model)}
    everywhere = model.named_parameters(remove_duplicate=False)  # also a tied parameter's other names
    lost = [name for name, parameter in everywhere if id(parameter) in head and not name.startswith(inside)]
    if lost:
        raise UserError(
            f"{lost[0]} is trained, or tied to such a parameter, in a module that is only partly head; PEFT keeps "
            "whole modules. Save the merged model instead: method.merge(model)."
        )


def _outside(method: Method, model: nn.Module, kept: list[str]) -> dict[str, tuple[str, Tensor]]:
    """What an adapter does not hold: plain name, as in the base model -> name in the live model, tensor."""
    inside = tuple(f"{name}." for name in kept)
    matrices, found = set(method.ranks()), {}
    for name, tensor in base_weights.tensors(model):
        plain = _plain_name(name, matrices)
        if plain is not None and not name.startswith(inside):
            found[plain] = (name, tensor)
    return found


def _plain_name(name: str, matrices: set[str]) -> str | None:
    """The name before the update was injected; None for a tensor of the update."""
    if NAME in name.split("."):
        return None
    parts = name.split(".")
    owner = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in matrices), None)
    if owner is None:
        return name
    rest = name.removeprefix(f"{owner}.")
    if rest in ("weight", "bias"):  # merged, or never adapted
        return name
    base, _, leaf = rest.partition(".")
    return f"{owner}.{leaf}" if base in ("base", "base_layer") else None


def _check_rest(method: Method, model: nn.Module, kept: list[str], factors: Mapping[str, Any]) -> None:
    """What the adapter does not hold is frozen, and is what it was before `prepare`."""
    layers = getattr(method, "linears", None) or getattr(method, "layers", {})
    modules = dict(model.named_modules())
    foreign = [n for n in factors if modules[n] is not layers.get(n) and type(modules[n]) is not nn.Linear]
    if foreign and layers:
        raise UserError(
            f"the model has another update than this method's, e.g. {foreign[0]}: give the model that method.prepare "
            "was given, not a copy, and the method that was prepared on it last"
        )
    outside = _outside(method, model, kept)
    trained = [name for name, tensor in outside.values() if tensor.requires_grad and name not in factors]
    if trained:
        raise UserError(
            f"{len(trained)} parameters train beside matrices and head, and the adapter would lose them, e.g. "
            f"{trained[0]}: let `head` match them, or save the merged model (growth.merge(), model.save_pretrained)"
        )
    before = method.weights_before
    if not before:  # a method that adapts no matrices by this interface
        return
    now = base_weights.checksums({plain: tensor for plain, (_, tensor) in outside.items()})
    merged = [f"{name}.weight" for name in factors if outside.get(f"{name}.weight", ("",))[0] == f"{name}.weight"]
    expected = before | {name: method.weights_merged.get(name, now[name]) for name in merged}
    changed = [outside[plain][0] for plain in now if now[plain] != expected.get(plain)]
    if changed:
        raise UserError(
            f"{len(changed)} weights of the model are not those that it had at method.prepare (trained, resized, cast, "
            f"merged or replaced since), and the adapter would lose that, e.g. {changed[0]}: save the merged model "
            "instead (growth.merge(), model.save_pretrained)"
        )


def _compare_with_base(
    method: Method,
    model: nn.Module,
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    names: Iterable[str | None],
    revision: str | None,
) -> None:
    """Load the base model once more, if this machine has it: with the adapter it must be the live model."""
    fresh = next((found for name in names if (found := _load_base(model, name, revision)) is not None), None)
    if fresh is None:
        return
    ends = (*(config.modules_to_save or ()), *IMPLIED_HEADS.get(config.task_type or "", ()))
    outside = _outside(method, model, [name for name, _ in model.named_modules() if ends and name.endswith(ends)])
    base, odd = dict(base_weights.tensors(fresh)), []
    for plain, (name, tensor) in outside.items():
        live, other = tensor.detach().cpu(), base.get(plain)
        if other is None or other.shape != live.shape:
            odd.append(name)
            continue
        owner = plain.removesuffix(".weight")
        A = tensors.get(f"{IN_FILE}{owner}.lora_A.weight")
        if A is not None and name == plain != owner:  # merged
            B = tensors[f"{IN_FILE}{owner}.lora_B.weight"]
            expected = other.detach().to(A.dtype) + (B @ A).cpu()
            if not torch.allclose(live.to(A.dtype), expected, rtol=1e-4, atol=1e-5):
                odd.append(name)
        elif not torch.equal(live, other.detach().to(live.dtype)):
            odd.append(name)
    if odd:
        raise UserError(
            f"on its base model the adapter would not be the trained model: {len(odd)} weights differ there, or are "
            f"new and drawn again at every loading, e.g. {odd[0]}. Let `head` match new layers when the method is "
            "made; else save the merged model instead (growth.merge(), model.save_pretrained)."
        )


def _load_base(model: nn.Module, name: str | None, revision: str | None) -> nn.Module | None:
    """The base model as a user loads it; None if this machine does not have it."""
    load = getattr(type(model), "from_pretrained", None)
    if not name or load is None:
        return None
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.seed()  # new layers must not be drawn as they were in the live model
            return load(
                name,
                config=copy.deepcopy(model.config),
                revision=revision or "main",
                local_files_only=True,
                ignore_mismatched_sizes=True,
                dtype=next(model.parameters()).dtype,
            )
    except (OSError, ValueError):  # no such folder, and not in the hub's cache
        return None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def config_of_base(name: str | None, revision: str | None) -> Any:
    """The configuration of a base model; None if this machine does not have it, or it needs code of its own."""
    from transformers import AutoConfig

    with contextlib.suppress(OSError, ValueError):
        if name:
            return AutoConfig.from_pretrained(
                name, revision=revision or "main", local_files_only=True, trust_remote_code=False
            )
    return None


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
            (rights := Path(temporary) / "rights").touch()
            for file in made.rglob("*"):
                if file.is_file():  # as the umask wants it; safetensors makes all its files private
                    file.chmod(rights.stat().st_mode)
            os.replace(made, folder)
