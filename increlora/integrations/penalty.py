"""Watches the gradient of a method's own loss, so that no step is taken without it."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from increlora import distributed
from increlora.errors import UserError


class Penalty:
    """Watches the parameters of the penalty, so that its gradient is not cleared before the optimizer's step.

    All of it is done on the host: the hooks look at which tensor a gradient is, and how often it was written.
    """

    def __init__(self) -> None:
        self.watched: list[nn.Parameter] = []
        self.hooks: list[Any] = []
        self.before: dict[int, tuple[Tensor, int]] = {}  # by id of the parameter: gradient of the penalty, its version
        self.arrivals = 0  # of gradients of the task
        self.cleared = False

    def begin(self, parameters: Iterable[nn.Parameter]) -> None:
        """The penalty's backward is done, and the task's has not begun."""
        penalised = [parameter for parameter in parameters if parameter.grad is not None]
        self.arrivals, self.cleared = 0, False
        self.before = {id(p): (p.grad, p.grad._version) for p in penalised if p.grad is not None}
        if [id(p) for p in penalised] != [id(p) for p in self.watched]:
            self.forget()
            self.watched = penalised
            self.hooks = [p.register_hook(partial(self._arrive, p)) for p in penalised]

    def forget(self) -> None:
        """Watch nothing any more."""
        for hook in self.hooks:
            hook.remove()
        self.watched, self.hooks = [], []

    def _arrive(self, parameter: nn.Parameter, _: Tensor) -> None:
        self.arrivals += 1
        if self.arrivals == 1:  # later ones may have been written by an earlier one: they can share memory
            gradient, version = self.before.get(id(parameter), (None, 0))
            self.cleared = gradient is not None and (parameter.grad is not gradient or gradient._version != version)
        self.cleared |= parameter.grad is None

    def check(self, gradients: int) -> None:
        """The gradients are complete.

        Args:
            gradients: parameters that have one.

        Raises:
            UserError: no backward pass of the task has come, or gradients were cleared before it.
        """
        penalised = len(self.before)
        lost = self.cleared or any(parameter.grad is None for parameter in self.watched)
        # with several processes DistributedDataParallel may put views of its buckets in their place
        replaced = distributed.processes() == 1 and any(
            id(parameter) in self.before and parameter.grad is not self.before[id(parameter)][0]
            for parameter in self.watched
        )
        self.before = {}
        if lost:
            raise UserError(
                "gradients were cleared between growth.begin_step() and growth.before_step(), and the penalty's with "
                "them: call optimizer.zero_grad() only after growth.after_step()"
            )
        if replaced:
            raise UserError(
                "gradients were replaced by other tensors between growth.begin_step() and growth.before_step(), and "
                "the penalty's with them: add to them or scale them in place (p.grad.add_(g), p.grad.mul_(x))"
            )
        if not self.arrivals and gradients <= penalised:
            raise UserError(
                "growth.before_step(): no gradient of the task has come since growth.begin_step(); call it after the "
                "backward pass"
            )
