"""Exports of finished runs, loaded as their users load them; logits against those of the trained model."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import HELPERS, ROOT
from finished_runs import SYNTHETIC, base_model, finished
from in_process import call, load
from safetensors.torch import load_file

from increlora import result_files
from increlora.analysis.tables import Table
from increlora.errors import UserError
from increlora.glue import export, finished_run
from increlora.glue.model_card import code, fenced, model_card, plain

script = load(ROOT / "scripts" / "export.py")
TEXTS = [
    ("all dogs are wet", "some poodles are not soaked"), ("no", "x"), ("most of the trees are old and red", "½ Ｆ"),
    ("there are no sharks that are deadly", "it is not true that some fish are dangerous"),
]  # fmt: skip
METHODS = {
    "increlora": ["method=increlora", "method.target_rank=3", "method.rank_step=1", "method.top_h=8"],
    "lora": ["method=lora", "method.rank=3"],
    "adalora": ["method=adalora"],
}
CASES = [(b, m) for b in ("deberta_v3_base", "bert_base", "roberta_base") for m in METHODS]
CASES += [("minilm", "increlora"), ("mpnet_base", "increlora")]
only = {method: pytest.mark.parametrize("case", [c for c in CASES if c[1] == method], ids="-".join, indirect=True)
        for method in METHODS}  # fmt: skip
HEADS = {"deberta_v3_base": ["pooler", "classifier"], "roberta_base": ["classifier"], "mpnet_base": ["classifier"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folder of a small encoder by backbone, made when it is first asked for."""
    made: dict[str, Path] = {}

    def base(backbone: str) -> Path:
        if backbone not in made:
            made[backbone] = base_model(backbone, tmp_path_factory.mktemp(backbone))
        return made[backbone]

    return base


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, bases, tmp_path_factory):
    """A run of a method on an architecture, and the logits of its last model, taken without our own batching."""
    backbone, method = request.param
    base = bases(backbone)
    where = f"backbone.path={base}"
    run_dir = finished(tmp_path_factory.mktemp("run"), f"backbone={backbone}", where, *SYNTHETIC, *METHODS[method])
    run = finished_run.load(run_dir, "last", [where])
    return SimpleNamespace(backbone=backbone, base=base, where=where, run_dir=run_dir, run=run, expected=forward(run))


@torch.no_grad()
def forward(run, model=None) -> torch.Tensor:
    tokens = run.tokenizer(*zip(*TEXTS, strict=True), padding=True, truncation=True, max_length=64, return_tensors="pt")
    return (model or run.model).eval()(**tokens).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return (found - expected).abs().max().item() < 1e-5


def test_an_adapter_for_peft(case, monkeypatch, capsys):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    code = call(script, monkeypatch, case.run_dir, "--format", "peft", "--checkpoint", "last", case.where)
    said = capsys.readouterr()
    assert code == 0, said.err
    assert re.search(r"its logits differ by at most \d\.\de[+-]\d\d \(largest", said.out)
    folder = case.run_dir / "peft"
    written = json.loads((folder / "adapter_config.json").read_text())
    reached = {name: len(A) for name, (A, _) in case.run.method.factors().items()}
    assert written["rank_pattern"] == written["alpha_pattern"] == reached
    assert set(written["modules_to_save"]) == set(HEADS.get(case.backbone, ["bert.pooler", "classifier"]))
    assert written["base_model_name_or_path"] == str(case.base) and written["task_type"] == "SEQ_CLS"
    base = AutoModelForSequenceClassification.from_pretrained(case.base, num_labels=2)
    assert not close(forward(case.run, base), case.expected)
    model = PeftModel.from_pretrained(base, folder)
    assert close(forward(case.run, model), case.expected)
    plain = model.merge_and_unload()
    assert type(plain) is type(case.run.model) and not [name for name in plain.state_dict() if "lora" in name]
    assert close(forward(case.run, plain), case.expected)
    done = use(folder)
    assert done["model"](**done["inputs"]).logits.shape == (1, 2)
    tokens = AutoTokenizer.from_pretrained(folder)(*zip(*TEXTS, strict=True))["input_ids"]
    assert tokens == case.run.tokenizer(*zip(*TEXTS, strict=True))["input_ids"]


