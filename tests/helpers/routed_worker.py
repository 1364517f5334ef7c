"""Experts of which every process uses another one; started by test_distributed.py, alone and through torchrun.

python tests/helpers/routed_worker.py FOLDER
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from distributed_worker import leave
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from increlora import Growth, IncreLoRA, distributed

STEPS, EXPERTS = 24, 2


class Experts(nn.Module):
    """A head on x + expert(x), the experts of equal shape."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(EXPERTS))
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return self.head(x + self.experts[expert](x)).squeeze(-1)


def grown() -> tuple[Experts, IncreLoRA]:
    torch.manual_seed(0)
    model = Experts().double()
    x, y = torch.randn(EXPERTS, 16, 6).double(), torch.randn(EXPERTS, 16).double()
    y *= torch.tensor([[1.0], [0.8]])  # so that now one, now the other matters more
    kinds = {"expert": r"experts\.\d+"}
    method = IncreLoRA(kinds=kinds, head=r"head\..*", target_rank=3, top_h=1, interval=4, init_warmup=4, seed=1)
    method.prepare(model, STEPS)
    optimizer = torch.optim.AdamW(method.param_groups(model), lr=3e-2, weight_decay=0.0)
    growth = Growth(method, model, optimizer, STEPS, 4)
    mine, wrapped = list(range(EXPERTS)), model
    if distributed.processes() > 1:
        mine, wrapped = [distributed.rank()], DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(STEPS):
        growth.begin_step(len(mine))
        for expert in mine:
            (nn.functional.mse_loss(wrapped(x[expert], expert), y[expert]) / len(mine)).backward()
        growth.before_step()
        optimizer.step()
        growth.after_step()
        optimizer.zero_grad()
    return model, method


def main(folder: Path) -> None:
    distributed.start("cpu")
    model, method = grown()
    weights = {name: p.tolist() for name, p in model.named_parameters() if p.requires_grad}
    assert all(other == weights for other in distributed.gather(weights)), "the processes ended with different weights"
    if distributed.is_main():
        allocations = [asdict(allocation) for allocation in method.allocations]
        (folder / "outcome.json").write_text(json.dumps({"allocations": allocations, "weights": weights}))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
