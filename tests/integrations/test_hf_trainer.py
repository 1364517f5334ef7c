"""The Hugging Face Trainer and accelerate grow, learn and resume exactly as our loop does."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from conftest import HELPERS, TINY_KINDS
from distributed_worker import KINDS, tiny_bert
from test_distributed import TORCHRUN, run
from test_loop import TASK, Poison, data, increlora
from transformers import Trainer, TrainingArguments

from baselines.adalora import AdaLoRA
from increlora.algorithm import IncreLoRA
from increlora.errors import UserError
from increlora.glue.batching import collate, epoch_batches
from increlora.glue.loop import train
from increlora.glue.settings import Settings
from increlora.glue.tracker import Tracker
from increlora.integrations.growth import Growth
from increlora.integrations.hf_trainer import IncreLoRACallback
from increlora.method import Method

WORKER = HELPERS / "library_worker.py"
STEPS, BATCH, WARMUP = 30, 10, 4
DATA = data(100)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its state for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def micro_batches(accumulation: int) -> list[dict[str, torch.Tensor]]:
    """What our loop is given, in its order: `accumulation` micro-batches for each of `STEPS` steps."""
    lengths = DATA.train.lengths
    order = [indices for epoch in range(3) for indices in epoch_batches(lengths, BATCH, 41, epoch)]
    size = BATCH // accumulation
    return [collate(DATA.train, batch[i : i + size], 0) for batch in order for i in range(0, BATCH, size)]


def ours(model, method, folder, accumulation: int = 1) -> list[float]:
    """Train in our loop; returns the losses."""
    settings = Settings(
        learning_rate=5e-3, batch_size=BATCH, accumulation=accumulation, epochs=3, warmup_steps=WARMUP, log_interval=1,
        eval_interval=STEPS, weight_decay=0.01, device="cpu", progress=False, seed=41,
    )  # fmt: skip
    tracker = Tracker()
    tracker.start(folder, {}, {"method": {"kinds": TINY_KINDS}})
    method.prepare(model, STEPS)
    train(model, method, TASK, DATA, settings, tracker)
    lines = [json.loads(line) for line in tracker.path.read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def trainer(
    model, method: Method, folder, accumulation: int = 1, micro_batches_per_step: int | None = None, **changes
) -> tuple[Trainer, IncreLoRACallback]:
    """The Trainer, given the same; several processes share the micro-batches of a step."""
    given = dict(
        output_dir=str(folder), max_steps=STEPS, learning_rate=5e-3, weight_decay=0.01, warmup_steps=WARMUP,
        per_device_train_batch_size=1, per_device_eval_batch_size=1, gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential", logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, remove_unused_columns=False,
    )  # fmt: skip
    args = TrainingArguments(**(given | changes))
    method.prepare(model, STEPS)
    callback = IncreLoRACallback(method, model, args)
    batches = micro_batches(micro_batches_per_step or accumulation)
    made = Trainer(
        model, args, train_dataset=batches, eval_dataset=batches[:2], data_collator=lambda items: items[0],
        callbacks=[callback], optimizers=callback.optimizers, compute_loss_func=share_of_loss,
    )  # fmt: skip
    return made, callback


def share_of_loss(outputs, labels, num_items_in_batch) -> torch.Tensor:
    """What a micro-batch adds to the mean task loss of its batch."""
    return TASK.loss(outputs.logits, labels) * len(labels) / num_items_in_batch


def losses(made: Trainer) -> list[float]:
    return [line["loss"] for line in made.state.log_history if "loss" in line]


def accelerated(
    model, method, accumulation=1, folder=None, save_at=None, resume=False, micro_batches_per_step=None
) -> tuple[Growth, list[float]]:
    """An accelerate loop as the example has it; returns its Growth and the losses of this process."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    method.prepare(model, STEPS)
    optimizer = torch.optim.AdamW(method.param_groups(model), lr=5e-3, weight_decay=0.01)
    growth = Growth(method, model, optimizer, STEPS, WARMUP)
    # a generator of its own: starting to iterate draws a number, which would shift dropout after a resume
    own = torch.Generator()
    batches = micro_batches(micro_batches_per_step or accumulation)
    loader = torch.utils.data.DataLoader(batches, collate_fn=lambda items: items[0], generator=own)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if resume:
        accelerator.load_state(folder)
        loader = accelerator.skip_first_batches(loader, growth.step * accumulation)
    model.train()
    losses, total = [], 0.0
    for batch in loader:
        with accelerator.accumulate(model):
            growth.begin_step(accumulation, accelerator.scaler)
            loss = TASK.loss(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])
            accelerator.backward(loss)
            total += loss.item() / accumulation
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                growth.before_step()
            optimizer.step()
            if accelerator.sync_gradients:
                growth.after_step()
                losses, total = [*losses, total], 0.0
            optimizer.zero_grad()
        if accelerator.sync_gradients and growth.step == save_at:
            accelerator.save_state(folder)
    return growth, losses


