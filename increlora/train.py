"""The one way of training anything here: the loop, one optimizer step, evaluation."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from increlora.batching import collate, epoch_batches, evaluation_batches
from increlora.errors import UserError
from increlora.method import Method
from increlora.schedule import multiplier
from increlora.streams import derive_seed
from increlora.tasks import Split, Task, TaskData
from increlora.tracker import Tracker

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Settings:
    """How to train: the keys of `train` in configs/config.yaml, plus seed, precision and device.

    Args:
        learning_rate: peak of the schedule; it warms up over `warmup_steps`, then falls linearly to 0.
        weight_decay: of AdamW; not on biases and normalisation weights.
        batch_size: examples per optimizer step, split into `accumulation` micro-batches.
        epochs: passes over the training data; `max_steps` cuts them short.
        max_grad_norm: gradients are clipped to this norm over all parameters.
        eval_interval: optimizer steps between evaluations; the last step is always evaluated.
        log_interval: optimizer steps between log lines.
        max_skipped: non-finite steps in a row after which the run counts as diverged.
        precision: fp32, bf16 (autocast) or fp16 (autocast and loss scaling, GPU only).
        device: auto, cpu, cuda or cuda:<n>.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 32
    eval_batch_size: int = 64
    accumulation: int = 1
    epochs: float = 5
    max_steps: int | None = None
    warmup_steps: int = 100
    max_grad_norm: float = 1.0
    eval_interval: int = 100
    log_interval: int = 10
    max_skipped: int = 20
    precision: str = "fp32"
    device: str = "auto"
    seed: int = 41
    progress: bool = True

    def __post_init__(self) -> None:
        if self.precision not in AUTOCAST:
            raise UserError(f"precision must be one of {', '.join(AUTOCAST)}, it is '{self.precision}'")
        if self.batch_size < 1 or self.accumulation < 1 or self.batch_size % self.accumulation:
            raise UserError(
                f"train.accumulation ({self.accumulation}) must divide train.batch_size ({self.batch_size})"
            )
        for name in (
            "epochs",
            "eval_interval",
            "log_interval",
            "eval_batch_size",
            "max_grad_norm",
            "max_skipped",
        ):
            if getattr(self, name) <= 0:
                raise UserError(f"train.{name} must be above 0, it is {getattr(self, name)}")
        if self.precision == "fp16" and self.torch_device.type != "cuda":
            raise UserError("precision=fp16 needs a GPU; on a CPU use precision=bf16 or fp32")

    @property
    def torch_device(self) -> torch.device:
        """The device to train on.

        Raises:
            UserError: a GPU is asked for and there is none.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise UserError(f"device must be auto, cpu, cuda or cuda:<n>, it is '{self.device}'") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"device={self.device} was asked for, but this machine has {torch.cuda.device_count()} GPUs. "
                "Use device=cpu or device=auto."
            )
        return device

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of a run on this many training examples."""
        steps = math.ceil(self.epochs * math.ceil(examples / self.batch_size))
        return min(steps, self.max_steps) if self.max_steps else steps


@dataclass
class Evaluation:
    """One point of the curve: what an evaluation measured, and the model it measured."""

    step: int
    epoch: float
    scores: dict[str, dict[str, float]]  # split -> metric -> value; the metric "score" is the primary one
    ranks: dict[str, int]
    parameters: dict[str, int]
    seconds: float


@dataclass
class Outcome:
    """What a training run produced; `status` is `finished` or `diverged`."""

    status: str
    start_ranks: dict[str, int]
    curve: list[Evaluation]
    allocations: list[dict[str, Any]]
    cost: dict[str, float]
    skipped_steps: int

    def best(self, split: str) -> Evaluation | None:
        """The evaluation with the highest primary score on `split`, the earliest of equals."""
        return max(self.curve, key=lambda evaluation: evaluation.scores[split]["score"], default=None)


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # optimizer steps taken
    position: int = 0  # batches drawn
    skipped: int = 0  # non-finite steps
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    tokens: int = 0
    padded_tokens: int = 0
    curve: list[Evaluation] = field(default_factory=list)


# one optimizer step


def make_optimizer(model: nn.Module, method: Method, settings: Settings) -> torch.optim.AdamW:
    """AdamW over the method's groups; each carries `born` and the names of its parameters."""
    groups = [_group(group, settings) for group in method.param_groups(model)]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)


