"""IncreLoRA with the arithmetic of its authors' code (arXiv 2308.12043), to measure what theirs costs.

    h = W0 x + b + delta x,   delta = alpha / rank * B diag(lambda) A

delta, (out, in), is formed in every forward and multiplies x; its gradient, of the same size, gives the importance
score. The penalty takes one product per factor. The results are those of `increlora`, so no table of scores has it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from increlora.algorithm import IncreLoRA
from increlora.importance import sensitivity
from increlora.linear import IncrementalLinear


class DeltaFormedLinear(IncrementalLinear):
    """The same layer, through delta."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> h (..., out)."""
        delta = self.delta()
        if self.watcher is not None and delta.requires_grad:
            self.watcher.awaited += 1
            delta.register_hook(self.receive)
        return self.base(x) + self.dropout(x) @ delta.t()

    def receive(self, gradient: Tensor) -> None:
        """What their backward hook does with the gradient of delta, (out, in)."""
        self.watcher.sensitivity = sensitivity(self.delta().detach(), gradient)


@dataclass
class Authors(IncreLoRA):
    """IncreLoRA through delta, its penalty in small products."""

    name: str = "authors"

    def prepare(self, model: nn.Module, total_steps: int) -> None:
        super().prepare(model, total_steps)
        for linear in self.linears.values():
            linear.__class__ = DeltaFormedLinear

    def orthogonal_penalty(self) -> Tensor:
        bank = self.bank
        pairs = [[bank.rows(name, i) for i in range(len(m.components))] for name, m in bank.matrices.items()]
        rows = [torch.cat(several) for matrix in pairs for several in zip(*matrix, strict=True)]
        return torch.stack([torch.norm(R @ R.t() - torch.eye(len(R), device=R.device)) for R in rows]).mean()