def test_a_merged_model_for_transformers(case, monkeypatch, capsys, tmp_path):
    from transformers import AutoModelForSequenceClassification, pipeline

    arguments = ("--format", "merged", "--output", tmp_path / "model", "--checkpoint", "last", case.where)
    assert call(script, monkeypatch, case.run_dir, *arguments) == 0, capsys.readouterr().err
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert close(forward(case.run, model), case.expected)
    assert model.config.id2label == {0: "entailment", 1: "not_entailment"}
    assert use(tmp_path / "model")["classify"]("text")[0]["label"] in ("entailment", "not_entailment")
    classify = pipeline("text-classification", str(tmp_path / "model"), top_k=None, truncation=True)
    for text, expected in zip(TEXTS, case.expected.softmax(-1), strict=True):
        found = {answer["label"]: answer["score"] for answer in classify({"text": text[0], "text_pair": text[1]})}
        assert found == pytest.approx(
            {"entailment": expected[0].item(), "not_entailment": expected[1].item()}, abs=1e-5
        )


def use(folder: Path) -> dict:
    """What is there after the example on the model card has run."""
    code = re.search(r"## Use\n\n```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)[1]
    exec(code.replace("THIS_FOLDER", str(folder)), names := {})
    return names


def test_ranks_differ_from_matrix_to_matrix(case):
    ranks = case.run.method.ranks()
    assert (len(set(ranks.values())) > 1) == (case.run.method.name != "lora")
    assert ranks == case.run.result["ranks"]["last"]


def test_factors_are_the_update(case):
    """Against what merging adds to the weights, and for PEFT's layers against PEFT's own delta."""
    run = finished_run.load(case.run_dir, "last", [case.where])
    before = {name: run.model.get_submodule(name).weight.clone() for name in run.method.ranks()}
    factors = run.method.factors()
    run.method.merge(run.model)
    for name, weight in before.items():
        A, B = factors[name] if name in factors else (torch.zeros(0, weight.shape[1]), torch.zeros(weight.shape[0], 0))
        assert A.shape[0] == B.shape[1] and not A.requires_grad and not B.requires_grad
        torch.testing.assert_close(B @ A, run.model.get_submodule(name).weight - weight, rtol=0, atol=1e-6)


def test_an_adapter_loads_by_itself(bases, tmp_path, monkeypatch):
    from peft import AutoPeftModelForSequenceClassification

    where = f"backbone.path={bases('bert_base')}"
    run_dir = finished(tmp_path / "run", "backbone=bert_base", where, *SYNTHETIC, "method=lora")
    assert call(script, monkeypatch, run_dir, where, "--format=peft", "--output", tmp_path / "a", "--base", "x/y") == 0
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "x/y"
    assert call(script, monkeypatch, run_dir, "--format=peft", where) == 0
    model = AutoPeftModelForSequenceClassification.from_pretrained(run_dir / "peft", num_labels=2)
    run = finished_run.load(run_dir, "best", [where])
    assert close(forward(run, model), forward(run))


# what reaches the output beyond the ranks


@only["increlora"]
def test_a_reserve_that_learns_is_kept(case, tmp_path):
    run = finished_run.load(case.run_dir, "last", [case.where])
    bank = run.method.bank
    assert not any(matrix.reserve_learns for matrix in bank.matrices.values())  # the budget is spent
    bank.reserve_lambda = 1e-5
    for name, matrix in bank.matrices.items():  # as in the growing phase, the reserve's A and B of norm 1
        for rows in bank.rows(name, matrix.active):
            torch.nn.init.orthogonal_(rows)
        silent = bank.factors(name)
        matrix.reserve_learns = True
        torch.testing.assert_close(silent[0], bank.factors(name)[0][:-1])
    bank.changed()
    ranks = run.method.ranks()
    assert {name: len(A) for name, (A, _) in run.method.factors().items()} == {n: r + 1 for n, r in ranks.items()}
    with_reserves = forward(run)
    moved = (with_reserves - case.expected).abs().max().item()
    difference, _ = script.write_and_compare(run, tmp_path, "peft")
    assert difference < 1e-5 and moved > 3 * difference  # dropping it would have been seen
    assert close(forward(run, script.adapter_model(run, tmp_path)), with_reserves)
    assert f"The adapter's are {sum(ranks.values()) + len(ranks)}" in (tmp_path / "README.md").read_text()


@only["adalora"]
def test_a_pruned_triplet_that_grew_again_is_kept_and_others_are_dropped(case):
    run = finished_run.load(case.run_dir, "last", [case.where])
    name, layer = next(iter(run.method.layers.items()))
    values = layer.lora_E["default"].data
    for triplets in ([0.5, 0.0, -0.2], [0.5, 1e-3, -0.2], [0.0, 0.0, 0.0]):
        values.copy_(torch.tensor(triplets).unsqueeze(1))
        kept = sum(value != 0 for value in triplets)
        if not kept:
            assert name not in run.method.factors()
            continue
        A, B = run.method.factors()[name]
        assert len(A) == kept
        torch.testing.assert_close(B @ A, layer.get_delta_weight("default"), rtol=0, atol=1e-7)


def test_only_what_is_needed_is_in_the_adapter(case, tmp_path):
    run = finished_run.load(case.run_dir, "last", [case.where])
    export.write_adapter(run, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    factors = sum(A.numel() + B.numel() for A, B in run.method.factors().values())
    head = sum(p.numel() for _, p in run.method.head_parameters(run.model))
    assert sum(tensor.numel() for tensor in tensors.values()) == factors + head
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


# the other methods


def tiny(tmp_path, *overrides: str) -> Path:
    return finished(tmp_path / "run", "backbone=tiny", *SYNTHETIC, *overrides)


@pytest.mark.parametrize("method", ["full", "bitfit", "uniform"])
def test_methods_that_can_be_merged(method, tmp_path, monkeypatch, capsys):
    run_dir = tiny(tmp_path, f"method={method}")
    assert call(script, monkeypatch, run_dir, "--format", "merged") == 0, capsys.readouterr().err
    run = finished_run.load(run_dir)
    assert close(forward(run, script.merged_model(run_dir / "merged")), forward(run))
    card = (run_dir / "merged" / "README.md").read_text()
    assert ("## Ranks" in card) == (method == "uniform") and "a random encoder" in card and "base_model" not in card


CANNOT = {
    (
        "full",
        "peft",
    ): "full trains no low-rank factors, so no LoRA adapter can hold it; the merged model can be written",
    ("houlsby", "peft"): "houlsby trains no low-rank factors, so no LoRA adapter can hold it; nor can it be merged",
    ("houlsby", "merged"): "cannot be folded into the layers they follow",
    ("lora", "peft"): "backbone tiny was drawn at random, so there is no base model to load an adapter on",
}


@pytest.mark.parametrize(("method", "kind"), CANNOT, ids="-".join)
def test_methods_that_cannot_say_so_and_leave_nothing(method, kind, tmp_path, monkeypatch, capsys):
    run_dir = tiny(tmp_path, f"method={method}", "train.max_steps=2" if method != "lora" else "train.max_steps=3")
    before = sorted(path.name for path in run_dir.iterdir())
    assert call(script, monkeypatch, run_dir, "--format", kind) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and CANNOT[method, kind] in said and said.count("\n") <= 2
    assert sorted(path.name for path in run_dir.iterdir()) == before


def test_the_ranks_of_another_run_found_where_it_lies_now(tmp_path, monkeypatch):
    first = tiny(tmp_path, "method.top_h=4")
    second = finished(
        tmp_path / "second", "backbone=tiny", *SYNTHETIC, "method=static_pattern", f"method.pattern={first}"
    )
    first.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"method\.pattern: cannot read ranks"):
        finished_run.load(second)
    run = finished_run.load(second, overrides=[f"method.pattern={tmp_path / 'moved'}"])
    assert len(set(run.method.ranks().values())) > 1
    difference, _ = script.write_and_compare(run, tmp_path, "merged")
    assert difference < 1e-5


def test_regression(tmp_path, monkeypatch):
    from transformers import pipeline

    data = tmp_path / "data"
    data.mkdir()
    rows = [f"{i}\tall dogs are wet\t{'some' if i % 2 else 'no'} dogs are wet\t{i % 6}" for i in range(24)]
    for name in ("train", "dev"):
        (data / f"{name}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tscore", *rows]) + "\n")
    run_dir = finished(tmp_path / "run", "backbone=tiny", "task=stsb", f"task.data_dir={data}", "method=lora")
    assert call(script, monkeypatch, run_dir, "--format", "merged") == 0
    config = json.loads((run_dir / "merged" / "config.json").read_text())
    assert config["problem_type"] == "regression" and config["id2label"] == {"0": "score"}
    score = pipeline("text-classification", str(run_dir / "merged"))({"text": TEXTS[0][0], "text_pair": TEXTS[0][1]})
    score = score if isinstance(score, dict) else score[0]
    expected = forward(finished_run.load(run_dir))[0].item()
    assert score["label"] == "score" and score["score"] == pytest.approx(expected, abs=1e-5)
    assert "One output, the score itself" in (run_dir / "merged" / "README.md").read_text()


