"""A saved adapter as a plain LoRA, for a PEFT, or a server, that does not know IncreLoRA."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from increlora.bank import Bank
from increlora.components import STATE
from increlora.errors import UserError
from increlora.integrations.packed import unpack
from increlora.integrations.peft.adapter import FACTORS, Adapter, matrices_of
from increlora.integrations.peft.config import IncreLoraConfig, Refused
from increlora.integrations.peft.layer import AdapterUpdate
from increlora.integrations.peft.model import OWN
from increlora.integrations.peft_export import config_of_base, plain_lora, refuse_taken_for_experts, save_tensors, whole

FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass
class Shape:
    """A layer without weights, in the place of one of a model."""

    out_features: int
    in_features: int

    def update_layer(self, adapter_name: str, bank: Bank, name: str, dropout: float) -> AdapterUpdate:
        return AdapterUpdate(bank, name, dropout)


def export_lora(
    adapter: str | os.PathLike[str], folder: str | os.PathLike[str], *, pad_to: int | None = None
) -> dict[str, int]:
    """Write a saved IncreLoRA adapter as a plain PEFT LoRA adapter with the same outputs; no model is needed.

    While ranks grow, the reserve that learns reaches the output, so it is in the LoRA too.

    Args:
        adapter: what `save_pretrained` wrote, or a `checkpoint-N` folder of a Trainer.
        folder: absent or empty; after an error it is not there.
        pad_to: the rank of every matrix in the LoRA, filled up with zeros; None: its own, by `rank_pattern`. With one
            rank for all, servers that know no `rank_pattern`, PEFT's hotswap and weighted combinations work.

    Returns:
        The rank of every matrix in the LoRA before it was filled up.

    Raises:
        UserError: there is no IncreLoRA adapter, it is damaged, a rank is above `pad_to`, `folder` is not empty, or
            PEFT would drop a part of the LoRA (known where the base model's configuration is on this machine).
    """
    adapter, folder = Path(adapter), Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise Refused(f"{folder} exists already; remove it, or choose another folder")
    config, own, others = _read(adapter)
    shapes = _shapes(own)
    dtype = next(value.dtype for key, value in own.items() if key != STATE)
    made = Adapter("default", config, shapes, [torch.empty(0, dtype=dtype)])
    rows = made.restore(own)
    made.bank.load_state_dict(rows)
    factors = {name: made.bank.factors(name) for name in shapes}
    lora, tensors = plain_lora(
        {name: (A.detach(), B.detach()) for name, (A, B) in factors.items()}, pad_to,
        task_type=config.task_type, auto_mapping=config.auto_mapping, revision=config.revision,
        base_model_name_or_path=config.base_model_name_or_path, modules_to_save=config.modules_to_save,
        fan_in_fan_out=config.fan_in_fan_out,
    )  # fmt: skip
    refuse_taken_for_experts(lora, config_of_base(config.base_model_name_or_path, config.revision))
    with whole(folder) as made_folder:
        save_tensors(lora, tensors | others, made_folder)
    return {name: len(A) for name, (A, _) in factors.items()}


def _read(folder: Path) -> tuple[IncreLoraConfig, dict[str, Tensor], dict[str, Tensor]]:
    """The configuration, the tensors of the adapter by matrix and factor, and those beside it by their names."""
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        raise Refused(f"{folder} has no {absent[0]}: give the folder of an adapter, or a checkpoint-N of a Trainer")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        tensors = load_file(folder / FILES[1])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{folder} cannot be read: {str(error).splitlines()[0][:120]}") from error
    if not isinstance(config, IncreLoraConfig):
        raise Refused(f"{folder} has an adapter of {config.peft_type}, not of IncreLoRA")
    own = {match[1]: value for key, value in tensors.items() if (match := OWN.fullmatch(key))}
    if not set(own) - {STATE}:
        raise UserError(f"{folder / FILES[1]} has no tensors of IncreLoRA")
    config.seed, config.init_weights = config.seed or 0, True  # nothing is drawn that stays
    return config, own, {key: value for key, value in tensors.items() if not OWN.fullmatch(key)}


def _shapes(own: dict[str, Tensor]) -> dict[str, Shape]:
    """The shape of every matrix of which both factors are there, in model order if the state has it."""
    A, B, _ = (
        {key.removesuffix(f".{f}"): value for key, value in own.items() if key.endswith(f".{f}")} for f in FACTORS
    )
    shapes = {name: Shape(B[name].shape[0], A[name].shape[1]) for name in sorted(set(A) & set(B))}
    if STATE not in own:
        return shapes
    return {name: shapes[name] for name in matrices_of(unpack(own[STATE])) if name in shapes}
