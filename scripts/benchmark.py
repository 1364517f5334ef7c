"""What a step costs: methods against each other in one process, interleaved, as medians of paired ratios.

    python scripts/benchmark.py                                   # DeBERTaV3-base shape, batch 8 x 128, fp32, CPU
    python scripts/benchmark.py --backbone minilm --precision bf16 --batch 32 --length 64
    python scripts/benchmark.py --device cuda --precision bf16 --batch 32 --json benchmark.json

Weights are random (a step costs the same), nothing is downloaded. Every round runs one step of every arm, so
that whatever else the machine does hits all alike; a ratio is the median over rounds of (arm / LoRA) within
a round. Peak memory is measured in a process of its own per arm. `--compile` also runs two arms under
torch.compile, and writes down what the first step and the step after a growth take. `--data DIR` with GLUE's
TSV folders and `--tokenizer DIR` adds the padding of length-bucketed batches, and examples per second over RTE's
lengths against the authors' recipe: every example padded to 320 tokens, the update formed in every forward.
"""

import argparse
import copy
import functools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from baselines.adalora import AdaLoRA
from baselines.lora import LoRA
from increlora.algorithm import IncreLoRA
from increlora.analysis.benchmark_table import benchmark_table
from increlora.files import as_json
from increlora.glue import config
from increlora.glue.batching import epoch_batches, padding_share
from increlora.glue.evaluate import predict
from increlora.glue.loop import Training, peak_memory_mb
from increlora.glue.settings import Settings
from increlora.glue.tasks import Split, Task, TaskData
from increlora.glue.tracker import Silent
from increlora.importance import sensitivity
from increlora.linear import IncrementalLinear
from increlora.method import Method

GROWTH = dict(interval=1000, init_warmup=1000, rank_step=1, scoring_window=57)
IDLE, SCORING, DUE = 10, 1990, 2000  # steps: no score is taken, one is, matrices grow
TASK = Task(name="benchmark", fields=["x"], labels=["a", "b"], metrics=["accuracy"], primary="accuracy", max_length=512)
# steps, growths, window, from the published r2 recipes: (total, first growth, growths, interval)
RECIPES = {"RTE r2": (3900, 200, 15, 100), "MNLI r2": (110448, 2000, 36, 1000)}
COMPILED = ", compiled"
AUTHORS_LENGTH = 320  # their padding on RTE


def methods(kinds: dict[str, str], head: str, rank: int) -> dict[str, tuple[Method, int]]:
    """Arm -> a fresh method and the step number that puts it in the wanted phase.

    IncreLoRA grows to `rank` by single ranks, so that it has as many components as it can ever have.
    """
    given = dict(kinds=kinds, head=head)
    grown = dict(given, top_h=10**6, **GROWTH)
    return {
        "lora": (LoRA(**given, rank=rank), IDLE),
        "adalora": (AdaLoRA(**given, target_rank=rank, init_warmup=1000, interval=1, final_steps=1000), SCORING),
        "increlora, not scoring": (IncreLoRA(**grown, target_rank=rank + 4), IDLE),
        "increlora, scoring": (IncreLoRA(**grown, target_rank=rank + 4), SCORING),
        "increlora, after growth": (IncreLoRA(**grown, target_rank=rank), IDLE),
        "authors, growing": (DeltaFormed(**grown | {"scoring_window": "all"}, target_rank=rank + 4), SCORING),
        "authors, after growth": (DeltaFormed(**grown, target_rank=rank), IDLE),
        "full": (Method(**given), IDLE),
    }


