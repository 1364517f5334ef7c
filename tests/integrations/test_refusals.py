"""Ways to a wrong result: every one is an error that says what to do, at the next call."""

import copy

import pytest
import torch
from conftest import tiny_batches
from naming import naming
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from increlora import Growth, IncreLoRA, IncreLoRACallback, UserError, distributed, save_peft_adapter
from increlora.linear import IncrementalLinear

STEPS, WARMUP = 30, 4
BATCHES = tiny_batches(4)


@pytest.fixture
def bert():
    """A two-layer BERT classifier with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def made(**changes) -> IncreLoRA:
    return IncreLoRA(**(dict(target_rank=2, top_h=5, interval=4, init_warmup=4) | changes))


def optimizer_of(method, model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(method.param_groups(model), lr=5e-3)


def growing(model, **changes) -> Growth:
    method = made(**changes)
    method.prepare(model, STEPS)
    return Growth(method, model, optimizer_of(method, model), STEPS, WARMUP)


def loss_of(model, step: int = 0) -> torch.Tensor:
    return model(**BATCHES[step % len(BATCHES)]).loss


def take(growth: Growth, until: int = STEPS) -> None:
    while growth.step < until:
        growth.begin_step()
        loss_of(growth.model, growth.step).backward()
        growth.before_step()
        growth.optimizer.step()
        growth.after_step()
        growth.optimizer.zero_grad()


def refused(said: str, call, *arguments, **keywords) -> None:
    try:
        call(*arguments, **keywords)
    except UserError as error:
        assert said in str(error) and len(str(error).splitlines()) <= 2, f"{said!r}: {error}"
    else:
        raise AssertionError(f"nothing was refused where it should have been said: {said}")


# the order of calls


def calls(growth: Growth) -> dict:
    model, optimizer = growth.model, growth.optimizer
    return {
        "begin": growth.begin_step,
        "backward": lambda: loss_of(model).backward(),
        "backward with gradients that overflow": lambda: (loss_of(model) * float("inf")).backward(),
        "cleared": optimizer.zero_grad,
        "zeroed": lambda: optimizer.zero_grad(set_to_none=False),
        "before": growth.before_step,
        "step": optimizer.step,
        "after": growth.after_step,
        "another optimizer": lambda: torch.optim.AdamW(growth.method.param_groups(model)).step(),
        "rate": lambda: optimizer.param_groups[0].update(lr=0.1),
        "scheduler": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        "half": model.half,
        "merge": growth.merge,
    }


STEP = ["begin", "backward", "before", "step", "after", "cleared"]
WRONG = {  # calls, of which the last is refused, after any number of right steps -> what is said
    "begin_step forgotten": (["backward", "before"], "growth.before_step(): the step was not begun"),
    "all of Growth forgotten": (["backward", "step"], "optimizer.step(): growth.begin_step() was not called"),
    "before_step forgotten": (["begin", "backward", "step"], "optimizer.step(): growth.before_step() was not called"),
    "after_step forgotten": ([*STEP[:4], "cleared", "begin"], "is not complete; call growth.after_step()"),
    "a skipped step not ended": (
        ["begin", "backward with gradients that overflow", "before", "cleared", "begin"],
        "also in one that before_step did not count",
    ),
    "before_step twice": ([*STEP[:3], "before"], "growth.before_step() is called twice"),
    "optimizer.step twice": ([*STEP[:4], "step"], "optimizer.step(): it is the second call in this step"),
    "optimizer.step forgotten": ([*STEP[:3], "after"], "took no step since growth.before_step()"),
    "another optimizer steps": ([*STEP[:3], "another optimizer", "after"], "took no step since growth.before_step()"),
    "optimizer.step before before_step": (["begin", "backward", "step"], "growth.before_step() was not called"),
    "before_step before the backward": (["begin", "before"], "no gradient of the task has come"),
    "zero_grad after begin_step": (["begin", "cleared", "backward", "before"], "and the penalty's with them"),
    "the same in place": (["begin", "zeroed", "backward", "before"], "and the penalty's with them"),
    "zero_grad after the backward": (["begin", "backward", "cleared", "before"], "and the penalty's with them"),
    "zero_grad between two backwards": (
        ["begin", "backward", "cleared", "backward", "before"], "and the penalty's with them",
    ),
    "zero_grad forgotten": ([*STEP[:5], "begin"], "the gradients of the last step are still there"),
    "merge within a step": (["begin", "merge"], "is not complete; merge after growth.after_step()"),
    "merge twice": (["merge", "merge"], "a second merge would add it twice"),
    "training after merge": (["merge", "begin"], "was merged and trains no further"),
    "a rate that is set outside": ([*STEP, "rate", "begin"], "to 0.1; Growth sets every learning rate"),
    "a scheduler": (["scheduler", "begin"], "a learning-rate scheduler is attached"),
    "half precision after prepare": (["half", "begin"], "in torch.float16"),
}  # fmt: skip


@pytest.mark.parametrize("done", [0, 6])
def test_every_wrong_order_of_calls_is_refused_at_the_next_call(bert, done):
    """Before the first growth, and after all growths, where nothing is scored any more."""
    for case, (names, said) in WRONG.items():
        growth = growing(copy.deepcopy(bert), interval=1, init_warmup=0)
        take(growth, done)
        known = calls(growth)
        with naming(case):
            for name in names[:-1]:
                known[name]()
            refused(said, known[names[-1]])


def test_a_forward_before_begin_step_and_gradients_that_were_not_announced_are_refused(bert):
    growth = growing(bert)
    loss = loss_of(bert)
    growth.begin_step()
    loss.backward()
    refused("no forward pass with gradients came between begin_step and before_step", growth.before_step)

    growth = growing(copy.deepcopy(bert_of(bert)))
    growth.begin_step(1)
    for _ in range(2):
        (loss_of(growth.model) / 2).backward()
    refused("announced: raise `micro_batches` of begin_step to their number", growth.before_step)


def bert_of(model):
    """A fresh model of the same shape."""
    return type(model)(model.config)


def test_steps_after_the_last_and_steps_that_are_never_finite_end(bert):
    growth = growing(copy.deepcopy(bert))
    take(growth)
    refused("all 30 steps of the run are done", growth.begin_step)

    growth = growing(bert)
    with pytest.raises(UserError, match=r"20 steps in a row had gradients that are not finite \(`max_skipped`\), at"):
        for _ in range(30):
            growth.begin_step()
            (loss_of(bert) * float("nan")).backward()
            growth.before_step()
            growth.optimizer.step()
            growth.after_step()
            growth.optimizer.zero_grad()
    assert growth.skipped_in_a_row == 20 and growth.step == 0 and all(p.isfinite().all() for p in bert.parameters())


BARE = {  # of the bare interface: calls with their step -> what is said at the last one
    "before_step without begin_step": (["before_step 0"], "begin_step(0) was not called before it"),
    "extra_loss forgotten": (["begin_step 0", "loss", "before_step 0"], "arrived 0 times in this step"),
    "extra_loss in every micro-batch": (["begin_step 0", "both", "both", "before_step 0"], "arrived 2 times"),
    "before_step twice": (["begin_step 0", "both", "before_step 0", "before_step 0"], "is called twice"),
    "after_step forgotten": (["begin_step 0", "both", "before_step 0", "begin_step 1"], "call after_step(0)"),
    "a step left out": (["begin_step 0", "both", "begin_step 1"], "step 0 is not complete"),
    "steps from 1": (["begin_step 1"], "step 0 is the next"),
    "steps of an epoch": (
        ["begin_step 0", "both", "before_step 0", "after_step 0", "begin_step 0"], "step 1 is the next",
    ),
    "another step in one call": (["begin_step 0", "both", "before_step 1"], "step 0 is under way"),
    "after_step alone": (["begin_step 0", "both", "after_step 0"], "before_step(0) was not called"),
    "zero_grad before before_step": (["begin_step 0", "both", "cleared", "before_step 0"], "there are no gradients"),
    "merge and train on": (["merge", "begin_step 0"], "prepare a fresh model"),
    "merge twice": (["merge", "merge"], "a second merge would add it twice"),
}  # fmt: skip


def test_every_wrong_order_of_the_methods_own_calls_is_refused(bert):
    for case, (names, said) in BARE.items():
        model, method = copy.deepcopy(bert), made()
        method.prepare(model, STEPS)
        known = {
            "loss": lambda model=model: loss_of(model).backward(),
            "both": lambda model=model, method=method: (loss_of(model) + method.extra_loss()).backward(),
            "merge": lambda model=model, method=method: method.merge(model),
            "cleared": model.zero_grad,
        }

        def call(name, known=known, method=method):
            if name in known:
                return known[name]()
            name, step = name.split()
            return getattr(method, name)(int(step))

        with naming(case):
            for name in names[:-1]:
                call(name)
            refused(said, call, names[-1])


def loop_by_hand(model, method, optimizer, steps=STEPS, overflow=None, takes_steps=True):
    """The bare interface, without a look at the gradients."""
    for step in range(steps):
        method.begin_step(step)
        ((loss_of(model, step) + method.extra_loss()) * (float("inf") if step == overflow else 1.0)).backward()
        method.before_step(step)
        if takes_steps:
            optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()


def test_a_loop_by_hand_in_which_nothing_trains_or_no_score_is_a_number_ends_at_the_next_growth(bert):
    def prepared():
        model, method = copy.deepcopy(bert), made()
        method.prepare(model, STEPS)
        return model, method, optimizer_of(method, model)

    refused("growth at step 8: the components have not changed", loop_by_hand, *prepared(), takes_steps=False)
    model, method, _ = prepared()
    of_the_start = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    refused("step 12: the components of the growth at step 8 have not", loop_by_hand, model, method, of_the_start)
    refused("step 8: components are no numbers any more", loop_by_hand, *prepared(), overflow=6)


def test_a_method_that_was_never_or_twice_prepared_says_so(bert):
    method = made()
    for call in (method.ranks, method.factors, lambda: method.begin_step(0), lambda: method.merge(bert)):
        refused("is not prepared: call method.prepare(model, total_steps) first", call)
    with pytest.raises(AttributeError):
        _ = method.nothing
    method.prepare(bert, STEPS)
    refused("was prepared on a model already: make another one", method.prepare, bert_of(bert), STEPS)
    refused("the model lacks", method.param_groups, copy.deepcopy(bert))
    with torch.inference_mode():
        refused("cannot train; call it outside", made().prepare, bert_of(bert), STEPS)


def test_the_checks_read_nothing_from_the_device(bert, monkeypatch):
    """One reading in a step: whether its gradients are finite."""
    growth, reads, counted = growing(bert, interval=8, init_warmup=8, top_h=12), [], True
    take(growth, 2)

    def counting(name, original):
        return lambda self, *a, **k: (reads.append(name) if counted else None, original(self, *a, **k))[1]

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
    growth.begin_step()
    counted = False  # what transformers and torch's optimizer read is not ours
    loss_of(bert).backward()
    counted = True
    growth.before_step()
    counted = False
    growth.optimizer.step()
    counted = True
    growth.after_step()
    growth.optimizer.zero_grad()
    assert reads == ["__bool__"]


# growth decided by nothing


class Checkpointed(nn.Module):
    """Reentrant checkpointing over frozen embeddings lets no gradient through; `unused` is never called."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.reentrant, self.words = reentrant, nn.Embedding(50, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.unused, self.classifier = nn.ModuleList([nn.Linear(8, 8)]), nn.Linear(8, 2)

    def forward(self, input_ids, labels, **_):
        h = self.words(input_ids)
        for layer in self.layers:
            h = h + checkpoint(layer, h, use_reentrant=self.reentrant)
        loss = nn.functional.cross_entropy(self.classifier(h.mean(1)), labels)
        return type("Output", (), {"loss": loss})


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_a_growth_without_scores_is_refused_and_matrices_without_a_gradient_are_named():
    kinds = {"layer": r".*\.\d"}
    growth = growing(Checkpointed(reentrant=True), kinds=kinds)
    with pytest.raises(UserError, match=r"growth at step 8 would be decided by nothing: 4 of 4 matrices have score 0"):
        take(growth)
    with pytest.warns(UserWarning, match=r"1 of 4 matrices have score 0, e.g. unused.0: no gradient reached"):
        take(growing(Checkpointed(reentrant=False), kinds=kinds, top_h=1), 12)
    with pytest.raises(UserError, match=r"decided by nothing: 1 of 4 matrices have score 0, e.g. unused.0"):
        take(growing(Checkpointed(reentrant=False), kinds=kinds, top_h=4, target_rank=4))