# the model card, the tokenizer


def test_the_model_card(case, tmp_path):
    run = replace(case.run, checkpoint="best")
    card = model_card(run, "merged", "some/base")
    best = run.result["scores"]["best"]
    assert f"After step {best['step']}, chosen on dev" in card
    assert f"| dev | accuracy | {best['metrics']['dev']['accuracy']:.4f} |" in card
    assert "0. `entailment`\n1. `not_entailment`" in card and 'base_model: "some/base"' in card
    assert f"Total {sum(run.method.ranks().values())} over 12 matrices." in card
    groups = f"backbone={case.backbone} budget=r2 method={run.method.name} task=synthetic_entailment seed=41"
    assert f"python run.py {groups} " in card and str(case.run_dir) not in card and str(case.base) not in card


def test_the_tokenizer_that_transformers_would_build_otherwise(shared, tmp_path):
    """DeBERTaV3's own pieces, through an export and AutoTokenizer: the golden ids of tests/glue/test_tokens.py."""
    from transformers import AutoConfig, AutoTokenizer

    from increlora.glue.tokenizing import sentencepiece_tokenizer

    run = SimpleNamespace(task=SimpleNamespace(max_length=77))
    run.tokenizer = sentencepiece_tokenizer(shared / "deberta-v3-tokenizer" / "spm.model")
    export.trained_tokenizer(run).save_pretrained(tmp_path)
    AutoConfig.for_model("deberta-v2").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == 77
    for pair in json.loads((HELPERS / "data_tokens.json").read_text()):
        assert tokenizer(pair["first"], pair["second"])["input_ids"] == pair["ids"]