def same_growth(a: Method, b: Method, tolerance: float = 1e-9) -> None:
    assert b.ranks() == a.ranks()
    for x, y in zip(a.allocations, b.allocations, strict=True):
        assert (x.step, x.added) == (y.step, y.added)
        assert list(y.scores.values()) == pytest.approx(list(x.scores.values()), rel=tolerance, abs=0)


def same_weights(a, b, tolerance: float = 1e-9) -> None:
    first, second = dict(a.named_parameters()), dict(b.named_parameters())
    assert list(first) == list(second)
    for name, parameter in first.items():
        torch.testing.assert_close(second[name], parameter, rtol=tolerance, atol=tolerance, msg=name)
        assert second[name].requires_grad == parameter.requires_grad, name


def adalora() -> AdaLoRA:
    return AdaLoRA(kinds=TINY_KINDS, target_rank=2, init_rank=3, init_warmup=5, final_steps=10, interval=5)


# the same as our loop


@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_the_trainer_does_what_our_loop_does(tiny_deberta, tmp_path, accumulation):
    models, methods = [tiny_deberta, copy.deepcopy(tiny_deberta)], [increlora(), increlora()]
    expected = ours(models[0], methods[0], tmp_path, accumulation)
    made, callback = trainer(models[1], methods[1], tmp_path, accumulation)
    made.train()
    assert [a.step for a in methods[0].allocations] == [8, 12, 16]
    same_growth(*methods)
    same_weights(*models)
    assert losses(made) == pytest.approx(expected, rel=1e-6)  # the Trainer adds them up in float32
    assert [group["born"] for group in callback.growth.optimizer.param_groups] == [0, 0, 1, 9, 13, 17]
    rates = [line["learning_rate"] for line in made.state.log_history if "learning_rate" in line]
    assert rates[:6] == pytest.approx([0, 5e-3 / 4, 5e-3 / 2, 5e-3 * 3 / 4, 5e-3, 5e-3 * 25 / 26])


@pytest.mark.parametrize("accumulation", [1, 5])
def test_accelerate_does_what_our_loop_does(tiny_deberta, tmp_path, accumulation):
    models, methods = [tiny_deberta, copy.deepcopy(tiny_deberta)], [increlora(), increlora()]
    expected = ours(models[0], methods[0], tmp_path, accumulation)
    growth, found = accelerated(models[1], methods[1], accumulation)
    same_growth(*methods)
    same_weights(*models)
    assert found == pytest.approx(expected, rel=1e-9)
    assert growth.step == STEPS and growth.skipped == 0


def test_a_method_that_prunes_after_the_step_does_what_it_does_in_our_loop(tiny_deberta, tmp_path):
    models, methods = [tiny_deberta, copy.deepcopy(tiny_deberta)], [adalora(), adalora()]
    expected = ours(models[0], methods[0], tmp_path)
    made, _ = trainer(models[1], methods[1], tmp_path)
    made.train()
    assert len(methods[0].allocations) > 1
    same_growth(*methods)
    same_weights(*models)
    assert losses(made) == pytest.approx(expected, rel=1e-6)


# several processes


def growing() -> IncreLoRA:
    return IncreLoRA(kinds=KINDS, target_rank=2, top_h=3, interval=4, init_warmup=4, seed=1)


@pytest.mark.parametrize(("loop", "accumulation"), [("trainer", 1), ("accelerate", 5)])
def test_two_processes_do_what_our_loop_does_in_one_and_resume(tmp_path, loop, accumulation):
    model, method = tiny_bert(), growing()
    expected = ours(model, method, tmp_path, 2 * accumulation)
    done = run([*TORCHRUN, WORKER, tmp_path, loop, accumulation])
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "outcome.json").read_text())
    assert [a["step"] for a in found["allocations"]] == [8, 12, 16]
    assert [a["added"] for a in found["allocations"]] == [a.added for a in method.allocations]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            again = torch.tensor(found["weights"][name], dtype=torch.float64)
            torch.testing.assert_close(again, parameter, rtol=1e-6, atol=1e-9, msg=name)
    if loop == "trainer":  # it reports the mean over the processes
        assert found["losses"] == pytest.approx(expected, rel=1e-6)


