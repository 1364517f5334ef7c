"""IncreLoRA as a PEFT method: the benchmark's numbers through PEFT's door, and what PEFT's users expect."""

import copy
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from naming import naming
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from increlora import Growth, IncreLoRA, IncreLoRACallback
from increlora.errors import UserError
from increlora.integrations.peft import IncreLoraCallback, IncreLoraConfig, attach, export_lora

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


def test_a_compiled_model_grows_as_another_and_is_compiled_once(expected):
    graphs, run = [], Run()
    run.model = torch.compile(run.model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    losses = run.train(range(2))
    first = len(graphs)
    same(run, losses + run.train(range(2, STEPS)), expected)
    assert 0 < first == len(graphs)


def trainer(folder: Path, model, callbacks, **more) -> Trainer:
    args = TrainingArguments(
        str(folder), max_steps=more.pop("max_steps", STEPS), learning_rate=RATE, weight_decay=DECAY,
        warmup_steps=WARMUP, report_to="none",
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


# what PEFT's users do with an adapter


def test_an_adapter_in_the_middle_of_growth_goes_on_in_a_plain_loop_to_the_same_bits(tmp_path):
    whole = Run()
    losses = whole.train(range(STEPS))
    first = Run()
    cut = first.train(range(10))
    first.model.save_pretrained(tmp_path)
    states = copy.deepcopy((first.optimizer.state_dict(), first.scheduler.state_dict()))
    again = Run(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True))
    again.optimizer.load_state_dict(states[0])
    again.scheduler.load_state_dict(states[1])
    assert cut + again.train(range(10, STEPS)) == losses
    for mine, other in zip(again.weights(), whole.weights(), strict=True):
        assert torch.equal(mine, other)


def test_an_adapter_that_is_saved_is_small_and_gives_the_same_outputs(tmp_path):
    run, x = Run(), counting(99)
    for until, name in ((STEPS // 2, "growing"), (STEPS, "finished")):
        run.train(range(run.training.step if run.training else 0, until))
        model = run.model.eval()
        model.save_pretrained(tmp_path / name)
        for low in (False, True):
            loaded = PeftModel.from_pretrained(llama(), tmp_path / name, low_cpu_mem_usage=low).eval()
            torch.testing.assert_close(loaded(input_ids=x).logits, model(input_ids=x).logits, rtol=0, atol=1e-6)
        assert loaded.base_model.adapters["default"].ranks() == run.training.ranks()
        merged = loaded.merge_and_unload()
        assert not any("increlora" in key for key in merged.state_dict()) and not hasattr(merged, "peft_config")
        torch.testing.assert_close(merged(input_ids=x).logits, model(input_ids=x).logits, rtol=0, atol=1e-4)

    ranks = run.training.ranks()
    lora = LoraConfig(r=4, rank_pattern=ranks, target_modules="all-linear")
    get_peft_model(llama(), lora).save_pretrained(tmp_path / "lora")
    sizes = {name: (tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("finished", "lora")}
    assert sizes["finished"] <= 1.1 * sizes["lora"], sizes


def test_a_finished_adapter_trains_on_at_its_ranks_and_says_so(tmp_path):
    run = Run()
    run.train(range(STEPS))
    run.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    more = Run(loaded)
    with pytest.warns(UserWarning, match="was loaded with final ranks: it trains on, and does not grow"):
        losses = more.train(range(STEPS))
    assert more.training.ranks() == run.training.ranks() and losses[-1] < losses[0]


def test_a_finished_adapter_trains_on_in_trainers_of_other_lengths_and_resumes_to_the_same_bits(tmp_path):
    run = Run()
    run.train(range(STEPS))
    run.model.save_pretrained(tmp_path / "first")  # its `total_step` is 30

    def again(name: str, steps: int) -> tuple[Trainer, IncreLoraCallback]:
        loaded = PeftModel.from_pretrained(llama(), tmp_path / "first", is_trainable=True)
        callback = IncreLoraCallback()
        return trainer(tmp_path / name, loaded, [callback], max_steps=steps), callback

    with pytest.warns(UserWarning, match="was loaded with final ranks"):
        whole, callback = again("second", 20)
        whole.train()
        parted, resumed = again("second", 20)
        parted.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-10"))
        assert resumed.training.step == 20 and resumed.training.ranks() == run.training.ranks()
        for mine, other in zip(resumed.training.bank.parameters(), callback.training.bank.parameters(), strict=True):
            assert torch.equal(mine, other)
        export_lora(tmp_path / "second" / "checkpoint-10", tmp_path / "lora")

        # a second Trainer on the same model begins another run
        third = IncreLoraCallback()
        trainer(tmp_path / "third", whole.model, [third], max_steps=10).train()
    assert third.training.step == 10
    whole.model.save_pretrained(tmp_path / "third" / "end")
    PeftModel.from_pretrained(llama(), tmp_path / "third" / "end")

    # one that grew in this process is not at the start of a run
    with naming("another Trainer"), pytest.raises(UserError, match="to train on at its ranks, save it and load it"):
        trainer(tmp_path / "fourth", run.model, [IncreLoraCallback()], max_steps=STEPS).train()


def test_several_adapters_are_in_one_model_and_one_trains():
    run = Run()
    model, x = run.model, counting(99)
    model.add_adapter("other", IncreLoraConfig(**GROWTH | {"target_r": 2}, total_step=STEPS, init_weights=False))
    run.train(range(STEPS))
    frozen = {n: p.clone() for n, p in model.named_parameters() if ".other." in n}
    assert frozen and not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    model.eval()
    alone = {}
    with torch.no_grad():
        for name in ("default", "other"):
            model.set_adapter(name)
            alone[name] = model(input_ids=x).logits
        with model.disable_adapter():
            alone["__base__"] = model(input_ids=x).logits
        names = ["default", "__base__", "other", "default", "other", "__base__", "default", "other"]
        mixed = model(input_ids=x, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=0, atol=1e-5)
    assert not torch.allclose(alone["default"], alone["other"], atol=1e-2)
    model.set_adapter("other")
    second = Run(model, warmup=0)
    second.train(range(STEPS))
    assert sum(second.training.ranks().values()) == 2 * 14 and sum(run.training.ranks().values()) == 4 * 14
    model.delete_adapter("other")
    assert not any(".other." in key for key in model.state_dict())


def test_a_model_in_half_precision_trains_components_in_full():
    config = IncreLoraConfig(**GROWTH, total_step=60)
    model = get_peft_model(llama(torch.bfloat16), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    training = attach(model, optimizer)
    start = training.bank.all_groups[0].rows["32"].detach().clone()
    for step in range(60):
        optimizer.zero_grad()
        model(input_ids=counting(step), labels=counting(step)).loss.backward()
        optimizer.step()
    now = training.bank.all_groups[0].rows["32"]
    assert now.dtype == torch.float32 and (now == start).float().mean() < 0.01
    assert sum(training.ranks().values()) == 4 * 14


def test_what_trl_casts_of_a_quantized_model_trains_in_full_and_resumes(tmp_path):
    def cast() -> PeftModel:
        model = get_peft_model(llama(), IncreLoraConfig(**GROWTH))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        return model

    whole, again = IncreLoraCallback(), IncreLoraCallback()
    trainer(tmp_path, cast(), [whole]).train()
    assert {p.dtype for p in whole.training.bank.parameters()} == {torch.float32}
    assert sum(whole.training.ranks().values()) == 4 * 14
    trainer(tmp_path, cast(), [again]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    for mine, other in zip(again.training.bank.parameters(), whole.training.bank.parameters(), strict=True):
        assert torch.equal(mine, other)
    with pytest.raises(ValueError, match="bfloat16, in which most of every step is lost"):
        attach(model := cast(), torch.optim.AdamW(model.parameters()), total_step=STEPS)


def test_gradient_checkpointing_changes_nothing(expected):
    for reentrant in (False, True):
        model = get_peft_model(llama(), IncreLoraConfig(**GROWTH, total_step=STEPS))
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        run = Run(model)
        same(run, run.train(range(STEPS)), expected)


def test_another_schedule_is_multiplied_by_the_warmup_of_what_is_new():
    run = Run()
    run.train(range(1))
    births = sorted(set(run.training.births.values()))
    for linear, warmup, step, expected in (
        (False, 4, births[1], 0.0),
        (False, 4, births[1] + 1, 0.25),
        (False, 4, births[1] + 9, 1.0),
        (False, 0, births[1], 1.0),
        (True, 4, births[1] + 4, (STEPS - WARMUP) / (STEPS - births[1] - 4)),  # the full rate again
    ):
        run.training.linear, run.training.warmup_steps = linear, warmup
        run.training.adapter.step = step
        assert run.training.factor(births[1]) == pytest.approx(expected), (linear, warmup, step)
        assert run.training.factor(0) == 1.0


def test_checkpoints_keep_the_groups_that_the_optimizer_was_made_with():
    run = Run()
    run.train(range(STEPS))
    groups = run.optimizer.state_dict()["param_groups"]
    assert len(groups) == 1 and len(run.scheduler.get_last_lr()) == 1
    assert len(groups[0]["params"]) == len(list(run.model.parameters())), "and all parameters"


def test_the_defaults_refuse_no_rank_and_end_growth_in_the_first_half():
    for rank in (2, 4, 8, 16, 32, 64):
        for matrices in (1, 12, 154, 224, 294):
            for steps in (20, 50, 101, 250, 1000, 3900):
                config = IncreLoraConfig(target_r=rank)
                method = IncreLoRA(**config.settings())
                method.interval, method.init_warmup = config.interval_and_warmup(steps)
                plan = method.schedule(matrices, steps)
                with naming((rank, matrices, steps)):
                    assert sum(plan.growths()) == (rank - 1) * matrices
                    assert len(set(plan.growths()[:-1])) <= 1 and plan.growths()[-1] <= plan.growths()[0]
                    assert plan.growth_steps()[-1] <= steps // 2 + plan.interval


def test_accumulated_gradients_are_one_batch_in_the_trainer(tmp_path):
    found = []
    for parts in (1, 4):
        callback = IncreLoraCallback()
        args = TrainingArguments(
            str(tmp_path), max_steps=STEPS, learning_rate=RATE, warmup_steps=WARMUP, report_to="none", use_cpu=True,
            per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts, disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in counting(step)]
        model = get_peft_model(llama(torch.float64), IncreLoraConfig(**GROWTH))
        Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
        found.append(callback.training)
    assert found[0].ranks() == found[1].ranks() and sum(found[0].ranks().values()) == 4 * 14
    for one, other in zip(found[0].bank.parameters(), found[1].bank.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_what_is_done_to_a_model_between_two_steps_changes_nothing(tmp_path):
    expected = Run()
    expected.train(range(STEPS))
    run = Run()
    run.train(range(10))
    run.model.eval()(input_ids=counting(5), labels=counting(5))  # with gradients, by mistake
    with run.model.disable_adapter(), torch.no_grad():
        run.model(input_ids=counting(1))
    run.model.save_pretrained(tmp_path / "middle")
    copy.deepcopy(run.model)
    run.train(range(10, STEPS))
    for mine, other in zip(run.weights(), expected.weights(), strict=True):
        assert torch.equal(mine, other)
    merged = Run()
    merged.train(range(10))
    merged.model.merge_adapter()
    with pytest.raises(RuntimeError, match="does not require grad"):  # nothing trains unseen
        merged.train(range(10, 11))
    merged.model.unmerge_adapter()
    merged.train(range(10, STEPS))
    assert merged.training.ranks() == expected.training.ranks()


def test_an_adapter_that_was_saved_before_any_step_grows_when_it_is_loaded(tmp_path):
    expected = Run()
    losses = expected.train(range(STEPS))
    get_peft_model(llama(), IncreLoraConfig(**GROWTH, total_step=STEPS)).save_pretrained(tmp_path)
    again = Run(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True))
    assert again.train(range(STEPS)) == losses and again.training.ranks() == expected.training.ranks()


def test_the_best_checkpoint_at_the_end_has_its_own_ranks(tmp_path):
    callback, model = IncreLoraCallback(), get_peft_model(llama(), IncreLoraConfig(**GROWTH))
    args = TrainingArguments(
        str(tmp_path), max_steps=STEPS, learning_rate=RATE, report_to="none", per_device_train_batch_size=8,
        eval_strategy="steps", eval_steps=10, save_steps=10, load_best_model_at_end=True, use_cpu=True,
        metric_for_best_model="eval_loss", greater_is_better=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in counting(step)]
    done = Trainer(model, args, train_dataset=rows, eval_dataset=rows[:16], callbacks=[callback])
    done.train()
    assert done.state.best_model_checkpoint.endswith("checkpoint-10")  # the worst one, still growing
    assert sum(model.base_model.adapters["default"].ranks().values()) < 4 * 14
    assert done.evaluate()["eval_loss"] == pytest.approx(done.state.best_metric, abs=1e-6)


# what cannot be right


def switched_in_the_middle() -> None:
    run = Run()
    run.model.add_adapter("other", IncreLoraConfig(**GROWTH, total_step=STEPS))
    run.train(range(1))
    run.model.set_adapter("other")
    run.train(range(1, 2))


def two_that_train() -> None:
    model, optimizer = model_and_optimizer(total_step=STEPS)
    model.add_adapter("other", IncreLoraConfig(**GROWTH, total_step=STEPS))
    model.base_model.set_adapter(["default", "other"])
    attach(model, optimizer)


def an_optimizer_made_too_early() -> None:
    base = llama()
    optimizer = torch.optim.AdamW(base.parameters())
    attach(get_peft_model(base, IncreLoraConfig(**GROWTH, total_step=STEPS)), optimizer)


def test_a_forgotten_call_is_said_once():
    model = get_peft_model(llama(), IncreLoraConfig(**GROWTH, total_step=STEPS))
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(2):
        model(input_ids=counting(step), labels=counting(step)).loss.backward()
        if step == 0:
            with pytest.warns(UserWarning, match="trains at its first ranks and does not grow"):
                optimizer.step()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                optimizer.step()


def model_and_optimizer(**config) -> tuple[PeftModel, torch.optim.Optimizer]:
    model = get_peft_model(llama(), IncreLoraConfig(**GROWTH | config))
    return model, torch.optim.AdamW(model.parameters())


def step_without_a_forward() -> None:
    model, optimizer = model_and_optimizer(total_step=STEPS)
    attach(model, optimizer)
    optimizer.step()


def more_micro_batches_than_were_said() -> None:
    run = Run()
    run.training = attach(run.model, run.optimizer)
    run.train(range(1), parts=3)


def sharded() -> None:
    model, optimizer = model_and_optimizer(total_step=STEPS)
    next(model.base_model.increlora_bank.parameters()).ds_id = 1
    attach(model, optimizer)


def another_optimizer() -> None:
    attach(model_and_optimizer(total_step=STEPS)[0], model_and_optimizer()[1])


def frozen() -> None:
    model, optimizer = model_and_optimizer(total_step=STEPS, inference_mode=True)
    attach(model, optimizer)


def other_matrices(tmp: Path) -> None:
    get_peft_model(llama(), IncreLoraConfig(target_modules=["q_proj"])).save_pretrained(tmp)
    model = get_peft_model(llama(), IncreLoraConfig(target_modules=["q_proj", "v_proj"]))
    model.load_adapter(tmp, "default", is_trainable=True)


def other_settings(tmp: Path) -> None:
    run = Run()
    run.train(range(10))
    run.model.save_pretrained(tmp)
    get_peft_model(llama(), IncreLoraConfig(**GROWTH, lora_alpha=8)).load_adapter(tmp, "default", is_trainable=True)


def test_what_cannot_be_right_is_refused(tmp_path):
    for refused, match in (
        (step_without_a_forward, "no gradient has reached the adapter `default`"),
        (more_micro_batches_than_were_said, "announced: raise `gradient_accumulation_steps` of attach"),
        (lambda: attach(*model_and_optimizer()), "how long is the run\\? Give `total_step`"),
        (lambda: model_and_optimizer(total_step=8), "the growth schedule does not fit"),
        (lambda: attach(llama(), model_and_optimizer()[1]), "has no IncreLoRA adapter"),
        (sharded, "is spread over processes or devices"),
        (another_optimizer, "the optimizer does not hold the parameters of the adapter `default`"),
        (frozen, "0 adapters are active and train"),
        (switched_in_the_middle, "no gradient has reached the adapter `default`"),
        (two_that_train, "2 adapters are active and train"),
        (an_optimizer_made_too_early, "make it after get_peft_model"),
        (lambda: Run().train(range(STEPS + 1)), f"all {STEPS} steps of the run are done"),
        (lambda: IncreLoraConfig(target_r=0), "`target_r` must be a whole number above 0"),
        (lambda: IncreLoraConfig(tinit=2.5), "`tinit` must be a whole number, 0 or more, it is 2.5"),
        (lambda: attach(*model_and_optimizer(), total_step=30.0), "`total_step` must be a whole number of steps above"),
        (lambda: IncreLoraConfig(lora_dropout=1.0), "`lora_dropout` must be in \\[0, 1\\)"),
        (lambda: model_and_optimizer(total_step=STEPS, init_r=5), "Raise `target_r` or lower `init_r`"),
        (lambda: get_peft_model(llama(), IncreLoraConfig(target_modules=["embed_tokens"])), "is a Embedding, and only"),
        (lambda: other_matrices(tmp_path / "matrices"), "has other matrices than `default` of this model"),
        (lambda: other_settings(tmp_path / "settings"), "trained with other settings: `lora_alpha` 32.0 there, 8"),
    ):
        with naming(match), pytest.raises((UserError, ValueError), match=match):
            refused()
