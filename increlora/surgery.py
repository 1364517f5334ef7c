"""Find, freeze and replace modules of a model by name."""

import re
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from increlora.errors import UserError
from increlora.matrices import kind_of


def find_matrices(model: nn.Module, kinds: Mapping[str, str]) -> dict[str, nn.Linear]:
    """The linear layers whose full module name matches one of the kinds, in model order.

    Args:
        model: any module.
        kinds: kind of matrix -> regular expression, matched against the whole module name, e.g.
            `{"query": r".*\\.attention\\.self\\.query_proj"}`.

    Raises:
        UserError: a kind matches no linear layer (the message lists what there is), or a layer that cannot be adapted:
            its weight is read directly by other code, is tied, quantized, or computed from other parameters.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for kind, pattern in kinds.items():
        if not any(re.fullmatch(pattern, name) for name in linears):
            raise UserError(
                f"no linear layer matches matrix kind '{kind}' ({pattern!r}); the model has: "
                f"{', '.join(_shapes_of_names(linears)) or 'none'}. An expression in `kinds` must match the whole name."
            )
    found = {name: module for name, module in linears.items() if kind_of(name, kinds) is not None}
    _refuse_what_cannot_be_adapted(model, found)
    return found


# their code reads `weight` of their layers directly and does not call the layers: it would ignore an update
READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def _refuse_what_cannot_be_adapted(model: nn.Module, found: Mapping[str, nn.Linear]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, linear in found.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, READ_WEIGHTS):
            raise UserError(
                f"{name} lies in torch's {type(parent).__name__}, which reads its weight directly and would ignore "
                "the update; choose other layers (kinds), or a model that calls its layers"
            )
        if linear._forward_hooks or linear._forward_pre_hooks:
            raise UserError(
                f"{name} has forward hooks, which would see its output without the update, and not as it was: register "
                "them after method.prepare"
            )
        weight = linear._parameters.get("weight")
        if weight is None:
            raise UserError(
                f"the weight of {name} is computed from other parameters (a parametrization, weight_norm, "
                "spectral_norm), so an update could not be merged into it; remove that before method.prepare"
            )
        if type(linear).forward is not nn.Linear.forward or weight.dtype not in (*HALF, torch.float32, torch.float64):
            raise UserError(
                f"{name} is a {type(linear).__module__}.{type(linear).__name__} with weights in {weight.dtype}; only "
                "plain nn.Linear layers in float32, float64, bfloat16 or float16 can be adapted: load the model "
                "without quantization"
            )
        if len(names := owners[id(linear.weight)]) > 1:
            raise UserError(
                f"the weight of {name} is tied ({', '.join(names)}): an update would not reach all of them, and "
                "merging it would; choose other layers (kinds)"
            )


WHOLE = "every process needs the whole model: use DistributedDataParallel, after method.prepare"
# classes that change or hold a model, by a name in their line of ancestors -> what to do instead
HOLDERS = {
    "DistributedDataParallel": "wrap the model after method.prepare and Growth",
    "DataParallel": "start one process per GPU, and wrap the model in DistributedDataParallel after method.prepare",
    "FullyShardedDataParallel": WHOLE,
    "FSDPModule": WHOLE,
    "DeepSpeedEngine": WHOLE,
    "OptimizedModule": "compile the model after method.prepare",
    "AveragedModel": "prepare the model itself, and average it afterwards",
    "PeftModel": "merge or remove PEFT's adapters first: model = model.merge_and_unload()",
    "PeftMixedModel": "merge or remove PEFT's adapters first: model = model.merge_and_unload()",
    "BaseTunerLayer": "merge or remove PEFT's adapters first: model = model.merge_and_unload()",
    "IncrementalLinear": "it has an update already: prepare a fresh model, or merge the first update before",
}


def refuse_what_holds_more_than_the_model(model: nn.Module) -> None:
    """Refuse a model that is wrapped, sharded or adapted already.

    Raises:
        UserError: with the module, its class and what to do.
    """
    for name, module in model.named_modules():
        refuse_wrapper(module, name or "the model")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id"):  # DTensor; ZeRO 3
            raise UserError(
                f"{name} is sharded over several processes; every process needs the whole model: use "
                "DistributedDataParallel, after method.prepare"
            )


def refuse_wrapper(module: nn.Module, name: str = "the model") -> None:
    """Refuse a module whose class wraps, shards or adapts others.

    Raises:
        UserError: with its class and what to do.
    """
    for ancestor in type(module).__mro__:
        if ancestor.__name__ in HOLDERS:
            raise UserError(f"{name} is of class {type(module).__name__}: {HOLDERS[ancestor.__name__]}")


HALF = (torch.float16, torch.bfloat16)


def refuse_half_precision(trained: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse parameters that would train in half precision, where most steps are lost to rounding.

    Raises:
        UserError: with the first one's name.
    """
    for name, parameter in trained:
        if parameter.dtype in HALF:
            raise UserError(
                f"{name} would train in {parameter.dtype}, which loses most of every step to rounding: load the model "
                "with dtype=torch.float32 and use autocast (a model without a trained head may stay in half precision)"
            )


