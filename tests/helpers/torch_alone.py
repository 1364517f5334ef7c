"""Trains IncreLoRA on a plain model where only torch, what torch requires and the standard library can be imported.

python tests/helpers/torch_alone.py
"""

import contextlib
import importlib.abc
import re
import sys
from importlib import metadata


def required(name: str, known: set[str]) -> set[str]:
    """A distribution and all that it requires without extras, added to the known ones."""
    if name not in known:
        known.add(name)
        for line in metadata.requires(name) or ():
            if "extra ==" not in line:
                with contextlib.suppress(metadata.PackageNotFoundError):  # for another platform
                    required(normal(re.match(r"[\w.-]+", line)[0]), known)
    return known


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


wanted = required("torch", {"increlora"})
REFUSED = {
    module for module, distributions in metadata.packages_distributions().items()
    if not wanted & set(map(normal, distributions))
}  # fmt: skip


class Absent(importlib.abc.MetaPathFinder):
    """Stands for all finders there were, and finds none of the other installed packages."""

    def __init__(self, finders: list):
        self.finders = finders

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in REFUSED:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)


assert "torch" not in REFUSED and not {"torch", "increlora"} & set(sys.modules)
sys.meta_path[:] = [Absent(list(sys.meta_path))]

import torch  # noqa: E402
from torch import nn  # noqa: E402

from increlora import Growth, IncreLoRA  # noqa: E402

STEPS = 20


def prepared():
    """The same model, method and optimizer at every call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    method = IncreLoRA(kinds={"dense": "0|2"}, head=r"4\..*", target_rank=2, top_h=1, interval=2, init_warmup=2)
    method.prepare(model, STEPS)
    optimizer = torch.optim.AdamW(method.param_groups(model), lr=1e-2)
    return model, method, optimizer, Growth(method, model, optimizer, STEPS, 2)


def step(model, optimizer, growth) -> float:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(growth.step))
    growth.begin_step()
    loss = (model(x).squeeze(-1) - x.sum(-1)).square().mean()
    loss.backward()
    growth.before_step()
    optimizer.step()
    growth.after_step()
    optimizer.zero_grad()
    return loss.item()


def main() -> None:
    model, method, optimizer, growth = prepared()
    losses = [step(model, optimizer, growth) for _ in range(STEPS - 1)]
    assert losses[-1] < losses[0]
    assert sum(method.ranks().values()) == 4, method.ranks()  # 2 matrices of average rank 2
    copy, _, its_optimizer, its_growth = prepared()
    copy.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(optimizer.state_dict())
    assert step(copy, its_optimizer, its_growth) == step(model, optimizer, growth)
    growth.merge()
    assert all(type(layer) in (nn.Linear, nn.Tanh) for layer in model)
    assert not REFUSED & {name.partition(".")[0] for name in sys.modules}
    print("trained without", len(REFUSED), "other packages")


if __name__ == "__main__":
    main()