# other settings over an old state


def test_a_state_of_other_settings_is_refused_with_both_values(bert):
    growth = growing(copy.deepcopy(bert))
    take(growth, 9)
    state = growth.model.state_dict()
    for name, value in {
        "alpha": 8.0, "dropout": 0.1, "beta1": 0.5, "beta2": 0.5, "orth_weight": 0.2, "reserve_lambda": 1e-4,
        "advance_learning": False, "restart_warmup": False, "score_reduction": "mean", "seed": 7, "interval": 3,
        "init_warmup": 5, "target_rank": 3, "init_rank": 2, "rank_step": 2, "top_h": 6, "scoring_window": 3,
        "last_use_only": True, "rank_epsilon": 1e-5,
    }.items():  # fmt: skip
        other = growing(copy.deepcopy(bert), **{name: value})
        with naming(name):
            refused(f"`{name}` ", other.model.load_state_dict, copy.copy(state))
            refused(f"`{name}` ", other.method.load_state_dict, growth.method.state_dict())
    other = growing(copy.deepcopy(bert), kinds={"q": r".*\.query", "v": r".*\.value"}, top_h=1)
    refused("adapts 12 matrices, this one 4", other.model.load_state_dict, copy.copy(state))
    refused("adapts 12 matrices, this one 4", other.method.load_state_dict, growth.method.state_dict())
    other = growing(copy.deepcopy(bert), head=r"classifier\..*")
    refused("parameters of the head", other.model.load_state_dict, copy.copy(state))
    method, model = made(), copy.deepcopy(bert)
    method.prepare(model, STEPS)
    other = Growth(method, model, optimizer_of(method, model), STEPS, WARMUP + 1)
    refused("warmup_steps 4 there, 5 here", model.load_state_dict, copy.copy(state))
    growing(bert).model.load_state_dict(state)


