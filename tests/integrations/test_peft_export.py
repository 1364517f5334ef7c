"""Adapters that leave as a plain LoRA, by either door: PEFT alone loads them and computes the same logits."""

import json
from pathlib import Path

import pytest
import torch
from naming import naming
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from test_peft import GROWTH, METHOD, STEPS, Run, counting, llama, trainer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)

from increlora import IncreLoRA, save_peft_adapter
from increlora.errors import UserError
from increlora.integrations.peft import IncreLoraCallback, IncreLoraConfig, attach, export_lora

X = counting(99)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=X).logits


def close(model: torch.nn.Module, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, torch.Tensor, dict[str, int]]:
    """The folder of an adapter whose ranks may not exceed 6, its logits, its ranks."""
    run, folder = (
        Run(get_peft_model(llama(), IncreLoraConfig(**GROWTH, max_rank=6, total_step=STEPS))),
        tmp_path_factory,
    )
    run.train(range(STEPS))
    path = folder.mktemp("finished")
    run.model.save_pretrained(path)
    return path, logits(run.model), run.training.ranks()


def test_ranks_stay_below_the_limit_and_the_budget_is_reached_by_both_doors(finished):
    assert max(finished[2].values()) == 5 and sum(finished[2].values()) == 4 * 14  # 1 + 2 * 2: whole steps
    method, model = IncreLoRA(head=None, **METHOD, max_rank=5), llama()
    method.prepare(model, STEPS)
    for step in range(STEPS):  # scores that never change: the first matrices would grow without end
        method.importance.scores = lambda: {name: 99.0 - i for i, name in enumerate(method.bank.matrices)}
        method.allocate(step)
    assert max(method.ranks().values()) == 5 and sum(method.ranks().values()) == 4 * 14


def test_a_limit_that_leaves_no_room_is_refused_before_training():
    for config, match in (
        ({"max_rank": 3}, "`max_rank` 3 is below the average rank at the end, target_r 4"),
        ({"max_rank": 4, "total_step": STEPS}, "Give `max_rank` 5 or more, or lower `rank_step`"),
        ({"max_rank": 0}, "`max_rank` must be a whole number above 0"),
    ):
        with naming(match), pytest.raises(ValueError, match=match):
            get_peft_model(llama(), IncreLoraConfig(**GROWTH | config))


def test_a_saved_adapter_is_a_lora_of_its_ranks_or_of_one_rank_for_all(finished, tmp_path):
    folder, expected, ranks = finished
    for pad_to in (None, 8):
        out = tmp_path / str(pad_to)
        assert export_lora(folder, out, pad_to=pad_to) == ranks
        close(PeftModel.from_pretrained(llama(), out), expected)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and config["lora_alpha"] == config["r"] == (pad_to or 5)
        assert bool(config["rank_pattern"]) == bool(config["alpha_pattern"]) == (pad_to is None)
    shapes = {tuple(t.shape) for key, t in load_file(tmp_path / "8/adapter_model.safetensors").items() if "_A" in key}
    assert shapes == {(8, 32), (8, 64)}
    close(PeftModel.from_pretrained(llama(), tmp_path / "8").merge_and_unload(), expected)


def test_the_library_s_door_pads_too(tmp_path):
    model, method = llama(), IncreLoRA(head=None, **METHOD)
    method.prepare(model, STEPS)
    with torch.no_grad():  # any update that is not zero
        for parameter in method.bank.parameters():
            parameter.normal_(0, 0.2)
    expected = logits(model)
    save_peft_adapter(method, model, tmp_path / "padded", pad_to=4, task_type="CAUSAL_LM")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "padded")
    close(loaded, expected)
    assert loaded.peft_config["default"].r == 4 and not loaded.peft_config["default"].rank_pattern
    with pytest.raises(UserError, match="`pad_to` must be a whole number that no rank exceeds; it is 0"):
        save_peft_adapter(method, model, tmp_path / "refused", pad_to=0)


def test_padded_adapters_are_combined_and_swapped(finished, tmp_path):
    """What asks for one rank: weighted combinations and hotswap."""
    export_lora(finished[0], tmp_path / "first", pad_to=8)
    torch.manual_seed(1)
    other = get_peft_model(llama(), IncreLoraConfig(target_r=4, init_weights=False, seed=1))
    other.save_pretrained(tmp_path / "other")
    expected = logits(other)
    export_lora(tmp_path / "other", tmp_path / "second", pad_to=8)

    model = PeftModel.from_pretrained(llama(), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", adapter_name="second")
    weights = {name: module.weight for name, module in llama().named_modules() if isinstance(module, torch.nn.Linear)}
    deltas = {
        adapter: {
            name: model.get_submodule(f"base_model.model.{name}").get_delta_weight(adapter)
            for name in weights
            if name != "lm_head"
        }
        for adapter in ("first", "second")
    }
    for kind in ("cat", "svd"):
        model.add_weighted_adapter(["first", "second"], [0.75, 0.25], kind, combination_type=kind, svd_rank=16)
        for name, delta in deltas["first"].items():
            both = model.get_submodule(f"base_model.model.{name}").get_delta_weight(kind)
            torch.testing.assert_close(both, 0.75 * delta + 0.25 * deltas["second"][name], rtol=0, atol=1e-5)
    swapped = PeftModel.from_pretrained(llama(), tmp_path / "first")
    close(swapped, finished[1])
    hotswap_adapter(swapped, tmp_path / "second", adapter_name="default", torch_device="cpu")
    close(swapped, expected)


def test_a_checkpoint_of_a_trainer_leaves_without_the_trainer(tmp_path):
    callback = IncreLoraCallback()
    model = get_peft_model(llama(), IncreLoraConfig(**GROWTH))
    seen = {}

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **parts) -> None:
            seen[state.global_step] = logits(model), dict(callback.training.ranks())
            model.train()

    trainer(tmp_path / "run", model, [callback, Watch()]).train()
    for step, (expected, ranks) in seen.items():  # growing, and finished
        reserve = 0 if step == STEPS or sum(ranks.values()) == 4 * 14 else 2
        found = export_lora(tmp_path / "run" / f"checkpoint-{step}", tmp_path / str(step), pad_to=12)
        assert found == {name: rank + reserve for name, rank in ranks.items()}, step
        close(PeftModel.from_pretrained(llama(), tmp_path / str(step)), expected)
    assert sum(seen[10][1].values()) < 4 * 14