# refused


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("lora"), "backbone=tiny", *SYNTHETIC, "method=lora")


def test_an_export_that_differs_is_not_kept(lora_run, tmp_path, monkeypatch, capsys):
    write, read = export.write_merged, script.merged_model

    def incomplete(run, folder):
        run.method.layers.popitem()  # one matrix is left unmerged
        write(run, folder)

    def shifted(folder):
        model = read(folder)
        model.classifier.bias.data += 2e-5
        return model

    for module_, name, broken in ((export, "write_merged", incomplete), (script, "merged_model", shifted)):
        with monkeypatch.context() as patch:
            patch.setattr(module_, name, broken)
            assert call(script, patch, lora_run, "--format", "merged", "--output", tmp_path / "m") == 2
        assert "nothing was kept" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(lora_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "m").mkdir()
    assert call(script, monkeypatch, lora_run, "--format", "merged", "--output", tmp_path / "m") == 2
    assert "exists already" in capsys.readouterr().err and not list((tmp_path / "m").iterdir())


def copied(lora_run: Path, folder: Path, **changes) -> Path:
    """The run directory with some of result.json replaced."""
    folder.mkdir()
    result = json.loads((lora_run / "result.json").read_text()) | changes
    (folder / "result.json").write_text(json.dumps(result_files.sealed(result)))
    (folder / "best.safetensors").write_bytes((lora_run / "best.safetensors").read_bytes())
    return folder


