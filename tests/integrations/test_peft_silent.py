"""PEFT's door: what once gave a wrong result without a word."""

import copy

import pytest
import torch
from naming import naming
from peft import PeftModel, get_peft_model
from test_peft import DECAY, GROWTH, RATE, STEPS, WARMUP, counting, llama, trainer
from torch import Tensor, nn
from transformers import get_constant_schedule, get_linear_schedule_with_warmup

from increlora.errors import UserError
from increlora.integrations.peft import IncreLoraCallback, IncreLoraConfig, attach


def adapted(**config) -> PeftModel:
    return get_peft_model(llama(), IncreLoraConfig(**GROWTH | {"total_step": STEPS} | config))


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=counting(99)).logits


def train(model: PeftModel, optimizer: torch.optim.Optimizer, steps: int, scaler=None, first: int = 0) -> None:
    model.train()
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = model(input_ids=counting(step), labels=counting(step)).loss
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


def test_later_components_join_the_group_of_their_kind():
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in trained if p.ndim == ndim] for ndim in (2, 1))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": DECAY}, {"params": vectors}], lr=RATE)
    training = attach(model, optimizer)
    for group, ndim in zip(optimizer.param_groups, (2, 1), strict=True):
        assert {p.ndim for p in group["params"]} == {ndim}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in training.bank.parameters()}


class Counting(torch.optim.AdamW):
    """Keeps values in its groups, as optimizers that find a learning rate do; `of_rate`: one depends on the rate."""

    def __init__(self, *arguments, of_rate: bool = False, **keywords):
        super().__init__(*arguments, **keywords)
        self.of_rate, self.highest = of_rate, 0.0

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            self.highest = max(self.highest, group["lr"])
            if self.of_rate:
                group["sum"] = group.get("sum", 0.0) + group["lr"]
        return super().step(closure)


@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_what_an_optimizer_keeps_in_its_groups_stays(warmup):
    model = adapted()
    optimizer = Counting(model.parameters(), lr=RATE)
    attach(model, optimizer, warmup_steps=warmup)
    train(model, optimizer, STEPS)
    assert [group["k"] for group in optimizer.param_groups] == [STEPS]


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_schedule_of_one_s_own_is_known_by_its_rates(tmp_path, schedule):
    model = get_peft_model(llama(), IncreLoraConfig(**GROWTH))
    optimizer, callback = Counting(model.parameters(), lr=RATE), IncreLoraCallback()
    own = {
        "constant": lambda: get_constant_schedule(optimizer),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS),
    }[schedule]()
    trainer(tmp_path, model, [callback], optimizers=(optimizer, own)).train()
    assert callback.training.linear == (schedule == "linear")
    assert optimizer.highest == pytest.approx(RATE, rel=1e-12)  # no new component trains faster than the others


def test_a_step_that_a_scaler_skips_is_counted(tmp_path):
    def made() -> tuple:
        callback = IncreLoraCallback()
        done = trainer(tmp_path, get_peft_model(llama(), IncreLoraConfig(**GROWTH)), [callback])
        done.accelerator.scaler = torch.amp.GradScaler("cpu")  # as fp16=True makes on a GPU
        loss = done.compute_loss

        def overflows(*arguments, **keywords):
            return loss(*arguments, **keywords) * (float("inf") if done.state.global_step < 2 else 1.0)

        done.compute_loss = overflows
        return done, callback

    done, callback = made()
    done.train()
    adapter = callback.training.adapter
    assert (adapter.step, adapter.skipped) == (STEPS - 2, 2)
    made()[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))  # was refused: "begins at step 20"


def test_a_state_of_final_ranks_brings_its_ranks(tmp_path):
    for seed in (1, 2):
        model = adapted(seed=seed, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])  # all of one width
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        attach(model, optimizer)
        train(model, optimizer, STEPS, first=100 * seed)
        model.save_pretrained(tmp_path / str(seed))
    one, two = (PeftModel.from_pretrained(llama(), tmp_path / str(seed)) for seed in (1, 2))
    ranks = [list(model.base_model.adapters["default"].ranks().values()) for model in (one, two)]
    assert ranks[0] != ranks[1] and sum(ranks[0]) == sum(ranks[1])
    two.load_state_dict(one.state_dict())
    assert list(two.base_model.adapters["default"].ranks().values()) == ranks[0]
    assert torch.equal(logits(two), logits(one))


def test_a_configuration_may_serve_several_models():
    config, rows = IncreLoraConfig(target_r=4), []
    for seed in (41, 42, 41):
        model = llama()
        torch.manual_seed(seed)
        bank = get_peft_model(model, config).base_model.adapters["default"].bank
        rows.append(next(p for p in bank.parameters() if p.ndim == 2))
    assert config.seed is None and config.total_step is None
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])


