"""IncreLoRA as a library: cheap imports, any transformers model, any loop, the examples."""

import copy
import io
import json
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT, tiny_batches
from naming import naming
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import clip_grad_norm_

import increlora
from baselines.adalora import AdaLoRA
from baselines.controls import RandomGrowth
from baselines.lora import LoRA
from increlora import Growth, IncreLoRA, UserError, multiplier, save_peft_adapter
from increlora.glue.loop import make_optimizer, take_step
from increlora.glue.settings import Settings
from increlora.groups import set_learning_rates
from increlora.linear import IncrementalLinear
from increlora.method import Method

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
STEPS, WARMUP, RATE = 30, 4, 5e-3
SEVEN = {
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}


@pytest.fixture
def llama():
    """A two-layer Llama for language modelling in float64, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def decoder(**changes) -> IncreLoRA:
    return IncreLoRA(**(dict(head=None, target_rank=2, top_h=5, interval=4, init_warmup=4, seed=1) | changes))


def rows(count: int = STEPS) -> list[torch.Tensor]:
    return [batch["input_ids"] for batch in tiny_batches(count)]


def by_hand(model, method) -> torch.optim.Optimizer:
    """A loop that knows the method's calls only."""
    method.prepare(model, STEPS)
    optimizer = torch.optim.AdamW(method.param_groups(model), lr=RATE, weight_decay=0.0, fused=True)
    model.train()
    for step, ids in enumerate(rows()):
        for group in optimizer.param_groups:
            group["lr"] = RATE * multiplier(step, group.get("born", 0), STEPS, WARMUP)
        method.begin_step(step)
        (model(ids, labels=ids).loss + method.extra_loss()).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
    return optimizer


def grow(model, growth: Growth, until: int = STEPS, scaler=None, clip: bool = True, loss_factors=None) -> None:
    """A loop over `growth` from wherever it stands."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    model.train()
    for ids in rows()[growth.step + growth.skipped : until]:
        factor = (loss_factors or {}).get(growth.step + growth.skipped, 1.0)
        growth.begin_step(2, scaler)
        for micro_batch in ids.chunk(2):
            growth.begin_step(2, scaler)  # again: no harm
            scaler.scale(factor * model(micro_batch, labels=micro_batch).loss / 2).backward()
        if clip:
            scaler.unscale_(growth.optimizer)
            clip_grad_norm_(model.parameters(), 1.0)
        growth.before_step()
        scaler.step(growth.optimizer)
        scaler.update()
        growth.after_step()
        growth.optimizer.zero_grad()


def growing(model, method=None, optimizer=None) -> Growth:
    method = method or decoder()
    method.prepare(model, STEPS)
    optimizer = optimizer or torch.optim.AdamW(method.param_groups(model), lr=RATE, weight_decay=0.0)
    return Growth(method, model, optimizer, STEPS, WARMUP)


def same(a, b, tolerance: float = 0) -> None:
    """The same parameters, by name."""
    found = dict(b.named_parameters())
    assert [name for name, _ in a.named_parameters()] == list(found)
    for name, parameter in a.named_parameters():
        torch.testing.assert_close(found[name], parameter, rtol=tolerance, atol=tolerance, msg=name)


# imports


def test_the_algorithm_comes_without_hydra_wandb_transformers_and_datasets():
    code = """
import json, sys
import increlora
assert "torch" not in sys.modules
from increlora import Growth, IncreLoRA, UserError, multiplier
import increlora.algorithm
heavy = ("hydra", "omegaconf", "wandb", "transformers", "datasets", "accelerate", "peft")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_the_package_offers_what_it_names_and_nothing_else():
    assert {name: getattr(increlora, name).__name__ for name in increlora.__all__} == {
        name: name for name in increlora.__all__
    }
    with pytest.raises(AttributeError, match="no attribute 'AdaLoRA'"):
        _ = increlora.AdaLoRA
    with pytest.raises(ImportError):
        from increlora import nothing  # noqa: F401


# any model


