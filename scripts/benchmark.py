"""What a step costs: methods against each other in one process, interleaved, as medians of paired ratios.

    python scripts/benchmark.py                                   # DeBERTaV3-base shape, batch 8 x 128, fp32, CPU
    python scripts/benchmark.py --precision bf16 --shapes 8x128 32x12 32x64
    python scripts/benchmark.py --launch                          # what it costs to launch the operations of a step
    python scripts/benchmark.py --device cuda --precision bf16 --shapes 32x32 32x128 --json gpu.json

A step is a whole step of run.py's loop. In half precision that loop holds frozen weights in half precision, LoRA's
too; `lora, weights cast` is LoRA as PEFT alone runs it, where autocast casts them at every use. Weights are random (a
step costs the same), nothing is downloaded. Each round times one step per method and phase (an arm), so that other work
on the machine affects all alike; a ratio is the median over rounds of (arm / LoRA) within a round. Peak memory is
measured in a process of its own per arm; that of whole runs by scripts/benchmark_memory.py.

`peft` (in fp32) is IncreLoRA through PEFT's door, `get_peft_model` and `attach`, beside the benchmark's method, both in
the same loop written out by hand.

`--launch` keeps the encoder's layers and makes them so narrow (hidden size 48) and the batch so small (1 x 4 tokens)
that a step takes its time to launch operations, as on a GPU with short sentences; on a CPU it takes CPU time. It also
counts the operations of a step that touch data, and the tensors in the optimizer: neither depends on the hidden size.

`--data DIR` with GLUE's TSV folders and `--tokenizer DIR` adds the padding of length-bucketed batches, and examples per
second over RTE's lengths against the authors' recipe: every example padded to 320 tokens, the update formed in every
forward.
"""

import argparse
import copy
import functools
import gc
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from baselines.adalora import AdaLoRA
from baselines.adapters import Adapters
from baselines.authors import Authors
from baselines.bitfit import BitFit
from baselines.lora import LoRA
from increlora.algorithm import IncreLoRA
from increlora.analysis.benchmark_table import benchmark_table
from increlora.files import as_json, write_text
from increlora.glue import config, machine
from increlora.glue.backbone import Backbone
from increlora.glue.batching import collate, epoch_batches, padding_share, to_device
from increlora.glue.evaluate import predict
from increlora.glue.loop import Training, peak_memory_mb
from increlora.glue.settings import AUTOCAST, Settings
from increlora.glue.tasks import Split, Task, TaskData
from increlora.glue.tracker import Silent
from increlora.method import Method
from increlora.order import AFTER
from increlora.surgery import hold_frozen_layers_in

METHODS = ("lora", "adalora", "houlsby", "pfeiffer", "bitfit", "full", "increlora", "authors", "peft")
CAST = "lora, weights cast"
STEPS = 100_000  # of a run, in which these are
INTERVAL, FIRST_GROWTH = 1000, 2000
PHASES = ("scoring", "not scoring", "after growth")
IDLE, SCORING, DUE = 60_010, 60_990, 61_000  # no score is taken, one is, matrices grow
GROWTH = dict(interval=INTERVAL, init_warmup=INTERVAL, rank_step=1, scoring_window=57)
ALL = 10**6  # matrices per growth: rank 8 by single ranks has as many components as it can ever have
MANY_GROWTHS = 41  # matrices per growth: from rank 1 to an average of 24 in 41 growths, with 72 matrices
SMALL = {"hidden_size": 48, "intermediate_size": 192, "vocab_size": 1000}
TASK = Task(name="benchmark", fields=["x"], labels=["a", "b"], metrics=["accuracy"], primary="accuracy", max_length=512)
# steps, growths, window, from the published r2 recipes: (total, first growth, growths, interval)
RECIPES = {"RTE r2": (3900, 200, 15, 100), "MNLI r2": (110448, 2000, 36, 1000)}
AUTHORS_LENGTH = 320  # their padding on RTE