def test_a_forward_that_ctrl_c_ended_leaves_nothing_behind():
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    attach(model, optimizer)
    train(model, optimizer, 5)

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.base_model.model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    hook.remove()
    before = logits(model)
    with torch.no_grad():
        for parameter in model.base_model.increlora_bank.parameters():
            parameter.zero_()
    assert not torch.equal(logits(model), before)
    torch.testing.assert_close(logits(model), logits(llama()), rtol=0, atol=1e-5)  # nothing is added


def test_a_hook_of_an_adapted_layer_sees_what_the_layer_gave():
    base, seen = llama(), []
    base.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, x, h: seen.append((h, h.clone())))
    model = get_peft_model(base, IncreLoraConfig(target_r=4, target_modules=["down_proj"], init_weights=False))
    logits(model)
    ((output, as_given),) = seen
    assert output.shape == (8, 12, 32) and torch.equal(output, as_given)


def test_hooks_of_the_backward_pass_and_of_all_modules_change_nothing():
    base, seen = llama(), []
    base.model.layers[0].mlp.down_proj.register_full_backward_hook(lambda *_: None)
    model = get_peft_model(base, IncreLoraConfig(target_r=4, init_weights=False))
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, x, h: seen.append((h, h.clone())) if type(module) is nn.Linear else None
    )
    model(input_ids=counting(0), labels=counting(0)).loss.backward()
    hook.remove()
    assert seen and all(torch.equal(output, as_given) for output, as_given in seen)


def test_a_reference_pass_without_the_adapter_may_come_first():
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training = attach(model, optimizer)
    with model.disable_adapter():
        reference = model(input_ids=counting(0)).logits.detach()
    (model(input_ids=counting(0)).logits - reference).square().mean().backward()
    optimizer.step()
    assert training.step == 1


def test_a_copy_that_trains_without_attach_is_named_too():
    model = adapted()
    attach(model, torch.optim.AdamW(model.parameters()))
    other = copy.deepcopy(model)
    other(input_ids=counting(0), labels=counting(0)).loss.backward()
    with pytest.warns(UserWarning, match="trains at its first ranks and does not grow"):
        torch.optim.AdamW(other.parameters()).step()


def test_a_merge_in_the_middle_says_where_it_stands():
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    attach(model, optimizer)
    train(model, optimizer, 8)
    with pytest.warns(UserWarning, match=f"is merged at step 8 of {STEPS}, its total rank .. of 56"):
        model.merge_and_unload()


def scaler_not_told() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters())
    attach(model, optimizer)
    train(model, optimizer, 1, torch.amp.GradScaler("cpu"))


def scaler_told_and_not_used() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters())
    attach(model, optimizer, scaler=torch.amp.GradScaler("cpu"))
    train(model, optimizer, 1)


def one_optimizer_for_two_models() -> None:
    one, two = adapted(), adapted()
    optimizer = torch.optim.AdamW([*one.parameters(), *two.parameters()])
    first = attach(one, optimizer)  # noqa: F841 - it must live
    attach(two, optimizer)


def not_linear_at_all() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters())
    attach(model, optimizer, linear=True)
    train(model, optimizer, 2)


def groups_that_differ() -> None:
    model = adapted()
    optimizer = Counting(model.parameters(), lr=RATE, of_rate=True)
    attach(model, optimizer, warmup_steps=WARMUP)
    train(model, optimizer, STEPS)


def warmup_below_0() -> None:
    model = adapted()
    attach(model, torch.optim.AdamW(model.parameters()), warmup_steps=-5)


def layers_without_names() -> None:
    adapted(layers_to_transform=[0])


def a_weight_that_is_computed() -> None:
    base = llama()
    nn.utils.parametrizations.weight_norm(base.model.layers[0].mlp.down_proj)
    get_peft_model(base, IncreLoraConfig(target_modules=["down_proj"]))


def test_it_is_refused():
    for refused, match in (
        (scaler_not_told, "this is a GradScaler that `attach` was not given"),
        (scaler_told_and_not_used, "this is no step of the scaler of `attach`"),
        (one_optimizer_for_two_models, "the optimizer is attached to an adapter of another model"),
        (not_linear_at_all, "the learning rate at step 1 is 0.001 of 0.001, not that of a linear schedule"),
        (warmup_below_0, "`warmup_steps` must be a whole number of steps, 0 or more, it is -5"),
        (layers_without_names, "`layers_to_transform` needs names in `target_modules`"),
        (a_weight_that_is_computed, r"down_proj` is computed from other parameters"),
        (groups_that_differ, "Counting writes `sum` into its groups at every step"),
    ):
        with naming(refused.__name__), pytest.raises(UserError, match=match):
            refused()