def test_directories_that_are_no_finished_run(lora_run, tmp_path):
    def message(run_dir, *overrides):
        with pytest.raises(UserError) as error:
            finished_run.load(run_dir, "best", overrides)
        assert len(str(error.value).splitlines()) <= 2
        return str(error.value)

    assert f"{tmp_path / 'result.json'}: no such file" in message(tmp_path)
    result = json.loads((lora_run / "result.json").read_text())
    (copied(lora_run, tmp_path / "a") / "best.safetensors").unlink()
    assert "best.safetensors: no such file; the run's weights" in message(tmp_path / "a")
    (copied(lora_run, tmp_path / "b") / "best.safetensors").write_bytes(b"cut")
    assert "truncated or not a checkpoint" in message(tmp_path / "b")
    other = {**result["config"], "seed": 42}
    assert "another run than result.json: it differs in config.seed" in message(
        copied(lora_run, tmp_path / "c", config=other)
    )
    ranks = {"best": dict.fromkeys(result["ranks"]["best"], 7)}
    assert "are not those in result.json" in message(copied(lora_run, tmp_path / "d", ranks=ranks))
    assert "'method.alpha=64': of a finished run only backbone.path" in message(lora_run, "method.alpha=64")
    assert "there is no such folder" in message(lora_run, "backbone.path=nowhere")


def test_names_of_strangers_are_no_markup():
    hostile = "a|b](http://x) <script> `c` ``d`` *e*\n# f \x1b[31m"
    assert plain(hostile) == r"a\|b\](http://x) \<script\> \`c\` \`\`d\`\` \*e\*\\n\# f \\x1b\[31m"
    assert plain("synthetic_entailment") == "synthetic_entailment"
    assert code("a``b`c") == "``` a``b`c ```" and code("plain") == "`plain`"
    assert fenced("sh", "```\nrm") == "````sh\n```\nrm\n````"
    table = Table("50 % of $x", ["a|b\nc"], [[r"\input{x}^~_#&"]])
    assert table.markdown() == "50 % of $x\n\n| a\\|b c |\n| --- |\n| \\input{x}^~_#& |\n"
    assert r"\caption{50 \% of \$x}" in table.latex()
    assert r"\textbackslash{}input\{x\}\textasciicircum{}\textasciitilde{}\_\#\&" in table.latex()


def test_released_adapters_are_small_and_fit_their_results():
    folders = [path for path in (ROOT / "results" / "adapters").iterdir() if path.is_dir()]
    assert {folder.name for folder in folders} == {"cola", "mrpc", "rte", "sst2", "stsb"}
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        result = result_files.read(folder / "result.json")
        assert (folder / "adapter_model.safetensors").stat().st_size < 1_000_000
        assert result["run"]["task"] == folder.name and result["code"]["dirty"] is False
        ranks = {name: len(A) for name, A in tensors.items() if name.endswith("lora_A.weight")}
        assert len(ranks) == 36 and sum(ranks.values()) >= sum(result["ranks"]["best"].values())
