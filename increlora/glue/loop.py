"""The training loop of the benchmark, for every method, and one optimizer step."""

import itertools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from increlora import distributed, groups, surgery
from increlora.errors import Interrupted, UserError
from increlora.glue import checkpoint
from increlora.glue.batching import collate, epoch_batches, to_device
from increlora.glue.checkpoint import Checkpoints
from increlora.glue.evaluate import Evaluation, best, evaluate
from increlora.glue.settings import Settings
from increlora.glue.stop_request import StopRequest
from increlora.glue.tasks import Task, TaskData
from increlora.glue.tracker import Tracker
from increlora.method import Method
from increlora.streams import derive_seed

log = logging.getLogger(__name__)
CHECKPOINT_SHARE = 0.01  # of a run's time; large models on slow disks keep checkpoints less often


@dataclass
class Outcome:
    """What a training run produced; `status` is `finished` or `diverged`."""

    status: str
    start_ranks: dict[str, int]
    curve: list[Evaluation]
    allocations: list[dict[str, Any]]
    cost: dict[str, float | None]
    skipped_steps: int

    def best(self, split: str) -> Evaluation | None:
        """The evaluation with the highest primary score on `split`, the earliest of equals."""
        return best(self.curve, split)


@dataclass
class Progress:
    """How far a run has come."""

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
    """AdamW over the method's groups."""
    parameters = groups.parameter_groups(method, model, settings.weight_decay)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, fused=True)
    groups.adopt(optimizer, method, model)
    return optimizer


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
    scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if settings.max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, settings.max_grad_norm, norm)
    # one reading for all three values, because every reading waits for the GPU
    told = torch.stack([torch.stack(losses).sum(), norm, norm.new_full((), float(stop))])
    loss, gradient_norm, stopping = distributed.mean(told).tolist()
    taken = math.isfinite(gradient_norm) and math.isfinite(loss)
    if taken:
        method.before_step(step)
        scaler.step(optimizer)
        method.after_step(step)
    scaler.update()
    optimizer.zero_grad()
    return StepReport(loss, gradient_norm, taken, stopping > 0)


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
    """One run: its parts and its progress; the arguments are those of `train`."""

    begun = False  # whether there was a run in this process

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
        # main memory has only a peak of the whole process, which after another run in it may be the other one's
        self.measures_memory = self.device.type == "cuda" or not Training.begun
        Training.begun = True
        torch.manual_seed(derive_seed(settings.seed, "dropout", distributed.rank()))
        self.start_ranks = method.ranks()
        model.to(self.device)
        if self.device.type == "cuda":  # after the first use of the GPU, without which torch has no statistics
            torch.cuda.reset_peak_memory_stats(self.device)
        if settings.autocast_dtype is not None:
            surgery.hold_frozen_layers_in(model, settings.autocast_dtype)
        self.optimizer = make_optimizer(model, method, settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.progress = Progress()
        self.started = time.perf_counter()
        self.saving = 0.0  # seconds that checkpoints took in this session

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
                # several processes must stop together: `report.stop` tells all of them in the next step
                if report.stop or (request.signal and distributed.processes() == 1):
                    self._interrupt(request.signal or signal.SIGTERM)
        if progress.step < self.total_steps and not (progress.curve and progress.curve[-1].step == progress.step):
            self._evaluate()  # diverged: skipped steps changed nothing, so the model still has a score
        return self._outcome()

    def _step(self, indices: list[int], stop: bool) -> StepReport:
        """One batch: train, count, evaluate, log, save."""
        progress, method, settings = self.progress, self.method, self.settings
        groups.set_learning_rates(self.optimizer, progress.step, self.total_steps, settings.warmup_steps)
        if settings.adamw == "authors":
            groups.set_epsilon_before_correction(self.optimizer, progress.step)
        self.model.train()
        mine = self._parts(indices)[distributed.rank()]
        micro_batches = [to_device(collate(self.data.train, part, self.pad_id), self.device) for part in mine]
        allocations = len(method.allocations)
        report = take_step(
            progress.step, micro_batches, self._loss_of, method, self.optimizer, settings, self.scaler, stop
        )
        self._count(report, indices)
        if report.taken:
            values = self._training_values(report)
            evaluated = progress.step % settings.eval_interval == 0 or progress.step == self.total_steps
            grown = len(method.allocations) > allocations
            if evaluated:
                values |= self._evaluate()
            if evaluated or grown:  # every matrix has a value of its own: too much for every log line of a long run
                values |= method.matrix_metrics()
            self.tracker.log(progress.step, values, method.ranks() if grown else None)
            if progress.step % settings.checkpoint_interval == 0 and self._may_save():
                self._save()
        return report

    def _loss_of(self, batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")
        with self.settings.autocast():
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
        penalties = [method.orthogonal_penalties().get(part) for part in ("all", "active", "reserve")]
        progress.curve.append(
            Evaluation(progress.step, epoch, scores, method.ranks(), parameters, self._seconds(), *penalties)
        )
        if self.checkpoints and distributed.is_main() and best(progress.curve, self.primary) is progress.curve[-1]:
            self.checkpoints.keep("best", checkpoint.model_state(self.model, method), progress.step)
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
            "peak_memory_mb": peak_memory_mb(self.device) if self.measures_memory else None,
            "tokens": progress.tokens,
            "padded_tokens": progress.padded_tokens,
        }
        if self.checkpoints and distributed.is_main():
            self.checkpoints.keep("last", checkpoint.model_state(self.model, self.method), progress.step)
        status = "finished" if progress.step == self.total_steps else "diverged"
        allocations = [asdict(allocation) for allocation in self.method.allocations]
        return Outcome(status, self.start_ranks, progress.curve, allocations, cost, progress.skipped)

    # stop and continue

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later process needs to continue exactly."""
        return {
            "progress": asdict(self.progress) | {"seconds": self._seconds()},
            "model": checkpoint.model_state(self.model, self.method),
            "optimizer": groups.state(self.optimizer),
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
        groups.load_state(self.optimizer, self.model, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        checkpoint.load_random_state(state["random"][distributed.rank()])

    def _may_save(self) -> bool:
        """Whether checkpoints take less than their share of the time so far; the first second is free."""
        passed = time.perf_counter() - self.started
        return distributed.gather(self.saving <= 1 + CHECKPOINT_SHARE * passed)[0]

    def _save(self) -> None:
        if self.checkpoints:
            begun = time.perf_counter()
            state = self.state_dict()  # every process takes part
            if distributed.is_main():
                self.checkpoints.save(state)
            self.saving += time.perf_counter() - begun

    def _interrupt(self, number: int) -> None:
        self._save()
        kept = "the same command continues from there" if self.checkpoints else "nothing was kept"
        raise Interrupted(f"stopped after step {self.progress.step} of {self.total_steps}; {kept}", number)


def peak_memory_mb(device: torch.device) -> float:
    """The most memory that this process has held so far, in MB: of the GPU since a run began, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what a large parent held when it forked
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
