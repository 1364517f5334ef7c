"""Replay a recorded run of the authors' code through our classes and compare every number.

    python scripts/check_parity.py tests/reference_trace

Exits 0 only if every selection of matrices is identical, the learning rates agree to 1e-12, the scores
to a relative 1e-6 and the final updates to 1e-7. The trace's format is described in
tests/reference_trace/README.md. The replay sets the start values of components and asks for the
method's part of configs/compat/authors.yaml (the trace was recorded with torch's AdamW); everything else is
what training uses.
"""

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from increlora.algorithm import IncreLoRA
from increlora.errors import UserError
from increlora.glue import config
from increlora.glue.loop import make_optimizer, take_step
from increlora.glue.settings import Settings
from increlora.groups import set_learning_rates

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
LIMITS = {"learning rate": 1e-12, "score (relative)": 1e-6, "final update": 1e-7}


@dataclass
class Differences:
    """The largest absolute difference per quantity, and the selections that differ."""

    largest: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    events: list[tuple[int, bool, float]] = field(default_factory=list)

    def note(self, quantity: str, ours: float, theirs: float) -> None:
        self.largest[quantity] = max(self.largest[quantity], abs(ours - theirs))

    @property
    def passed(self) -> bool:
        same = all(identical for _, identical, _ in self.events)
        return same and all(self.largest[name] <= limit for name, limit in LIMITS.items())


def build(trace: dict, tensors: dict[str, Tensor]) -> tuple[DebertaV2ForSequenceClassification, IncreLoRA, Settings]:
    """The trace's model in float64, and the method and settings that its hyperparameters ask for."""
    given = trace["hyperparameters"]
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**trace["backbone_config"])).double()
    start = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    model.load_state_dict(start)
    compat = yaml.safe_load((CONFIGS / "compat" / "authors.yaml").read_text())["method"]
    method = IncreLoRA(
        kinds={"all": "|".join(name.replace(".", r"\.") for name in trace["modules"])},
        target_rank=given["target_rank"],
        init_rank=given["init_rank"],
        rank_step=given["incre_rank_num"],
        top_h=given["top_h"],
        interval=given["interval"],
        init_warmup=given["init_warmup"],
        beta1=given["beta1"],
        beta2=given["beta2"],
        advance_learning=given["advance_learn"],
        restart_warmup=given["multi_lr"],
        orth_weight=given["orth"],
        alpha=given["alpha"],
        **compat,
    )
    settings = Settings(
        learning_rate=given["lr"],
        weight_decay=given["wd"],
        warmup_steps=given["warmup"],
        max_grad_norm=given["clip"],
        batch_size=given["batch"],
        device="cpu",
    )
    return model, method, settings


def set_components(method: IncreLoRA, tensors: dict[str, Tensor], prefix: str) -> None:
    """Overwrite the newest component of every matrix that the trace has values for."""
    for name, linear in method.linears.items():
        if f"{prefix}.{name}.A" in tensors:
            A, B = linear.bank.rows(name, -1)
            A.data.copy_(tensors[f"{prefix}.{name}.A"])
            B.data.copy_(tensors[f"{prefix}.{name}.B"].t())


def replay(trace: dict, tensors: dict[str, Tensor]) -> Differences:
    """Train as the trace did, comparing step by step."""
    model, method, settings = build(trace, tensors)
    total_steps = trace["hyperparameters"]["steps"]
    method.prepare(model, total_steps)
    set_components(method, tensors, "init")
    optimizer = make_optimizer(model, method, settings)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    events = {event["step"]: event for event in trace["events"]}
    differences = Differences()
    model.train()

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss

    for step in range(total_steps):
        set_learning_rates(optimizer, step, total_steps, settings.warmup_steps)
        compare_learning_rates(differences, optimizer, trace["lr"][step])
        batch = {name: tensors[f"data.{name}"][step] for name in ("input_ids", "attention_mask", "labels")}
        penalty = method.orthogonal_penalty().item()
        report = take_step(step, [batch], loss_of, method, optimizer, settings, scaler)
        set_components(method, tensors, f"reserve.{step}")
        differences.note("task loss", report.loss, trace["task_loss"][step])
        differences.note("orthogonal penalty", penalty, trace["orth_loss"][step])
        differences.note("gradient norm", report.gradient_norm, trace["grad_norm"][step])
        differences.note("total rank", method.total_rank, trace["total_rank"][step])
        if step in events:
            compare_event(differences, method, events[step])
    compare_end(differences, model, method, trace, tensors)
    return differences


def compare_learning_rates(differences: Differences, optimizer: torch.optim.Optimizer, theirs: list[float]) -> None:
    """Compare the number of groups, and the rate of each group."""
    ours = [group["lr"] for group in optimizer.param_groups if any(p.requires_grad for p in group["params"])]
    differences.note("optimizer groups", len(ours), len(theirs))
    for a, b in zip(ours, theirs, strict=False):
        differences.note("learning rate", a, b)


def compare_event(differences: Differences, method: IncreLoRA, event: dict) -> None:
    """Selection, ranks and scores of one growth."""
    last = method.allocations[-1] if method.allocations else None
    grown = last is not None and last.step == event["step"]
    identical = grown and list(last.added) == event["selected"] and method.ranks() == event["ranks"]
    worst = 0.0
    for name, theirs in event["importance"].items():
        worst = max(worst, abs(method.scores()[name] - theirs) / abs(theirs))
    differences.events.append((event["step"], identical, worst))
    differences.note("score (relative)", worst, 0.0)


def compare_end(differences: Differences, model, method: IncreLoRA, trace: dict, tensors: dict[str, Tensor]) -> None:
    """Final ranks, updates and logits."""
    for name, linear in method.linears.items():
        gap = (linear.delta() - tensors[f"final.{name}.delta"]).abs().max().item()
        differences.note("final update", gap, 0.0)
    model.eval()
    with torch.no_grad():
        logits = model(tensors["data.input_ids"][0], tensors["data.attention_mask"][0]).logits
    differences.note("final logits", (logits - tensors["final.logits"]).abs().max().item(), 0.0)
    wrong = sum(method.ranks()[name] != rank for name, rank in trace["final_ranks"].items())
    differences.note("final ranks that differ", wrong, 0)


def load(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The two files of a trace."""
    for name in ("trace.json", "trace.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"no reference trace in {folder}: {name} is missing")
    return json.loads((folder / "trace.json").read_text()), load_file(folder / "trace.safetensors")


@config.guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with trace.json and trace.safetensors")
    try:
        trace, tensors = load(parser.parse_args().folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    differences = replay(trace, tensors)
    for step, identical, worst in differences.events:
        print(
            f"growth at step {step:5d}: selection {'identical' if identical else 'DIFFERENT'}, "
            f"largest relative score difference {worst:.1e}"
        )
    for quantity, largest in differences.largest.items():
        limit = f" (limit {LIMITS[quantity]:.0e})" if quantity in LIMITS else ""
        print(f"largest difference in {quantity}: {largest:.1e}{limit}")
    print("parity: passed" if differences.passed else "parity: FAILED")
    return 0 if differences.passed else 1


if __name__ == "__main__":
    sys.exit(main())