# the arms


@dataclass
class Case:
    """A method and the phase of its training in which a step is measured.

    Args:
        step: number of the step; it is taken again and again.
        rank: average rank to which IncreLoRA has grown before.
        cast: frozen weights stay in fp32, and autocast casts them at every use.
    """

    method: Method
    step: int = IDLE
    rank: int = 1
    cast: bool = False


def cases(backbone: Backbone, rank: int, launch: bool, precision: str) -> dict[str, Case]:
    """Arm -> what it measures."""
    given = dict(kinds=backbone.kinds, head=backbone.head)
    pruning = dict(init_warmup=INTERVAL, interval=INTERVAL, final_steps=INTERVAL)  # not in the step measured
    others = {
        "lora": Case(LoRA(**given, rank=rank)),
        **({} if precision == "fp32" else {CAST: Case(LoRA(**given, rank=rank), cast=True)}),
        "adalora": Case(AdaLoRA(**given, target_rank=rank, **pruning), SCORING),
        # bottlenecks that train as many parameters as LoRA of this rank: configs/budget
        "houlsby": Case(Adapters(**given, matrices=["attention_output", "output"], bottleneck=4 * rank)),
        "pfeiffer": Case(
            Adapters(**given, name="pfeiffer", matrices=["output"], bottleneck=8 * rank, activation="relu")
        ),
        "bitfit": Case(BitFit(**given)),
        "full": Case(Method(**given)),
    }
    increlora = functools.partial(IncreLoRA, **given, **GROWTH)
    authors = functools.partial(Authors, **given, **GROWTH, top_h=ALL)
    if launch:
        return others | {
            "increlora r2": Case(increlora(target_rank=2, top_h=ALL), IDLE, 2),
            f"increlora r{rank}": Case(increlora(target_rank=rank, top_h=ALL), IDLE, rank),
            f"increlora r{rank}, growing": Case(increlora(target_rank=rank + 4, top_h=ALL), IDLE, rank),
            f"increlora r{rank}, scoring": Case(increlora(target_rank=rank + 4, top_h=ALL), SCORING, rank),
            "increlora r24": Case(increlora(target_rank=24, top_h=MANY_GROWTHS), IDLE, 24),
        }
    return others | {
        "increlora, not scoring": Case(increlora(target_rank=rank + 4, top_h=ALL), IDLE, rank),
        "increlora, scoring": Case(increlora(target_rank=rank + 4, top_h=ALL), SCORING, rank),
        "increlora, after growth": Case(increlora(target_rank=rank, top_h=ALL), IDLE, rank),
        "authors, growing": Case(authors(target_rank=rank + 4, scoring_window="all"), SCORING, rank),
        "authors, after growth": Case(authors(target_rank=rank), IDLE, rank),
    }


def chosen(options: argparse.Namespace) -> list[str]:
    """The arms of the methods asked for."""
    names = cases(backbone_of(options), options.rank, options.launch, options.precision)
    return [name for name in names if re.match(r"\w+", name)[0] in options.methods]


@functools.cache
def _backbone(name: str, launch: bool) -> Backbone:
    small = [f"backbone.architecture.{key}={value}" for key, value in SMALL.items()] if launch else []
    return config.build(config.load([f"backbone={name}", "backbone.weights=random", *small]).backbone)


@functools.cache
def _model(name: str, launch: bool) -> nn.Module:
    return _backbone(name, launch).model(2)


def backbone_of(options: argparse.Namespace) -> Backbone:
    """The encoder, with random weights."""
    return _backbone(options.backbone, options.launch)


@dataclass
class Arm:
    """One method on a model of its own, ready to take steps in its phase."""

    run: Training
    step: int
    clock: Callable[[], float]

    def take(self, indices: list[int] | None = None) -> float:
        """Seconds of one step through the loop, on the first batch or on some examples."""
        self.run.progress.step = self.step
        stand_before(self.step, self.run.method)
        return timed(lambda: self.run._step(indices or self.indices, False), self.run.device, self.clock)

    @property
    def indices(self) -> list[int]:
        return list(range(self.run.settings.batch_size))


