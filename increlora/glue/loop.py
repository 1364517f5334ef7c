"""The one way of training anything here: the loop, one optimizer step, evaluation."""

import contextlib
import itertools
import logging
import math
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from increlora import distributed
from increlora.errors import Interrupted, UserError
from increlora.glue import checkpoint
from increlora.glue.batching import collate, epoch_batches, evaluation_batches
from increlora.glue.checkpoint import Checkpoints
from increlora.glue.stop_request import StopRequest
from increlora.glue.tasks import Split, Task, TaskData
from increlora.glue.tracker import Tracker
from increlora.method import Method
from increlora.schedule import multiplier
from increlora.streams import derive_seed
from increlora.validation import check_numbers

log = logging.getLogger(__name__)
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Settings:
    """How to train: the keys of `train` in configs/config.yaml, plus seed, precision and device.

    Args:
        learning_rate: peak of the schedule; it warms up over `warmup_steps`, then falls linearly to 0.
        weight_decay: of AdamW; not on biases and normalisation weights.
        batch_size: examples per optimizer step.
        eval_batch_size: examples at a time in evaluation; no score depends on it.
        accumulation: micro-batches that a batch is split into.
        epochs: passes over the training data.
        max_steps: optimizer steps after which a run ends at the latest.
        warmup_steps: of the learning rate; new parameters get a warmup of their own of this length.
        max_grad_norm: gradients are clipped to this norm over all parameters.
        eval_interval: optimizer steps between evaluations; the last step is always evaluated.
        log_interval: optimizer steps between log lines.
        checkpoint_interval: optimizer steps between checkpoints.
        max_skipped: non-finite steps in a row after which the run counts as diverged.
        precision: fp32, bf16 (autocast) or fp16 (autocast and loss scaling, GPU only).
        device: auto, cpu, cuda or cuda:<n>.
        progress: show a progress bar.
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
    checkpoint_interval: int = 100
    max_skipped: int = 20
    precision: str = "fp32"
    device: str = "auto"
    seed: int = 41
    progress: bool = True

    def __post_init__(self) -> None:
        if self.precision not in AUTOCAST:
            raise UserError(f"precision must be one of {', '.join(AUTOCAST)}, it is '{self.precision}'")
        check_numbers(self, "train")
        positive = ("epochs", "batch_size", "eval_batch_size", "accumulation", "eval_interval", "log_interval")
        for name in (*positive, "checkpoint_interval", "max_grad_norm", "max_skipped", "learning_rate", "max_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"train.{name} must be above 0, it is {value}")
        for name in ("weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} must not be negative, it is {getattr(self, name)}")
        if self.batch_size % (self.accumulation * distributed.processes()):
            raise UserError(
                f"train.accumulation ({self.accumulation}) times the processes ({distributed.processes()}) "
                f"must divide train.batch_size ({self.batch_size})"
            )
        if self.precision == "fp16" and self.torch_device.type != "cuda":
            raise UserError("precision=fp16 needs a GPU; on a CPU use precision=bf16 or fp32")

    @property
    def torch_device(self) -> torch.device:
        """The device to train on.

        Raises:
            UserError: a GPU is asked for and there is none.
        """
        if self.device == "auto" and not torch.cuda.is_available():
            return torch.device("cpu")
        if self.device in ("auto", "cuda") and torch.cuda.is_available():
            return torch.device("cuda", distributed.local_rank())
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UserError(f"device must be auto, cpu, cuda or cuda:<n>, it is '{self.device}'")
        device = torch.device(self.device)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"device={self.device} was asked for, but this machine has {torch.cuda.device_count()} GPUs. "
                "Use device=cpu or device=auto."
            )
        return device

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of a run on this many training examples."""
        steps = math.ceil(self.epochs * math.ceil(examples / self.batch_size))
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass
class Evaluation:
    """One point of the curve: what an evaluation measured, and the model it measured."""

    step: int
    epoch: float
    scores: dict[str, dict[str, float]]  # split -> metric -> value; the metric "score" is the primary one
    ranks: dict[str, int]
    parameters: dict[str, int]
    seconds: float
    orthogonal_penalty: float | None = None  # unweighted; None where the method has none


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
        return best(self.curve, split)


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
    """Task loss (mean over the batch), gradient norm before clipping, and whether the step was taken.

    `stop` says whether any process was asked to stop.
    """

    loss: float
    gradient_norm: float
    taken: bool
    stop: bool = False


