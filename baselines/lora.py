"""LoRA (arXiv 2106.09685) on PEFT's own layers: h = W0 x + b + alpha / rank * B A x.

PEFT draws A from the global random state. Here that state is forked and seeded from the method's own stream, so no
other draw of the run changes. PEFT freezes the head while it injects; it is trained again afterwards.
"""

from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from increlora import surgery
from increlora.errors import UserError
from increlora.method import Method
from increlora.streams import derive_seed

ADAPTER = "default"  # PEFT's name for the only one


@dataclass
class LoRA(Method):
    """Low-rank adaptation with the same rank for every matrix.

    Args:
        rank: rank of every update.
        alpha: scale of the update, divided by the rank.
        dropout: dropout on the input of the update.
    """

    name: str = "lora"
    rank: int = 2
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise UserError(f"`rank` must be at least 1, it is {self.rank}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"`dropout` must be in [0, 1), it is {self.dropout}")

    def prepare(self, model: nn.Module, total_steps: int) -> None:
        names = list(self.adapted_matrices(model))
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=names)
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which would seed the GPUs too
            torch.default_generator.manual_seed(derive_seed(self.seed, "lora"))
            inject_adapter_in_model(config, model)
        del model.peft_config  # PEFT's own record; a second injection would be refused because of it
        self.freeze_all_but_head(model)
        self.layers: dict[str, LoraLayer] = {name: model.get_submodule(name) for name in names}
        for layer in self.layers.values():
            layer.lora_A.requires_grad_(True)
            layer.lora_B.requires_grad_(True)

    def ranks(self) -> dict[str, int]:
        return dict.fromkeys(self.layers, self.rank)

    @torch.no_grad()
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            name: (layer.scaling[ADAPTER] * layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight.detach())
            for name, layer in self.layers.items()
        }

    def merge(self, model: nn.Module) -> None:
        for name, layer in self.layers.items():
            layer.merge()
            surgery.replace(model, name, layer.get_base_layer())
