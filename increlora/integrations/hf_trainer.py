"""IncreLoRA, or any method of this repository, in the Hugging Face Trainer."""

from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    PreTrainedModel,
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from increlora.errors import UserError
from increlora.groups import parameter_groups
from increlora.integrations.growth import Growth
from increlora.method import Method

READ = (  # of the arguments, when the callback is made
    "learning_rate", "weight_decay", "warmup_steps", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon",
    "lr_scheduler_type", "lr_scheduler_kwargs",
)  # fmt: skip
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class IncreLoRACallback(TrainerCallback):
    """Lets a method train in the Trainer:

        method.prepare(model, total_steps)
        callback = IncreLoRACallback(method, model, args, total_steps)
        trainer = Trainer(model, args, ..., callbacks=[callback], optimizers=callback.optimizers)

    The optimizer is the one that `args` describes (`optim`, `learning_rate`, `weight_decay`, ...). The schedule
    is the paper's, a restart warmup over `args.warmup_steps` and linear decay; another `args.lr_scheduler_type`
    than `linear` is refused. The method's own loss is added once per optimizer step and never to a reported loss.
    Checkpoints are the Trainer's, and `resume_from_checkpoint` and `load_best_model_at_end` work as they always do.

    When training is over, `callback.growth.merge()` leaves a plain model to save.

    Args:
        method: prepared on `model` for `total_steps` steps.
        model: what the Trainer is given.
        args: what the Trainer is given.
        total_steps: optimizer steps of the whole run; None: `args.max_steps`.

    Raises:
        UserError: `args` asks for another schedule. When training begins: the Trainer takes another number of steps,
            begins at another step than the model stands at, trains another model or with other arguments, was not
            given `callback.optimizers`, or shards the model.
    """

    def __init__(self, method: Method, model: PreTrainedModel, args: TrainingArguments, total_steps: int | None = None):
        if args.lr_scheduler_type != SchedulerType.LINEAR or args.lr_scheduler_kwargs:
            raise UserError(
                f"lr_scheduler_type={args.lr_scheduler_type.value!r} is not used: the schedule is a restart warmup "
                "with linear decay; give TrainingArguments lr_scheduler_type='linear' and no lr_scheduler_kwargs"
            )
        if args.auto_find_batch_size:
            raise UserError(
                "auto_find_batch_size starts the training again in the middle of it, where the ranks have grown: set "
                "per_device_train_batch_size, and leave auto_find_batch_size out"
            )
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer: torch.optim.Optimizer = kind(parameter_groups(method, model, args.weight_decay), **options)
        total_steps = args.max_steps if total_steps is None else total_steps
        self.growth = Growth(method, model, optimizer, total_steps, args.get_warmup_steps(total_steps))
        self.optimizers = optimizer, GroupsDecide(optimizer)
        self.made_with = {name: getattr(args, name) for name in READ}
        self.over = False  # the step under way comes after the last one

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        growth, optimizer = self.growth, parts["optimizer"]
        if optimizer.accelerator_state.distributed_type in SHARDED or args.n_gpu > 1:
            raise UserError(
                "a method that grows needs the whole model in every process: start one process per GPU (torchrun, "
                "accelerate launch) with DistributedDataParallel, not FSDP, DeepSpeed or DataParallel"
            )
        if optimizer.optimizer is not growth.optimizer:
            raise UserError("give the Trainer the callback's optimizer: Trainer(..., optimizers=callback.optimizers)")
        changed = [f"{name} {value}, now {getattr(args, name)}" for name, value in self.made_with.items()
                   if getattr(args, name) != value]  # fmt: skip
        if changed:
            raise UserError(
                f"the Trainer's arguments are not those that the callback was made with: {'; '.join(changed)}. Give "
                "both the same `args`, and change nothing in them afterwards"
            )
        if parts["model"] is not growth.model:
            raise UserError("the Trainer trains another model than the callback was given: give both the same object")
        if state.max_steps != growth.total_steps:
            raise UserError(
                f"the Trainer takes {state.max_steps} steps, the method was prepared for {growth.total_steps}: "
                "give method.prepare and IncreLoRACallback the same total_steps as the Trainer takes"
            )
        if state.global_step != growth.step + growth.skipped:
            raise UserError(
                f"the Trainer begins at step {state.global_step}, the model stands at {growth.step + growth.skipped}: "
                "resume from a checkpoint (resume_from_checkpoint=True), or prepare a fresh model"
            )

        growth.keeps_checkpoints(True)  # they hold the unmerged model, to resume from

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        self.growth.keeps_checkpoints(False)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        self.over = self.growth.step >= self.growth.total_steps
        if self.over:  # the Trainer has resumed from the last checkpoint, and takes a step before it looks where it is
            return
        self.growth.begin_step(args.gradient_accumulation_steps, parts["optimizer"].scaler)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        if self.over:
            self.growth.optimizer.zero_grad(set_to_none=True)
            return
        self.growth.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        self.growth.after_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        if self.over:
            state.global_step -= 1
            control.should_training_stop = True


class GroupsDecide(LRScheduler):
    """The scheduler that the Trainer requires; it changes no learning rate, because `Growth` sets them all."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        super().__init__(optimizer)
        del optimizer.step  # torch's mark of a scheduler that sets rates, by which Growth refuses other ones

    def step(self, epoch: int | None = None) -> None:
        self._step_count += 1

    def get_lr(self) -> list[float | torch.Tensor]:
        return self.get_last_lr()

    def get_last_lr(self) -> list[float | torch.Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]