def take_step(
    step: int,
    micro_batches: list[Any],
    loss_of: Callable[[Any], Tensor],
    method: Method,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    scaler: torch.amp.GradScaler,
    stop: bool = False,
) -> StepReport:
    """Forward, backward, clip, grow, update: one optimizer step, or none if its gradient is not finite.

    Args:
        step: optimizer steps already taken.
        micro_batches: equally large parts of this process's share of the batch.
        loss_of: mean task loss of a micro-batch.
        stop: whether this process was asked to stop; passed on to all.
    """
    method.begin_step(step, len(micro_batches), scaler.get_scale())
    losses = []
    for index, micro_batch in enumerate(micro_batches):
        task_loss = loss_of(micro_batch) / len(micro_batches)
        losses.append(task_loss.detach())
        scaler.scale(task_loss + method.extra_loss() if index == 0 else task_loss).backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    distributed.average_gradients(parameters)
    loss = sum(value.item() for value in losses)  # only now: a GPU is not to be waited for in between
    loss, stopping = distributed.mean(torch.tensor([loss, float(stop)], dtype=torch.float64)).tolist()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item()
    taken = math.isfinite(norm) and math.isfinite(loss)
    if taken:
        for group in method.before_step(step):
            optimizer.add_param_group(_group(group, settings, born=step + 1))
        scaler.step(optimizer)
        method.after_step(step)
    scaler.update()
    optimizer.zero_grad()
    return StepReport(loss, norm, taken, stopping > 0)


# the loop


