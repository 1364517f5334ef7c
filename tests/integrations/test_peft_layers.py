"""Which layers an adapter takes by default, and what it does with those that it cannot take."""

import copy
import warnings

import pytest
import torch
import transformers as t
from naming import naming
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from test_peft import counting

from increlora.integrations.peft import IncreLoraConfig, attach, export_lora

WIDE = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
MIXTRAL = t.MixtralConfig(**WIDE, num_local_experts=2, num_key_value_heads=2)
MODELS = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**WIDE)),
    "llama, tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**WIDE, tie_word_embeddings=True)),
    "llama, classifier": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**WIDE)),
    "gpt2, tied": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    ),
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(
            vocab_size=32, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
            word_embed_proj_dim=32,
        )
    ),
    "bert, classifier": lambda: t.BertForSequenceClassification(t.BertConfig(**WIDE)),
}  # fmt: skip
RUN = {"target_r": 2, "total_step": 40, "seed": 0}


def adapted(model: torch.nn.Module) -> set[str]:
    kind = next(iter(model.peft_config.values())).peft_type.value.lower()
    ends = ".lora_A" if kind == "lora" else ".increlora_update"
    return {name.removesuffix(ends) for name, _ in model.named_modules() if name.endswith(ends)}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_layers_by_default_are_those_of_all_linear_and_no_head():
    for name, make in MODELS.items():
        task = "SEQ_CLS" if "classifier" in name else "CAUSAL_LM"
        ours = adapted(get_peft_model(make(), IncreLoraConfig(**RUN, task_type=task)))
        theirs = adapted(get_peft_model(make(), LoraConfig(task_type=task, target_modules="all-linear")))
        with naming(name):
            assert ours == theirs and len(ours) >= 8
            assert not any(layer.endswith(("lm_head", "score", "classifier")) for layer in ours)


@pytest.mark.parametrize(
    "kind, task, head",
    [
        (t.BertForTokenClassification, "TOKEN_CLS", "classifier"),
        (t.RobertaForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
        (t.BertForSequenceClassification, "SEQ_CLS", "bert.pooler"),
    ],
)
def test_a_head_trains_in_full_and_leaves_with_the_merge(kind, task, head, tmp_path):
    base = kind(kind.config_class(**WIDE)).eval()
    more = {"modules_to_save": [head]} if task == "SEQ_CLS" else {}  # the head of the others is known
    model = get_peft_model(copy.deepcopy(base), IncreLoraConfig(**RUN, task_type=task, init_weights=False, **more))
    assert len(adapted(model)) == 12 and not any(head in name for name in adapted(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"{head}.modules_to_save" in name:
                assert parameter.requires_grad
                parameter.add_(1.0)
    inputs = {"input_ids": torch.randint(2, 32, (3, 8))}
    expected = model.eval()(**inputs)[0]
    assert not torch.allclose(expected, base(**inputs)[0])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    for found in (again, again.merge_and_unload()):
        torch.testing.assert_close(found(**inputs)[0], expected)


def test_fused_experts_are_named_as_left_out_and_the_rest_grows():
    with pytest.warns(UserWarning, match="model.layers.N.mlp.experts.down_proj, .*which are not adapted"):
        model = get_peft_model(t.MixtralForCausalLM(MIXTRAL), IncreLoraConfig(**RUN))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training = attach(model, optimizer)
    for step in range(40):
        optimizer.zero_grad()
        model(input_ids=counting(step), labels=counting(step)).loss.backward()
        optimizer.step()
    assert sum(training.ranks().values()) == 2 * 8 and not any("experts" in name for name in training.ranks())


def test_positions_and_convolutions_are_no_experts():
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    heard = t.Wav2Vec2Config(
        **small,
        conv_dim=(32,),
        conv_stride=(5,),
        conv_kernel=(10,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    for model in (t.ViTModel(t.ViTConfig(**small, image_size=8, patch_size=4)), t.Wav2Vec2Model(heard)):
        assert any(parameter.ndim == 3 for parameter in model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            get_peft_model(model, IncreLoraConfig(**RUN))


def test_what_cannot_be_adapted_is_refused_with_its_name():
    for make, target, match in (
        (
            lambda: t.MixtralForCausalLM(MIXTRAL),
            "experts",
            "experts` is a MixtralExperts, and only",
        ),
        (lambda: t.MixtralForCausalLM(MIXTRAL), "gate_up_proj", "Target modules .* not found in the base model"),
        (MODELS["llama"], "embed_tokens", "`model.embed_tokens` is a Embedding, and only nn.Linear"),
        (MODELS["llama, tied"], "lm_head", "the weight of `lm_head` is tied to another module's"),
    ):
        with naming(match), warnings.catch_warnings(), pytest.raises(ValueError, match=match):
            warnings.simplefilter("ignore")
            get_peft_model(make(), IncreLoraConfig(target_modules=[target]))
    assert adapted(get_peft_model(MODELS["llama"](), IncreLoraConfig(target_modules=["lm_head"])))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=counting(99)).logits


def test_quantized_layers_train_save_load_and_leave_as_a_lora(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra `quantized` has it)")
    torch.manual_seed(0)
    wide = WIDE | {"hidden_size": 64, "intermediate_size": 128}  # no block of 4-bit weights is shorter
    t.LlamaForCausalLM(t.LlamaConfig(**wide, initializer_range=0.2)).save_pretrained(tmp_path / "base")
    four = t.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    for bits, kind in ((4, four), (8, t.BitsAndBytesConfig(load_in_8bit=True))):

        def base(kind=kind) -> torch.nn.Module:
            return t.LlamaForCausalLM.from_pretrained(
                tmp_path / "base", quantization_config=kind, dtype=torch.float32
            ).eval()

        with naming(bits):
            model = prepare_model_for_kbit_training(base(), use_gradient_checkpointing=False)
            model = get_peft_model(model, IncreLoraConfig(target_r=4, total_step=60, seed=0))
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
            training, losses = attach(model, optimizer, warmup_steps=5), []
            for step in range(60):
                optimizer.zero_grad()
                loss = model(input_ids=counting(step), labels=counting(step)).loss
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            assert losses[-1] < 0.3 * losses[0] and sum(training.ranks().values()) == 4 * 14
            expected = logits(model)
            model.save_pretrained(tmp_path / str(bits))
            loaded = PeftModel.from_pretrained(base(), tmp_path / str(bits)).eval()
            assert torch.equal(logits(loaded), expected)
            export_lora(tmp_path / str(bits), tmp_path / f"lora{bits}", pad_to=16)
            plain = PeftModel.from_pretrained(base(), tmp_path / f"lora{bits}").eval()
            torch.testing.assert_close(logits(plain), expected, rtol=0, atol=0.05)  # products in bfloat16
            weight = loaded.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
            if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
                with pytest.raises(ValueError, match="bitsandbytes has packed the 4-bit weights"):
                    loaded.merge_and_unload()
            elif bits == 8:  # rounded to 8 bits
                merged = logits(loaded.merge_and_unload())
                assert (merged - expected).abs().max() < 0.1 * expected.abs().max()
