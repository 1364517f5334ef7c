"""One process of a distributed run on a tiny float64 BERT; started by test_distributed.py through torchrun.

python tests/helpers/distributed_worker.py FOLDER ACCUMULATION [DIE_AT]
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from test_loop import TASK, data
from transformers import BertConfig, BertForSequenceClassification

from increlora import distributed
from increlora.algorithm import IncreLoRA
from increlora.glue.checkpoint import Checkpoints
from increlora.glue.loop import Training
from increlora.glue.settings import Settings
from increlora.glue.tracker import Silent, Tracker

KINDS = {
    "query": r".*\.self\.query",
    "value": r".*\.self\.value",
    "intermediate": r".*\.intermediate\.dense",
    "output": r".*\.layer\.\d+\.output\.dense",
}


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return BertForSequenceClassification(config).double()


def leave() -> None:
    """End a process that had a DistributedDataParallel, all of whose work is done.

    Some 4 % of them abort while the interpreter ends, in torch's own threads ("terminate called without an active
    exception", no Python frame): they do not get there.
    """
    distributed.stop()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Mortal(Training):
    """The second process dies without a word after `die_at` steps."""

    die_at = 0

    def _step(self, indices, stop):
        if self.progress.step == self.die_at and distributed.rank() == 1:
            os._exit(9)
        return super()._step(indices, stop)


def main(folder: Path, accumulation: int, die_at: int) -> None:
    distributed.start("cpu")
    model, made = tiny_bert(), data()
    method = IncreLoRA(kinds=KINDS, target_rank=2, top_h=3, interval=4, init_warmup=4, seed=1)
    settings = Settings(
        learning_rate=5e-3, batch_size=20, accumulation=accumulation, epochs=6, warmup_steps=4, eval_interval=10,
        log_interval=1, checkpoint_interval=5, device="cpu", progress=False, eval_batch_size=8,
    )  # fmt: skip
    method.prepare(model, settings.total_steps(len(made.train)))
    tracker = Tracker() if distributed.is_main() else Silent()
    tracker.start(folder, {}, {"method": {"kinds": KINDS}})
    checkpoints = Checkpoints(folder, {})
    run = (Mortal if die_at else Training)(model, method, TASK, made, settings, tracker, 0, checkpoints)
    run.die_at = die_at
    outcome = run.run(None)
    weights = {name: p.tolist() for name, p in model.named_parameters() if p.requires_grad}
    everywhere = distributed.gather(weights)
    assert all(other == weights for other in everywhere), "the processes ended with different weights"
    if distributed.is_main():
        curve = [asdict(e) | {"seconds": 0} for e in outcome.curve]
        (folder / "outcome.json").write_text(json.dumps({"curve": curve, "allocations": outcome.allocations}))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
