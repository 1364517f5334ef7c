"""An adapter grows while its optimizer takes steps: hooks of the optimizer do what a training loop would have to."""

import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from increlora import distributed
from increlora.algorithm import START
from increlora.integrations.growth import (
    SHARDED_OPTIMIZERS,
    average_late,
    differing_process,
    refuse_sharding,
    scaler_under_way,
)
from increlora.integrations.peft.adapter import Adapter
from increlora.integrations.peft.config import Refused, in_words_of_peft
from increlora.integrations.peft.model import LIVE, IncreLoraModel
from increlora.schedule import multiplier

HOLDERS = {
    "FullyShardedDataParallel",
    "FSDPModule",
    "DeepSpeedEngine",
    "DataParallel",
}  # classes, by an ancestor's name
HOOKED_STEP = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__  # of the `step` of every optimizer
MAX_SKIPPED = 20  # steps in a row with gradients that are not finite
UNSHARDED = (
    "An adapter that grows needs whole parameters and a plain optimizer in every process: start one process per GPU "
    "(torchrun, accelerate launch) with DistributedDataParallel, not FSDP, DeepSpeed or DataParallel"
)
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    total_step: int | None = None,
    warmup_steps: int = 0,
    linear: bool = False,
    gradient_accumulation_steps: int = 1,
    scaler: torch.amp.GradScaler | None = None,
) -> "Training":
    """Let the active adapter grow with the steps of an optimizer; nothing else has to be called.

        model = get_peft_model(model, IncreLoraConfig(total_step=1000))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        attach(model, optimizer)

    Before each step, ranks grow where it is time; the penalty's gradient is added in the first backward pass of the
    step and is in no loss. Learning rates are the optimizer's or its scheduler's, multiplied for components that begin
    to train later: by a warmup of their own over `warmup_steps`, and with `linear` by the paper's restart, in which
    they decay linearly from the full rate to 0 at the last step. Checkpoints keep the groups that the optimizer has.

    Args:
        model: of `get_peft_model`, before anything wraps it.
        optimizer: over the model's parameters; also what `Accelerator.prepare` made of it.
        total_step: optimizer steps of the whole run; None: the configuration has it.
        warmup_steps: of every group of new components.
        linear: the optimizer's schedule is linear, with as many warmup steps.
        gradient_accumulation_steps: backward passes in a step.
        scaler: multiplies the loss before backward (fp16). A step by another one, or by none, is refused.

    Raises:
        UserError: no adapter trains, or several do; the model, or the optimizer, is sharded; the optimizer lacks
            parameters of the adapter, or is attached to another model; growth does not fit into the steps of the run;
            processes have other settings. At a step: the schedule is not what `linear` says.
    """
    return Training(model, optimizer, total_step, warmup_steps, linear, gradient_accumulation_steps, scaler)