def test_a_decoder_without_a_head_trains_its_matrices_only(llama):
    method = decoder()
    frozen = {name: p.clone() for name, p in llama.named_parameters()}
    by_hand(llama, method)
    assert {name.split(".", 3)[3] for name in method.ranks()} == SEVEN and len(method.ranks()) == 14
    assert method.total_rank == method.allocator.budget == 28
    assert all(name.startswith("increlora_bank.") for name, p in llama.named_parameters() if p.requires_grad)
    assert method.parameters_by_kind(llama)["head"] == 0
    now = {name.replace(".base.", "."): p for name, p in llama.named_parameters()}
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


def test_an_empty_head_is_none_and_a_pattern_trains_what_it_matches(llama):
    other = copy.deepcopy(llama)
    by_hand(llama, decoder())
    by_hand(other, decoder(head=""))
    same(llama, other)
    method = decoder(head=r"lm_head\..*", kinds={"q_proj": r".*\.q_proj"}, top_h=1)
    plain = type(llama)(llama.config)
    method.prepare(plain, STEPS)
    assert plain.lm_head.weight.requires_grad and method.parameters_by_kind(plain)["head"] == 50 * 16


def test_given_kinds_are_adapted_and_no_others(llama):
    method = decoder(kinds={"q_proj": r".*\.q_proj", "v_proj": r".*\.v_proj"})
    method.prepare(llama, STEPS)
    assert list(method.ranks()) == [f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1) for m in "qv"]


def test_without_kinds_an_encoder_gets_the_papers_six_and_the_head_stays_plain(tiny_deberta):
    method = IncreLoRA(interval=4, init_warmup=4)
    method.prepare(tiny_deberta, STEPS)
    assert len(method.ranks()) == 12
    assert not isinstance(tiny_deberta.pooler.dense, IncrementalLinear)


def test_a_numbered_layer_of_the_head_is_no_matrix():
    model = nn.ModuleDict(
        {"body": nn.ModuleList([nn.ModuleDict({"a": nn.Linear(4, 4)})]), "classifier": nn.ModuleList([nn.Linear(4, 2)])}
    )
    model["classifier"].append(nn.Sequential(nn.Linear(2, 2)))
    method = IncreLoRA(interval=1, init_warmup=0)
    method.prepare(model, 9)
    assert list(method.ranks()) == ["body.0.a"]
    assert all(p.requires_grad for p in model["classifier"].parameters())


def test_models_that_fit_no_pattern_are_refused_with_what_to_say(llama):
    with pytest.raises(UserError, match="Set `head`; use None if only the adapted matrices should train"):
        IncreLoRA(interval=4, init_warmup=4).prepare(llama, STEPS)
    flat = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(UserError, match=re.escape("no nn.Linear in numbered layers, it has: N. Say which")):
        IncreLoRA(head=None).prepare(flat, STEPS)
    with pytest.raises(UserError, match="An expression in `kinds` must match the whole name"):
        decoder(kinds={"q": "q_proj"}).prepare(llama, STEPS)
    with pytest.raises(UserError, match="`kinds` must map names to regular expressions"):
        decoder(kinds=["q_proj"]).prepare(llama, STEPS)


def test_layers_on_which_an_update_would_not_act_are_refused(llama):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    for kinds, owner in (({}, "MultiheadAttention"), ({"first": r".*\.linear1"}, "TransformerEncoderLayer")):
        with pytest.raises(UserError, match=f"lies in torch's {owner}, which reads its weight directly"):
            decoder(kinds=kinds).prepare(encoder, STEPS)
    llama.lm_head.weight = llama.model.embed_tokens.weight
    with pytest.raises(UserError, match=r"tied \(model.embed_tokens.weight, lm_head.weight\)"):
        decoder(kinds={"lm": "lm_head"}).prepare(llama, STEPS)
    decoder().prepare(llama, STEPS)
    with pytest.raises(UserError, match="has an update already: prepare a fresh model"):
        decoder().prepare(llama, STEPS)


def test_steps_that_do_not_fit_are_refused(llama):
    with pytest.raises(UserError, match=r"the run has -1 steps.*where a Trainer counts epochs"):
        decoder().prepare(llama, -1)
    method = decoder()
    method.prepare(llama, STEPS)
    optimizer = torch.optim.AdamW(method.param_groups(llama))
    with pytest.raises(UserError, match="ranks change until step 16, after the last of 16 steps"):
        Growth(method, llama, optimizer, 16, WARMUP)