# resume


def with_dropout(model):
    """The same model with dropout on, so that the random states matter."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) or type(module).__name__ == "StableDropout":
            module.p = module.drop_prob = 0.1
    return model


@pytest.mark.parametrize(("accumulation", "cut"), [(1, 10), (2, 21)])
def test_the_trainer_resumes_as_if_it_had_never_stopped(tiny_deberta, tmp_path, accumulation, cut):
    """Cut between two growths (step 10) and after the last one (step 21)."""
    models = [with_dropout(tiny_deberta), with_dropout(copy.deepcopy(tiny_deberta))]
    methods = [increlora(dropout=0.1), increlora(dropout=0.1)]
    whole, _ = trainer(models[0], methods[0], tmp_path, accumulation, save_strategy="steps", save_steps=cut)
    whole.train()
    torch.rand(3)  # another process would be elsewhere in its random stream
    resumed, callback = trainer(models[1], methods[1], tmp_path, accumulation)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{cut}"))
    assert resumed._initial_global_step == cut and callback.growth.step == STEPS
    same_growth(*methods, tolerance=0)
    same_weights(*models, tolerance=0)
    assert losses(resumed) == losses(whole)
    groups = [[(g["born"], g["param_names"]) for g in made.optimizer.param_groups] for made in (whole, resumed)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_accelerate_resumes_as_if_it_had_never_stopped(tiny_deberta, tmp_path, accumulation):
    models = [with_dropout(tiny_deberta), with_dropout(copy.deepcopy(tiny_deberta))]
    methods = [increlora(dropout=0.1), increlora(dropout=0.1)]
    _, whole = accelerated(models[0], methods[0], accumulation, tmp_path, save_at=10)
    torch.rand(3)
    growth, rest = accelerated(models[1], methods[1], accumulation, tmp_path, resume=True)
    assert growth.step == STEPS and rest == whole[10:]
    same_growth(*methods, tolerance=0)
    same_weights(*models, tolerance=0)


def test_the_best_model_is_loaded_with_the_structure_it_had(tiny_deberta, tmp_path):
    """The first evaluation counts as the best, so the model has grown twice since."""
    scores = iter([3.0, 2.0, 1.0])
    method, seen = increlora(), {}
    made, callback = trainer(
        tiny_deberta, method, tmp_path, save_strategy="steps", save_steps=10, eval_strategy="steps", eval_steps=10,
        load_best_model_at_end=True, metric_for_best_model="made_up", greater_is_better=True,
    )  # fmt: skip

    def evaluate(prediction):
        seen.setdefault(callback.growth.step, (method.ranks(), prediction.predictions))
        return {"made_up": next(scores)}

    made.compute_metrics = evaluate
    made.train()
    ranks, predictions = seen[10]
    assert sum(ranks.values()) < method.allocator.budget and sum(seen[20][0].values()) == 24
    assert method.ranks() == ranks
    batches = made.eval_dataset
    again = torch.cat([tiny_deberta(b["input_ids"], b["attention_mask"]).logits for b in batches]).detach()
    torch.testing.assert_close(again, torch.from_numpy(predictions), rtol=1e-12, atol=1e-12)
    assert all(matrix.reserve_learns for matrix in method.bank.matrices.values())  # every matrix has its reserve back


def test_merged_the_model_is_plain_again_and_its_weights_say_the_same(tiny_deberta, tmp_path):
    made, callback = trainer(tiny_deberta, increlora(), tmp_path)
    made.train()
    batch = {key: value for key, value in made.eval_dataset[0].items() if key != "labels"}
    tiny_deberta.eval()
    before, names = tiny_deberta(**batch).logits, set(tiny_deberta.state_dict())
    callback.growth.merge()
    made.save_model(str(tmp_path / "merged"))
    plain = type(tiny_deberta).from_pretrained(tmp_path / "merged", dtype=torch.float64)
    assert set(plain.state_dict()) == {name for name in set(tiny_deberta.state_dict())} != names
    torch.testing.assert_close(plain.eval()(**batch).logits, before, rtol=1e-9, atol=1e-9)


# what else a run may meet


def test_the_penalty_is_trained_on_but_not_reported(tiny_deberta, tmp_path):
    models, found = [tiny_deberta, copy.deepcopy(tiny_deberta)], []
    for model, weight in zip(models, (0.0, 100.0), strict=True):
        made, _ = trainer(model, increlora(orth_weight=weight), tmp_path, accumulation=2)
        made.train()
        found.append(losses(made))
    assert found[0][0] == found[1][0]  # the first step: same weights
    assert max(found[1]) < 5
    norms = [model.increlora_bank.rows("deberta.encoder.layer.0.output.dense", 0)[0].norm().item() for model in models]
    assert 2 * norms[0] < norms[1] < 1  # the penalty draws them to 1


def test_bf16_trains_and_reaches_the_budget(tiny_deberta, tmp_path):
    made, callback = trainer(tiny_deberta.float(), increlora(), tmp_path, bf16=True)
    made.train()
    assert sum(callback.growth.method.ranks().values()) == 24
    assert all(p.dtype == torch.float32 for p in tiny_deberta.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 with loss scaling needs a GPU")
def test_fp16_trains_reaches_the_budget_and_scores_without_the_scale(tiny_deberta, tmp_path):
    made, callback = trainer(tiny_deberta.float(), increlora(), tmp_path, fp16=True, use_cpu=False)
    made.train()
    method = callback.growth.method
    assert callback.growth.step + callback.growth.skipped == STEPS
    assert sum(method.ranks().values()) == 24
    assert all(0 < score < 1 for allocation in method.allocations for score in allocation.scores.values())


def test_a_step_that_is_not_finite_changes_nothing_and_growth_comes_with_the_next(tiny_deberta, tmp_path):
    kinds = {name: f"model\\.{pattern}" for name, pattern in TINY_KINDS.items()}
    poisoned, method = Poison(tiny_deberta, {0, 9, 10}), increlora(kinds=kinds)
    made, callback = trainer(poisoned, method, tmp_path)
    made.train()
    assert (callback.growth.step, callback.growth.skipped) == (27, 3)
    assert [a.step for a in method.allocations] == [8, 12, 16] and sum(method.ranks().values()) == 24
    assert all(p.isfinite().all() for p in tiny_deberta.parameters())
    assert all(math.isfinite(score) for a in method.allocations for score in a.scores.values())


# bad input


def test_a_trainer_with_an_optimizer_of_its_own_is_refused(tiny_deberta, tmp_path):
    made, _ = trainer(tiny_deberta, increlora(), tmp_path)
    made.optimizer = torch.optim.AdamW([p for p in tiny_deberta.parameters() if p.requires_grad])
    with pytest.raises(UserError, match=r"optimizers=callback\.optimizers"):
        made.train()


def test_another_number_of_steps_is_refused_with_the_right_one(tiny_deberta, tmp_path):
    made, _ = trainer(tiny_deberta, increlora(), tmp_path)
    made.args.max_steps = 20
    with pytest.raises(UserError, match="takes 20 steps, the method was prepared for 30"):
        made.train()


def test_training_on_without_resuming_is_refused(tiny_deberta, tmp_path):
    made, _ = trainer(tiny_deberta, increlora(), tmp_path)
    made.train()
    with pytest.raises(UserError, match="begins at step 0, the model stands at 30"):
        made.train()


@pytest.mark.parametrize(("kind", "n_gpu"), [("FSDP", 1), ("DEEPSPEED", 1), ("NO", 2)])
def test_a_model_in_pieces_is_refused(tiny_deberta, tmp_path, kind, n_gpu):
    made, callback = trainer(tiny_deberta, increlora(), tmp_path)
    state = SimpleNamespace(distributed_type=DistributedType[kind])
    optimizer = SimpleNamespace(optimizer=callback.growth.optimizer, accelerator_state=state)
    made.state.max_steps = STEPS
    with pytest.raises(UserError, match="one process per GPU"):
        callback.on_train_begin(SimpleNamespace(n_gpu=n_gpu), made.state, made.control, optimizer=optimizer)


def test_a_checkpoint_of_other_matrices_is_refused(tiny_deberta, tmp_path):
    other = copy.deepcopy(tiny_deberta)
    made, _ = trainer(tiny_deberta, increlora(), tmp_path, save_strategy="steps", save_steps=10)
    made.train()
    resumed, _ = trainer(other, increlora(matrices=["query", "value"]), tmp_path)
    with pytest.raises(UserError, match="adapts 12 matrices, this one 4"):
        resumed.train(resume_from_checkpoint=True)