def test_conv1d_and_modules_to_save_leave_with_it(tmp_path):
    def gpt2() -> torch.nn.Module:
        torch.manual_seed(0)
        shape = {"vocab_size": 32, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.2, bos_token_id=None, eos_token_id=None))

    def classifier() -> torch.nn.Module:
        torch.manual_seed(0)
        shape = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        config = LlamaConfig(**shape, num_attention_heads=2, initializer_range=0.2, pad_token_id=0)
        return LlamaForSequenceClassification(config)

    for make, task in ((gpt2, "CAUSAL_LM"), (classifier, "SEQ_CLS")):
        model = get_peft_model(make(), IncreLoraConfig(target_r=2, init_weights=False, task_type=task, seed=2))
        if task == "SEQ_CLS":
            torch.nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
        model.save_pretrained(tmp_path / task)
        export_lora(tmp_path / task, tmp_path / "lora" / task, pad_to=2)
        close(PeftModel.from_pretrained(make(), tmp_path / "lora" / task), logits(model))


def test_an_adapter_that_was_never_trained_leaves_as_nothing_added(tmp_path):
    get_peft_model(llama(), IncreLoraConfig(**GROWTH)).save_pretrained(tmp_path / "new")
    export_lora(tmp_path / "new", tmp_path / "lora")
    close(PeftModel.from_pretrained(llama(), tmp_path / "lora"), logits(llama()))


def test_what_cannot_be_exported_is_refused(finished, tmp_path):
    folder = finished[0]
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    for name in ("cut", "none"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(
        (folder / "adapter_model.safetensors").read_bytes()[:999]
    )
    save_file({"x": torch.ones(1)}, tmp_path / "none" / "adapter_model.safetensors")
    part = {
        k: v
        for k, v in load_file(folder / "adapter_model.safetensors").items()
        if "0.self_attn.q_proj.increlora_E" not in k
    }
    (tmp_path / "part").mkdir()
    save_file(part, tmp_path / "part" / "adapter_model.safetensors")
    (tmp_path / "part" / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    for source, more, match in (
        (folder, {"pad_to": 4}, "has rank 5. Give a larger one, or train with a `max_rank`"),
        (folder, {"pad_to": 8.0}, "`pad_to` must be a whole number"),
        (tmp_path, {}, "has no adapter_config.json: give the folder of an adapter"),
        (tmp_path / "lora", {}, "has an adapter of PeftType.LORA, not of IncreLoRA|has an adapter of LORA"),
        (tmp_path / "cut", {}, "cannot be read"),
        (tmp_path / "none", {}, "has no tensors of IncreLoRA"),
        (tmp_path / "part", {}, "q_proj"),
    ):
        with naming(match), pytest.raises(UserError, match=match):
            export_lora(source, tmp_path / "out", **more)
        assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(UserError, match="exists already"):
        export_lora(folder, tmp_path / "full")


def test_an_exported_adapter_is_that_of_a_plain_loop_in_the_middle(tmp_path):
    model = get_peft_model(llama(torch.float64), IncreLoraConfig(**GROWTH, total_step=STEPS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    attach(model, optimizer)
    for step in range(8):
        optimizer.zero_grad()
        model(input_ids=counting(step), labels=counting(step)).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "growing")
    export_lora(tmp_path / "growing", tmp_path / "lora")
    assert all(t.dtype == torch.float64 for t in load_file(tmp_path / "lora/adapter_model.safetensors").values())
    loaded = PeftModel.from_pretrained(llama(torch.float64), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-12)


def test_dense_layers_that_peft_would_take_for_experts_are_refused(tmp_path):
    shape = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1}
    config = Qwen3MoeConfig(**shape, moe_intermediate_size=16, mlp_only_layers=[0])  # layer 0 is dense
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")

    def base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    dense = ["gate_proj", "up_proj", "down_proj"]
    for name, excluded in (("all", None), ("some", ["gate_proj"]), ("attention", dense)):
        config = IncreLoraConfig(target_r=1, init_weights=False, exclude_modules=excluded, seed=1)
        model = get_peft_model(base(), config)
        model.save_pretrained(tmp_path / name)
        if excluded == dense:
            export_lora(tmp_path / name, tmp_path / "lora")
            close(PeftModel.from_pretrained(base(), tmp_path / "lora"), logits(model))
            continue
        with naming(name), pytest.raises(UserError, match="would drop the updates of the layers here"):
            export_lora(tmp_path / name, tmp_path / "lora")
    kinds = {name: rf".*\.0\.mlp\.{name}" for name in dense}
    live, method = base(), IncreLoRA(target_rank=1, head=None, kinds=kinds)
    method.prepare(live, 10)
    with pytest.raises(UserError, match="in a LoRA of qwen3_moe for those of experts"):
        save_peft_adapter(method, live, tmp_path / "plain", base_model=str(tmp_path / "base"))
    assert not (tmp_path / "plain").exists() and not (tmp_path / "lora" / "plain").exists()