# any loop


def test_a_loop_by_hand_does_what_our_step_does(llama):
    other, method = copy.deepcopy(llama), decoder()
    given = Settings(learning_rate=RATE, warmup_steps=WARMUP, batch_size=8, device="cpu")
    method.prepare(llama, STEPS)
    optimizer = make_optimizer(llama, method, given)
    llama.train()
    for step, ids in enumerate(rows()):
        set_learning_rates(optimizer, step, STEPS, given.warmup_steps)
        off = torch.amp.GradScaler("cpu", enabled=False)
        take_step(step, [ids], lambda x: llama(x, labels=x).loss, method, optimizer, given, off)
    again = decoder()
    by_hand(other, again)
    assert again.allocations == method.allocations and [a.step for a in method.allocations] == [8, 12, 16]
    same(llama, other)


def test_growth_in_micro_batches_does_what_the_loop_by_hand_does(llama):
    other, method = copy.deepcopy(llama), decoder()
    optimizer = by_hand(llama, method)
    growth = growing(other)
    grow(other, growth)
    assert growth.method.ranks() == method.ranks() and growth.step == STEPS
    same(llama, other, 1e-9)
    last = [[(g.get("born", 0), g["param_names"]) for g in o.param_groups] for o in (optimizer, growth.optimizer)]
    assert last[0] == last[1] and [born for born, _ in last[1]] == [0, 1, 9, 13, 17]


def test_recomputed_activations_change_no_score(llama):
    other, methods = copy.deepcopy(llama), [decoder(), decoder()]
    by_hand(llama, methods[0])
    other.activation_checkpointing_enable()
    by_hand(other, methods[1])
    assert other.is_activation_checkpointing and methods[0].allocations == methods[1].allocations
    same(llama, other)


@pytest.mark.parametrize("clip", [True, False])
def test_a_loss_scale_changes_nothing_and_an_overflow_costs_one_step(llama, clip):
    models, growths = [llama, copy.deepcopy(llama)], []
    for model, enabled in zip(models, (False, True), strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        growths.append(growing(model))
        grow(model, growths[-1], STEPS, scaler, clip, {8: float("inf"), 20: float("nan")})
    for growth in growths:
        assert (growth.step, growth.skipped) == (28, 2)
        assert [a.step for a in growth.method.allocations] == [8, 12, 16]
    assert growths[0].method.ranks() == growths[1].method.ranks()
    same(*models, 1e-7)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_groups_of_ones_own_keep_their_rates_and_new_ones_take_the_options_of_the_first(llama, kind):
    method = decoder(head=r"lm_head\..*")
    method.prepare(llama, STEPS)
    inside = [p for n, p in llama.named_parameters() if p.requires_grad and n != "lm_head.weight"]
    groups = [{"params": inside}, {"params": [llama.lm_head.weight], "lr": 0.5, "weight_decay": 0.0}]
    optimizer = kind(groups, lr=0.1, weight_decay=0.2)
    growth = Growth(method, llama, optimizer, STEPS, WARMUP)
    assert optimizer.param_groups[1]["param_names"] == ["lm_head.weight"]
    grow(llama, growth, 20)
    growth.begin_step()
    rates = [g["lr"] / multiplier(20, g["born"], STEPS, WARMUP) for g in optimizer.param_groups]
    assert rates == pytest.approx([0.1, 0.5, 0.1, 0.1, 0.1, 0.1])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.0, 0.2, 0.2, 0.2, 0.2]


def test_what_must_not_decay_does_not(tiny_deberta):
    method = IncreLoRA(interval=4, init_warmup=4)
    method.prepare(tiny_deberta, STEPS)
    optimizer = torch.optim.AdamW(method.param_groups(tiny_deberta), weight_decay=0.3)
    Growth(method, tiny_deberta, optimizer, STEPS, WARMUP)
    assert [g["weight_decay"] for g in optimizer.param_groups][:3] == [0.3, 0.0, 0.3]
    assert optimizer.param_groups[1]["param_names"] == ["pooler.dense.bias", "classifier.bias"]


