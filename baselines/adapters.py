"""Bottleneck adapters of Houlsby et al. (arXiv 1902.00751) and Pfeiffer et al. (arXiv 2005.00247).

    h = base(x);   h <- h + W_up f(W_down h + b_down) + b_up

on the output of the attention-output and FFN-output matrices (Houlsby, figure 2) or of the FFN output alone
(Pfeiffer), before the residual connection and LayerNorm of the encoder. Non-linearities (swish, relu), biases
and the absence of further LayerNorms are those of the `adapters` library, the papers' shared code base; its
Pfeiffer variant puts the adapter behind a first pass through the LayerNorm, ours does not. Both projections
start from N(0, 0.01^2) cut off at two standard deviations, biases at 0 (Houlsby, section 2; `init_weights=
"houlsby"` in `adapters`), which is nearly the identity.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from increlora import surgery
from increlora.errors import UserError
from increlora.method import Method
from increlora.streams import stream

ACTIVATIONS = {"swish": nn.SiLU, "relu": nn.ReLU}
INIT_STD = 0.01


class Adapter(nn.Module):
    """`base` followed by a bottleneck with a residual connection of its own.

    Args:
        base: the pretrained layer; it is frozen.
        bottleneck: width of the adapter.
        activation: a key of `ACTIVATIONS`.
        generator: source of the start.
    """

    def __init__(self, base: nn.Linear, bottleneck: int, activation: str, generator: torch.Generator):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = _near_zero(base.out_features, bottleneck, generator).to(base.weight)
        self.activation = ACTIVATIONS[activation]()
        self.up = _near_zero(bottleneck, base.out_features, generator).to(base.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> h (..., out)."""
        h = self.base(x)
        return h + self.up(self.activation(self.down(h)))


def _near_zero(in_features: int, out_features: int, generator: torch.Generator) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, in_features, out_features)  # nn.Linear draws from the global random state
    nn.init.trunc_normal_(linear.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD, generator=generator)
    nn.init.zeros_(linear.bias)
    return linear


@dataclass
class Adapters(Method):
    """Adapters behind the chosen matrices; `configs/method/houlsby.yaml` and `pfeiffer.yaml` choose.

    Args:
        bottleneck: width of every adapter.
        activation: swish or relu.
    """

    can_merge: ClassVar[bool] = False

    name: str = "houlsby"
    bottleneck: int = 8
    activation: str = "swish"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bottleneck < 1:
            raise UserError(f"`bottleneck` must be at least 1, it is {self.bottleneck}")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"`activation` must be one of {', '.join(ACTIVATIONS)}, it is '{self.activation}'")

    def prepare(self, model: nn.Module, total_steps: int) -> None:
        bases = self.adapted_matrices(model)
        self.freeze_all_but_head(model)
        for name, base in bases.items():
            generator = stream(self.seed, "adapter", name)
            surgery.replace(model, name, Adapter(base, self.bottleneck, self.activation, generator))

    def merge(self, model: nn.Module) -> None:
        raise UserError(f"{self.name} adapters are not linear and cannot be folded into the layers they follow")