def make_arm(name: str, options: argparse.Namespace, batch: int, lengths: list[int]) -> Arm:
    """A model with random weights, the method in its phase, examples of the given lengths."""
    backbone = backbone_of(options)
    case = cases(backbone, options.rank, options.launch, options.precision)[name]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 1000, (length,), generator=generator).tolist() for length in lengths]
    split = Split("train", rows, None, [i % 2 for i in range(len(rows))])
    data = TaskData(split, {"dev": split}, "random", {}, "", {})
    settings = Settings(
        batch_size=batch, eval_batch_size=batch, max_steps=STEPS, epochs=1_000_000, warmup_steps=100,
        eval_interval=10**9, log_interval=10**9, checkpoint_interval=10**9, precision=options.precision,
        device=options.device, progress=False,
    )  # fmt: skip
    model = copy.deepcopy(_model(options.backbone, options.launch))
    case.method.prepare(model, STEPS)
    tracker = Silent()
    tracker.start()
    run = Training(model, case.method, TASK, data, settings, tracker, 0, None)
    if case.cast:
        hold_frozen_layers_in(run.model, torch.float32)
    if isinstance(case.method, IncreLoRA):
        grow_to(case.rank, case.method)
    narrow = options.launch and run.device.type == "cpu"
    return Arm(run, case.step, time.process_time if narrow else time.perf_counter)


def grow_to(rank: int, method: IncreLoRA) -> None:
    """Growths up to an average rank, by scores that are drawn: without training all are 0, and ties would pile up."""
    generator = torch.Generator().manual_seed(0)
    method.allocate(0)
    while method.total_rank < rank * len(method.linears):
        method.importance.update(torch.rand(len(method.linears), generator=generator))
        method.allocate(FIRST_GROWTH + INTERVAL * len(method.allocations))


def stand_before(step: int, method: Method) -> None:
    """Let the method take this step next, whatever it took before; its calls otherwise count the steps."""
    if isinstance(method, IncreLoRA):
        method.order.next, method.order.last = step, AFTER


# time


