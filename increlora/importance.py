"""How much the loss depends on each update matrix.

The paper's importance score (arXiv 2308.12043; its averages are AdaLoRA's, arXiv 2303.10512), where
G = d(task loss) / d(delta) is (out, in) and the product with delta is elementwise:

    S = sum |delta * G| / sqrt(out * in)
    I <- beta1 I + (1 - beta1) S              sensitivity
    U <- beta2 U + (1 - beta2) |S - I|        uncertainty, with the new I
    score = I * U

G is computed from the gradient of the output and the input: G = (dL/dh)^T x, summed over every use of the matrix in
the forward, over micro-batches and over processes. So delta need not be formed in the forward.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from increlora import distributed
from increlora.bank import Views
from increlora.linear import Update


def sensitivity(delta: Tensor, gradient: Tensor, reduction: str = "sqrt") -> Tensor:
    """S of one matrix, a scalar: sum |delta * gradient| over sqrt(out * in), or over out * in for "mean".

    Args:
        delta: the update, (out, in).
        gradient: d(task loss) / d(delta), (out, in).
    """
    total = torch.linalg.vector_norm(delta * gradient, ord=1)
    return total / (delta.numel() ** 0.5 if reduction == "sqrt" else delta.numel())


class DeltaGradient:
    """Collects G of one matrix over the uses and micro-batches of one optimizer step.

    When the last gradient has arrived, G is reduced to S and freed. So a step without accumulation holds one G at a
    time. Several processes reduce later, in `finish`, which is called for one matrix after another: a process may skip
    a matrix (an expert, a dropped layer), and then the processes would add up the G of different matrices.

    Args:
        linear: the matrix; `linear.watcher` is set to this object until `finish`.
        micro_batches: backward passes in the step.
        last_use_only: keep only the gradient that arrived last, as the authors' code does.
    """

    def __init__(self, linear: Update, micro_batches: int, reduction: str, last_use_only: bool):
        self.linear, self.reduction, self.last_use_only = linear, reduction, last_use_only
        self.remaining = micro_batches
        self.awaited = 0
        self.uses: list[tuple[Tensor, Tensor]] = []  # of this micro-batch: input and gradient of the output
        self.gradient: Tensor | None = None
        self.sensitivity: Tensor | None = None
        self.factors: tuple[Tensor, Tensor] | None = None
        self.late = False  # whether a gradient arrived after G was reduced
        linear.watcher = self

    @property
    def took_part(self) -> bool:
        """Whether any gradient has arrived."""
        return bool(self.uses) or self.gradient is not None or self.sensitivity is not None

    def watch(self, x: Tensor, h: Tensor, factors: Views) -> None:
        """Note one use of the matrix: input x (tokens, in) after dropout, output h (tokens, out), and the factors."""
        self.awaited += 1
        self.factors = (factors.exact_A, factors.exact_B)
        h.register_hook(partial(self._arrive, x.detach()))

    def _arrive(self, x: Tensor, output_gradient: Tensor) -> None:
        self.late |= self.sensitivity is not None
        use = (x, output_gradient.detach())
        self.uses = [use] if self.last_use_only else [*self.uses, use]
        self.awaited -= 1
        if self.awaited == 0:
            self.remaining -= 1
            self._collect()
            if self.remaining == 0 and distributed.processes() == 1:
                self._reduce()

    @torch.no_grad()
    def _collect(self) -> None:
        """Add what the uses of this micro-batch give to G: one product, over the tokens of all of them."""
        if not self.uses:
            return
        x, h = self.uses[0] if len(self.uses) == 1 else (torch.cat(several) for several in zip(*self.uses, strict=True))
        if h.dtype == torch.float16:  # with a loss scale the product would overflow
            x, h = x.float(), h.float()
        gradient = h.t() @ x
        self.uses = []
        if self.gradient is None or self.last_use_only:
            self.gradient = gradient
        else:  # sums of several micro-batches lose digits in half precision
            self.gradient = self.gradient.to(self.linear.bank.like.dtype).add_(gradient)

    @torch.no_grad()
    def _reduce(self) -> None:
        if self.factors is None or self.gradient is None:
            return
        A, B = self.factors
        self.sensitivity = sensitivity(B.t() @ A, self.gradient, self.reduction)
        self.gradient = self.factors = None

    def finish(self) -> Tensor:
        """S of the step, a scalar; 0 for a matrix that took no part in it."""
        self.linear.watcher = None
        self._collect()
        if distributed.processes() > 1:
            like = self.linear.bank.like
            own = like.new_zeros(self.linear.out_features, self.linear.in_features)
            self.gradient = distributed.mean(own if self.gradient is None else self.gradient.to(like.dtype))
            A, B = self.linear.bank.factors(self.linear.name)
            self.factors = (A.detach(), B.t().detach())
        self._reduce()
        return self.linear.bank.like.new_zeros(()) if self.sensitivity is None else self.sensitivity


class ImportanceScore:
    """Moving averages of sensitivity and uncertainty, which start at 0, and their product (the paper's score).

    They stay on the device of S. Reading them makes the program wait for the GPU; only a growth and a log line do it.

    Args:
        matrices: names, in model order.
        beta1, beta2: decay of the two averages, in [0, 1).
    """

    def __init__(self, matrices: list[str], beta1: float, beta2: float):
        self.matrices, self.beta1, self.beta2 = matrices, beta1, beta2
        self.sensitivity = torch.zeros(len(matrices), dtype=torch.float64)
        self.uncertainty = torch.zeros(len(matrices), dtype=torch.float64)

    def update(self, sensitivities: Tensor) -> None:
        """One step of the averages with S (matrices,); an S that is not finite everywhere changes nothing."""
        S = sensitivities.to(_exact_dtype(sensitivities))
        finite = torch.isfinite(S).all()
        before = self.sensitivity.to(S), self.uncertainty.to(S)
        sensitivity = self.beta1 * before[0] + (1 - self.beta1) * S
        distance = (S - sensitivity).abs()
        uncertainty = self.beta2 * before[1] + (1 - self.beta2) * distance
        self.sensitivity = torch.where(finite, sensitivity, before[0])
        self.uncertainty = torch.where(finite, uncertainty, before[1])

    def scores(self) -> dict[str, float]:
        """score = sensitivity * uncertainty by matrix, in model order."""
        return dict(zip(self.matrices, (self.sensitivity * self.uncertainty).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sensitivity, self.uncertainty = state["sensitivity"].clone(), state["uncertainty"].clone()


def _exact_dtype(like: Tensor) -> torch.dtype:
    """float64, which Apple's GPUs do not have."""
    return torch.float32 if like.device.type == "mps" else torch.float64