class Training:
    """What `attach` gives: `ranks()`, and `step`, the optimizer steps taken.

    Args:
        at: the step at which the loop stands; None: not known.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, total_step: int | None, warmup_steps: int,
        linear: bool, micro_batches: int, scaler: torch.amp.GradScaler | None, at: int | None = None,
    ):  # fmt: skip
        self.tuner = tuner_of(model)
        self.adapter = adapter = _trained(self.tuner)
        with in_words_of_peft():
            adapter.bank.check_dtype()
        self._refuse_sharding(model, optimizer)
        if isinstance(optimizer, AcceleratedOptimizer):
            prepared: Any = optimizer
            optimizer, scaler = prepared.optimizer, scaler or prepared.scaler
        if total_step is not None and not (type(total_step) is int and total_step > 0):
            raise Refused(f"`total_step` must be a whole number of steps above 0, it is {total_step!r}")
        if type(warmup_steps) is not int or warmup_steps < 0:
            raise Refused(f"`warmup_steps` must be a whole number of steps, 0 or more, it is {warmup_steps!r}")
        self.optimizer, self.warmup_steps, self.linear = optimizer, warmup_steps, linear
        self.micro_batches, self.scaler = micro_batches, scaler
        self._refuse_shared()
        self._agree(total_step)
        self._plan(total_step, at)
        self.method, self.bank = adapter.method, adapter.bank
        self._hold_all()
        self.begun = self.arrived = self.finite = False
        self.idle = False  # the step under way comes after the last one, and has no gradients
        self.skipped_in_a_row = 0  # steps whose gradients were not finite
        self.averages = False
        self.pending: dict[int, Tensor] = {}  # gradients of the penalty, by id of the parameter
        # while a step is taken: every group of the optimizer, what takes its place, and the learning rates of that
        self.split: list[tuple[dict[str, Any], list[dict[str, Any]], list[Any]]] | None = None
        self.births = {
            id(parameter): born
            for number, born in self.method.births().items()
            for parameter in self.bank.all_groups[number].parameters()
        }
        if (before := self.tuner.trainings.pop(adapter.name, None)) is not None:
            before.detach()
        self.tuner.trainings[adapter.name] = self
        self.hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        self.hooks += [self.tuner.model.register_forward_pre_hook(self._forward_begins)]
        self.hooks += [p.register_hook(partial(self._arrives, id(p))) for p in self.bank.parameters()]
        if distributed.processes() > 1:
            self.hooks += [p.register_post_accumulate_grad_hook(self._queue_average) for p in self.bank.parameters()]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.adapter.step

    def ranks(self) -> dict[str, int]:
        """The rank of every matrix."""
        return self.adapter.ranks()

    def detach(self) -> None:
        """The optimizer's steps let nothing grow any more."""
        for hook in self.hooks:
            hook.remove()
        self._join()
        if self.tuner.trainings.get(self.adapter.name) is self:
            del self.tuner.trainings[self.adapter.name]

    # what it is given

    def _refuse_sharding(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        refuse_sharding()
        kinds = {ancestor.__name__ for ancestor in type(optimizer).__mro__} & SHARDED_OPTIMIZERS
        kinds |= HOLDERS & {ancestor.__name__ for module in model.modules() for ancestor in type(module).__mro__}
        sharded = [n for n, p in model.named_parameters() if hasattr(p, "device_mesh") or hasattr(p, "ds_id")]
        if kinds or sharded:
            raise Refused(f"{kinds.pop() if kinds else sharded[0]} is spread over processes or devices. {UNSHARDED}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise Refused(f"{type(optimizer).__name__} is no torch.optim.Optimizer: give `attach` what it wraps")

    def _refuse_shared(self) -> None:
        """Groups that two models part for the same step would not come together again."""
        others = [t for tuner in LIVE if tuner is not self.tuner for t in tuner.trainings.values()]
        if any(training.optimizer is self.optimizer for training in others):
            raise Refused(
                "the optimizer is attached to an adapter of another model: give each model an optimizer of its own, or "
                "call training.detach() of the first"
            )

    def _agree(self, total_step: int | None) -> None:
        """Every process draws later components by itself: all take the seed of the first, and have its settings."""
        if distributed.processes() == 1:
            return
        adapter = self.adapter
        config = adapter.config
        mine = config.settings() | {
            "matrices": list(adapter.shapes), "step": adapter.step, "total rank": sum(adapter.ranks().values()),
            "total_step": total_step or config.total_step, "tinit": config.tinit, "deltaT": config.deltaT,
            "warmup_steps": self.warmup_steps, "linear": self.linear,
            "gradient_accumulation_steps": self.micro_batches,
        }  # fmt: skip
        if odd := differing_process(mine):
            raise Refused(odd)
        if not adapter.planned:
            adapter.method.seed = distributed.gather(adapter.method.seed)[0]

    def _plan(self, total_step: int | None, at: int | None) -> None:
        adapter = self.adapter
        if adapter.final and (at == 0 or (at is None and adapter.over)):  # another run at these ranks
            adapter.step, adapter.skipped, adapter.planned = 0, 0, False
        told = adapter.config.total_step  # of the run in which ranks grow
        planned = adapter.method.order.total_steps if adapter.planned else None if adapter.final else told
        total = total_step or planned or told
        if total is None:
            raise Refused("how long is the run? Give `total_step`, in IncreLoraConfig or here: its optimizer steps")
        if adapter.final:
            warnings.warn(
                f"the adapter `{adapter.name}` was loaded with final ranks: it trains on, and does not grow",
                stacklevel=4,
            )
        if planned not in (None, total):
            raise Refused(
                f"the run has {total} steps, and `total_step` of the adapter is {planned}: "
                f"give IncreLoraConfig(total_step={total}), or leave it out"
            )
        if not adapter.planned:
            adapter.plan(total)

    def _hold_all(self) -> None:
        """The optimizer holds every tensor of the adapter, also those that were made for this run just now."""
        holds = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        first = dict(self.bank.all_groups[START].named_parameters())
        if any(id(p) not in holds for p in first.values()):
            raise Refused(
                f"the optimizer does not hold the parameters of the adapter `{self.adapter.name}`: make it after "
                "get_peft_model, over model.parameters()"
            )
        for group in self.bank.all_groups:  # lambdas join the first lambdas, rows the first rows of their width
            for name, parameter in group.named_parameters():
                if id(parameter) not in holds:
                    holds[id(first[name])]["params"].append(parameter)

    # a step

    @torch.compiler.disable
    def _forward_begins(self, model: nn.Module, *_: Any) -> None:
        """Before every forward pass of the model, compiled or not; the first one with gradients begins a step."""
        if not torch.is_grad_enabled() or not self.bank.like.requires_grad:  # as in disable_adapter()
            return
        if self.begun and self.arrived and all(p.grad is None for p in self.bank.all_groups[0].parameters()):
            self.begun = False  # a step that nobody took, such as one of a scaler whose gradients overflowed
        self.begin()

    @property
    def _over(self) -> bool:
        return self.step >= self.method.order.total_steps

    def begin(self) -> None:
        """Begin a step: the gradient of the penalty, and the score; no effect within a step and after the last one."""
        self._check_bank()
        if self.begun or self._over:
            return
        method = self.method
        scale = self.scaler.get_scale() if self.scaler is not None and self.scaler.is_enabled() else 1.0
        with in_words_of_peft():
            method.begin_step(self.step, self.micro_batches, scale)
        self.pending = {}
        with torch.enable_grad():
            penalty = method.extra_loss()
            if isinstance(penalty, Tensor) and penalty.requires_grad:
                parameters = list(self.bank.parameters())
                gradients = torch.autograd.grad(penalty * scale, parameters, allow_unused=True)
                self.pending = {id(p): g for p, g in zip(parameters, gradients, strict=True) if g is not None}
        self.begun, self.arrived = True, False

    def _check_bank(self) -> None:
        if self.adapter.bank is not self.bank:
            raise Refused(
                f"the adapter `{self.adapter.name}` was loaded with other tensors since `attach`; make a new optimizer "
                "over model.parameters(), and attach that"
            )

    def _arrives(self, parameter: int, gradient: Tensor) -> Tensor | None:
        """The first gradient of a parameter in a step brings the penalty's with it."""
        if not self.begun:
            return None
        self.arrived = True
        own = self.pending.pop(parameter, None)
        return None if own is None else gradient + own

    def _before(self, optimizer: torch.optim.Optimizer, arguments: tuple, keywords: dict[str, Any]) -> Any:
        """Before the optimizer's step: ranks grow, and new components get their own learning rates."""
        if self._is_inner():
            return None
        self._join()
        self.idle = self._over and all(p.grad is None for g in self.optimizer.param_groups for p in g["params"])
        if self.idle:
            return None
        closure = arguments[1] if len(arguments) > 1 else keywords.get("closure")  # after the optimizer itself
        if closure is None:
            self._grow()
            return None
        return (optimizer,), {"closure": partial(self._closure, closure)}  # in which forward and backward come

    def _closure(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            loss = closure()
        self._grow()
        return loss

    def _grow(self) -> None:
        self._check_bank()
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if any(id(p) not in held for p in self.bank.parameters()):
            raise Refused(
                f"optimizer.step(): the optimizer no longer holds the parameters of the adapter `{self.adapter.name}`: "
                f"something has replaced them since `attach`. {UNSHARDED}"
            )
        if self._over:
            raise Refused(
                f"optimizer.step(): all {self.step} steps of the run are done; give IncreLoraConfig(total_step=...) "
                "the optimizer steps of the whole run, or call training.detach() to train on at these ranks"
            )
        if not (self.begun and self.arrived):
            raise Refused(
                f"optimizer.step(): no gradient has reached the adapter `{self.adapter.name}` since the step before; "
                "call the model itself (not a part of it), and backward, between two steps"
            )
        for parameter in self.bank.parameters():  # whose gradient did not come by the task
            if (own := self.pending.pop(id(parameter), None)) is not None:
                parameter.grad = own if parameter.grad is None else parameter.grad + own
        self._check_scaler()
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.finite = bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        if self.finite:
            grown = len(self.method.allocations)
            with in_words_of_peft():
                self.method.before_step(self.step)
            if len(self.method.allocations) > grown and any(
                r != self.ranks() for r in distributed.gather(self.ranks())
            ):
                raise Refused("the processes disagree about the ranks: start them with the same model and settings")
        else:
            self.optimizer.zero_grad(set_to_none=True)
        self._part()

    def _check_scaler(self) -> None:
        told = self.scaler if self.scaler is not None and self.scaler.is_enabled() else None
        if (used := scaler_under_way()) is told:
            return
        what = "a GradScaler that `attach` was not given" if used is not None else "no step of the scaler of `attach`"
        raise Refused(
            f"optimizer.step(): this is {what}, so the penalty was scaled otherwise than the loss; give attach(..., "
            "scaler=scaler) the one that steps, or the optimizer that accelerator.prepare has returned"
        )

    def _is_inner(self) -> bool:
        """Whether the step of a subclass has called that of its base class, which runs all hooks once more."""
        steps = (frame.f_locals["args"] for frame, _ in traceback.walk_stack(None) if frame.f_code is HOOKED_STEP)
        return sum(arguments[0] is self.optimizer for arguments in steps) > 1

    def _after(self, *_: Any) -> None:
        if self._is_inner() or self.idle:
            return
        self._take_over()
        self._join()
        self.begun = False
        if self.finite:
            self.method.after_step(self.step)
            self.adapter.step += 1
        self.adapter.skipped += not self.finite
        self.skipped_in_a_row = 0 if self.finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise Refused(
                f"{self.skipped_in_a_row} steps in a row had gradients that are not finite, at step {self.step}: the "
                "training has diverged. Lower the learning rate."
            )

    # learning rates

    def _part(self) -> None:
        """For the time of a step, a group of the optimizer becomes one for each learning rate of its parameters."""
        self.split = []
        factors = {born: self.factor(born) for born in {0, *self.births.values()}}
        for group in self.optimizer.param_groups:
            by_factor: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_factor.setdefault(factors[self.births.get(id(parameter), 0)], []).append(parameter)
            if self.linear and any(id(p) in self.births for p in group["params"]):
                self._check_schedule(group)
            if set(by_factor) <= {1.0}:
                parts = [group]
            else:
                parts = [{**group, "params": p, "lr": group["lr"] * by} for by, p in by_factor.items()]
            self.split.append((group, parts, [part["lr"] for part in parts]))
        self.optimizer.param_groups[:] = [part for _, parts, _ in self.split for part in parts]

    def _check_schedule(self, group: dict[str, Any]) -> None:
        """Refuse a schedule that is not linear though `linear` says so; skipped steps may have moved it on."""
        total, now = self.method.order.total_steps, float(group["lr"])
        peak = float(group.get("initial_lr", now))
        steps = range(self.step, self.step + self.adapter.skipped + 1)
        if not any(abs(now - peak * multiplier(k, 0, total, self.warmup_steps)) <= 1e-6 * peak for k in steps):
            raise Refused(
                f"the learning rate at step {self.step} is {now:.4g} of {peak:.4g}, not that of a linear schedule with "
                f"{self.warmup_steps} warmup steps over {total}: leave `linear` out, or give the optimizer "
                f"get_linear_schedule_with_warmup(optimizer, {self.warmup_steps}, {total})"
            )

    def _take_over(self) -> None:
        """What the optimizer has written into the parts of a group in its step goes into the group.

        Raises:
            UserError: the parts have other values, so there is none for the group.
        """
        for group, parts, rates in self.split or ():
            if parts[0] is group:
                continue
            for key in dict.fromkeys(key for part in parts for key in part if key not in ("params", "lr")):
                values = [part.get(key) for part in parts]
                if not all(_same(value, values[0]) for value in values):
                    self._refuse_values(key)
                group[key] = values[0]
            if any(part["lr"] is not rate for part, rate in zip(parts, rates, strict=True)):
                self._refuse_values("lr")

    def _refuse_values(self, key: str) -> None:
        raise Refused(
            f"{type(self.optimizer).__name__} writes `{key}` into its groups at every step, and new components that "
            "warm up need groups of their own: train without warmup (attach(..., warmup_steps=0), linear left out)"
        )

    def _join(self) -> None:
        if self.split is not None:
            self.optimizer.param_groups[:] = [group for group, _, _ in self.split]
            self.split = None

    def factor(self, born: int) -> float:
        """By which the learning rate of components is multiplied that train from step `born` on."""
        if born == 0 or self.step < born:
            return 1.0
        if self.linear:
            total, warmup = self.method.order.total_steps, self.warmup_steps
            scheduled = multiplier(self.step, 0, total, warmup)
            return multiplier(self.step, born, total, warmup) / scheduled if scheduled else 0.0
        return min(1.0, (self.step - born) / self.warmup_steps) if self.warmup_steps else 1.0

    # several processes

    def _queue_average(self, _: Tensor) -> None:
        if self.begun and not self.averages:
            self.averages = True
            torch.autograd.Variable._execution_engine.queue_callback(self._average)  # when this backward ends

    def _average(self) -> None:
        self.averages = False
        average_late([p for g in self.bank.all_groups[1:] if g.trains for p in g.parameters()])


class IncreLoraCallback(TrainerCallback):
    """Lets the adapter of a Trainer's model grow: `Trainer(..., callbacks=[IncreLoraCallback()])`, and nothing else.

    With a linear schedule, new components get the paper's restart: a warmup of their own over the Trainer's warmup
    steps, then linear decay. With any other, the same warmup is multiplied by what the scheduler gives.
    `training` is there while the Trainer trains: its `ranks()` and `step`.

    Raises:
        UserError: when training begins: the model has no adapter that trains, the Trainer takes another number of
            steps than the adapter was planned for, begins at another step than it stands at, or shards the model.
    """

    training: Training
    over = False  # the step under way comes after the last one

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Before optimizer and checkpoints: TRL casts what trains of a quantized model to bfloat16, in place."""
        for tuner in (module for module in parts["model"].modules() if isinstance(module, IncreLoraModel)):
            for adapter in tuner.adapters.values():
                adapter.bank.to(torch.promote_types(adapter.bank.like.dtype, torch.float32))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        optimizer, kind = parts["optimizer"], parts["optimizer"].accelerator_state.distributed_type
        if kind in SHARDED or args.n_gpu > 1:
            raise Refused(f"the Trainer runs with {kind.value}, and {args.n_gpu} GPUs in this process. {UNSHARDED}")
        warmup = args.get_warmup_steps(state.max_steps)
        self.training = Training(
            parts["model"], optimizer.optimizer, state.max_steps, warmup,
            _is_linear(parts.get("lr_scheduler"), state.max_steps, warmup), args.gradient_accumulation_steps,
            optimizer.scaler, at=state.global_step,
        )  # fmt: skip
        adapter = self.training.adapter
        stands = adapter.step + adapter.skipped
        if state.global_step != stands:
            raise Refused(
                f"the Trainer begins at step {state.global_step}, the adapter stands at {stands}: resume from a "
                "checkpoint (resume_from_checkpoint=True), or make a fresh adapter"
                + ("; to train on at its ranks, save it and load it (is_trainable=True)" if adapter.over else "")
            )
        adapter.in_checkpoints = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        self.training.begun = False
        self.over = self.training.step >= state.max_steps
        self.training.begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        if self.over:  # the Trainer has resumed from the last checkpoint, and takes a step before it looks where it is
            self.training.optimizer.zero_grad(set_to_none=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        if self.over:
            state.global_step -= 1
            control.should_training_stop = True
        if self.training.begun:  # a scaler whose gradients overflowed has not stepped the optimizer
            self.training.begun = False
            self.training.adapter.skipped += 1

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        self.training.adapter.in_checkpoints = False
        self.training.detach()


def _is_linear(scheduler: Any, total: int, warmup: int) -> bool:
    """Whether a scheduler's rates are those of `multiplier`, whatever it is called."""
    rates = getattr(getattr(scheduler, "scheduler", scheduler), "lr_lambdas", ())
    steps = {0, warmup // 2, warmup, (warmup + total) // 2, total - 1, total}
    return bool(rates) and all(abs(rate(k) - multiplier(k, 0, total, warmup)) < 1e-9 for rate in rates for k in steps)


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def tuner_of(model: nn.Module) -> IncreLoraModel:
    """The tuner in a model of PEFT.

    Raises:
        UserError: it has none.
    """
    tuner = next((module for module in model.modules() if isinstance(module, IncreLoraModel)), None)
    if tuner is None:
        raise Refused(
            f"the model ({type(model).__name__}) has no IncreLoRA adapter: get_peft_model(model, IncreLoraConfig(...))"
        )
    return tuner


def _trained(tuner: IncreLoraModel) -> Adapter:
    trained = [a for name, a in tuner.adapters.items() if name in tuner.active_adapters and a.bank.like.requires_grad]
    if len(trained) != 1:
        raise Refused(
            f"{len(trained)} adapters are active and train ({', '.join(a.name for a in trained) or 'none'}), and one "
            "can grow: choose it by model.set_adapter(name)"
        )
    return trained[0]


@register_optimizer_step_pre_hook
def _warn_of_a_forgotten_call(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """An adapter that trains and does not grow, because another optimizer was attached to it, or none.

    Raises:
        UserError: another one was.
    """
    for tuner in list(LIVE):
        for adapter in tuner.adapters.values():
            training = tuner.trainings.get(adapter.name)
            if adapter.finished or (adapter.warned if training is None else training.optimizer is optimizer):
                continue
            some = adapter.bank.like
            if some.requires_grad and any(some is p for group in optimizer.param_groups for p in group["params"]):
                if training is not None:
                    raise Refused(
                        f"optimizer.step(): the adapter `{adapter.name}` was attached to another optimizer, with whose "
                        f"steps it grows; attach this one, or call training.detach(). {UNSHARDED}"
                    )
                adapter.warned = True
                warnings.warn(
                    f"the adapter `{adapter.name}` trains at its first ranks and does not grow: give the Trainer "
                    "callbacks=[IncreLoraCallback()], or call attach(model, optimizer) in your own loop",
                    stacklevel=3,
                )