class DeltaFormedLinear(IncrementalLinear):
    """The same layer with the authors' arithmetic: delta (out, in) is formed, and so is its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        delta = self.delta()
        if self.watcher is not None and delta.requires_grad:
            self.watcher.awaited += 1
            delta.register_hook(self.receive)
        return self.base(x) + self.dropout(x) @ delta.t()

    def receive(self, gradient: Tensor) -> None:
        """What their backward hook does with the gradient of delta."""
        self.watcher.sensitivity = sensitivity(self.delta().detach(), gradient)


@dataclass
class DeltaFormed(IncreLoRA):
    """IncreLoRA as the authors compute it: delta formed in every forward, scored in every step, small products."""

    def prepare(self, model: nn.Module, total_steps: int) -> None:
        super().prepare(model, total_steps)
        for linear in self.linears.values():
            linear.__class__ = DeltaFormedLinear

    def orthogonal_penalty(self) -> Tensor:
        bank = self.bank
        pairs = [[bank.rows(name, i) for i in range(len(m.components))] for name, m in bank.matrices.items()]
        rows = [torch.cat(several) for matrix in pairs for several in zip(*matrix, strict=True)]
        return torch.stack([torch.norm(R @ R.t() - torch.eye(len(R), device=R.device)) for R in rows]).mean()


@dataclass
class Arm:
    """One method on a model of its own, ready to take steps in its phase."""

    run: Training
    step: int

    def take(self, indices: list[int] | None = None) -> float:
        """Seconds of one step through the loop, on the whole data or on some examples."""
        self.run.progress.step = self.step
        return timed(lambda: self.run._step(indices or self.indices, False), self.run.device)

    @property
    def indices(self) -> list[int]:
        return list(range(self.run.settings.batch_size))


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, the GPU's work included."""
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_arm(name: str, options: argparse.Namespace, lengths: list[int] | None = None) -> Arm:
    """A model with random weights, the method, data of the wanted shape or of the given lengths."""
    backbone = config.build(config.load([f"backbone={options.backbone}", "backbone.weights=random"]).backbone)
    plain = name.removesuffix(COMPILED)
    method, step = methods(backbone.kinds, backbone.head, options.rank)[plain]
    generator = torch.Generator().manual_seed(0)
    lengths = lengths or [options.length] * options.batch
    rows = [torch.randint(5, 1000, (length,), generator=generator).tolist() for length in lengths]
    split = Split("train", rows, None, [i % 2 for i in range(len(rows))])
    data = TaskData(split, {"dev": split}, "random", {}, "", {})
    settings = Settings(
        batch_size=options.batch, eval_batch_size=options.batch, max_steps=100_000, epochs=1_000_000, warmup_steps=100,
        eval_interval=10**9, log_interval=10**9, checkpoint_interval=10**9, precision=options.precision,
        device=options.device, progress=False,
    )  # fmt: skip
    model = backbone.model(2)
    method.prepare(model, 100_000)
    tracker = Silent()
    tracker.start()
    run = Training(model, method, TASK, data, settings, tracker, 0, None)
    for growth in [0, *(DUE + i * GROWTH["interval"] for i in range(options.rank - 1))]:
        method.before_step(growth)  # of other methods: nothing
    if plain != name:
        model.compile()
    return Arm(run, step)


def bare_loop(arm: Arm) -> float:
    """Seconds of the same step written out by hand: what any loop must do."""
    run = arm.run
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    batch = {
        "input_ids": torch.tensor(run.data.train.input_ids, device=run.device),
        "attention_mask": torch.ones(len(arm.indices), len(run.data.train.input_ids[0]), device=run.device).long(),
    }
    labels = torch.tensor(run.data.train.labels, device=run.device)

    def step() -> None:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.settings.precision, torch.float32)
        with torch.autocast(run.device.type, dtype, enabled=dtype != torch.float32):
            logits = run.model(**batch).logits
        loss = nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        loss.item()

    run.model.train()
    return timed(step, run.device)