def test_weights_that_come_without_their_structure_are_refused(bert):
    growth = growing(copy.deepcopy(bert))
    take(growth, 9)
    state = growth.model.state_dict()
    method, model = made(), copy.deepcopy(bert)
    method.prepare(model, STEPS)  # no Growth, which would restore the structure
    refused("load method.state_dict() first", model.load_state_dict, copy.copy(state), strict=False)
    without = {name: tensor for name, tensor in state.items() if name != "increlora_state"}
    refused("load method.state_dict() first", growing(bert).model.load_state_dict, dict(without), strict=False)
    method.load_state_dict(growth.method.state_dict())
    model.load_state_dict(without)
    assert torch.equal(loss_of(model), loss_of(growth.model))


# what leaves the library


def test_an_unmerged_models_weights_are_read_by_nothing_else(bert, tmp_path):
    fresh = copy.deepcopy(bert)
    growth = growing(bert)
    take(growth, 9)
    refused("the update is not merged", bert.save_pretrained, tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch for bert.encoder.layer.0.attention.self.query.weight"):
        fresh.load_state_dict(bert.state_dict(), strict=False)
    growth.keeps_checkpoints(True)
    bert.save_pretrained(tmp_path)
    assert "increlora_state" in load_file(tmp_path / "model.safetensors")
    with pytest.raises((RuntimeError, ValueError), match="mismatch"):
        type(bert).from_pretrained(tmp_path)
    refused("load it before method.prepare", bert.load_state_dict, fresh.state_dict(), strict=False)
    growth.merge()
    bert.save_pretrained(tmp_path / "merged")
    plain = type(bert).from_pretrained(tmp_path / "merged")
    assert torch.equal(loss_of(plain.eval()), loss_of(bert.eval()))


def test_an_adapter_that_is_not_the_live_model_is_refused(bert, tmp_path):
    bert.save_pretrained(tmp_path / "base")
    load = type(bert).from_pretrained

    def changed(change):
        model = load(tmp_path / "base")
        growth = growing(model)
        change(model, growth)
        return growth.method, model

    def trains(model, growth):
        model.bert.embeddings.LayerNorm.weight.requires_grad_(True)

    def bias_trains(model, growth):
        model.bert.encoder.layer[0].output.dense.base.bias.requires_grad_(True)

    def moved(model, growth):
        model.bert.embeddings.LayerNorm.weight.data += 0.1

    def a_buffer_moved(model, growth):
        model.bert.register_buffer("mean", torch.zeros(3))

    def resized(model, growth):
        model.resize_token_embeddings(60)

    def cast(model, growth):
        model.bert.embeddings.double()

    def base_changed(model, growth):
        next(iter(growth.method.linears.values())).base.weight.data += 0.1

    def changed_after_merge(model, growth):
        growth.merge()
        model.bert.encoder.layer[0].attention.self.query.weight.data += 0.1

    def merged_twice_over(model, growth):
        growth.merge()
        take(growing(model), 9)

    for change, said in {
        trains: "1 parameters train beside matrices and head",
        bias_trains: "e.g. bert.encoder.layer.0.output.dense.base.bias",
        moved: "e.g. bert.embeddings.LayerNorm.weight",
        a_buffer_moved: "e.g. bert.mean",
        resized: "1 weights of the model are not those that it had at method.prepare",
        cast: "not those that it had at method.prepare",
        base_changed: "e.g. bert.encoder.layer.0.attention.self.query.base.weight",
        changed_after_merge: "e.g. bert.encoder.layer.0.attention.self.query.weight",
        merged_twice_over: "has another update than this method's, e.g. bert.encoder.layer.0.attention.self.query",
    }.items():
        with naming(change.__name__):
            refused(said, save_peft_adapter, *changed(change), tmp_path / "adapter", task_type="SEQ_CLS")
            assert not (tmp_path / "adapter").exists()


def test_an_adapter_on_a_base_that_was_merged_before_or_is_another_is_refused(bert, tmp_path):
    bert.save_pretrained(tmp_path / "base")
    other = bert_of(bert)
    other.save_pretrained(tmp_path / "other")
    model = type(bert).from_pretrained(tmp_path / "base")
    growth = growing(model)
    take(growth, 9)
    save_peft_adapter(growth.method, model, tmp_path / "right", task_type="SEQ_CLS")
    arguments = dict(base_model=str(tmp_path / "other"), task_type="SEQ_CLS")
    refused("on its base model the adapter", save_peft_adapter, growth.method, model, tmp_path / "new", **arguments)
    growth.merge()
    save_peft_adapter(growth.method, model, tmp_path / "merged", task_type="SEQ_CLS")
    second = growing(model)
    take(second, 9)
    refused("on its base model the adapter", save_peft_adapter, second.method, model, tmp_path / "new")


def test_a_merge_into_another_model_or_with_loss_is_refused(bert):
    growth = growing(copy.deepcopy(bert))
    take(growth, 9)
    refused("this is not the model that the method was prepared on", growth.method.merge, bert)
    refused("12 of 12 layers are not the method's", growth.method.merge, copy.deepcopy(growth.model))
    for linear in growth.method.linears.values():
        linear.base.to(torch.bfloat16)
    refused("merging would lose a part of the update to rounding. Call model.float()", growth.merge)
    assert all(isinstance(linear, IncrementalLinear) for linear in growth.method.linears.values())
    growth.model.float()
    growth.merge()


# models that cannot be right


class Fused(nn.Module):
    """A layer whose experts are one tensor and whose gate is no nn.Linear."""

    def __init__(self, experts: int):
        super().__init__()
        self.attention = nn.Linear(8, 8)
        self.gate = nn.Parameter(torch.zeros(2, 8))
        if experts:
            self.experts = nn.Parameter(torch.zeros(experts, 8, 8))


class DistributedDataParallel(nn.Module):
    """As torch's, which needs a group of processes."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_models_that_cannot_be_right_are_refused(bert):
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    config = LoraConfig(r=2, target_modules=["query"])
    injected = inject_adapter_in_model(config, copy.deepcopy(bert))
    normed = copy.deepcopy(bert)
    nn.utils.parametrizations.weight_norm(normed.bert.encoder.layer[0].output.dense)
    packed = copy.deepcopy(bert)
    weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    packed.bert.encoder.layer[1].attention.self.key.weight = weight
    prepared, hooked = copy.deepcopy(bert), copy.deepcopy(bert)
    made().prepare(prepared, STEPS)
    hooked.bert.encoder.layer[0].output.dense.register_forward_hook(lambda module, x, h: h * 2)
    for case, (model, changes, said) in {
        "a PeftModel": (get_peft_model(copy.deepcopy(bert), config), {}, "merge or remove PEFT's adapters first"),
        "PEFT's layers inside": (injected, {}, "bert.encoder.layer.0.attention.self.query is of class Linear: merge"),
        "float16": (copy.deepcopy(bert).half(), {}, "bert.pooler.dense.weight would train in torch.float16"),
        "bfloat16": (copy.deepcopy(bert).bfloat16(), {}, "would train in torch.bfloat16"),
        "compiled": (torch.compile(copy.deepcopy(bert)), {}, "compile the model after method.prepare"),
        "wrapped": (DistributedDataParallel(bert), {}, "wrap the model after method.prepare and Growth"),
        "averaged": (torch.optim.swa_utils.AveragedModel(bert), {}, "average it afterwards"),
        "in several parts": (nn.DataParallel(bert), {}, "start one process per GPU"),
        "a layer with a hook": (hooked, {}, "output.dense has forward hooks"),
        "a parametrization": (normed, {}, "output.dense is computed from other parameters"),
        "quantized": (packed, {}, "with weights in torch.int8; only plain nn.Linear layers"),
        "experts": (
            nn.ModuleList([Fused(4)]),
            {"head": None},
            "N.experts, N.gate: matrices in numbered layers",
        ),
        "prepared, other kinds": (prepared, {"kinds": {"none": "nothing"}}, "has an update already"),
    }.items():
        with naming(case):
            trained = [name for name, p in model.named_parameters() if p.requires_grad]
            refused(said, made(**changes).prepare, model, STEPS)
            assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    with pytest.warns(UserWarning, match="N.gate: matrices in numbered layers"):
        made(head=None).prepare(nn.ModuleList([Fused(0)]), STEPS)


def test_a_half_precision_model_without_a_head_has_components_in_float32(bert):
    method, model = made(head=None), bert.bfloat16()
    method.prepare(model, STEPS)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


class ZeroRedundancyOptimizer(torch.optim.AdamW):
    """By name torch's, which needs a group of processes."""


def test_optimizers_that_would_not_train_what_grows_are_refused(bert, monkeypatch):
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    def growth_with(optimizer):
        return Growth(method, bert, optimizer, STEPS, WARMUP)

    method = made()
    method.prepare(bert, STEPS)
    groups = method.param_groups(bert)
    refused("ZeroRedundancyOptimizer shards its state", growth_with, ZeroRedundancyOptimizer(groups))
    wrapped = type("Wrapped", (), {"param_groups": optimizer_of(method, bert).param_groups})()
    refused("is not a torch.optim.Optimizer itself", growth_with, wrapped)
    refused("Growth has -1 steps: give the optimizer steps", Growth, method, bert, optimizer_of(method, bert), -1, 0)
    scheduled = optimizer_of(method, bert)
    torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 1.0)
    refused("a learning-rate scheduler is attached", growth_with, scheduled)
    growth = growth_with(optimizer_of(method, bert))
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType[kind])
        refused(f"accelerate runs with {kind}", growth.begin_step)