def train(
    model: nn.Module,
    method: Method,
    task: Task,
    data: TaskData,
    settings: Settings,
    tracker: Tracker,
    pad_id: int = 0,
    checkpoints: Checkpoints | None = None,
    state: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train `model` with `method` on `task`, evaluating every `eval_interval` steps.

    Args:
        model: a sequence classifier as the backbone gives it, prepared by `method`.
        method: prepared for `settings.total_steps(len(data.train))` steps.
        data: the tokenised splits.
        tracker: started.
        pad_id: token id for padding.
        checkpoints: where to keep what is needed to continue; None keeps nothing.
        state: a checkpoint to continue from.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
    """
    return Training(model, method, task, data, settings, tracker, pad_id, checkpoints).run(state)


class Training:
    """One run: what it consists of and where it stands; the arguments are those of `train`."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        task: Task,
        data: TaskData,
        settings: Settings,
        tracker: Tracker,
        pad_id: int,
        checkpoints: Checkpoints | None,
    ):
        self.model, self.method, self.task, self.data = model, method, task, data
        self.settings, self.tracker, self.pad_id, self.checkpoints = settings, tracker, pad_id, checkpoints
        self.device = settings.torch_device
        self.total_steps = settings.total_steps(len(data.train))
        self.lengths = data.train.lengths
        self.primary = next(iter(data.evaluation))
        torch.manual_seed(derive_seed(settings.seed, "dropout", distributed.rank()))
        self.start_ranks = method.ranks()
        model.to(self.device)
        self.optimizer = make_optimizer(model, method, settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.progress = Progress()
        self.started = time.perf_counter()

    def run(self, state: Mapping[str, Any] | None) -> Outcome:
        """The loop, from the start or from a checkpoint."""
        if state is not None:
            self.load_state_dict(state)
        progress, settings = self.progress, self.settings
        batches = self._batches(progress.position)
        shown = settings.progress and distributed.is_main()
        bar = tqdm(total=self.total_steps, initial=progress.step, disable=not shown, dynamic_ncols=True)
        with bar, StopRequest() as request:
            while progress.step < self.total_steps and progress.skipped_in_a_row < settings.max_skipped:
                report = self._step(next(batches), bool(request.signal))
                if report.taken:
                    bar.update()
                    self._show(bar, report)
                # several processes must agree, and do so in the next step
                if report.stop or (request.signal and distributed.processes() == 1):
                    self._interrupt(request.signal or signal.SIGTERM)
        if progress.step < self.total_steps and not (progress.curve and progress.curve[-1].step == progress.step):
            self._evaluate()  # diverged: the steps left out changed nothing, so there is a model with a score
        return self._outcome()

    def _step(self, indices: list[int], stop: bool) -> StepReport:
        """One batch: train, count, evaluate, log, save."""
        progress, method, settings = self.progress, self.method, self.settings
        set_learning_rates(self.optimizer, progress.step, self.total_steps, settings)
        self.model.train()
        mine = self._parts(indices)[distributed.rank()]
        micro_batches = [_to(self.device, collate(self.data.train, part, self.pad_id)) for part in mine]
        allocations = len(method.allocations)
        report = take_step(
            progress.step, micro_batches, self._loss_of, method, self.optimizer, settings, self.scaler, stop
        )
        self._count(report, indices)
        if report.taken:
            values = self._training_values(report)
            if progress.step % settings.eval_interval == 0 or progress.step == self.total_steps:
                values |= self._evaluate()
            self.tracker.log(progress.step, values, method.ranks() if len(method.allocations) > allocations else None)
            if progress.step % settings.checkpoint_interval == 0:
                self._save()
        return report

    def _loss_of(self, batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")
        with _autocast(self.settings):
            logits = self.model(**batch).logits
        return self.task.loss(logits, labels)

    def _batches(self, position: int) -> Iterator[list[int]]:
        """The batches of the run from the given position on; a function of (lengths, seed, position) alone."""
        per_epoch = math.ceil(len(self.lengths) / self.settings.batch_size)
        for epoch in itertools.count(position // per_epoch):
            batches = epoch_batches(self.lengths, self.settings.batch_size, self.settings.seed, epoch)
            yield from batches[position % per_epoch :]
            position = 0

    def _parts(self, indices: list[int]) -> list[list[list[int]]]:
        """The batch by process and micro-batch; neighbours in length go to different processes."""
        processes = distributed.processes()
        size = self.settings.batch_size // (self.settings.accumulation * processes)
        shares = [indices[rank::processes] for rank in range(processes)]
        return [[share[i : i + size] for i in range(0, len(share), size)] for share in shares]

    def _count(self, report: StepReport, indices: list[int]) -> None:
        progress = self.progress
        progress.position += 1
        progress.step += report.taken
        progress.skipped += not report.taken
        progress.skipped_in_a_row = 0 if report.taken else progress.skipped_in_a_row + 1
        parts = [[self.lengths[i] for i in part] for share in self._parts(indices) for part in share]
        progress.tokens += sum(map(sum, parts))
        progress.padded_tokens += sum(len(part) * max(part) - sum(part) for part in parts)

    def _training_values(self, report: StepReport) -> dict[str, float]:
        if self.progress.step % self.settings.log_interval:
            return {}
        values = {
            "train/loss": report.loss,
            "train/gradient_norm": report.gradient_norm,
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
            "train/skipped_steps": float(self.progress.skipped),
        }
        return values | self.method.metrics()

    def _evaluate(self) -> dict[str, float]:
        """Add a point to the curve, keep the weights if it is the best; returns it by tracker key."""
        progress, method = self.progress, self.method
        if any(ranks != method.ranks() for ranks in distributed.gather(method.ranks())):
            raise UserError("the processes disagree about the ranks; please report this with your configuration")
        scores = evaluate(self.model, self.task, self.data, self.settings, self.pad_id)
        epoch = progress.position * self.settings.batch_size / len(self.lengths)
        parameters = method.parameters_by_kind(self.model)
        penalty = method.metrics().get("train/orthogonal_penalty")
        progress.curve.append(
            Evaluation(progress.step, epoch, scores, method.ranks(), parameters, self._seconds(), penalty)
        )
        if self.checkpoints and distributed.is_main() and best(progress.curve, self.primary) is progress.curve[-1]:
            self.checkpoints.keep("best", checkpoint.model_state(self.model, method))
        return {
            f"eval/{metric}" if split == self.primary else f"eval/{split}/{metric}": value
            for split, metrics in scores.items()
            for metric, value in metrics.items()
        }

    def _show(self, bar: tqdm, report: StepReport) -> None:
        shown = {"loss": f"{report.loss:.3f}"}
        if self.progress.curve:
            shown["score"] = f"{self.progress.curve[-1].scores[self.primary]['score']:.4f}"
        if ranks := self.method.ranks():
            shown["rank"] = str(sum(ranks.values()))
        bar.set_postfix(shown, refresh=False)

    def _seconds(self) -> float:
        """Seconds of training so far, over all sessions of the run."""
        return self.progress.seconds + time.perf_counter() - self.started

    def _outcome(self) -> Outcome:
        progress = self.progress
        cost = {
            "seconds": self._seconds(),
            "steps": progress.step,
            "steps_per_second": progress.step / max(self._seconds(), 1e-9),
            "peak_memory_mb": peak_memory_mb(self.device),
            "tokens": progress.tokens,
            "padded_tokens": progress.padded_tokens,
        }
        if self.checkpoints and distributed.is_main():
            self.checkpoints.keep("last", checkpoint.model_state(self.model, self.method))
        status = "finished" if progress.step == self.total_steps else "diverged"
        allocations = [asdict(allocation) for allocation in self.method.allocations]
        return Outcome(status, self.start_ranks, progress.curve, allocations, cost, progress.skipped)

    # stop and continue

    def state_dict(self) -> dict[str, Any]:
        """Everything a later process needs to go on as if nothing had happened."""
        return {
            "progress": asdict(self.progress) | {"seconds": self._seconds()},
            "model": checkpoint.model_state(self.model, self.method),
            "optimizer": checkpoint.optimizer_state(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "random": distributed.gather(checkpoint.random_state()),
            "tracker": self.tracker.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where `state_dict` was called."""
        curve = [Evaluation(**point) for point in state["progress"]["curve"]]
        self.progress = Progress(**{**state["progress"], "curve": curve})
        checkpoint.load_model_state(self.model, self.method, state["model"])
        self.model.to(self.device)
        checkpoint.load_optimizer_state(self.optimizer, self.model, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        checkpoint.load_random_state(state["random"][distributed.rank()])

    def _save(self) -> None:
        if self.checkpoints:
            state = self.state_dict()  # every process takes part
            if distributed.is_main():
                self.checkpoints.save(state)

    def _interrupt(self, number: int) -> None:
        self._save()
        kept = "the same command continues from there" if self.checkpoints else "nothing was kept"
        raise Interrupted(f"stopped after step {self.progress.step} of {self.total_steps}; {kept}", number)


def best(curve: list[Evaluation], split: str) -> Evaluation | None:
    """The evaluation with the highest primary score on a split, the earliest of equals."""
    return max(curve, key=lambda evaluation: evaluation.scores[split]["score"], default=None)


def peak_memory_mb(device: torch.device) -> float:
    """The most memory that this process has held so far, in MB: of the GPU, or resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what a large parent held when it forked
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# evaluation


def predict(model: nn.Module, split: Split, task: Task, settings: Settings, pad_id: int = 0) -> tuple[Tensor, float]:
    """Predictions for a split in its own order, (examples,), and the mean task loss over it.

    The batches are shared out over the processes; every process gets all predictions.
    """
    device = settings.torch_device
    predictions: dict[int, Any] = {}
    total_loss = 0.0
    batches = evaluation_batches(split.lengths, settings.eval_batch_size)
    model.eval()
    with torch.inference_mode(), _autocast(settings):
        for indices in batches[distributed.rank() :: distributed.processes()]:
            batch = _to(device, collate(split, indices, pad_id))
            labels = batch.pop("labels")
            logits = model(**batch).logits
            total_loss += task.loss(logits, labels).item() * len(indices)
            predictions |= dict(zip(indices, task.predict(logits).tolist(), strict=True))
    shares, losses = zip(*distributed.gather((predictions, total_loss)), strict=True)
    predictions = {index: value for share in shares for index, value in share.items()}
    return torch.tensor([predictions[i] for i in range(len(split))]), sum(losses) / len(split)


def evaluate(
    model: nn.Module, task: Task, data: TaskData, settings: Settings, pad_id: int = 0
) -> dict[str, dict[str, float]]:
    """Every metric of the task and the mean loss on every evaluation split."""
    scores = {}
    for name, split in data.evaluation.items():
        predictions, loss = predict(model, split, task, settings, pad_id)
        scores[name] = task.evaluate(predictions.tolist(), split.labels) | {"loss": loss}
    return scores


def _autocast(settings: Settings) -> contextlib.AbstractContextManager:
    dtype = AUTOCAST[settings.precision]
    return torch.autocast(settings.torch_device.type, dtype) if dtype else contextlib.nullcontext()


def _to(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