def _group(group: dict[str, Any], settings: Settings, born: int = 0) -> dict[str, Any]:
    decay = settings.weight_decay if group["decay"] else 0.0
    return {"born": born, "lr": 0.0, **group, "weight_decay": decay}


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, total_steps: int, settings: Settings) -> None:
    """Write the learning rate of this step into every group."""
    for group in optimizer.param_groups:
        factor = multiplier(step, group["born"], total_steps, settings.warmup_steps)
        group["lr"] = settings.learning_rate * factor


@dataclass
class StepReport:
    """Task loss (mean over the batch), gradient norm before clipping, and whether the step was taken."""

    loss: float
    gradient_norm: float
    taken: bool


def take_step(
    step: int,
    micro_batches: list[Any],
    loss_of: Callable[[Any], Tensor],
    method: Method,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    scaler: torch.amp.GradScaler,
) -> StepReport:
    """Forward, backward, clip, grow, update: one optimizer step, or none if its gradient is not finite.

    Args:
        step: optimizer steps already taken.
        micro_batches: equally large parts of the batch.
        loss_of: mean task loss of a micro-batch.
    """
    method.begin_step(step, len(micro_batches), scaler.get_scale())
    loss = 0.0
    for index, micro_batch in enumerate(micro_batches):
        task_loss = loss_of(micro_batch) / len(micro_batches)
        loss += task_loss.item()
        scaler.scale(task_loss + method.extra_loss() if index == 0 else task_loss).backward()
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item()
    taken = math.isfinite(norm) and math.isfinite(loss)
    if taken:
        for group in method.before_step(step):
            optimizer.add_param_group(_group(group, settings, born=step + 1))
        scaler.step(optimizer)
        method.after_step(step)
    scaler.update()
    optimizer.zero_grad()
    return StepReport(loss, norm, taken)


# the loop