# modules of torch whose weights are no linear maps from one layer's output to another's
NO_MATRICES = (nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.RNNBase)


PACKED = (torch.int8, torch.uint8, torch.int32)  # how quantized weights are held


def refuse_passed_over(model: nn.Module, head: str | None) -> None:
    """Refuse experts and quantized layers that are no nn.Linear; warn of other matrices in numbered layers.

    Args:
        head: regular expression over parameter names; None: the model has no head.

    Raises:
        UserError: with the names of all matrices in numbered layers that would not be adapted.
    """
    found: dict[str, bool] = {}  # name -> whether the model's function lies there for a large part
    for prefix, module in model.named_modules():
        if isinstance(module, NO_MATRICES) or not any(part.isdigit() for part in prefix.split(".")):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim in (2, 3) and not (head and re.fullmatch(head, f"{prefix}.{name}")):
                found[f"{prefix}.{name}"] = parameter.ndim == 3 or not parameter.is_floating_point()
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.ndim == 2 and buffer.dtype in PACKED:
                found[f"{prefix}.{name}"] = True
    if not found:
        return
    said = (
        f"{', '.join(_shapes_of_names(found))}: matrices in numbered layers, but in no nn.Linear (experts, gates, "
        "quantized layers, Conv1D), so they are not adapted. Say which layers to adapt: kinds={'name': r'regular "
        "expression over module names'}."
    )
    if any(found.values()):
        raise UserError(said)
    warnings.warn(said, stacklevel=2)


def kinds_of_layers(model: nn.Module, head: str | None = None) -> dict[str, str]:
    """Kinds for every linear layer that lies in a numbered layer of the model and not in the head.

    A kind is called by the module's name with N for the numbers, e.g. `model.layers.N.self_attn.q_proj`.

    Args:
        head: regular expression over parameter names; None: the model has no head.

    Raises:
        UserError: the model has no such layer, or has experts or quantized layers that would be passed over.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    in_head = {name for name in linears if head and re.fullmatch(head, f"{name}.weight")}
    inside = [name for name in linears if any(part.isdigit() for part in name.split(".")[:-1]) and name not in in_head]
    if not inside:
        raise UserError(
            f"the model has no nn.Linear in numbered layers, it has: {', '.join(_shapes_of_names(linears)) or 'none'}. "
            "Say which to adapt: kinds={'name': r'regular expression over module names'}."
        )
    refuse_passed_over(model, head)
    return {_shape_of(name): re.sub(r"\b\d+\b", r"\\d+", re.escape(name)) for name in inside}


def freeze(model: nn.Module) -> None:
    """Stop training every parameter."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def unfreeze_matching(model: nn.Module, pattern: str) -> list[str]:
    """Train every parameter whose name matches the whole pattern; returns the names.

    Raises:
        UserError: nothing matches.
    """
    names = [name for name, _ in model.named_parameters() if re.fullmatch(pattern, name)]
    if not names:
        children = ", ".join(name for name, _ in model.named_children())
        raise UserError(
            f"no parameter matches the head pattern {pattern!r}; the model's parts are: {children}. "
            "Set `head`; use None if only the adapted matrices should train."
        )
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return names


def hold_frozen_layers_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the frozen weights of linear layers in the dtype in which autocast computes.

    Autocast would cast them to the same values at every use. So this saves time and memory and changes no result.
    """
    others = (module for module in model.modules() if type(module) is not nn.Linear)
    shared = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    for module in model.modules():
        for parameter in module.parameters(recurse=False) if type(module) is nn.Linear else ():
            if not parameter.requires_grad and id(parameter) not in shared:
                parameter.data = parameter.data.to(dtype)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module called `name` by `module`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def refuse_other_model(model: nn.Module, layers: Mapping[str, nn.Module], merged: bool) -> None:
    """Refuse to merge layers that do not lie in this model, or were merged already.

    Args:
        layers: the layers with an update, by name.

    Raises:
        UserError: with what to do.
    """
    if merged:
        raise UserError("the update was merged already; a second merge would add it twice")
    modules = dict(model.named_modules())
    other = [name for name, layer in layers.items() if modules.get(name) is not layer]
    if other:
        raise UserError(
            f"this is not the model that the method was prepared on: {len(other)} of {len(layers)} layers are not the "
            f"method's, e.g. {other[0]}. Give the model that method.prepare was given, not a copy or what wraps it."
        )


def _shapes_of_names(names: Iterable[str]) -> list[str]:
    return sorted({_shape_of(name) for name in names})


def _shape_of(name: str) -> str:
    return re.sub(r"\b\d+\b", "N", name)
