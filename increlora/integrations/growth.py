"""A method in any training code: learning rates, later groups, several processes, complete checkpoints."""

import sys
import traceback
import warnings
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from increlora import distributed, groups, surgery
from increlora.components import STATE
from increlora.errors import UserError
from increlora.integrations.packed import pack, unpack
from increlora.integrations.penalty import Penalty
from increlora.method import Method
from increlora.validation import other_settings

BETWEEN, BEGUN, READY, STEPPED, MERGED = "between", "begun", "ready", "stepped", "merged"  # phases of a step
SHARDED_OPTIMIZERS = {"ZeroRedundancyOptimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"}


class Growth:
    """Keeps an optimizer, and the state dicts of model and optimizer, in step with a method that grows.

        method.prepare(model, total_steps)
        optimizer = torch.optim.AdamW(method.param_groups(model), lr=1e-3)
        growth = Growth(method, model, optimizer, total_steps, warmup_steps)
        while growth.step < total_steps:
            growth.begin_step(len(micro_batches))      # learning rates, gradient of the method's own loss
            for micro_batch in micro_batches:
                task_loss.backward()
            clip gradients
            growth.before_step()                       # ranks grow
            optimizer.step()
            growth.after_step()
            optimizer.zero_grad()

    *Learning rates* are `multiplier(step, born, total_steps, warmup_steps)` times the rate that a group had
    when this object was made. The parameters that begin to train at a growth are in the optimizer from the start; where
    it does not hold them yet, they get the options of the first group that decays. No scheduler is needed beside it. A
    step whose gradients are not finite changes nothing and is not counted.

    *Checkpoints*: `model.state_dict()` carries one more entry, `increlora_state`. When a state is loaded into a
    model that was prepared alike, the structure is restored before the weights are read, and
    `optimizer.load_state_dict` orders its groups by parameter name; load both. Whatever saves
    and loads the two state dicts (Trainer, accelerate, `torch.save`) therefore resumes exactly.

    *Several processes*: DistributedDataParallel does not know the parameters that begin to train after the start;
    their gradients are averaged at the end of each backward.

    Args:
        method: prepared on `model`.
        model: the model itself, before anything wraps it.
        optimizer: over `method.param_groups(model)`, or over groups of your own; not wrapped.
        total_steps: optimizer steps of the whole run, as given to `prepare`.
        warmup_steps: of the parameters that are there from the start, and again of each new group.

        max_skipped: steps in a row with gradients that are not finite after which training is given up.

    Raises:
        UserError: the optimizer lacks trained parameters of the model, holds others, is wrapped, is sharded or has a
            scheduler; the model is wrapped, or another one than the method's; a parameter would train in half
            precision.

    A call that is forgotten, doubled or out of place is a UserError at the next call, `optimizer.step()` included.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        warmup_steps: int,
        max_skipped: int = 20,
    ):
        self.method, self.model, self.optimizer = method, model, optimizer
        self.total_steps, self.warmup_steps, self.max_skipped = total_steps, warmup_steps, max_skipped
        self.step = 0  # optimizer steps taken
        self.skipped = self.skipped_in_a_row = 0  # steps that were not finite
        self.phase = BETWEEN
        self.scaled = False  # the step under way has a loss scale
        self.finite = True  # of the step under way, from before_step on
        self.averages = False  # at the end of the backward under way
        self.loaded: set[str] = set()  # since the last step: the model's state, the optimizer's
        self.held = 0  # parameters in the optimizer when it was last checked
        self.frozen: list[nn.Parameter] = []  # of the model, when the optimizer was last checked
        self.compared = False  # with the other processes
        self.rates: list[Any] | None = None  # that were written into the groups
        # by id of the parameter: its gradient in the last step, its version; None: not known
        self.left: dict[int, tuple[Any, int]] | None = None
        self.penalty = Penalty()
        self._check_parts()
        self.bank = getattr(method, "bank", None)  # of a method that has one
        if self.bank is not None:
            self.bank.restored = True
        groups.adopt(optimizer, method, model)
        if not any(group["initial_lr"] for group in optimizer.param_groups):
            raise UserError("every learning rate of the optimizer is 0: give it the peak rates, which Growth scales")
        self._check_schedule()
        # DistributedDataParallel ignores what begins to train later, also if it wraps a model that has grown
        self.later = method.later_parameters()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        model._ddp_params_and_buffers_to_ignore = [names[id(p)] for p in self.later]  # type: ignore[assignment]
        self.hooks = [
            model.register_state_dict_post_hook(partial(_store, self)),
            model.register_load_state_dict_pre_hook(self._restore),
            optimizer.register_load_state_dict_pre_hook(self._regroup),
            optimizer.register_step_pre_hook(self._optimizer_steps),
        ]
        if distributed.processes() > 1:
            trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
            self.hooks += [p.register_post_accumulate_grad_hook(self._queue_average) for p in trained]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "left": None}  # weak references, of no use in a copy or a file

    # one step

    def begin_step(self, micro_batches: int = 1, scaler: torch.amp.GradScaler | None = None) -> None:
        """Call before the first forward of a step; a repeated call before `before_step` has no effect.

        Args:
            micro_batches: backward passes in this step, or more.
            scaler: multiplies the loss before backward (fp16).

        Raises:
            UserError: the step before is not complete or its gradients are still there; the run is over; the state of
                the model or of the optimizer was loaded without the other; learning rates or the optimizer's
                parameters were changed in a way that cannot be right.
        """
        if self.phase == BEGUN:
            return
        if self.phase == MERGED:
            raise UserError("the model was merged and trains no further: prepare a fresh model with a new method")
        if self.phase != BETWEEN:
            raise UserError(
                f"growth.begin_step(): step {self.step} is not complete; call growth.after_step() after "
                "optimizer.step() in every step, also in one that before_step did not count"
            )
        if self.step >= self.total_steps:
            raise UserError(
                f"growth.begin_step(): all {self.total_steps} steps of the run are done, and every learning rate is 0. "
                "Give method.prepare and Growth the steps of the whole run."
            )
        if len(self.loaded) == 1:
            raise UserError(
                f"the state of the {self.loaded.pop()} was loaded, but not that of both model and optimizer: load the "
                "other one too, from the same checkpoint"
            )
        self.loaded.clear()
        if not torch.is_grad_enabled():
            raise UserError("growth.begin_step(): gradients are switched off (torch.no_grad, set_grad_enabled(False))")
        self._compare_processes()
        self._check_optimizer()
        groups.set_learning_rates(self.optimizer, self.step, self.total_steps, self.warmup_steps)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaled = scaler is not None and scaler.is_enabled()
        loss_scale = scaler.get_scale() if scaler is not None else 1.0
        self.method.begin_step(self.step, micro_batches, loss_scale)
        penalty = self.method.extra_loss()
        if isinstance(penalty, Tensor):
            (penalty * loss_scale).backward()
        self.penalty.begin(self._parameters())
        self.phase = BEGUN

    def before_step(self) -> bool:
        """Call when gradients are complete and clipped: ranks grow if it is time; returns whether the step counts.

        Raises:
            UserError: the step was not begun, the call is a second one, no gradient of the task has arrived, the
                penalty's gradient was cleared, or `max_skipped` steps in a row were not finite.
        """
        if self.phase != BEGUN:
            raise UserError(
                "growth.before_step(): the step was not begun; call growth.begin_step() before the forward"
                if self.phase in (BETWEEN, MERGED)
                else "growth.before_step() is called twice in a step: call it once, when the gradients are complete"
            )
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        self.penalty.check(len(gradients))
        self.finite = bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        if self.finite:
            allocations = len(self.method.allocations)
            self.method.before_step(self.step)
            grown = len(self.method.allocations) > allocations
            if grown and any(ranks != self.method.ranks() for ranks in distributed.gather(self.method.ranks())):
                raise UserError("the processes disagree about the ranks: start them with the same model and settings")
        elif not self.scaled:  # a scaler skips such a step by itself
            self.optimizer.zero_grad(set_to_none=True)
        self.phase = READY
        self._count_skipped()
        return self.finite

    def after_step(self) -> None:
        """Call after the optimizer's step, before zero_grad; between micro-batches it has no effect.

        Raises:
            UserError: the optimizer took no step since `before_step`.
        """
        if self.phase not in (READY, STEPPED):
            return
        if self.finite:
            if self.phase != STEPPED:
                raise UserError(
                    "growth.after_step(): the optimizer that Growth was given took no step since growth.before_step(); "
                    "call both once an optimizer step, with optimizer.step() between them"
                )
            self.method.after_step(self.step)
        self.step += self.finite
        self.skipped += not self.finite
        self.left = {id(p): (weakref.ref(p.grad), p.grad._version) for p in self._parameters() if p.grad is not None}
        self.phase = BETWEEN

    def merge(self) -> None:
        """Fold the update into the model's own layers; its state dict is that of a plain model again.

        Raises:
            UserError: it was merged already, a step is not complete, or the update would be lost to rounding.
        """
        if self.phase not in (BETWEEN, MERGED):
            raise UserError(f"growth.merge(): step {self.step} is not complete; merge after growth.after_step()")
        if self.phase == MERGED:
            raise UserError("the update was merged already; a second merge would add it twice")
        self.method.merge(self.model)
        for hook in self.hooks:
            hook.remove()
        self.penalty.forget()
        self.phase = MERGED

    def keeps_checkpoints(self, keeps: bool) -> None:
        """Let the model's `save_pretrained` write the unmerged model, for a loop that resumes from such a folder."""
        if self.bank is not None:
            self.bank.saves_unmerged = keeps

    def _optimizer_steps(self, _: Any, arguments: tuple, keywords: dict) -> None:
        """Before every step of the optimizer: it is its turn."""
        if keywords.get("closure") is not None or any(argument is not None for argument in arguments[1:]):
            raise UserError(
                "optimizer.step(closure): ranks grow from the gradients before it; call it without a closure"
            )
        if self.phase == READY:
            self._check_scaler()
            if self.finite and all(parameter.grad is None for parameter in self._parameters()):
                raise UserError(
                    "optimizer.step(): there are no gradients, though growth.before_step() saw some: call "
                    "optimizer.zero_grad() after growth.after_step()"
                )
            self.phase = STEPPED
            return
        if self.phase == BETWEEN and self.step >= self.total_steps and all(p.grad is None for p in self._parameters()):
            return  # after the last step, and nothing can change
        what = {
            BETWEEN: "growth.begin_step() was not called before the forward of this step",
            BEGUN: "growth.before_step() was not called after the backward of this step",
            STEPPED: "it is the second call in this step",
        }[self.phase]
        raise UserError(
            f"optimizer.step(): {what}; nothing would grow. In the Trainer: Trainer(..., callbacks=[callback], "
            "optimizers=callback.optimizers)."
        )

    def _check_scaler(self) -> None:
        """The optimizer's step under way is one of a GradScaler if `begin_step` was given one, and only then."""
        scales = scaler_under_way() is not None
        if scales and not self.scaled:
            raise UserError(
                "scaler.step(optimizer): growth.begin_step() was not given the scaler, so the penalty was not scaled: "
                "growth.begin_step(micro_batches, scaler)"
            )
        if self.scaled and not scales:
            raise UserError(
                "optimizer.step(): growth.begin_step() was given a scaler, so the penalty was scaled: call "
                "scaler.scale(loss).backward(), scaler.unscale_(optimizer) and scaler.step(optimizer)"
            )

    def _count_skipped(self) -> None:
        self.skipped_in_a_row = 0 if self.finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.max_skipped:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row had gradients that are not finite (`max_skipped`), at step "
                f"{self.step}: the training has diverged. Lower the learning rate, or load the model in float32."
            )

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    # what it is given

    def _check_parts(self) -> None:
        """Model and optimizer are those themselves, not what wraps them."""
        if self.method.ranks():  # other methods may inject layers of other libraries
            surgery.refuse_wrapper(self.model)
        surgery.refuse_half_precision((n, p) for n, p in self.model.named_parameters() if p.requires_grad)
        kinds = {ancestor.__name__ for ancestor in type(self.optimizer).__mro__}
        if kinds & SHARDED_OPTIMIZERS:
            raise UserError(
                f"{type(self.optimizer).__name__} shards its state over the processes by the parameters that train at "
                "the start, and would never train those of a growth: use a plain optimizer"
            )
        if not hasattr(self.optimizer, "_optimizer_step_pre_hooks"):
            raise UserError(
                f"{type(self.optimizer).__name__} is not a torch.optim.Optimizer itself: make Growth before "
                "accelerator.prepare or anything else wraps the optimizer"
            )
        if "LBFGS" in kinds:
            raise UserError("LBFGS computes gradients by itself, again and again in a step: use another optimizer")
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UserError(
                "no parameter of the model trains: make Growth after method.prepare, and freeze nothing then"
            )
        if getattr(self.method, "merged", False):
            raise UserError("the method was merged into its model already: prepare a fresh model with a new method")

    def _check_schedule(self) -> None:
        warmup = self.warmup_steps
        if self.total_steps < 1:
            raise UserError(
                f"Growth has {self.total_steps} steps: give the optimizer steps of the whole run, as method.prepare "
                "had them (where a Trainer counts epochs, its max_steps is -1)"
            )
        if not isinstance(warmup, int) or not 0 <= warmup < max(1, self.total_steps):
            raise UserError(
                f"`warmup_steps` must be a whole number of steps from 0 to below {self.total_steps} (the whole run), "
                f"it is {warmup}"
            )
        last = max(self.method.planned_ranks(), default=0)
        if last >= self.total_steps:
            raise UserError(
                f"ranks change until step {last}, after the last of {self.total_steps} steps: give method.prepare and "
                "Growth the same total_steps"
            )
        order = getattr(self.method, "order", None)
        if order is not None and order.total_steps != self.total_steps:
            raise UserError(
                f"Growth has {self.total_steps} steps and method.prepare was told {order.total_steps}: give both the "
                "optimizer steps of the whole run"
            )
        self._refuse_scheduler()

    def _refuse_scheduler(self) -> None:
        if hasattr(self.optimizer.step, "_wrapped_by_lr_sched"):
            raise UserError(
                "a learning-rate scheduler is attached to the optimizer; Growth sets every learning rate (restart "
                "warmup, linear decay): make the optimizer anew, without a scheduler"
            )

    def _check_optimizer(self) -> None:
        """What may have happened between two steps: groups, learning rates, gradients that were left."""
        self._refuse_scheduler()
        now = [group["lr"] for group in self.optimizer.param_groups]
        changed = [(a, b) for a, b in zip(self.rates or (), now, strict=False) if a is not b and differ(a, b)]
        if changed:
            raise UserError(
                f"a learning rate was changed from {changed[0][0]} to {changed[0][1]}; Growth sets every learning rate "
                "(restart warmup, linear decay): remove the scheduler, or whatever else sets it"
            )
        self._refuse_gradients()
        self.left = {}
        held = sum(len(group["params"]) for group in self.optimizer.param_groups)
        if held != self.held:
            self._take_up_groups()
            self.held = held
        self._check_frozen()

    def _check_frozen(self) -> None:
        """What was frozen is frozen, and what the method trains from the start is not."""
        thawed = sum(parameter.requires_grad for parameter in self.frozen)
        if thawed:
            raise UserError(
                f"{thawed} parameters that were frozen train now, and the optimizer does not hold them: freeze them "
                "again one by one (model.requires_grad_ changes all), or add them to the optimizer"
            )
        if self.bank is not None and not all(p.requires_grad for p in self.bank.all_groups[0].parameters()):
            raise UserError("the method's components were frozen after method.prepare; they must train: thaw them")

    def _compare_processes(self) -> None:
        """Once: every process has the same settings, for each makes the parameters of later growths by itself."""
        if self.compared or distributed.processes() == 1:
            return
        if odd := differing_process(self._settings() | getattr(self.method, "settings", dict)()):
            raise UserError(odd)
        self.compared = True

    def _refuse_gradients(self) -> None:
        """Before a step: no gradient is there, but for those of the last step that were set to zero."""
        if self.left is None:
            return
        for parameter in self._parameters():
            gradient = parameter.grad
            if gradient is None:
                continue
            last, version = self.left.get(id(parameter), (lambda: None, 0))
            if last() is gradient and gradient._version != version:
                continue
            whose = "the last step are still" if last() is gradient else "another backward are"
            raise UserError(
                f"growth.begin_step(): the gradients of {whose} there (step {self.step}); call optimizer.zero_grad() "
                "after growth.after_step(), and after every backward that is no part of a step"
            )

    def _take_up_groups(self) -> None:
        """The first step of a session, or groups were added since: check and complete them."""
        refuse_sharding()
        added = any("born" not in group for group in self.optimizer.param_groups)
        if added and distributed.processes() > 1:
            raise UserError(
                "with several processes, the gradients of parameters that are added to the optimizer after Growth was "
                "made would differ between processes: add them before, or use one process"
            )
        groups.adopt(self.optimizer, self.method, self.model, self.step)
        trained = ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)
        surgery.refuse_half_precision(trained)
        held = {id(parameter) for parameter in self._parameters()}
        self.frozen = [p for p in self.model.parameters() if not p.requires_grad and id(p) not in held]

    # several processes

    def _queue_average(self, _: Tensor) -> None:
        # the penalty's gradient, before the step has begun, is the same everywhere
        if self.phase == BEGUN and not self.averages:
            self.averages = True
            torch.autograd.Variable._execution_engine.queue_callback(self._average)  # when this backward ends

    def _average(self) -> None:
        self.averages = False
        average_late([parameter for parameter in self.later if parameter.requires_grad])

    # state dicts

    def _restore(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Rebuild the structure before the weights are read."""
        packed = state_dict.pop(prefix + STATE, None)
        if packed is None:
            return
        state = unpack(packed)
        if state["matrices"] != list(self.method.ranks()):
            raise UserError(
                f"the checkpoint is of another model or method: it adapts {len(state['matrices'])} matrices, "
                f"this one {len(self.method.ranks())}, and their names differ. Prepare the method as in that run."
            )
        mine = self._settings()
        changed = other_settings(state.get("settings", mine), mine)  # absent from states of earlier versions
        if changed:
            raise UserError(
                f"the loaded state was trained with other settings: {'; '.join(changed)}. Make Growth and prepare the "
                "method as in that run, or start again from the pretrained model."
            )
        self.method.load_state_dict(state["method"])
        self.step, self.skipped, self.skipped_in_a_row = state["step"], state["skipped"], 0
        self.phase, self.left = BETWEEN, None
        self.loaded.add("model")

    def _settings(self) -> dict[str, Any]:
        """What a state depends on beside the method's own settings."""
        method = self.method
        return {
            "method": method.name,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "parameters of the head": [name for name, _ in method.head_parameters(self.model)],
        }

    def _regroup(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Give the optimizer the saved groups, by parameter name; their options and states follow."""
        if state_dict["state"]:  # accelerate prepares a fresh optimizer by loading its own empty state
            self.loaded.add("optimizer")
        mine, theirs = optimizer.param_groups[0]["initial_lr"], state_dict["param_groups"][0].get("initial_lr")
        if theirs is not None and differ(mine, theirs):
            warnings.warn(
                f"the loaded optimizer has the learning rate {theirs}, this one was made with {mine}: {theirs} is used",
                stacklevel=2,
            )
        groups.rebuild(optimizer, self.model, [group.get("param_names", [""]) for group in state_dict["param_groups"]])
        own = {id(parameter) for group in self.method.param_groups(self.model) for _, parameter in group["params"]}
        for number, parameter in enumerate(self._parameters()):
            if number in state_dict["state"] and id(parameter) not in own:  # the user added it to that run's optimizer
                parameter.requires_grad_(True)
        self.rates, self.left, self.held = None, None, 0


def differing_process(mine: dict[str, Any]) -> str | None:
    """What the first process with other settings than mine has, in words; None if all have the same."""
    for number, theirs in enumerate(distributed.gather(mine)):
        if changed := other_settings(theirs, mine):
            return f"process {number} has other settings: {'; '.join(changed[:5])}. Give all the same."
    return None


def scaler_under_way() -> torch.amp.GradScaler | None:
    """The enabled GradScaler whose step the step of the optimizer is, or None; asked in a hook of the optimizer."""
    calls = (frame for frame, _ in traceback.walk_stack(None) if frame.f_code is torch.amp.GradScaler.step.__code__)
    return next((found for frame in calls if (found := frame.f_locals["self"]).is_enabled()), None)


def average_late(parameters: list[nn.Parameter]) -> None:
    """Average over the processes the gradients of parameters that train since a growth.

    What earlier micro-batches left is a mean already, and averaging does not change it. A process that did not use
    a parameter (an expert, a dropped layer) counts with gradient 0.
    """
    if not parameters:
        return
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    parameters = [p for p, share in zip(parameters, distributed.mean(used).tolist(), strict=True) if share]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    distributed.average_gradients(parameters)


def differ(a: Any, b: Any) -> bool:
    """Whether two learning rates differ; of tensors nothing is read, another one is a change."""
    return isinstance(a, Tensor) or isinstance(b, Tensor) or a != b


def refuse_sharding() -> None:
    """accelerate shards by plugins that show only here; it is not imported where nobody uses it."""
    state = sys.modules.get("accelerate.state")
    shared = state.AcceleratorState._shared_state if state else {}
    kind = str(getattr(shared.get("distributed_type"), "value", ""))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise UserError(
            f"accelerate runs with {kind}; a method that grows needs the whole model and optimizer in every process: "
            "use one process per GPU with DistributedDataParallel (MULTI_GPU)"
        )


def _store(growth: Growth, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Add structure, averages and step to the weights.

    Raises:
        UserError: a step has changed a part of what a state holds, and not yet the rest.
    """
    if growth.phase in (READY, STEPPED):
        raise UserError(
            f"state_dict(): step {growth.step} is not complete, so a run from this state would take it twice; save "
            "after growth.after_step()"
        )
    state = {
        "step": growth.step,
        "skipped": growth.skipped,
        "matrices": list(growth.method.ranks()),
        "settings": growth._settings(),
        "method": growth.method.state_dict(),
    }
    state_dict[prefix + STATE] = pack(state)