# keep and restore


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("cut", [2, 10, 21])
def test_state_dicts_alone_resume_a_run(llama, cut):
    other = copy.deepcopy(llama)
    growth = growing(llama)
    grow(llama, growth, cut)
    file = io.BytesIO()
    torch.save({"model": Wrapper(llama).state_dict(), "optimizer": growth.optimizer.state_dict()}, file)
    grow(llama, growth)
    again = growing(other)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert Wrapper(other).load_state_dict(state["model"], strict=True)
    again.optimizer.load_state_dict(state["optimizer"])
    assert again.step == cut
    grow(other, again)
    assert again.method.allocations == growth.method.allocations
    same(llama, other)


def test_going_back_to_an_earlier_state_goes_back_to_its_structure(llama):
    growth = growing(llama)
    grow(llama, growth, 6)
    model, optimizer = copy.deepcopy((llama.state_dict(), growth.optimizer.state_dict()))
    grow(llama, growth)
    first = {name: p.detach().clone() for name, p in llama.named_parameters()}
    llama.load_state_dict(model)
    growth.optimizer.load_state_dict(optimizer)
    assert growth.step == 6 and growth.method.total_rank == 14 and growth.method.allocations == []
    grow(llama, growth)
    assert all(torch.equal(p, first[name]) for name, p in llama.named_parameters())


def test_merged_the_state_dict_is_the_plain_models(llama):
    plain = set(llama.state_dict())
    growth = growing(llama)
    grow(llama, growth)
    ids = rows(1)[0]
    before = llama(ids).logits
    assert "increlora_state" in llama.state_dict()
    growth.merge()
    assert set(llama.state_dict()) == plain
    torch.testing.assert_close(llama(ids).logits, before, rtol=1e-9, atol=1e-9)


def test_an_optimizer_of_another_model_or_order_is_refused(llama):
    other = copy.deepcopy(llama)
    early = torch.optim.AdamW(llama.parameters())
    with pytest.raises(UserError, match=r"lacks 3 trained parameters .* holds 0 others\. Make it after"):
        growing(llama, optimizer=early)  # rows of two widths, lambdas
    with pytest.raises(UserError, match=r"lacks 3 trained parameters .* holds 21 others"):
        growing(other, optimizer=torch.optim.AdamW(type(llama)(llama.config).parameters()))


