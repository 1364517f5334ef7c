"""How to train: steps, rates, batches, precision and device; settings that cannot work are refused."""

import contextlib
import functools
import logging
import math
import re
from dataclasses import dataclass

import torch

from increlora import distributed
from increlora.errors import UserError
from increlora.validation import check_numbers

log = logging.getLogger(__name__)

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Settings:
    """How to train: the keys of `train` in configs/config.yaml, plus seed, precision and device.

    Args:
        learning_rate: peak of the schedule; it warms up over `warmup_steps`, then falls linearly to 0.
        adamw: torch, or authors: epsilon is added before the bias of the second moment is corrected (configs/compat).
        weight_decay: of AdamW; not on biases and normalisation weights.
        batch_size: examples per optimizer step.
        eval_batch_size: examples at a time in evaluation; no score depends on it.
        accumulation: micro-batches that a batch is split into.
        epochs: passes over the training data.
        max_steps: optimizer steps after which a run ends at the latest.
        warmup_steps: of the learning rate; new parameters get a warmup of their own of this length.
        max_grad_norm: gradients are clipped to this norm over all parameters; None: they are not clipped.
        eval_interval: optimizer steps between evaluations; the last step is always evaluated.
        log_interval: optimizer steps between log lines.
        checkpoint_interval: optimizer steps between checkpoints; more if they took over 1 % of the time.
        max_skipped: non-finite steps in a row after which the run counts as diverged.
        precision: fp32, bf16 (autocast) or fp16 (autocast and loss scaling, GPU only).
        device: auto, cpu, cuda or cuda:<n>.
        progress: show a progress bar.
    """

    learning_rate: float = 1e-3
    adamw: str = "torch"
    weight_decay: float = 0.0
    batch_size: int = 32
    eval_batch_size: int = 64
    accumulation: int = 1
    epochs: float = 5
    max_steps: int | None = None
    warmup_steps: int = 100
    max_grad_norm: float | None = 1.0
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
        if self.adamw not in ("torch", "authors"):
            raise UserError(f"`adamw` must be torch or authors, it is '{self.adamw}'")
        check_numbers(self)
        positive = ("epochs", "batch_size", "eval_batch_size", "accumulation", "eval_interval", "log_interval")
        for name in (*positive, "checkpoint_interval", "max_grad_norm", "max_skipped", "learning_rate", "max_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                origin = " (train.warmup_steps, if nothing else is given)" if name == "eval_interval" else ""
                raise UserError(f"`{name}` must be above 0, it is {value}{origin}")
        for name in ("weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"`{name}` must not be negative, it is {getattr(self, name)}")
        if self.batch_size % (self.accumulation * distributed.processes()):
            raise UserError(
                f"`accumulation` ({self.accumulation}) times the processes ({distributed.processes()}) "
                f"must divide `batch_size` ({self.batch_size})"
            )
        if self.precision == "fp16" and self.torch_device.type != "cuda":
            raise UserError("precision=fp16 needs a GPU; on a CPU use precision=bf16 or fp32")
        if self.precision == "bf16" and not multiplies_bf16(self.torch_device):
            warn_of_bf16("GPU" if self.torch_device.type == "cuda" else "processor")

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

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of autocast, None without it."""
        return AUTOCAST[self.precision]

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which a forward computes in `precision`."""
        dtype = self.autocast_dtype
        return torch.autocast(self.torch_device.type, dtype) if dtype else contextlib.nullcontext()


@functools.cache  # once in a process
def warn_of_bf16(what: str) -> None:
    """Tell that bf16 costs time on this GPU or processor."""
    log.warning(
        "precision=bf16: this %s has no matrix products in bf16, so a step can take many times as long as in fp32; "
        "use precision=fp32",
        what,
    )


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device computes products of bfloat16 matrices; an x86 processor does with AVX-512 and not with AVX2."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.cpu.get_cpu_capability() != "AVX2"
