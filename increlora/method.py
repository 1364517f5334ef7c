"""The interface between a fine-tuning method and the training loop.

A method changes the model in place and says what should change in training; the loop applies it.
It never sees the optimizer, scheduler, tracker, configuration, task or device:

    method.prepare(model, total_steps)                     # inject, set requires_grad
    optimizer = AdamW(method.param_groups(model))          # also of parameters that train later, from `born` on
    for step in range(total_steps):                        # step = optimizer steps already taken
        set the learning rate of every group from (step, its `born`)
        method.begin_step(step)                            # prepare to watch this step's gradients
        for micro_batch in batch:
            (task_loss + method.extra_loss()).backward()
        clip gradients; if they are not finite, try the next batch for the same step
        method.before_step(step)                           # gradients ready, weights old: growth
        optimizer.step()
        method.after_step(step)                            # weights new, gradients alive: pruning
        optimizer.zero_grad()

The base class is full fine-tuning.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from increlora import base_weights, surgery
from increlora.base_weights import Checksum
from increlora.errors import UserError
from increlora.validation import check_numbers, check_patterns


@dataclass
class Allocation:
    """One change of ranks: after which step, how many ranks each matrix gained, and the scores that decided."""

    step: int
    added: dict[str, int]
    scores: dict[str, float]


@dataclass
class Method:
    """Full fine-tuning, and the interface that every method implements.

    Dataclass fields are the keys of `configs/method/<name>.yaml`.

    Args:
        name: the method's name in results and tables.
        kinds: kind of matrix -> regular expression over module names (from the backbone); none given: every
            linear layer in the model's numbered layers.
        head: regular expression over parameter names: the freshly initialised part that every method
            trains and no budget counts (pooler and classifier); None: there is none, as in a language model.
        matrices: the kinds to adapt; None adapts all of `kinds`.
        seed: seed of the method's own random streams.

    `can_merge` says whether `merge` can fold the update into the model's own layers.
    """

    can_merge: ClassVar[bool] = True

    name: str = "full"
    kinds: Mapping[str, str] = field(default_factory=dict)
    head: str | None = r".*(pooler|classifier)\..*"
    matrices: list[str] | None = None
    seed: int = 0
    allocations: list[Allocation] = field(default_factory=list, init=False, repr=False)
    weights_before: dict[str, Checksum] = field(default_factory=dict, init=False, repr=False, compare=False)
    weights_merged: dict[str, Checksum] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_numbers(self)

    def prepare(self, model: nn.Module, total_steps: int) -> None:
        """Inject the method into `model` in place and set `requires_grad`; call once, before the optimizer.

        Raises:
            UserError: the model or the number of steps does not fit the method.
        """
        for parameter in model.parameters():
            parameter.requires_grad_(True)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Optimizer groups of (name, parameter) pairs; `decay` says whether weight decay applies.

        By default everything that requires a gradient; biases and normalisation weights do not decay. A group of
        parameters that train only later says from which step on, `born`; until then they have no gradient.
        """
        groups: list[dict[str, Any]] = [{"params": [], "decay": True}, {"params": [], "decay": False}]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[0 if decays(name, parameter) else 1]["params"].append((name, parameter))
        return [group for group in groups if group["params"]]

    def later_parameters(self) -> list[nn.Parameter]:
        """The parameters that begin to train after the start, in the order in which they do."""
        return []

    def begin_step(self, step: int, micro_batches: int = 1, loss_scale: float = 1.0) -> None:
        """Called before the first forward of a step, and again if the step is retried on another batch.

        Args:
            step: optimizer steps already taken.
            micro_batches: number of backward passes in this step.
            loss_scale: factor by which the loss is multiplied before backward (fp16).
        """

    def extra_loss(self) -> Tensor | float:
        """Regulariser to add to the training loss once per step; never part of a reported task loss."""
        return 0.0

    def before_step(self, step: int) -> None:
        """Gradients are ready, weights are old (IncreLoRA grows here)."""

    def after_step(self, step: int) -> None:
        """Weights are new, gradients alive (AdaLoRA prunes here)."""

    def ranks(self) -> dict[str, int]:
        """Rank of every adapted matrix by module name, in model order; empty where ranks mean nothing."""
        return {}

    def planned_ranks(self) -> dict[int, int]:
        """The planned total rank, by the step from which it holds, after `prepare`; empty where ranks mean nothing."""
        ranks = self.ranks()
        return {0: sum(ranks.values())} if ranks else {}

    def scores(self) -> dict[str, float]:
        """Current importance score of every adapted matrix; empty where there is none."""
        return {}

    def orthogonal_penalties(self) -> dict[str, float]:
        """What keeps components apart, by part of them; empty where the method has no such penalty."""
        return {}

    def metrics(self) -> dict[str, float]:
        """The method's values over all matrices that the tracker logs, by W&B key."""
        ranks = self.ranks()
        return {"budget/total_rank": float(sum(ranks.values()))} if ranks else {}

    def matrix_metrics(self) -> dict[str, float]:
        """Rank and importance score of every matrix, by W&B key; logged where they are looked at or change."""
        values = {f"rank/{matrix}": float(rank) for matrix, rank in self.ranks().items()}
        return values | {f"score/{matrix}": score for matrix, score in self.scores().items()}

    def parameters_by_kind(self, model: nn.Module) -> dict[str, int]:
        """Parameters that train: `update` (what the budget counts), `reserve`, `head`; `total` is the whole model."""
        head = {name for name, _ in self.head_parameters(model)}
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        in_head = sum(count for name, count in trained.items() if name in head)
        total = sum(p.numel() for p in model.parameters())
        return {"update": sum(trained.values()) - in_head, "reserve": 0, "head": in_head, "total": total}

    def inputs(self) -> dict[str, str]:
        """Digests of the files that the method reads, by name; empty if it reads none."""
        return {}

    def trained_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Every trained tensor by name; put over the pretrained weights, they give the trained model."""
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        """Structure and state of the method itself (JSON values and tensors), without the model's weights."""
        return {"allocations": [vars(allocation) for allocation in self.allocations]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rebuild structure and state on a prepared model; the weights are loaded afterwards, by name."""
        self.allocations = [Allocation(**allocation) for allocation in state["allocations"]]

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Every matrix's update in evaluation mode as a product B A: its A (r, in) and B (out, r), by module name.

        All scales are included. r counts what reaches the output, which may be more than the rank; a matrix
        whose update is zero may be left out.

        Raises:
            UserError: the update is not of this form.
        """
        instead = "the merged model can be written instead" if self.can_merge else "nor can it be merged"
        raise UserError(f"{self.name} trains no low-rank factors, so no LoRA adapter can hold it; {instead}")

    def warn_of_an_early_end(self, what: str) -> None:
        """Before what was trained leaves: a warning if the run is not at its end."""

    def merge(self, model: nn.Module) -> None:
        """Fold the update into the model's own layers in place; outputs stay the same.

        Raises:
            UserError: it cannot be folded (`can_merge` is False).
        """

    # shared by the methods that adapt chosen matrices

    def head_parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """The head's parameters by name."""
        return [(name, p) for name, p in model.named_parameters() if self.head and re.fullmatch(self.head, name)]

    def adapted_matrices(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The linear layers to adapt, by name, in model order; the first thing that `prepare` asks.

        The model's own weights are noted here, so that what leaves the library later can be compared with them.
        """
        if torch.is_inference_mode_enabled():
            raise UserError("prepare: tensors that are made under torch.inference_mode cannot train; call it outside")
        surgery.refuse_what_holds_more_than_the_model(model)
        if not isinstance(self.kinds, Mapping):
            raise UserError(f"`kinds` must map names to regular expressions over module names, it is {self.kinds!r}")
        if isinstance(self.matrices, str):
            raise UserError(f"`matrices` must be a list of kinds, it is {self.matrices!r}")
        if self.matrices is not None and not self.matrices:
            raise UserError("`matrices` names no kind of matrix; null adapts all")
        patterns = {f"kinds.{kind}": pattern for kind, pattern in self.kinds.items()}
        check_patterns(patterns if self.head is None else patterns | {"head": self.head})
        kinds = self.kinds or surgery.kinds_of_layers(model, self.head)
        unknown = sorted(set(self.matrices or []) - set(kinds))
        if unknown:
            raise UserError(f"`matrices` names {', '.join(unknown)}; the backbone has: {', '.join(kinds)}")
        found = surgery.find_matrices(model, {k: kinds[k] for k in self.matrices or kinds})
        head = self.head_parameters(model)
        if both := [name for name in found if any(parameter.startswith(f"{name}.") for parameter, _ in head)]:
            raise UserError(
                f"{', '.join(both)}: `kinds` adapts it, which freezes it, and `head` trains it in full; let one of the "
                "two expressions leave it out"
            )
        surgery.refuse_half_precision(head)
        self.allocations = []
        self.weights_before = base_weights.checksums(dict(base_weights.tensors(model)))
        return found

    def freeze_all_but_head(self, model: nn.Module) -> None:
        """Freeze the encoder, train pooler and classifier."""
        surgery.freeze(model)
        if self.head:
            surgery.unfreeze_matching(model, self.head)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to biases nor to normalisation weights (vectors called `weight`)."""
    leaf = name.rpartition(".")[2]
    return leaf != "bias" and not (leaf == "weight" and parameter.ndim == 1)


def named(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    """The given parameters with their names in `model`, in model order.

    Raises:
        UserError: the model lacks some of them.
    """
    wanted = {id(parameter) for parameter in parameters}
    found = [(name, p) for name, p in model.named_parameters() if id(p) in wanted]
    if len(found) < len(wanted):
        raise UserError(
            f"the model lacks {len(wanted) - len(found)} of {len(wanted)} parameters of the method: give the model "
            "that method.prepare was given, not a copy or a part of it"
        )
    return found
