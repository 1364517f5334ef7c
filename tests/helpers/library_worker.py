"""One process of a run in the Trainer or with accelerate; started by test_hf_trainer.py through torchrun.

python tests/helpers/library_worker.py FOLDER (trainer | accelerate) ACCUMULATION
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from distributed_worker import leave, tiny_bert
from test_hf_trainer import accelerated, growing, losses, same_growth, same_weights, trainer

from increlora import distributed

CUT = 21  # after the last growth: the reserve still trains, but the forward no longer uses it


def in_trainer(model, method, folder: Path, accumulation: int, resume: bool) -> list[float]:
    strict = dict(ddp_find_unused_parameters=False, save_strategy="steps", save_steps=CUT)
    made, _ = trainer(model, method, folder, accumulation, micro_batches_per_step=2 * accumulation, **strict)
    made.train(resume_from_checkpoint=str(folder / f"checkpoint-{CUT}") if resume else None)
    return losses(made)


def in_accelerate(model, method, folder: Path, accumulation: int, resume: bool) -> list[float]:
    options = dict(micro_batches_per_step=2 * accumulation, save_at=CUT, resume=resume)
    return accelerated(model, method, accumulation, folder / "state", **options)[1]


def main(folder: Path, loop: str, accumulation: int) -> None:
    torch.manual_seed(0)
    run = {"trainer": in_trainer, "accelerate": in_accelerate}[loop]
    models, methods = [tiny_bert(), tiny_bert()], [growing(), growing()]
    found = run(models[0], methods[0], folder, accumulation, resume=False)
    assert distributed.processes() == 2
    weights = {name: p.tolist() for name, p in models[0].named_parameters() if p.requires_grad}
    assert all(other == weights for other in distributed.gather(weights)), "the processes ended with different weights"
    run(models[1], methods[1], folder, accumulation, resume=True)
    same_growth(*methods, tolerance=0)
    same_weights(*models, tolerance=0)
    if distributed.is_main():
        allocations = [asdict(allocation) for allocation in methods[0].allocations]
        state = {"losses": found, "allocations": allocations, "weights": weights}
        (folder / "outcome.json").write_text(json.dumps(state))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