@pytest.mark.parametrize("restart_warmup", [True, False])
def test_an_optimizer_over_what_trains_at_the_start_is_completed(llama, restart_warmup):
    """Groups of one's own: what begins to train at a growth is in the optimizer from the start, and moves only then."""
    method = decoder(restart_warmup=restart_warmup)
    method.prepare(llama, STEPS)
    optimizer = torch.optim.AdamW([p for p in llama.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    other = copy.deepcopy((llama, method))
    grow(llama, Growth(method, llama, optimizer, STEPS, WARMUP))
    usual = torch.optim.AdamW(other[1].param_groups(other[0]), lr=RATE, weight_decay=0.0)
    grow(other[0], Growth(other[1], other[0], usual, STEPS, WARMUP))
    same(llama, other[0])


@pytest.mark.parametrize("which", ["model", "optimizer"])
def test_a_state_that_is_loaded_by_half_is_not_trained_on(llama, which):
    other = copy.deepcopy(llama)
    growth = growing(llama)
    grow(llama, growth, 10)
    again = growing(other)
    if which == "model":
        other.load_state_dict(llama.state_dict())
    else:
        again.optimizer.load_state_dict(growth.optimizer.state_dict())
    with pytest.raises(UserError, match=f"the state of the {which} was loaded, but not"):
        again.begin_step()


# examples


def test_an_example_is_short_and_says_how_to_call_it():
    for path in EXAMPLES:
        with naming(path):
            lines = path.read_text().splitlines()
            assert len(lines) <= 40 and f"examples/{path.name}" in lines[0]


def run_example(name: str, folder, monkeypatch, capsys) -> str:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    monkeypatch.setattr(sys, "argv", [name, str(folder)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out


def test_the_loop_of_ones_own_learns_and_reaches_the_budget(tmp_path, monkeypatch, capsys):
    out = run_example("train_in_your_own_loop.py", tmp_path, monkeypatch, capsys)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert losses[-1] < 1.0 < 3.0 < losses[0] and out.strip().endswith("total rank 24")


def killed_after(function):
    def call(*arguments, **keywords):
        function(*arguments, **keywords)
        raise InterruptedError

    return call


def test_the_accelerate_example_goes_on_after_a_kill_and_ends_as_if_there_had_been_none(tmp_path, monkeypatch, capsys):
    whole = run_example("train_with_accelerate.py", tmp_path / "whole", monkeypatch, capsys)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Accelerator, "save_state", killed_after(Accelerator.save_state))
        run_example("train_with_accelerate.py", tmp_path / "cut", patch, capsys)
    assert "step 30" in capsys.readouterr().out and whole.endswith("total rank 56\n")
    again = run_example("train_with_accelerate.py", tmp_path / "cut", monkeypatch, capsys)
    assert again == whole.splitlines(keepends=True)[-1]


def test_the_trainer_example_goes_on_after_a_kill_and_leaves_a_plain_model(tmp_path, monkeypatch, capsys):
    whole = run_example("train_with_trainer.py", tmp_path, monkeypatch, capsys).splitlines()
    shutil.rmtree(tmp_path / "checkpoint-60")  # as if killed after checkpoint-30
    again = run_example("train_with_trainer.py", tmp_path, monkeypatch, capsys).splitlines()
    assert again[-2:] == whole[-2:] and "total rank 48" in whole[-2] and "a plain BERT" in whole[-1]
    assert len(again) < len(whole)
    once_more = run_example("train_with_trainer.py", tmp_path, monkeypatch, capsys).splitlines()  # from the last step
    assert once_more[-2:] == whole[-2:]


# a PEFT adapter


@pytest.fixture
def bert():
    """A two-layer BERT classifier in float64, with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return BertForSequenceClassification(config).double()


def learned(model, method, until: int = STEPS) -> Growth:
    """Language modelling or classification, up to this step; the model is left in evaluation mode."""
    growth = growing(model, method)
    model.train()
    for batch in tiny_batches(until):
        labels = batch["labels"] if hasattr(model, "classifier") else batch["input_ids"]
        growth.begin_step()
        model(**batch | {"labels": labels}).loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        growth.before_step()
        growth.optimizer.step()
        growth.after_step()
        growth.optimizer.zero_grad()
    model.eval()
    return growth


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(rows(1)[0]).logits


HEAD, GROWS = r".*(pooler|classifier)\..*", dict(target_rank=2, top_h=5, interval=4, init_warmup=4)
ADAPTERS = {  # case -> the model's fixture, method, its options, step to stop at, task type
    "llama": ("llama", IncreLoRA, GROWS | {"head": None}, STEPS, "CAUSAL_LM"),
    "llama-whose-reserve-learns": ("llama", IncreLoRA, GROWS | {"head": None}, 10, None),
    "llama-random-growth": ("llama", RandomGrowth, GROWS | {"head": None}, STEPS, None),
    "llama-lora": ("llama", LoRA, {"head": None}, STEPS, None),
    "llama-adalora": ("llama", AdaLoRA, {"head": r"lm_head\..*"}, STEPS, "CAUSAL_LM"),
    "bert": ("bert", IncreLoRA, GROWS | {"head": HEAD}, STEPS, "SEQ_CLS"),
    "bert-of-no-task-type": ("bert", IncreLoRA, GROWS | {"head": HEAD}, 10, None),
    "bert-with-a-frozen-classifier": ("bert", IncreLoRA, GROWS | {"head": None}, STEPS, "SEQ_CLS"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_on_a_fresh_base_model_gives_the_same_logits(case, request, tmp_path):
    from peft import PeftModel

    fixture, kind, options, until, task_type = ADAPTERS[case]
    model, method = request.getfixturevalue(fixture), kind(**options)
    base = copy.deepcopy(model)
    growth = learned(model, method, until)
    expected = logits(model)
    assert not torch.allclose(logits(base), expected, atol=1e-3)
    save_peft_adapter(method, model, tmp_path / "new" / "adapter", base_model="some/base", task_type=task_type)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)

    written = json.loads((tmp_path / "new" / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "some/base" and written["task_type"] == task_type
    assert written["rank_pattern"] == {name: len(A) for name, (A, _) in method.factors().items()}
    loaded = PeftModel.from_pretrained(base, tmp_path / "new" / "adapter")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-9)
    plain = loaded.merge_and_unload()
    assert type(plain) is type(model) and not any("lora" in name for name in plain.state_dict())
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-9)

    growth.merge()
    save_peft_adapter(method, model, tmp_path / "merged", base_model="some/base", task_type=task_type)
    first, second = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("new/adapter", "merged"))
    assert set(first) == set(second) and all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_an_adapter_is_called_after_the_folder_that_the_model_came_from(llama, tmp_path):
    from peft import AutoPeftModel, AutoPeftModelForCausalLM

    llama.float().save_pretrained(tmp_path / "base")
    llama = type(llama).from_pretrained(tmp_path / "base")
    method = decoder()
    learned(llama, method, 6)
    for task_type, auto in ((None, AutoPeftModel), ("CAUSAL_LM", AutoPeftModelForCausalLM)):
        save_peft_adapter(method, llama, str(tmp_path / auto.__name__), task_type=task_type)
        loaded = auto.from_pretrained(tmp_path / auto.__name__)
        torch.testing.assert_close(logits(loaded), logits(llama), rtol=0, atol=1e-5)


class Odd(nn.Module):
    """A matrix whose name is the end of another's, and a head with buffers and a tied parameter."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.more = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
        self.classifier = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
        self.classifier[2].weight = self.classifier[1].weight

    def forward(self, x):
        return self.classifier(self.more["layers"][0](self.layers[0](x)))


def test_names_that_end_alike_and_a_head_with_buffers(tmp_path):
    from peft import PeftModel

    torch.manual_seed(0)
    model, x = Odd(), torch.randn(8, 4)
    base = copy.deepcopy(model)
    kinds = {"layer": r".*layers\.0"}
    method = IncreLoRA(kinds=kinds, target_rank=2, top_h=1, interval=2, init_warmup=1, head=r"classifier\..*")
    growth = growing(model, method)
    while growth.step < 3:
        growth.begin_step()
        model(x).square().sum().backward()
        growth.before_step()
        growth.optimizer.step()
        growth.after_step()
        growth.optimizer.zero_grad()
    assert list(method.ranks().values()) in ([1, 2], [2, 1])
    save_peft_adapter(method, model, tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x), rtol=0, atol=1e-6)


def test_adapters_that_cannot_be_written_leave_nothing(llama, bert, tmp_path):
    def message(method, model, folder=tmp_path / "new" / "adapter", **names):
        with pytest.raises(UserError) as error:
            save_peft_adapter(method, model, folder, **names)
        assert len(str(error.value).splitlines()) <= 2 and not (tmp_path / "new").exists()
        return str(error.value)

    def prepared(model, **changes):
        model, method = copy.deepcopy(model), decoder(**changes)
        method.prepare(model, STEPS)
        return method, model

    method, model = prepared(llama)
    (tmp_path / "file").write_text("x")
    assert "exists already" in message(method, model, tmp_path)
    assert "exists already" in message(method, model, tmp_path / "file")
    assert "cannot write" in message(method, model, tmp_path / "file" / "adapter")
    assert "task_type 'LM' is none of PEFT's: SEQ_CLS, " in message(method, model, task_type="LM")
    assert "the model lacks 14 of the method's 14 matrices" in message(method, Wrapper(model))
    assert "full trains no low-rank factors" in message(Method(), model)
    assert "bert.pooler.dense.bias is trained" in message(*prepared(bert, head=r".*pooler\.dense\.bias"))
    llama.config.tie_word_embeddings = True
    tied = prepared(type(llama)(llama.config), head=r".*embed_tokens\..*")
    assert "lm_head.weight is trained, or tied to such a parameter" in message(*tied)


def test_writing_an_adapter_needs_neither_hydra_nor_datasets():
    code = """
import sys
from increlora import save_peft_adapter
assert not {"hydra", "omegaconf", "wandb", "datasets"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