# groups of one's own


def test_a_group_that_is_added_later_is_taken_up_saved_and_restored(bert):
    other = copy.deepcopy(bert)
    growth = growing(bert)
    take(growth, 6)
    unfrozen = bert.bert.embeddings.LayerNorm.weight
    unfrozen.requires_grad_(True)
    growth.optimizer.add_param_group({"params": [("bert.embeddings.LayerNorm.weight", unfrozen)], "lr": 1e-2})
    start = unfrozen.detach().clone()
    take(growth, 9)
    group = growth.optimizer.param_groups[-1]
    assert (group["born"], group["initial_lr"]) == (6, 1e-2) and group["lr"] == pytest.approx(1e-2 * 2 / 4)
    assert not torch.equal(unfrozen, start)
    again = growing(other)
    other.load_state_dict(copy.deepcopy(bert.state_dict()))
    again.optimizer.load_state_dict(copy.deepcopy(growth.optimizer.state_dict()))
    for one in (growth, again):
        take(one, 12)
    for (name, first), second in zip(bert.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second), name
    frozen = bert.bert.embeddings.position_embeddings.weight
    growth.optimizer.add_param_group({"params": [("elsewhere", nn.Parameter(frozen.detach().clone()))]})
    refused("holds 1 others", growth.begin_step)