def grow(arm: Arm) -> float:
    """Seconds that a growth of all matrices adds to a step."""
    method = arm.run.method
    grown = timed(lambda: method.before_step(DUE), arm.run.device)
    return grown - timed(lambda: method.before_step(DUE + 1), arm.run.device)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of one step per arm, after two rounds of warm-up."""
    names = [n for n in methods({}, "", 1) if n in options.methods or n.partition(",")[0] in options.methods]
    if options.compile:
        names += [name + COMPILED for name in names if name in ("lora", "increlora, not scoring")]
    arms = {name: make_arm(name, options) for name in names}
    evaluated = {"evaluation lora": arms["lora"].run.model}
    if grown := arms.get("increlora, after growth"):
        evaluated |= {"evaluation increlora": grown.run.model, "evaluation increlora, merged": merged(grown)}
    seconds: dict[str, list[float]] = {name: [] for name in [*names, "bare lora", *evaluated]}
    for number in range(options.repeats + 2):
        order = names if number % 2 else names[::-1]
        taken = {name: arms[name].take() for name in order}
        taken["bare lora"] = bare_loop(arms["lora"])
        run = arms["lora"].run
        for name, model in evaluated.items():
            call = functools.partial(predict, model, run.data.train, TASK, run.settings)
            taken[name] = timed(call, run.device)
        if number == 0:
            first = {name: taken[name] for name in names}
        if number >= 2:
            for name, value in taken.items():
                seconds[name].append(value)
    growing = arms.get("increlora, scoring")
    growth = [grow(growing) for _ in range(3)] if growing else []
    measured = {"seconds": seconds, "first step": first, "growth": growth}
    if compiled := arms.get("increlora, not scoring" + COMPILED):
        grow(compiled)
        measured["compiled, step after a growth"] = compiled.take()
    return measured


def merged(arm: Arm) -> nn.Module:
    """A copy of an arm's model with the update folded into its weights."""
    model, method = copy.deepcopy((arm.run.model, arm.run.method))
    method.merge(model)
    return model


def ratio(seconds: dict[str, list[float]], a: str, b: str) -> float:
    """The median over rounds of a / b within a round."""
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


def ratios(measured: dict[str, Any]) -> dict[str, float]:
    """Every ratio that has a bar, and those of the other arms."""
    seconds = measured["seconds"]
    found = {name: ratio(seconds, name, "lora") for name in seconds if name not in ("lora", "bare lora")}
    found["our loop / bare loop"] = ratio(seconds, "lora", "bare lora")
    if "increlora, scoring" in found:
        scoring, idle, after = (found[f"increlora, {p}"] for p in ("scoring", "not scoring", "after growth"))
        for name, (total, first, growths, interval) in RECIPES.items():
            last = first + (growths - 1) * interval
            scored = min(GROWTH["scoring_window"], interval) * growths
            found[f"recipe {name}"] = (scored * scoring + (last - scored) * idle + (total - last) * after) / total
        step = statistics.median(seconds["increlora, not scoring"])
        found["growth event / step"] = statistics.median(measured["growth"]) / step
    return found


def memory(options: argparse.Namespace) -> dict[str, float]:
    """Peak memory in MB of two steps of every arm, each in a process of its own."""
    peaks = {}
    for name in methods({}, "", 1):
        if name in options.methods or name.partition(",")[0] in options.methods:
            command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[name] = float(done.stdout.splitlines()[-1])
    return peaks


def peak_of_two_steps(name: str, options: argparse.Namespace) -> float:
    """Peak memory of this process in MB (of the GPU, if it computes)."""
    arm = make_arm(name, options)
    arm.take(), arm.take()
    return peak_memory_mb(arm.run.device)


def lengths_of(task: str, folder: Path, tokenizer: Path) -> list[int]:
    """Tokens of every training example of a task, with DeBERTaV3's tokens."""
    backbone = config.build(config.load(["backbone=deberta_v3_base", f"backbone.path={tokenizer}"]).backbone)
    built = config.build(config.load([f"task={task}", f"task.data_dir={folder}"]).task)
    return built.load(backbone.tokenizer()).train.lengths


