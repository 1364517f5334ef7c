"""Peak memory of whole runs, and what frozen weights take in bf16.

    python scripts/benchmark_memory.py --backbone minilm --task cola --data GLUE
    python scripts/benchmark_memory.py --backbone deberta_v3_base --tokenizer DIR --task rte --data GLUE --batch 32

Every method trains in a process of its own, by run.py, in bf16, with evaluations; no result is kept. IncreLoRA grows
15 times in the first half, as in the published recipe for RTE. Shapes and ranks change in a whole run, so it needs more
memory than a step. `--tokenizer DIR` gives the backbone random weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from increlora import surgery
from increlora.analysis.benchmark_table import benchmark_table
from increlora.errors import UserError
from increlora.files import write_text
from increlora.glue import config, machine

ROOT = Path(__file__).resolve().parent.parent
SPANS = 32  # of the length between two growths, in a run: growths end the 2nd to the 16th


def overrides(method: str, options: argparse.Namespace) -> list[str]:
    """What a run of this method is asked for."""
    found = [
        f"backbone={options.backbone}", f"task={options.task}", f"method={method}", f"budget=r{options.rank}",
        f"precision={options.precision}", f"train.batch_size={options.batch}", f"train.max_steps={options.steps}",
        "train.epochs=100000", f"train.warmup_steps={max(1, options.steps // 10)}",
        f"train.eval_interval={max(1, options.steps // 4)}", "train.progress=false", "tracker=jsonl", "device=cpu",
    ]  # fmt: skip
    if options.data:
        found.append(f"task.data_dir='{options.data.resolve()}'")
    if options.tokenizer:
        found += ["backbone.weights=random", f"backbone.path='{options.tokenizer.resolve()}'"]
    return found + GROWTH.get(method, lambda _: [])(options)


def _growth(options: argparse.Namespace) -> list[str]:
    interval = max(1, options.steps // SPANS)
    return [f"method.interval={interval}", f"method.init_warmup={interval}", "method.top_h=null"]


GROWTH = {"increlora": _growth}  # what only this method can be told


def run(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory, seconds, steps and growths of a whole run.

    Raises:
        UserError: the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*overrides(method, options), f"run_dir='{folder}'"]
        done = subprocess.run([sys.executable, ROOT / "run.py", *arguments], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the run of {method} failed: {done.stderr.strip() or done.stdout.strip()}")
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    cost = {key: result["cost"][key] for key in ("peak_memory_mb", "seconds", "steps")}
    return cost | {"growths": len(result["allocations"]), "total_rank": result["curve"][-1]["total_rank"]}


def frozen_weights(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """MB of the frozen weights in fp32 and as a run in bf16 holds them: all of them, and those of linear layers.

    Embeddings are looked up in fp32 under autocast too: in bf16 they would change the losses.
    """
    cfg = config.load([f"backbone={options.backbone}", "backbone.weights=random", "method=lora"])
    model = config.build(cfg.backbone).model(2)
    config.build(cfg.method).prepare(model, options.steps)
    linear = nn.ModuleList(module for module in model.modules() if type(module) is nn.Linear)
    measured = {"frozen weights": model, "frozen weights of linear layers": linear}
    before = {name: _frozen_mb(module) for name, module in measured.items()}
    surgery.hold_frozen_layers_in(model, torch.bfloat16)
    return {name: {"fp32": before[name], "bf16": _frozen_mb(module)} for name, module in measured.items()}


def _frozen_mb(module: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad) / 2**20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--tokenizer", type=Path, help="folder with the backbone's tokenizer: the weights are random")
    parser.add_argument("--task", default="cola")
    parser.add_argument("--data", type=Path, help="folder of GLUE's TSV folders; without it the hub is asked")
    parser.add_argument("--methods", nargs="+", default=["lora", "increlora"])
    parser.add_argument("--rank", type=int, default=2, help="a budget of configs/budget")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--json", type=Path, help="write everything here as JSON")
    return parser.parse_args()


@config.guarded
def main() -> None:
    options = parse()
    kept = ("backbone", "task", "methods", "rank", "batch", "steps", "precision")
    result = {
        "measure": "memory",
        "about": machine.describe(sys.argv, "cpu"),
        "options": {key: getattr(options, key) for key in kept},
        "runs": {method: run(method, options) for method in options.methods},
        "frozen": frozen_weights(options),
    }
    if options.json:
        write_text(options.json, json.dumps(result, indent=1) + "\n")
    print(benchmark_table(result))


if __name__ == "__main__":
    main()
