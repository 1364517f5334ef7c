"""IncreLoRA as a PEFT method: the benchmark's numbers through PEFT's door, and what PEFT's users expect."""

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from increlora import Growth, IncreLoRA, IncreLoRACallback
from increlora.integrations.peft import IncreLoraCallback, IncreLoraConfig, attach

STEPS, WARMUP, RATE, DECAY = 30, 4, 2e-2, 0.01
GROWTH = {"target_r": 4, "deltaT": 3, "tinit": 3, "seed": 5}
METHOD = {"target_rank": 4, "interval": 3, "init_warmup": 3, "seed": 5}


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, initializer_range=0.2)).to(dtype)


def counting(step: int, sentences: int = 8) -> torch.Tensor:
    start = torch.randint(0, 32, (sentences, 1), generator=torch.Generator().manual_seed(step))
    return (start + torch.arange(12)) % 32


def benchmark() -> tuple[list[float], IncreLoRA]:
    """The method of run.py in the loop that its documentation gives."""
    model, method = llama(), IncreLoRA(head=None, **METHOD)
    method.prepare(model, STEPS)
    optimizer = torch.optim.AdamW(method.param_groups(model), lr=RATE, weight_decay=DECAY)
    growth, losses = Growth(method, model, optimizer, STEPS, WARMUP), []
    for step in range(STEPS):
        growth.begin_step()
        loss = model(input_ids=counting(step), labels=counting(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        growth.before_step()
        optimizer.step()
        growth.after_step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, method


class Run:
    """A plain loop over a model of PEFT; nothing of IncreLoRA in it but `attach`."""

    def __init__(self, model: PeftModel | None = None, warmup: int = WARMUP, **how):
        self.model = model or get_peft_model(llama(), IncreLoraConfig(**GROWTH, total_step=STEPS))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=DECAY)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, warmup, STEPS)
        self.how = {"warmup_steps": warmup, "linear": True} | how
        self.training = None

    def train(self, steps: range, order: str = "zero first", parts: int = 1) -> list[float]:
        self.training = self.training or attach(
            self.model, self.optimizer, gradient_accumulation_steps=parts, **self.how
        )
        self.model.train()
        losses = []

        def backward(step: int) -> torch.Tensor:
            if order == "zero first":
                self.optimizer.zero_grad()
            total = 0.0
            for part in counting(step).chunk(parts):
                loss = self.model(input_ids=part, labels=part).loss / parts
                if order == "zero between":  # as in torch's tutorial, and in Lightning
                    self.optimizer.zero_grad()
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            losses.append(total)
            return loss

        for step in steps:
            if order == "closure":
                self.optimizer.zero_grad()
                self.optimizer.step(partial(backward, step))
            else:
                backward(step)
                self.optimizer.step()
            self.scheduler.step()
        return losses

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.training.bank.parameters()]


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], IncreLoRA]:
    return benchmark()


def same(run: Run, losses: list[float], expected: tuple[list[float], IncreLoRA]) -> None:
    """Equal growth at every step; losses to 1e-6; weights to what 30 steps of Adam make of rounding."""
    method = expected[1]
    assert [(a.step, a.added) for a in run.training.method.allocations] == [
        (a.step, a.added) for a in method.allocations
    ]
    assert losses == pytest.approx(expected[0], abs=1e-6)
    for mine, theirs in zip(run.weights(), method.bank.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=0, atol=5e-5)


def test_a_plain_loop_grows_and_learns_as_the_benchmark_does(expected):
    assert sum(expected[1].ranks().values()) == 4 * 14
    for order in ("zero first", "zero between", "closure"):
        run = Run()
        same(run, run.train(range(STEPS), order), expected)


def test_micro_batches_are_one_step(expected):
    run = Run()
    losses = run.train(range(STEPS), parts=2)
    assert losses == pytest.approx(expected[0], abs=2e-4)
    assert run.training.ranks() == expected[1].ranks()


def trainer(folder: Path, model, callbacks, **more) -> Trainer:
    args = TrainingArguments(
        str(folder), max_steps=STEPS, learning_rate=RATE, weight_decay=DECAY, warmup_steps=WARMUP, report_to="none",
        per_device_train_batch_size=8, logging_steps=1, save_steps=10, disable_tqdm=True, use_cpu=True,
        **{key: more.pop(key) for key in ("lr_scheduler_type", "gradient_checkpointing") if key in more},
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in counting(step)]
    return Trainer(model, args, train_dataset=rows, callbacks=callbacks, **more)


def losses_of(done: Trainer) -> list[float]:
    return [line["loss"] for line in done.state.log_history if "loss" in line]


def test_the_trainer_needs_the_callback_alone(tmp_path):
    plain, method = llama(), IncreLoRA(head=None, **METHOD)
    method.prepare(plain, STEPS)
    args = TrainingArguments(
        str(tmp_path), max_steps=STEPS, learning_rate=RATE, weight_decay=DECAY, warmup_steps=WARMUP
    )
    theirs = IncreLoRACallback(method, plain, args)
    reference = trainer(tmp_path / "ours", plain, [theirs], optimizers=theirs.optimizers)
    reference.train()
    callback = IncreLoraCallback()
    model = get_peft_model(llama(), IncreLoraConfig(**GROWTH))  # the Trainer says how long the run is
    done = trainer(tmp_path / "peft", model, [callback])
    done.train()
    assert callback.training.ranks() == method.ranks()
    assert losses_of(done) == pytest.approx(losses_of(reference), abs=1e-6)
    for mine, other in zip(callback.training.bank.parameters(), method.bank.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=5e-5)

    # in the middle of growth and after it, a fresh model and a fresh Trainer go on to the same bits
    for stopped in (10, 20):
        again = IncreLoraCallback()
        resumed = trainer(tmp_path / "peft", get_peft_model(llama(), IncreLoraConfig(**GROWTH)), [again])
        resumed.train(resume_from_checkpoint=str(tmp_path / "peft" / f"checkpoint-{stopped}"))
        assert again.training.ranks() == callback.training.ranks()
        for mine, other in zip(again.training.bank.parameters(), callback.training.bank.parameters(), strict=True):
            assert torch.equal(mine, other), stopped
