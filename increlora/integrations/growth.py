"""A method in any training code: learning rates, later groups, several processes, complete checkpoints."""

import ctypes
import io
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from increlora import distributed, groups
from increlora.errors import UserError
from increlora.method import Method

STATE = "increlora_state"  # the entry of model.state_dict() for structure, averages and step


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

    Raises:
        UserError: the optimizer lacks trained parameters of the model, or holds others.
    """

    def __init__(
        self, method: Method, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int
    ):
        self.method, self.model, self.optimizer = method, model, optimizer
        self.total_steps, self.warmup_steps = total_steps, warmup_steps
        self.step = 0  # optimizer steps taken
        self.skipped = 0  # steps that were not finite
        self.begun = self.scaled = False  # of the step under way
        self.finite: bool | None = None  # None until its gradients are complete
        self.averages = False  # at the end of the backward under way
        self.loaded: set[str] = set()  # since the last step: the model's state, the optimizer's
        self._check_steps()
        groups.adopt(optimizer, method, model)
        # DistributedDataParallel ignores what begins to train later, also if it wraps a model that has grown
        self.later = method.later_parameters()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        model._ddp_params_and_buffers_to_ignore = [names[id(p)] for p in self.later]  # type: ignore[assignment]
        self.hooks = [
            model.register_state_dict_post_hook(partial(_store, self)),
            model.register_load_state_dict_pre_hook(self._restore),
            optimizer.register_load_state_dict_pre_hook(self._regroup),
        ]
        if distributed.processes() > 1:
            trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
            self.hooks += [p.register_post_accumulate_grad_hook(self._queue_average) for p in trained]

    # one step

    def begin_step(self, micro_batches: int = 1, scaler: torch.amp.GradScaler | None = None) -> None:
        """Call before the first forward of a step; a repeated call within the step has no effect.

        Args:
            micro_batches: backward passes in this step, or more.
            scaler: multiplies the loss before backward (fp16).

        Raises:
            UserError: the state of the model or of the optimizer was loaded without the other.
        """
        if self.begun:
            return
        if len(self.loaded) == 1:
            raise UserError(
                f"the state of the {self.loaded.pop()} was loaded, but not that of both model and optimizer: load the "
                "other one too, from the same checkpoint"
            )
        self.loaded.clear()
        groups.set_learning_rates(self.optimizer, self.step, self.total_steps, self.warmup_steps)
        self.scaled = scaler is not None and scaler.is_enabled()
        loss_scale = scaler.get_scale() if scaler is not None else 1.0
        self.method.begin_step(self.step, micro_batches, loss_scale)
        penalty = self.method.extra_loss()
        if isinstance(penalty, Tensor):
            (penalty * loss_scale).backward()
        self.begun = True

    def before_step(self) -> bool:
        """Call when gradients are complete and clipped: ranks grow if it is time; returns whether the step counts."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.finite = bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        if self.finite:
            allocations = len(self.method.allocations)
            self.method.before_step(self.step)
            grown = len(self.method.allocations) > allocations
            if grown and any(ranks != self.method.ranks() for ranks in distributed.gather(self.method.ranks())):
                raise UserError("the processes disagree about the ranks: start them with the same model and settings")
        elif not self.scaled:  # a scaler skips such a step by itself
            self.optimizer.zero_grad(set_to_none=True)
        return self.finite

    def after_step(self) -> None:
        """Call after the optimizer's step, before zero_grad; between micro-batches it has no effect."""
        if self.finite is None:
            return
        if self.finite:
            self.method.after_step(self.step)
        self.step += self.finite
        self.skipped += not self.finite
        self.begun, self.finite = False, None

    def merge(self) -> None:
        """Fold the update into the model's own layers; its state dict is that of a plain model again."""
        self.method.merge(self.model)
        for hook in self.hooks:
            hook.remove()

    def _check_steps(self) -> None:
        last = max(self.method.planned_ranks(), default=0)
        if last >= self.total_steps:
            raise UserError(
                f"ranks change until step {last}, after the last of {self.total_steps} steps: give method.prepare and "
                "Growth the same total_steps"
            )

    # several processes

    def _queue_average(self, _: Tensor) -> None:
        # the penalty's gradient, before the step has begun, is the same everywhere
        if self.begun and not self.averages:
            self.averages = True
            torch.autograd.Variable._execution_engine.queue_callback(self._average)  # when this backward ends

    def _average(self) -> None:
        """Average the gradients of parameters that train since a growth.

        What earlier micro-batches left is a mean already, and averaging does not change it. A process that did not use
        a parameter (an expert, a dropped layer) counts with gradient 0.
        """
        self.averages = False
        parameters = [parameter for parameter in self.later if parameter.requires_grad]
        if not parameters:
            return
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        parameters = [p for p, share in zip(parameters, distributed.mean(used).tolist(), strict=True) if share]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        distributed.average_gradients(parameters)

    # state dicts

    def _restore(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Rebuild the structure before the weights are read."""
        packed = state_dict.pop(prefix + STATE, None)
        if packed is None:
            return
        state = _unpack(packed)
        if state["matrices"] != list(self.method.ranks()):
            raise UserError(
                f"the checkpoint is of another model or method: it adapts {len(state['matrices'])} matrices, "
                f"this one {len(self.method.ranks())}, and their names differ. Prepare the method as in that run."
            )
        self.method.load_state_dict(state["method"])
        self.step, self.skipped = state["step"], state["skipped"]
        self.begun, self.finite = False, None
        self.loaded.add("model")

    def _regroup(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Give the optimizer the saved groups, by parameter name; their options and states follow."""
        if state_dict["state"]:  # accelerate prepares a fresh optimizer by loading its own empty state
            self.loaded.add("optimizer")
        groups.rebuild(optimizer, self.model, [group.get("param_names", [""]) for group in state_dict["param_groups"]])


def _store(growth: Growth, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Add structure, averages and step to the weights."""
    state = {
        "step": growth.step,
        "skipped": growth.skipped,
        "matrices": list(growth.method.ranks()),
        "method": growth.method.state_dict(),
    }
    state_dict[prefix + STATE] = _pack(state)


def _pack(state: dict[str, Any]) -> Tensor:
    """Plain values and tensors as one vector of bytes, so that any format for weights can hold them."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _unpack(packed: Tensor) -> dict[str, Any]:
    packed = packed.cpu().contiguous()
    content = ctypes.string_at(packed.data_ptr(), packed.numel())  # torch gives bytes only by way of numpy
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