def timed(call: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a call, the GPU's work included."""
    _wait(device)
    started = clock()
    call()
    _wait(device)
    return clock() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_rounds(calls: Mapping[str, Callable[[], float]], repeats: int, warm_up: int) -> dict[str, list[float]]:
    """Seconds of every call by round: every round takes each once, every other round backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + repeats):
        for name in list(calls) if number % 2 else reversed(calls):
            taken = calls[name]()
            if number >= warm_up:
                seconds[name].append(taken)
    return seconds


def bare_loop(arm: Arm) -> float:
    """Seconds of the same step written out by hand: what any loop must do, and what the method asks of it."""
    run, method = arm.run, arm.run.method
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    batch = {
        "input_ids": torch.tensor(run.data.train.input_ids, device=run.device),
        "attention_mask": torch.ones(len(arm.indices), len(run.data.train.input_ids[0]), device=run.device).long(),
    }
    labels = torch.tensor(run.data.train.labels, device=run.device)

    def step() -> None:
        method.begin_step(arm.step)
        dtype = AUTOCAST[run.settings.precision]
        with torch.autocast(run.device.type, dtype, enabled=dtype is not None):
            logits = run.model(**batch).logits
        loss, penalty = nn.functional.cross_entropy(logits.float(), labels), method.extra_loss()
        (loss + penalty if isinstance(penalty, torch.Tensor) else loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        method.before_step(arm.step)
        run.optimizer.step()
        method.after_step(arm.step)
        run.optimizer.zero_grad()
        loss.item()

    stand_before(arm.step, method)
    run.model.train()
    return timed(step, run.device, arm.clock)


def through_peft(arm: Arm, options: argparse.Namespace) -> Callable[[], float]:
    """A call that takes the step of an arm of IncreLoRA by PEFT's tuner, on a model of its own, in a plain loop."""
    from peft import get_peft_model

    from increlora.integrations.peft import IncreLoraConfig, attach

    run, method = arm.run, arm.run.method
    config = IncreLoraConfig(
        target_r=method.target_rank, rank_step=method.rank_step, top_h=method.top_h, deltaT=method.interval,
        tinit=method.init_warmup, total_step=STEPS, target_modules=list(method.ranks()), seed=0,
    )  # fmt: skip
    model = get_peft_model(copy.deepcopy(_model(options.backbone, False)), config).to(run.device)
    for name, parameter in model.named_parameters():
        if re.fullmatch(method.head, name):
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    training = attach(model, optimizer)
    grow_to(sum(method.ranks().values()) // len(method.ranks()), training.method)
    parameters = [p for p in model.parameters() if p.requires_grad]
    batch = {
        "input_ids": torch.tensor(run.data.train.input_ids, device=run.device),
        "attention_mask": torch.ones(len(arm.indices), len(run.data.train.input_ids[0]), device=run.device).long(),
    }
    labels = torch.tensor(run.data.train.labels, device=run.device)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(**batch).logits.float(), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    def take() -> float:
        training.adapter.step = arm.step
        stand_before(arm.step, training.method)
        model.train()
        return timed(step, run.device, arm.clock)

    return take


def grow(arm: Arm) -> float:
    """Seconds that a growth of all matrices adds to a step."""
    method = arm.run.method
    grown = timed(lambda: method.allocate(DUE), arm.run.device)
    return grown - timed(lambda: method.allocate(DUE + 1), arm.run.device)


def merged(arm: Arm) -> nn.Module:
    """A copy of an arm's model with the update folded into its weights, which must be fp32 for that."""
    model, method = copy.deepcopy((arm.run.model, arm.run.method))
    model.float()
    method.merge(model)
    return model


def measure(options: argparse.Namespace, batch: int, length: int) -> dict[str, Any]:
    """Whole steps of one shape, evaluations of the same batch, and growths."""
    arms = {name: make_arm(name, options, batch, [length] * batch) for name in chosen(options)}
    run = arms["lora"].run
    evaluated = {"evaluation lora": run.model}
    if after := arms.get("increlora, after growth"):
        evaluated |= {"evaluation increlora": after.run.model, "evaluation increlora, merged": merged(after)}
    calls = {name: arm.take for name, arm in arms.items()}
    calls["bare lora"] = functools.partial(bare_loop, arms["lora"])
    if {"peft", "increlora"} <= set(options.methods) and options.precision == "fp32":
        for phase in PHASES:
            arm = arms[f"increlora, {phase}"]
            calls[f"bare increlora, {phase}"] = functools.partial(bare_loop, arm)
            calls[f"peft, {phase}"] = through_peft(arm, options)
    for name, model in evaluated.items():
        call = functools.partial(predict, model, run.data.train, TASK, run.settings)
        calls[name] = functools.partial(timed, call, run.device)
    seconds = in_rounds(calls, options.repeats, warm_up=2)
    growing = arms.get("increlora, scoring")
    growth = [grow(growing) for _ in range(3)] if growing else []
    return {"ratios": ratios(seconds, growth), "seconds": seconds, "growth": growth}


def ratio(seconds: Mapping[str, list[float]], a: str, b: str) -> float:
    """The median over rounds of a / b within a round."""
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


def ratios(seconds: Mapping[str, list[float]], growth: list[float]) -> dict[str, float]:
    """Every ratio that has a bar, and those of the other arms; a recipe's cost follows from its steps'."""
    found = {name: ratio(seconds, name, "lora") for name in seconds if name != "lora" and not name.startswith("bare")}
    if CAST in seconds:
        found |= {f"{name} / {CAST}": ratio(seconds, name, CAST) for name in seconds if name.startswith("increlora")}
    for phase in (phase for phase in PHASES if f"peft, {phase}" in seconds):
        found[f"peft, {phase} / increlora"] = ratio(seconds, f"peft, {phase}", f"bare increlora, {phase}")
    found["our loop / bare loop"] = ratio(seconds, "lora", "bare lora")
    if growth:
        phases = [found[f"increlora, {phase}"] for phase in PHASES]
        found |= {f"recipe {name}": over_recipe(name, *phases) for name in RECIPES}
        if CAST in seconds:
            found |= {f"recipe {name} / {CAST}": found[f"recipe {name}"] / found[CAST] for name in RECIPES}
        step = statistics.median(seconds["increlora, not scoring"])
        found["growth event / step"] = statistics.median(growth) / step
    return found


def over_recipe(name: str, scoring: float, idle: float, after: float) -> float:
    """The mean of a step's cost over a recipe, from those of its phases."""
    total, first, growths, interval = RECIPES[name]
    last = first + (growths - 1) * interval
    scored = min(GROWTH["scoring_window"], interval) * growths
    return (scored * scoring + (last - scored) * idle + (total - last) * after) / total


# operations


class CountOperations(TorchDispatchMode):
    """Counts the operations that touch data.

    Left out are views, by torch's own schemas (`OpOverload.is_view`: view, t, expand, split, select, detach, alias,
    lift_fresh, ...); `_unsafe_view`, a view whose schema does not say so; and what only reserves memory, the
    operations called empty, empty_like, new_empty and so on.
    """

    count = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple = (), keywords: dict | None = None
    ) -> Any:
        view = operation.is_view or operation is torch.ops.aten._unsafe_view.default
        self.count += not (view or "empty" in operation.name())
        return operation(*arguments, **(keywords or {}))


def operations(arm: Arm) -> int:
    """Those of a step's forward, penalty and backward, and of what the method makes of the gradients."""
    run = arm.run
    batch = to_device(collate(run.data.train, arm.indices, run.pad_id), run.device)
    run.model.train()
    stand_before(arm.step, run.method)
    run.method.begin_step(arm.step)
    with CountOperations() as counted:
        (run._loss_of(batch) + run.method.extra_loss()).backward()
        run.method.before_step(arm.step)
    run.optimizer.zero_grad()
    return counted.count


def measure_launch(options: argparse.Namespace, batch: int, length: int) -> dict[str, Any]:
    """Steps that are bound by launching operations, the operations, the tensors in the optimizer."""
    arms = {name: make_arm(name, options, batch, [length] * batch) for name in chosen(options)}
    seconds = in_rounds({name: arm.take for name, arm in arms.items()}, options.repeats, warm_up=5)
    growths = {name: len(arm.run.method.allocations) for name, arm in arms.items()}
    return {
        "ratios": {name: ratio(seconds, name, "lora") for name in arms if name != "lora"},
        "seconds": seconds,
        "operations": {name: operations(arm) for name, arm in arms.items()},
        "tensors": {name: sum(len(g["params"]) for g in arm.run.optimizer.param_groups) for name, arm in arms.items()},
        "growths": {name: number for name, number in growths.items() if number},
    }


# memory


def memory(options: argparse.Namespace, shape: str) -> dict[str, float]:
    """Peak memory in MB of two steps of every arm, each in a process of its own."""
    peaks = {}
    for name in chosen(options):
        command = [sys.executable, __file__, *sys.argv[1:], "--shapes", shape, "--memory-of", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[name] = float(done.stdout.splitlines()[-1])
    return peaks


def peak_of_two_steps(options: argparse.Namespace) -> float:
    """Peak memory of this process in MB (of the GPU, if it computes)."""
    batch, length = sizes(options.shapes[0])
    arm = make_arm(options.memory_of, options, batch, [length] * batch)
    arm.take(), arm.take()
    return peak_memory_mb(arm.run.device)


# GLUE's lengths


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


def examples_per_second(options: argparse.Namespace, batch: int) -> dict[str, float]:
    """Examples a second over a whole RTE recipe: ours on its lengths, the authors' arithmetic on 320 tokens each.

    Ours is measured on every tenth batch of an epoch, in order of length; a recipe's share of scoring steps
    and of steps before and after the end of growth weighs both.
    """
    lengths = lengths_of("rte", options.data / "RTE", options.tokenizer)
    batches = sorted(epoch_batches(lengths, batch, 41, 0), key=lambda indices: max(lengths[i] for i in indices))
    sample = batches[5::10]
    ours, theirs = [], []
    for phase in ("scoring", "not scoring", "after growth"):
        arm = make_arm(f"increlora, {phase}", options, batch, lengths)
        arm.take(sample[-1])
        ours.append(statistics.mean(arm.take(indices) for indices in sample))
    for phase in ("growing", "growing", "after growth"):  # theirs scores in every step of growth
        arm = make_arm(f"authors, {phase}", options, batch, [AUTHORS_LENGTH] * batch)
        arm.take()
        theirs.append(statistics.median(arm.take() for _ in range(3)))
    our_mean, their_mean = over_recipe("RTE r2", *ours), over_recipe("RTE r2", *theirs)
    return {"ours": batch / our_mean, "authors": batch / their_mean, "ratio": their_mean / our_mean}


# the command


def sizes(shape: str) -> tuple[int, int]:
    """Examples and tokens of 8x128."""
    batch, _, length = shape.partition("x")
    return int(batch), int(length)


def _shape(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text}: examples x tokens, e.g. 32x64")
    return text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="deberta_v3_base")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="lora is always among them")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", type=_shape, help="examples x tokens (8x128; --launch: 1x4)")
    parser.add_argument("--launch", action="store_true", help="narrow layers: the cost of launching operations")
    parser.add_argument("--precision", choices=AUTOCAST, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, help="rounds (7; --launch: 30)")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory of every arm out")
    parser.add_argument("--data", type=Path, help="folder of GLUE's TSV folders: adds the padding")
    parser.add_argument("--tokenizer", type=Path, help="folder with DeBERTaV3's spm.model")
    parser.add_argument("--json", type=Path, help="write everything here as JSON")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.shapes = options.shapes or ["1x4" if options.launch else "8x128"]
    options.repeats = options.repeats or (30 if options.launch else 7)
    options.methods = [name for name in METHODS if name == "lora" or name in options.methods]
    if options.launch and (options.data or len(options.shapes) > 1):
        parser.error("--launch measures one shape, and no data")
    return options


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for, as `increlora.analysis.benchmark_table` reads it."""
    kept = ("backbone", "methods", "rank", "precision", "device", "repeats")
    result: dict[str, Any] = {
        "measure": "launch" if options.launch else "steps",
        "about": machine.describe(sys.argv, options.device),
        "options": {key: getattr(options, key) for key in kept},
        "shapes": {},
    }
    for shape in options.shapes:
        of = (measure_launch if options.launch else measure)(options, *sizes(shape))
        gc.collect()  # the models hold themselves by their hooks; those of two shapes at once may not fit
        if not (options.no_memory or options.launch):
            of["memory"] = peaks = memory(options, shape)
            if "increlora, not scoring" in peaks:
                of["ratios"]["memory increlora, not scoring"] = peaks["increlora, not scoring"] / peaks["lora"]
        result["shapes"][shape] = of
    if options.data and options.tokenizer:
        result["padding"] = padding(options.data, options.tokenizer, 32)
        result["rte"] = examples_per_second(options, sizes(options.shapes[0])[0])
    return result


@config.guarded
def main() -> None:
    options = parse()
    if options.memory_of:
        print(peak_of_two_steps(options))
        return
    result = measured(options)
    if options.json:
        write_text(options.json, as_json(result, indent=1) + "\n")
    print(benchmark_table(result))


if __name__ == "__main__":
    main()
