"""Whole states of a model with an adapter, and what is loaded or deleted at a wrong time: nothing is wrong unseen."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from naming import naming
from peft import PeftModel, get_peft_model
from test_peft import GROWTH, STEPS, Run, counting, llama, model_and_optimizer
from transformers import Trainer, TrainingArguments

from increlora.errors import UserError
from increlora.integrations.peft import IncreLoraCallback, IncreLoraConfig, attach

CUT = 10  # in the middle of growth


@pytest.fixture(scope="module")
def whole() -> Run:
    run = Run()
    run.train(range(STEPS))
    return run


def stopped() -> Run:
    run = Run()
    run.train(range(CUT))
    return run


def attached() -> Run:
    run = Run()
    run.training = attach(run.model, run.optimizer, **run.how)
    return run


def goes_on(run: Run, states: tuple[dict, dict], whole: Run) -> None:
    run.optimizer.load_state_dict(copy.deepcopy(states[0]))  # it keeps the tensors that it is given
    run.scheduler.load_state_dict(states[1])
    run.train(range(CUT, STEPS))
    assert run.training.ranks() == whole.training.ranks()
    for mine, other in zip(run.weights(), whole.weights(), strict=True):
        assert torch.equal(mine, other)


def test_a_state_of_the_whole_model_has_the_ranks_and_goes_on_to_the_same_bits(whole):
    first = stopped()
    state = copy.deepcopy(first.model.state_dict())
    states = copy.deepcopy((first.optimizer.state_dict(), first.scheduler.state_dict()))
    run = attached()
    assert not any(run.model.load_state_dict(state))  # no key is missing, none is too much
    goes_on(run, states, whole)
    model = get_peft_model(llama(), IncreLoraConfig(**GROWTH))  # its growth is not planned yet
    model.load_state_dict(state)
    goes_on(Run(model), states, whole)


def test_a_state_of_accelerate_goes_on_to_the_same_bits(whole, tmp_path):
    first = Run()
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(first.model, first.optimizer)
    first.train(range(CUT))
    accelerator.save_state(str(tmp_path))
    states = copy.deepcopy((first.optimizer.state_dict(), first.scheduler.state_dict()))
    run, accelerator = attached(), Accelerator(cpu=True)
    accelerator.prepare(run.model, run.optimizer)
    accelerator.load_state(str(tmp_path))
    goes_on(run, states, whole)


def weights_of_base(run: Run) -> list[torch.Tensor]:
    return [layer.get_base_layer().weight.clone() for layer in run.training.adapter.layers.values()]


def test_what_is_merged_is_neither_replaced_nor_deleted(whole, tmp_path):
    whole.model.save_pretrained(tmp_path)
    state = copy.deepcopy(stopped().model.state_dict())
    run = stopped()
    before = weights_of_base(run)
    run.model.merge_adapter()
    for change, match in (
        (lambda: run.model.load_adapter(tmp_path, "default"), "`default` is merged into the weights"),
        (lambda: run.model.load_state_dict(state, strict=False), "`default` is merged into the weights"),
        (lambda: run.model.delete_adapter("default"), "while they are merged. Please unmerge them"),  # by PEFT itself
    ):
        with pytest.raises(ValueError, match=match):
            change()
    run.model.unmerge_adapter()
    for mine, other in zip(weights_of_base(run), before, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def state_without_ranks(tmp: Path) -> None:
    state = {key: value for key, value in stopped().model.state_dict().items() if "increlora_state" not in key}
    attached().model.load_state_dict(state)


def state_of_other_matrices(tmp: Path) -> None:
    model, optimizer = model_and_optimizer(total_step=STEPS, target_modules=["q_proj"])
    attach(model, optimizer)
    attached().model.load_state_dict(model.state_dict())


def final_ranks_in_the_middle(tmp: Path) -> None:
    run = Run()
    run.train(range(STEPS))
    run.model.save_pretrained(tmp)
    other = stopped()
    other.model.load_adapter(tmp, "default", is_trainable=True)
    with torch.no_grad():
        assert torch.equal(other.model.eval()(input_ids=counting(9)).logits, run.model.eval()(counting(9)).logits)
    other.train(range(CUT, CUT + 1))


def more_steps_than_the_trainer_takes(tmp: Path) -> None:
    model = get_peft_model(llama(), IncreLoraConfig(**GROWTH, total_step=2 * STEPS))
    args = TrainingArguments(str(tmp), max_steps=STEPS, report_to="none", use_cpu=True, disable_tqdm=True)
    rows = [{"input_ids": row, "labels": row} for row in counting(0)]
    Trainer(model, args, train_dataset=rows, callbacks=[IncreLoraCallback()]).train()


def test_what_would_be_wrong_unseen_is_refused(tmp_path):
    cases: tuple[tuple[Callable[[Path], None], str], ...] = (
        (state_without_ranks, "tensors of the adapter `default` without its ranks"),
        (state_of_other_matrices, "has other matrices than `default` of this model"),
        (final_ranks_in_the_middle, "was loaded with other tensors since `attach`; make a new optimizer"),
        (
            more_steps_than_the_trainer_takes,
            f"the run has {STEPS} steps, and `total_step` of the adapter is {2 * STEPS}",
        ),
    )
    for refused, match in cases:
        with naming(refused.__name__), pytest.raises(UserError, match=match):
            refused(tmp_path / refused.__name__)


def test_a_state_of_final_ranks_needs_no_state(whole, tmp_path):
    whole.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    with torch.no_grad():
        for parameter in again.base_model.increlora_bank.parameters():
            parameter.zero_()
    assert not any(again.load_state_dict(loaded.state_dict()))
    for mine, other in zip(again.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine, other)
