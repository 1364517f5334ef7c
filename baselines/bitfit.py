"""BitFit (arXiv 2106.10199): train every bias of the encoder, and the head."""

from dataclasses import dataclass

from torch import nn

from increlora.method import Method


@dataclass
class BitFit(Method):
    """Bias-only fine-tuning; there is nothing to inject and nothing to merge."""

    name: str = "bitfit"

    def prepare(self, model: nn.Module, total_steps: int) -> None:
        self.freeze_all_but_head(model)
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias":
                parameter.requires_grad_(True)