def test_an_optimizer_over_all_of_the_models_parameters_gets_the_groups_of_the_method(bert):
    other = copy.deepcopy(bert)
    right, method = growing(bert), made()
    method.prepare(other, STEPS)
    growth = Growth(method, other, torch.optim.AdamW(other.parameters(), lr=5e-3, weight_decay=0.0), STEPS, WARMUP)
    for group in right.optimizer.param_groups:
        group["weight_decay"] = 0.0
    for one in (right, growth):
        take(one)
    for (name, first), second in zip(bert.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_parameters_that_are_frozen_or_thawed_in_the_middle_are_refused(bert):
    growth = growing(bert)
    take(growth, 2)
    bert.requires_grad_(True)
    refused("parameters that were frozen train now, and the optimizer does not hold them", growth.begin_step)
    bert.requires_grad_(False)
    refused("components were frozen after method.prepare", growth.begin_step)
    with torch.no_grad():
        refused("gradients are switched off", growth.begin_step)


def test_processes_with_other_settings_are_refused(bert, monkeypatch):
    growth = growing(bert, seed=1)
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, value | {"seed": 2}])
    refused("process 1 has other settings: seed 2 there, 1 here", growth.begin_step)


# the Trainer


def trainer_of(bert, folder, callbacks: bool = True, **changes):
    from transformers import Trainer, TrainingArguments

    bert.accepts_loss_kwargs = False
    given = dict(
        output_dir=str(folder), max_steps=STEPS, learning_rate=5e-3, warmup_steps=WARMUP, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, per_device_train_batch_size=8,
    )  # fmt: skip
    args = TrainingArguments(**given | changes)
    method = made()
    method.prepare(bert, STEPS)
    callback = IncreLoRACallback(method, bert, args)
    rows = [dict(zip(BATCHES[0], row, strict=True)) for row in zip(*BATCHES[0].values(), strict=True)]
    chosen = dict(callbacks=[callback] if callbacks else [], optimizers=callback.optimizers)
    return Trainer(bert, args, train_dataset=rows, **chosen), callback