def train(
    model: nn.Module,
    method: Method,
    task: Task,
    data: TaskData,
    settings: Settings,
    tracker: Tracker,
    pad_id: int = 0,
) -> Outcome:
    """Train `model` with `method` on `task`, evaluating every `eval_interval` steps.

    Args:
        model: a sequence classifier as the backbone gives it; it is changed in place.
        method: not yet prepared.
        data: the tokenised splits.
        pad_id: token id for padding.
    """
    device, total_steps = settings.torch_device, settings.total_steps(len(data.train))
    torch.manual_seed(derive_seed(settings.seed, "dropout"))
    method.prepare(model, total_steps)
    model.to(device)
    optimizer = make_optimizer(model, method, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    start_ranks, progress = method.ranks(), Progress()
    batches = _batches(data.train, settings, progress.position)

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")
        with _autocast(settings):
            logits = model(**batch).logits
        return task.loss(logits, labels)

    bar = tqdm(total=total_steps, initial=progress.step, disable=not settings.progress, dynamic_ncols=True)
    started = time.perf_counter()
    while progress.step < total_steps and progress.skipped_in_a_row < settings.max_skipped:
        set_learning_rates(optimizer, progress.step, total_steps, settings)
        model.train()
        indices = next(batches)
        parts = [collate(data.train, part, pad_id) for part in _split(indices, settings)]
        micro_batches = [_to(device, part) for part in parts]
        allocations = len(method.allocations)
        report = take_step(progress.step, micro_batches, loss_of, method, optimizer, settings, scaler)
        _count(progress, report, parts)
        if not report.taken:
            continue
        bar.update()
        values = _training_values(progress, report, method, optimizer, settings)
        if progress.step % settings.eval_interval == 0 or progress.step == total_steps:
            values |= _evaluate_now(model, method, task, data, settings, progress, pad_id, started)
            model.zero_grad()
        grown = method.allocations[allocations:]
        tracker.log(progress.step, values, method.ranks() if grown else None)
        _show(bar, report, progress, method)
    bar.close()
    progress.seconds = time.perf_counter() - started
    return _outcome(progress, start_ranks, total_steps, method, device)


def _batches(train_split: Split, settings: Settings, position: int) -> Iterator[list[int]]:
    """The batches of the run from the given position on; a function of (lengths, seed, position) alone."""
    per_epoch = math.ceil(len(train_split) / settings.batch_size)
    for epoch in itertools.count(position // per_epoch):
        batches = epoch_batches(train_split.lengths, settings.batch_size, settings.seed, epoch)
        yield from batches[position % per_epoch :]
        position = 0


def _split(indices: list[int], settings: Settings) -> list[list[int]]:
    size = settings.batch_size // settings.accumulation
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _count(progress: Progress, report: StepReport, micro_batches: list[dict[str, Tensor]]) -> None:
    progress.position += 1
    progress.step += report.taken
    progress.skipped += not report.taken
    progress.skipped_in_a_row = 0 if report.taken else progress.skipped_in_a_row + 1
    masks = [batch["attention_mask"] for batch in micro_batches]
    real = sum(int(mask.sum()) for mask in masks)
    progress.tokens += real
    progress.padded_tokens += sum(mask.numel() for mask in masks) - real


def _training_values(
    progress: Progress,
    report: StepReport,
    method: Method,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
) -> dict[str, float]:
    if progress.step % settings.log_interval:
        return {}
    values = {
        "train/loss": report.loss,
        "train/gradient_norm": report.gradient_norm,
        "train/learning_rate": optimizer.param_groups[0]["lr"],
        "train/skipped_steps": float(progress.skipped),
    }
    return values | method.metrics()


def _show(bar: tqdm, report: StepReport, progress: Progress, method: Method) -> None:
    shown = {"loss": f"{report.loss:.3f}"}
    if progress.curve:
        shown["score"] = f"{next(iter(progress.curve[-1].scores.values()))['score']:.4f}"
    if ranks := method.ranks():
        shown["rank"] = str(sum(ranks.values()))
    bar.set_postfix(shown, refresh=False)


def _outcome(
    progress: Progress, start_ranks: dict[str, int], total_steps: int, method: Method, device: torch.device
) -> Outcome:
    cost = {
        "seconds": progress.seconds,
        "steps": progress.step,
        "steps_per_second": progress.step / max(progress.seconds, 1e-9),
        "peak_memory_mb": _peak_memory_mb(device),
        "tokens": progress.tokens,
        "padded_tokens": progress.padded_tokens,
    }
    status = "finished" if progress.step == total_steps else "diverged"
    allocations = [asdict(allocation) for allocation in method.allocations]
    return Outcome(status, start_ranks, progress.curve, allocations, cost, progress.skipped)


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# evaluation


def predict(model: nn.Module, split: Split, task: Task, settings: Settings, pad_id: int = 0) -> tuple[Tensor, float]:
    """Predictions for a split in its own order, (examples,), and the mean task loss over it."""
    device = settings.torch_device
    predictions: dict[int, Any] = {}
    total_loss = 0.0
    model.eval()
    with torch.inference_mode(), _autocast(settings):
        for indices in evaluation_batches(split.lengths, settings.eval_batch_size):
            batch = _to(device, collate(split, indices, pad_id))
            labels = batch.pop("labels")
            logits = model(**batch).logits
            total_loss += task.loss(logits, labels).item() * len(indices)
            predictions |= dict(zip(indices, task.predict(logits).tolist(), strict=True))
    return torch.tensor([predictions[i] for i in range(len(split))]), total_loss / len(split)


def evaluate(
    model: nn.Module, task: Task, data: TaskData, settings: Settings, pad_id: int = 0
) -> dict[str, dict[str, float]]:
    """Every metric of the task and the mean loss on every evaluation split."""
    scores = {}
    for name, split in data.evaluation.items():
        predictions, loss = predict(model, split, task, settings, pad_id)
        scores[name] = task.evaluate(predictions.tolist(), split.labels) | {"loss": loss}
    return scores


def _evaluate_now(
    model: nn.Module,
    method: Method,
    task: Task,
    data: TaskData,
    settings: Settings,
    progress: Progress,
    pad_id: int,
    started: float,
) -> dict[str, float]:
    """Add a point to the curve; returns it by tracker key."""
    scores = evaluate(model, task, data, settings, pad_id)
    epoch = progress.position * settings.batch_size / len(data.train)
    parameters = method.parameters_by_kind(model)
    seconds = time.perf_counter() - started
    progress.curve.append(Evaluation(progress.step, epoch, scores, method.ranks(), parameters, seconds))
    primary = next(iter(scores))
    return {
        f"eval/{metric}" if split == primary else f"eval/{split}/{metric}": value
        for split, metrics in scores.items()
        for metric, value in metrics.items()
    }


def _autocast(settings: Settings) -> contextlib.AbstractContextManager:
    dtype = AUTOCAST[settings.precision]
    return torch.autocast(settings.torch_device.type, dtype) if dtype else contextlib.nullcontext()


def _to(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
