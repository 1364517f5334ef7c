"""How much the loss depends on each update matrix.

The paper's importance score (arXiv 2308.12043; its averages are AdaLoRA's, arXiv 2303.10512), where
G = d(task loss) / d(delta) is (out, in) and the product with delta is elementwise:

    S = sum |delta * G| / sqrt(out * in)
    I <- beta1 I + (1 - beta1) S              sensitivity
    U <- beta2 U + (1 - beta2) |S - I|        uncertainty, with the new I
    score = I * U

G comes from the gradient of the output and the input, G = (dL/dh)^T x, summed over every use of the
matrix in the forward, over micro-batches and over processes: it needs neither delta in the forward nor its factors.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from increlora import distributed
from increlora.linear import IncrementalLinear


def sensitivity(delta: Tensor, gradient: Tensor, reduction: str = "sqrt") -> Tensor:
    """S of one matrix, a scalar: sum |delta * gradient| over sqrt(out * in), or over out * in for "mean".

    Args:
        delta: the update, (out, in).
        gradient: d(task loss) / d(delta), (out, in).
    """
    total = (delta * gradient).abs_().sum()
    return total / (delta.numel() ** 0.5 if reduction == "sqrt" else delta.numel())


class DeltaGradient:
    """Collects G of one matrix over the uses and micro-batches of one optimizer step.

    G is reduced to S when the last gradient has arrived and is let go, so that a step without
    accumulation holds one G at a time. Several processes wait with it until `finish`, called for one matrix after
    another: what one of them passes over (an expert, a dropped layer) would pair the G of different matrices.

    Args:
        linear: the matrix; `linear.watcher` is set to this object until `finish`.
        micro_batches: backward passes in the step.
        last_use_only: keep only the gradient that arrived last, as the authors' code does.
    """

    def __init__(self, linear: IncrementalLinear, micro_batches: int, reduction: str, last_use_only: bool):
        self.linear, self.reduction, self.last_use_only = linear, reduction, last_use_only
        self.remaining = micro_batches
        self.awaited = 0
        self.gradient: Tensor | None = None
        self.sensitivity: Tensor | None = None
        linear.watcher = self

    def watch(self, x: Tensor, h: Tensor) -> None:
        """Note one use of the matrix: input x (..., in) after dropout, output h (..., out)."""
        self.awaited += 1
        h.register_hook(partial(self._arrive, x.detach()))

    def _arrive(self, x: Tensor, output_gradient: Tensor) -> None:
        output_gradient = output_gradient.detach().flatten(0, -2)
        if output_gradient.dtype == torch.float16:  # a loss scale would overflow the product
            output_gradient = output_gradient.float()
        gradient = output_gradient.t() @ x.flatten(0, -2).to(output_gradient.dtype)
        gradient = gradient.to(self.linear.weight.dtype)
        self.gradient = gradient if self.gradient is None or self.last_use_only else self.gradient.add_(gradient)
        self.awaited -= 1
        if self.awaited == 0:
            self.remaining -= 1
            if self.remaining == 0 and distributed.processes() == 1:
                self._reduce(self.gradient)

    @torch.no_grad()
    def _reduce(self, gradient: Tensor) -> None:
        self.sensitivity = sensitivity(self.linear.delta(), gradient, self.reduction)
        self.gradient = None

    def finish(self) -> Tensor:
        """S of the step, a scalar; 0 for a matrix that took no part in it."""
        self.linear.watcher = None
        gradient = self.gradient
        if distributed.processes() > 1:
            own = torch.zeros_like(self.linear.weight) if gradient is None else gradient
            gradient = distributed.mean(own)
        if gradient is not None:
            self._reduce(gradient)
        return self.linear.weight.new_zeros(()) if self.sensitivity is None else self.sensitivity


class ImportanceScore:
    """Moving averages of sensitivity and uncertainty, from 0, and their product (the paper's score).

    Args:
        matrices: names, in model order.
        beta1, beta2: decay of the two averages, in [0, 1).
    """

    def __init__(self, matrices: list[str], beta1: float, beta2: float):
        self.matrices, self.beta1, self.beta2 = matrices, beta1, beta2
        self.sensitivity = torch.zeros(len(matrices), dtype=torch.float64)
        self.uncertainty = torch.zeros(len(matrices), dtype=torch.float64)

    def update(self, sensitivities: Tensor) -> bool:
        """One step of the averages with S (matrices,); a non-finite S changes nothing and returns False."""
        S = sensitivities.to("cpu", torch.float64)
        if not torch.isfinite(S).all():
            return False
        self.sensitivity = self.beta1 * self.sensitivity + (1 - self.beta1) * S
        distance = (S - self.sensitivity).abs()
        self.uncertainty = self.beta2 * self.uncertainty + (1 - self.beta2) * distance
        return True

    def scores(self) -> dict[str, float]:
        """score = sensitivity * uncertainty by matrix, in model order."""
        return dict(zip(self.matrices, (self.sensitivity * self.uncertainty).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sensitivity, self.uncertainty = state["sensitivity"].clone(), state["uncertainty"].clone()