def test_a_trainer_without_its_callback_with_another_schedule_or_saved_unmerged_is_refused(bert, tmp_path):
    made_, _ = trainer_of(copy.deepcopy(bert), tmp_path, callbacks=False)
    refused("In the Trainer: Trainer(..., callbacks=[callback]", made_.train)
    refused(
        "lr_scheduler_type='cosine' is not used", trainer_of, copy.deepcopy(bert), tmp_path, lr_scheduler_type="cosine"
    )
    refused("leave auto_find_batch_size out", trainer_of, copy.deepcopy(bert), tmp_path, auto_find_batch_size=True)
    made_, callback = trainer_of(copy.deepcopy(bert), tmp_path)
    made_.add_callback(callback)
    refused("growth.before_step() is called twice", made_.train)
    made_, callback = trainer_of(bert, tmp_path)
    made_.train()
    refused("the update is not merged", made_.save_model, str(tmp_path / "model"))
    callback.growth.merge()
    made_.save_model(str(tmp_path / "model"))
    refused("the model stands at 30", made_.train)


def test_a_trainer_with_other_arguments_than_the_callbacks_is_refused(bert, tmp_path):
    made_, _ = trainer_of(bert, tmp_path)
    made_.args.learning_rate, made_.args.warmup_steps = 1e-4, 9
    refused("learning_rate 0.005, now 0.0001; warmup_steps 4, now 9", made_.train)