def padding(data: Path, tokenizer: Path, batch: int) -> dict[str, float]:
    """Padded tokens beyond real ones in bucketed batches, mean of three epochs, by task."""
    shares = {}
    for task, folder in {"rte": "RTE", "mrpc": "MRPC", "cola": "CoLA", "stsb": "STS-B", "sst2": "SST-2"}.items():
        if (data / folder).is_dir():
            lengths = lengths_of(task, data / folder, tokenizer)
            epochs = [padding_share(lengths, epoch_batches(lengths, batch, 41, epoch)) for epoch in range(3)]
            shares[task] = statistics.mean(epochs)
    return shares


def examples_per_second(options: argparse.Namespace) -> dict[str, float]:
    """Examples a second over a whole RTE recipe: ours on its lengths, the authors' arithmetic on 320 tokens each.

    Ours is measured on every tenth batch of an epoch, in order of length; a recipe's share of scoring steps
    and of steps before and after the end of growth weighs both.
    """
    lengths = lengths_of("rte", options.data / "RTE", options.tokenizer)
    batches = sorted(epoch_batches(lengths, options.batch, 41, 0), key=lambda batch: max(lengths[i] for i in batch))
    sample = batches[5::10]
    ours = {"scoring": 0.0, "not scoring": 0.0, "after growth": 0.0}
    for phase in ours:
        arm = make_arm(f"increlora, {phase}", options, lengths)
        arm.take(sample[-1])
        ours[phase] = statistics.mean(arm.take(batch) for batch in sample)
    theirs = {}
    for phase in ("growing", "after growth"):
        arm = make_arm(f"authors, {phase}", options, [AUTHORS_LENGTH] * options.batch)
        arm.take()
        theirs[phase] = statistics.median(arm.take() for _ in range(3))
    total, first, growths, interval = RECIPES["RTE r2"]
    last = first + (growths - 1) * interval
    scored = min(GROWTH["scoring_window"], interval) * growths
    our_mean = (
        scored * ours["scoring"] + (last - scored) * ours["not scoring"] + (total - last) * ours["after growth"]
    ) / total
    their_mean = (last * theirs["growing"] + (total - last) * theirs["after growth"]) / total
    return {"ours": options.batch / our_mean, "authors": options.batch / their_mean, "ratio": their_mean / our_mean}


def processor() -> str:
    """The processor's name as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="deberta_v3_base")
    parser.add_argument("--methods", nargs="+", default=["lora", "adalora", "increlora", "full", "authors"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also LoRA and IncreLoRA under torch.compile")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory of every arm out")
    parser.add_argument("--data", type=Path, help="folder of GLUE's TSV folders: adds the padding")
    parser.add_argument("--tokenizer", type=Path, help="folder with DeBERTaV3's spm.model")
    parser.add_argument("--json", type=Path, help="write everything here as JSON")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


@config.guarded
def main() -> None:
    options = parse()
    if options.memory_of:
        print(peak_of_two_steps(options.memory_of, options))
        return
    options.methods = list(dict.fromkeys(["lora", *options.methods]))
    measured = measure(options)
    result = {
        "machine": f"{processor()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        + (f", {torch.cuda.get_device_name()}" if options.device.startswith("cuda") else ""),
        "options": {k: v for k, v in vars(options).items() if not isinstance(v, Path) and k != "memory_of"},
        "ratios": ratios(measured),
        **measured,
    }
    if not options.no_memory:
        result["memory"] = memory(options)
        if "increlora, not scoring" in result["memory"]:
            peaks = result["memory"]
            result["ratios"]["memory increlora, not scoring"] = peaks["increlora, not scoring"] / peaks["lora"]
    if options.data and options.tokenizer:
        result["padding"] = padding(options.data, options.tokenizer, 32)
        result["rte"] = examples_per_second(options)
    if options.json:
        options.json.write_text(as_json(result, indent=1) + "\n", encoding="utf-8")
    print(f"{options.backbone}, batch {options.batch} x {options.length}, rank {options.rank}, {options.precision}, "
          f"{options.repeats} rounds; {result['machine']}\n\n{benchmark_table(result)}")  # fmt: skip


if __name__ == "__main__":
    main()
