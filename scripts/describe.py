"""What a run will train, before it runs: parameters by kind, matrices touched, steps, plan of ranks; loads no weights.

    python scripts/describe.py method=increlora budget=r2 backbone=deberta_v3_base task=rte [--json]

Takes the overrides of run.py. `--json` prints the same as JSON.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from increlora import surgery
from increlora.algorithm import IncreLoRA
from increlora.errors import UserError
from increlora.glue import config
from increlora.method import Method


@config.guarded
def main() -> None:
    """Print the description of the run that the command line asks for."""
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    as_json = "--json" in sys.argv
    described = describe([argument for argument in sys.argv[1:] if argument != "--json"])
    print(json.dumps(described, indent=1) if as_json else table(described))


def describe(overrides: list[str]) -> dict[str, Any]:
    """The description as plain data.

    Raises:
        UserError: what the command line asks for does not exist or is impossible.
    """
    cfg = config.load([*overrides, "backbone.weights=random"])
    method, settings, task = (config.build(cfg[key]) for key in ("method", "train", "task"))
    if task.train_examples is None:
        raise UserError(f"task {task.name} does not say how many examples it has: set +task.train_examples=N")
    drawn = round(task.train_examples * task.train_fraction)
    examples = drawn - round(drawn * task.holdout)
    total_steps = settings.total_steps(examples)
    with torch.device("meta"):  # shapes without memory
        model = config.build(cfg.backbone).model(task.num_labels, task.head_dropout)
    with config.readable_errors(cfg.method):
        linears = surgery.find_matrices(model, method.kinds)
        method.prepare(model, total_steps)
    plan, start_ranks = method.planned_ranks(), method.ranks()
    if isinstance(method, IncreLoRA):
        method.allocate(0)  # a reserve is there from the first step on
    start = method.parameters_by_kind(model)
    factors = {
        name: linears[name].in_features + linears[name].out_features for name, rank in start_ranks.items() if rank
    }
    cost = cost_of_a_rank(start["update"], factors, start_ranks)
    return {
        "run": {group: cfg[group].name for group in ("backbone", "budget", "method", "task")},
        "settings_from": cfg.settings_from,
        "parameters": {"start": start, "end": at_the_end(start, cost, factors, start_ranks, plan)},
        "matrices": touched(model, linears, method),
        "steps": {
            "total": total_steps, "examples": examples, "batch_size": settings.batch_size, "epochs": settings.epochs,
        },
        "ranks": [{"step": step, "total": total} for step, total in plan.items()],
    }  # fmt: skip


def cost_of_a_rank(update: int, factors: Mapping[str, int], ranks: Mapping[str, int]) -> dict[str, int]:
    """Trained parameters per rank of every matrix that has ranks.

    Beside its row of A and its column of B every rank has as many numbers: a lambda, a singular value, or none.
    """
    beside = update - sum(factors[name] * ranks[name] for name in factors)
    return {name: size + beside // sum(ranks.values()) for name, size in factors.items()}


def trained_below(model: nn.Module, module: str) -> int:
    return sum(p.numel() for p in model.get_submodule(module).parameters() if p.requires_grad)


def at_the_end(
    start: Mapping[str, int],
    cost: Mapping[str, int],
    factors: Mapping[str, int],
    ranks: Mapping[str, int],
    plan: Mapping[int, int],
) -> dict[str, Any]:
    """Parameters when ranks have reached their last total: the fewest, those at average rank, and the most.

    Args:
        start: parameters by kind at the start.
        cost: trained parameters per rank, by matrix.
        factors: of these, the elements of A and B alone, which is how LoRA counts.
        ranks: at the start, by matrix.
        plan: total rank by step.
    """
    if not plan or plan[max(plan)] == sum(ranks.values()):
        return {
            "update": dict.fromkeys(("lowest", "average", "highest"), start["update"]),
            **_rest(start, factors, ranks),
        }
    total, gained = plan[max(plan)], plan[max(plan)] - sum(ranks.values())
    held = sum(cost[name] * ranks[name] for name in cost)
    average = round(total * sum(cost.values()) / len(cost))
    if gained > 0:
        lowest, highest = held + gained * min(cost.values()), held + gained * max(cost.values())
        reserve = start["reserve"]
    else:
        pruned = sorted(cost[name] for name in cost for _ in range(ranks[name]))
        lowest, highest = held - sum(pruned[gained:]), held - sum(pruned[:-gained])
        reserve = start["reserve"] + start["update"] - average  # what is pruned keeps its tensors
    return {
        "update": {"lowest": lowest, "average": average, "highest": highest},
        "A_and_B_alone": round(total * sum(factors.values()) / len(factors)),
        "reserve": reserve,
        "head": start["head"],
        "total": start["total"] + average + reserve - start["update"] - start["reserve"],
    }


def _rest(start: Mapping[str, int], factors: Mapping[str, int], ranks: Mapping[str, int]) -> dict[str, int]:
    alone = {"A_and_B_alone": sum(factors[name] * ranks[name] for name in factors)} if factors else {}
    return alone | {kind: start[kind] for kind in ("reserve", "head", "total")}


def touched(model: nn.Module, linears: Mapping[str, nn.Linear], method: Method) -> dict[str, dict[str, int]]:
    """Matrices that have trained parameters, by kind: how many, and their shape."""
    kinds: dict[str, dict[str, int]] = {}
    for name, linear in linears.items():
        if method.ranks().get(name) or trained_below(model, name):  # a bank's components lie elsewhere
            kind = surgery.kind_of(name, method.kinds)
            shape = {"count": 0, "out": linear.out_features, "in": linear.in_features}
            kinds.setdefault(kind, shape)["count"] += 1
    return kinds


# for people


def table(described: Mapping[str, Any]) -> str:
    """The description as lines of text."""
    run, start, end = described["run"], described["parameters"]["start"], described["parameters"]["end"]
    steps, update = described["steps"], end["update"]
    lines = [" / ".join(run[key] for key in ("method", "budget", "backbone", "task"))]
    lines += [
        f"  settings: {described['settings_from']}",
        "",
        f"  {'parameters':<12}{'at the start':>14}{'at the end':>14}",
    ]
    lines += [f"  {'update':<12}{start['update']:>14,}{update['average']:>14,}" + _spread(update)]
    lines += [f"  {kind:<12}{start[kind]:>14,}{end[kind]:>14,}" for kind in ("reserve", "head", "total")]
    if "A_and_B_alone" in end:
        lines += [f"  update counted as LoRA counts, A and B alone, at the end: {end['A_and_B_alone']:,}"]
    lines += ["", "  matrices touched"]
    lines += [f"  {kind:<18}{m['count']:>4} x {m['out']} x {m['in']}" for kind, m in described["matrices"].items()]
    lines += ["", f"  {steps['total']:,} steps: {steps['examples']:,} examples, batch {steps['batch_size']}, "
              f"{steps['epochs']:g} epochs"]  # fmt: skip
    return "\n".join([*lines, *_plan(described["ranks"], steps["total"])])


def _spread(update: Mapping[str, int]) -> str:
    if update["lowest"] == update["highest"]:
        return ""
    return f"  at average rank; {update['lowest']:,} to {update['highest']:,}, depending on the matrices"


def _plan(ranks: list[dict[str, int]], total_steps: int) -> list[str]:
    if not ranks:
        return ["  no ranks"]
    if len(ranks) == 1:
        return [f"  total rank {ranks[0]['total']} throughout"]
    first, second, last = ranks[0], ranks[1], ranks[-1]
    shown = ranks if len(ranks) <= 8 else [*ranks[:4], *ranks[-3:]]
    points = [f"{point['total']} from step {point['step']:,}" for point in shown]
    if len(shown) < len(ranks):
        points.insert(4, "...")
    return [
        f"  total rank {first['total']} -> {last['total']} in {len(ranks) - 1} changes from step {second['step']:,} "
        f"to step {last['step']:,} ({last['step'] / total_steps:.0%} of training)",
        "    " + ", ".join(points),
    ]


if __name__ == "__main__":
    main()