def test_what_leaves_before_its_end_is_warned_of(bert, tmp_path):
    method = made()
    method.prepare(bert, STEPS)
    optimizer = optimizer_of(method, bert)
    for step in range(4):  # a plain loop, in which nothing grows
        loss_of(bert, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.warns(UserWarning, match="save_peft_adapter: no step was begun, so nothing has grown: make Growth"):
        save_peft_adapter(method, bert, tmp_path / "adapter")
    growth = Growth(method, bert, optimizer_of(method, bert), STEPS, WARMUP)
    take(growth, until=10)
    with pytest.warns(UserWarning, match="merge: the run is at step 10 of 30, its total rank 17"):
        growth.merge()


def test_a_schedule_that_is_not_the_methods_is_refused(bert):
    method = made()
    method.prepare(bert, STEPS)
    optimizer = optimizer_of(method, bert)
    refused(f"Growth has 60 steps and method.prepare was told {STEPS}", Growth, method, bert, optimizer, 60, WARMUP)
    for warmup in (0.06, -1, STEPS):
        refused("`warmup_steps` must be a whole number of steps", Growth, method, bert, optimizer, STEPS, warmup)
    refused("LBFGS computes gradients by itself", Growth, method, bert, torch.optim.LBFGS(bert.parameters()), STEPS, 4)
    still = torch.optim.AdamW(method.param_groups(bert), lr=0.0)
    refused("every learning rate of the optimizer is 0", Growth, method, bert, still, STEPS, WARMUP)
    bert.requires_grad_(False)
    refused("no parameter of the model trains", Growth, method, bert, optimizer, STEPS, WARMUP)


def test_gradients_that_are_not_those_of_the_step_are_refused(bert):
    growth = growing(bert)
    optimizer = growth.optimizer
    take(growth, until=2)
    loss_of(bert).backward()  # for a look at a gradient between two steps
    refused("the gradients of another backward are there", growth.begin_step)
    optimizer.zero_grad(set_to_none=False)
    refused("the gradients of another backward are there", growth.begin_step)  # they would pass for those of the step
    optimizer.zero_grad()
    for step in (2, 3):  # zeros in the place of gradients are none
        growth.begin_step()
        loss_of(bert, step).backward()
        growth.before_step()
        if step == 2:
            refused("state_dict(): step 2 is not complete", bert.state_dict)
        optimizer.step()
        growth.after_step()
        optimizer.zero_grad(set_to_none=False)
    growth.begin_step()
    loss_of(bert).backward()
    growth.before_step()
    refused("call it without a closure", optimizer.step, lambda: None)
    optimizer.zero_grad()
    refused("there are no gradients, though growth.before_step() saw some", optimizer.step)


def test_gradients_that_take_the_place_of_the_penaltys_are_refused(bert):
    growth = growing(bert)
    trained = [p for p in bert.parameters() if p.requires_grad]
    growth.begin_step()
    for p, gradient in zip(trained, torch.autograd.grad(loss_of(bert), trained, allow_unused=True), strict=True):
        p.grad = gradient
    refused("gradients were replaced by other tensors", growth.before_step)


def test_a_loss_scale_that_the_penalty_does_not_have_is_refused(bert):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def until_the_step(told):
        growth = growing(copy.deepcopy(bert))
        growth.begin_step(1, scaler if told else None)
        scaler.scale(loss_of(growth.model)).backward()
        scaler.unscale_(growth.optimizer)
        growth.before_step()
        return growth.optimizer

    refused("growth.begin_step() was not given the scaler", scaler.step, until_the_step(told=False))
    refused("growth.begin_step() was given a scaler", until_the_step(told=True).step)
    scaler.step(until_the_step(told=True))


def test_a_state_that_was_averaged_or_cast_with_its_weights_is_refused_and_another_rate_is_said(bert):
    growth = growing(copy.deepcopy(bert))
    take(growth, 9)
    state, other = growth.model.state_dict(), growing(copy.deepcopy(bert))
    for odd in (state["increlora_state"].half(), state["increlora_state"] // 2):
        refused("was changed with the weights", other.model.load_state_dict, state | {"increlora_state": odd})
    for group in other.optimizer.param_groups:
        group["initial_lr"] = 1e-4
    with pytest.warns(UserWarning, match="has the learning rate 0.005, this one was made with 0.0001: 0.005 is used"):
        other.optimizer.load_state_dict(growth.optimizer.state_dict())
