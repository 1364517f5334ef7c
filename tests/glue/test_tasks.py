"""Every task's YAML against a small file in its public layout, every error of data, and the synthetic task."""

import re
import subprocess
import sys
from dataclasses import fields as dataclass_fields
from itertools import combinations_with_replacement, product

import pytest
import torch
from conftest import ROOT
from naming import naming
from omegaconf import OmegaConf

from increlora.errors import UserError
from increlora.glue import tasks
from increlora.glue.batching import epoch_batches, padding_share
from increlora.glue.synthetic import NOUNS, PROPERTIES, VOCABULARY, Statement, SyntheticEntailment, entails, includes
from increlora.glue.tasks import Examples, Task, fingerprint
from increlora.glue.tokenizing import word_tokenizer

TASKS = ROOT / "configs" / "task"
CLASSES = {"increlora.glue.tasks.Task": Task, "increlora.glue.synthetic.SyntheticEntailment": SyntheticEntailment}


def settings_of(name, seed=0):
    settings = OmegaConf.load(TASKS / f"{name}.yaml")
    settings.seed = seed  # ${seed} of configs/config.yaml
    return OmegaConf.to_container(settings)


def task_of(name, seed=0, **overrides):
    settings = settings_of(name, seed)
    if settings.get("train_examples") == "${task.train_size}":  # what Hydra would put there
        settings["train_examples"] = settings["train_size"]
    return CLASSES[settings.pop("_target_")](**settings | overrides)


@pytest.fixture(scope="module")
def words():
    """A tokenizer of whole words and single digits, in the format of BERT."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def row(*values):
    return "\t".join(values) + "\n"


def mnli_rows(gold, annotators):
    """The public files have one annotator's label in train and five in dev, so the columns shift."""
    names = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
    labels = [f"label{i + 1}" for i in range(annotators)]
    header = row(*names.split(), "sentence1", "sentence2", *labels, "gold_label")
    body = [
        row(str(i), "9", "9n", "slate", "( a )", "( b )", "(S a)", "(S b)", f"premise {i}", f"hypothesis {i}",
            *["neutral"] * annotators, label)
        for i, label in enumerate(gold)
    ]  # fmt: skip
    return header + "".join(body)


MRPC_HEADER = row("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
STSB_HEADER = row("index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2",
                  "score")  # fmt: skip
STSB_ROW = (
    "0",
    "main-captions",
    "MSRvid",
    "2012test",
    "0001",
    "none",
    "none",
    "A plane is taking off.",
    "An air plane.",
)
PAIR_HEADER = row("index", "sentence1", "sentence2", "label")
QQP_HEADER = row("id", "qid1", "qid2", "question1", "question2", "is_duplicate")

# task -> files in the public layout, then texts and labels of train
LAYOUTS = {
    "cola": (
        {"train.tsv": row("gj04", "1", "", "One more \"quote.") + row("gj04", "0", "*", "They drank the pub."),
         "dev.tsv": row("gj04", "1", "", "The sailors rode.")},
        [("One more \"quote.",), ("They drank the pub.",)], [1, 0],
    ),
    "sst2": (
        {"train.tsv": row("sentence", "label") + row("hide new secretions ", "0") + row("a gem", "1"),
         "dev.tsv": row("sentence", "label") + row("charming", "1")},
        [("hide new secretions ",), ("a gem",)], [0, 1],
    ),
    "mrpc": (
        {"train.tsv": "\ufeff" + MRPC_HEADER + row("1", "7", "8", 'He said " no .', "He refused .")
         + row("0", "7", "8", "One", "Two"),
         "dev.tsv": "\ufeff" + MRPC_HEADER + row("1", "7", "8", "Three", "Four")},
        [('He said " no .', "He refused ."), ("One", "Two")], [1, 0],
    ),
    "stsb": (
        {"train.tsv": STSB_HEADER + row(*STSB_ROW, "5.000") + row(*STSB_ROW, "0.25"),
         "dev.tsv": STSB_HEADER + row(*STSB_ROW, "3.8")},
        [STSB_ROW[-2:]] * 2, [5.0, 0.25],
    ),
    "qqp": (
        {"train.tsv": QQP_HEADER + row("1", "2", "3", "How?", "Why?", "0") + row("1", "2", "only three fields")
         + row("4", "5", "6", "Who?", "", "1"),
         "dev.tsv": QQP_HEADER + row("1", "2", "3", "Where?", "When?", "1")},
        [("How?", "Why?"), ("Who?", "")], [0, 1],
    ),
    "mnli": (
        {"train.tsv": mnli_rows(["contradiction", "entailment", "neutral"], 1),
         "dev_matched.tsv": mnli_rows(["neutral"], 5), "dev_mismatched.tsv": mnli_rows(["entailment"], 5)},
        [(f"premise {i}", f"hypothesis {i}") for i in range(3)], [2, 0, 1],
    ),
    "qnli": (
        {"train.tsv": row("index", "question", "sentence", "label") + row("0", "What?", "This.", "not_entailment")
         + row("1", "Who?", "She.", "entailment"),
         "dev.tsv": row("index", "question", "sentence", "label") + row("0", "Why?", "So.", "entailment")},
        [("What?", "This."), ("Who?", "She.")], [1, 0],
    ),
    "rte": (
        {"train.tsv": PAIR_HEADER + row("0", "No weapons.", "Weapons.", "not_entailment")
         + row("1", "A.", "B.", "entailment"),
         "dev.tsv": PAIR_HEADER + row("0", "C.", "D.", "entailment")},
        [("No weapons.", "Weapons."), ("A.", "B.")], [1, 0],
    ),
    "wnli": (
        {"train.tsv": PAIR_HEADER + row("0", "I stuck a pin.", "It had a hole.", "1") + row("1", "A.", "B.", "0"),
         "dev.tsv": PAIR_HEADER + row("0", "C.", "D.", "0")},
        [("I stuck a pin.", "It had a hole."), ("A.", "B.")], [1, 0],
    ),
}  # fmt: skip

# task -> class names as on the hub, metrics, primary ones
PUBLISHED = {
    "cola": (["unacceptable", "acceptable"], ["matthews_correlation", "accuracy"], ["matthews_correlation"]),
    "sst2": (["negative", "positive"], ["accuracy"], ["accuracy"]),
    "mrpc": (["not_equivalent", "equivalent"], ["accuracy", "f1"], ["accuracy"]),
    "stsb": (None, ["pearson", "spearmanr"], ["pearson", "spearmanr"]),
    "qqp": (["not_duplicate", "duplicate"], ["accuracy", "f1"], ["accuracy"]),
    "mnli": (["entailment", "neutral", "contradiction"], ["accuracy"], ["accuracy"]),
    "qnli": (["entailment", "not_entailment"], ["accuracy"], ["accuracy"]),
    "rte": (["entailment", "not_entailment"], ["accuracy"], ["accuracy"]),
    "wnli": (["not_entailment", "entailment"], ["accuracy"], ["accuracy"]),
}
FOLDERS = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "rte": "RTE", "wnli": "WNLI"}


def write(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def rte_files(train=None, dev=None):
    default = LAYOUTS["rte"][0]
    return {"train.tsv": default["train.tsv"] if train is None else train,
            "dev.tsv": default["dev.tsv"] if dev is None else dev}  # fmt: skip


def message(name, folder, tokenizer, **overrides):
    """What the person is told, which must be short."""
    with pytest.raises(UserError) as error:
        task_of(name, data_dir=str(folder), **overrides).load(tokenizer)
    assert len(str(error.value).splitlines()) <= 2
    return str(error.value)


# the YAML files


def test_every_yaml_is_short_says_its_command_and_names_the_fields():
    paths = sorted(TASKS.glob("*.yaml"))
    assert {path.stem for path in paths} >= {*LAYOUTS, "synthetic_entailment"}
    for path in paths:
        with naming(path.stem):
            text = path.read_text()
            assert text.startswith(f"# python run.py task={path.stem}")
            assert len(text.splitlines()) <= 18
            assert OmegaConf.is_interpolation(OmegaConf.load(path), "seed")
            settings = settings_of(path.stem)
            known = {field.name for field in dataclass_fields(CLASSES[settings.pop("_target_")])}
            assert set(settings) <= known
            assert {"data_dir", "holdout", "train_fraction", "head_dropout", "max_length"} <= set(settings)


def test_every_task_reads_its_public_layout(tmp_path, words):
    for name in LAYOUTS:
        (tmp_path / name).mkdir()
        with naming(name):
            assert_reads_its_layout(name, tmp_path / name, words)


def assert_reads_its_layout(name, tmp_path, words):
    files, texts, labels = LAYOUTS[name]
    task = task_of(name, data_dir=write(tmp_path, files))
    source, splits = task.read()
    assert splits["train"].texts == texts
    assert splits["train"].labels == labels
    data = task.load(words)
    evaluation = [file.removesuffix(".tsv") for file in files if file != "train.tsv"]
    assert list(data.evaluation) == list(splits)[1:] == evaluation
    assert data.source == source == str(tmp_path)
    assert data.sizes == {split: len(examples.labels) for split, examples in splits.items()}
    assert data.skipped == ({"train": 1} if name == "qqp" else {})
    assert data.truncated == dict.fromkeys(data.sizes, 0)
    assert data.train.labels == labels and data.train.name == "train"
    assert len(data.train) == len(data.train.lengths) == len(labels)
    assert (task.labels, task.metrics, task.primary) == PUBLISHED[name]
    assert task.num_labels == (1 if task.labels is None else len(task.labels))


def test_files_of_other_systems(tmp_path):
    """Byte-order mark, CRLF, no last line end, quotes, and line ends that are none in Unicode text."""
    text = PAIR_HEADER + row("0", 'a "quoted', "b\u2028c\x85d\x0be", "entailment") + row("1", "x", "y", "entailment")
    content = ("\ufeff" + text.rstrip("\n").replace("\n", "\r\n")).encode()
    task = task_of("rte", data_dir=write(tmp_path, rte_files(train=content)))
    assert task.read()[1]["train"].texts == [('a "quoted', "b\u2028c\x85d\x0be"), ("x", "y")]


def test_labels_as_words_or_ids(tmp_path):
    names, ids = ["1", "2", "3"], ["0", "1", "2"]
    cases = {  # classes, labels in train (dev has the first) -> ids, or what the message says
        "names": (["no", "yes"], ["yes", "no"], [1, 0]),
        "ids": (["no", "yes"], ["1", "0"], [1, 0]),
        "ids as pandas writes them beside missing ones": (["no", "yes"], ["1.0", "0.0"], [1, 0]),
        "names that are numbers": (names, ["3", "1"], [2, 0]),
        "ids of classes whose names are numbers": (names, ids, [0, 1, 2]),
        "names that are their ids": (ids, ["2", "0"], [2, 0]),
        "both in one column": (["no", "yes"], ["yes", "0"], "line 3: the label '0' is an id, but 'yes' ("),
        "names or ids": (names, ["1", "2"], "the labels 1, 2 can be names of classes or ids, which differ"),
        "neither": (["no", "yes"], ["yes", "2"], "line 3: unknown label '2'"),
        "a float": (["no", "yes"], ["0", "0.5"], "line 3: unknown label '0.5'"),
    }
    for number, (case, (classes, labels, expected)) in enumerate(cases.items()):
        lines = [row("text", "label"), *(row(f"text {i}", label) for i, label in enumerate(labels))]
        (tmp_path / str(number)).mkdir()
        folder = write(tmp_path / str(number), {"train.tsv": "".join(lines), "dev.tsv": "".join(lines[:2])})
        task = Task(name="own", fields=["text"], labels=classes, metrics=["accuracy"], primary="accuracy",
                    max_length=16, data_dir=folder)  # fmt: skip
        with naming(case):
            if isinstance(expected, list):
                assert task.read()[1]["train"].labels == expected
            else:
                with pytest.raises(UserError, match=re.escape(expected)):
                    task.read()


def test_someone_elses_task_is_one_yaml_and_two_files(tmp_path, words):
    content = row("text", "label") + row("good", "yes") + row("bad", "no")
    folder = write(tmp_path, {"train.tsv": content, "dev.tsv": content})
    own = Task(name="own", fields=["text"], labels=["no", "yes"], metrics=["accuracy"], primary="accuracy",
               max_length=16, data_dir=folder)  # fmt: skip
    assert own.load(words).train.labels == [1, 0]


def test_tasks_imports_nothing_slow():
    code = "import sys, increlora.glue.synthetic; print({'datasets', 'transformers', 'evaluate'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "set()"


# errors in the data


def test_missing_folder_and_file(tmp_path, words):
    said = message("rte", tmp_path / "nowhere", words)
    assert "nowhere: no such folder" in said and "train.tsv, dev.tsv" in said
    write(tmp_path, {"train.tsv": LAYOUTS["mnli"][0]["train.tsv"]})
    assert "dev_matched.tsv: no such file" in message("mnli", tmp_path, words)


BAD_FILES = {
    "empty": ("", ["train.tsv", "empty"]),
    "blank": (" \r\n\n", ["train.tsv", "empty"]),
    "only a header": (PAIR_HEADER, ["train.tsv", "only a header"]),
    "wrong column": (
        row("index", "sentence1", "hypothesis", "label") + row("0", "a", "b", "entailment"),
        ["train.tsv, line 1", "no column sentence2", "index, sentence1, hypothesis, label"],
    ),
    "too few fields": (PAIR_HEADER + row("0", "a", "b", "entailment") + row("1", "a b", "entailment"),
                       ["train.tsv, line 3", "3 fields", "has 4"]),
    "too many fields": (PAIR_HEADER + row("0", "a", "b", "c", "entailment"), ["train.tsv, line 2", "5 fields"]),
    "blank line": (PAIR_HEADER + "\n" + row("0", "a", "b", "entailment"), ["train.tsv, line 2", "1 fields"]),
    "two columns of a name": (row("index", "sentence1", "sentence2", "sentence1", "label"),
                              ["train.tsv, line 1", "2 columns are called sentence1"]),
    "a label of a megabyte": (PAIR_HEADER + row("0", "a", "b", "x" * 10**6), ["... (1,000,000 characters)"]),
    "unknown label": (PAIR_HEADER + row("0", "a", "b", "neutral"),
                      ["train.tsv, line 2", "'neutral'", "entailment, not_entailment"]),
    "id out of range": (PAIR_HEADER + row("0", "a", "b", "2"), ["train.tsv, line 2", "'2'"]),
    "hidden label": (PAIR_HEADER + row("0", "a", "b", "-1"), ["train.tsv, line 2", "'-1'"]),
    "bad UTF-8": (PAIR_HEADER.encode() + b"0\ta\tb\tentailment\n1\tcaf\xe9\tb\tentailment\n",
                  ["train.tsv, line 3", "UTF-8"]),
    "UTF-16": (PAIR_HEADER.encode("utf-16"), ["train.tsv, line 1", "UTF-8"]),
    "empty text": (PAIR_HEADER + row("0", "a", " ", "entailment"), ["train.tsv, line 2", "empty text"]),
}  # fmt: skip


def test_malformed_files(tmp_path, words):
    for case in BAD_FILES:
        with naming(case):
            content, parts = BAD_FILES[case]
            said = message("rte", write(tmp_path, rte_files(train=content)), words)
            assert all(part in said for part in parts), said


def test_the_bad_file_is_named(tmp_path, words):
    said = message("rte", write(tmp_path, rte_files(dev=PAIR_HEADER + row("0", "a", "b", "maybe"))), words)
    assert str(tmp_path / "dev.tsv") in said


def test_bad_scores(tmp_path, words):
    for score in ["nan", "NaN", "inf", "-inf", "high", "", "5.1", "-0.1"]:
        with naming(score):
            files = {"train.tsv": STSB_HEADER + row(*STSB_ROW, "1.0") + row(*STSB_ROW, score),
                     "dev.tsv": LAYOUTS["stsb"][0]["dev.tsv"]}  # fmt: skip
            said = message("stsb", write(tmp_path, files), words)
            assert "train.tsv, line 3" in said and score in said


def test_file_without_header_has_too_few_columns(tmp_path, words):
    said = message("cola", write(tmp_path, {"train.tsv": row("1", "a text"), "dev.tsv": row("1", "b")}), words)
    assert "no column 3" in said and "2 columns and no header" in said


def test_impossible_settings(tmp_path, words):
    for overrides, part in [
        ({"holdout": 1.0}, "task.holdout=1.0"),
        ({"holdout": -0.1}, "task.holdout"),
        ({"train_fraction": 0.0}, "task.train_fraction"),
        ({"train_fraction": 1.5}, "task.train_fraction"),
        ({"holdout": 0.01}, "task.holdout=0.01 of 2 examples"),
        ({"train_fraction": 0.01}, "task.train_fraction=0.01 of 2 examples"),
        ({"max_length": 4}, "the least is 5"),
        ({"max_length": 513}, "512"),
        ({"metrics": ["bleu"]}, "bleu"),
        ({"metrics": ["pearson"], "primary": "pearson"}, "pearson"),
        ({"primary": "f1"}, "f1"),
        ({"columns": {"sentence1": "label"}}, "must be different columns"),
        ({"max_length": "abc"}, "`max_length` must be a whole number"),
        ({"lenient": "no"}, "`lenient` must be true or false"),
        ({"dev": ["holdout"]}, "which names examples of train"),
        ({"labels": ["a", "b\tc"]}, "control characters"),
        ({"labels": [False, True]}, "quote the labels"),
        ({"labels": ["a", "b", "c"], "metrics": ["f1"], "primary": "f1"}, "3 classes"),
        ({"labels": ["a"]}, "at least two"),
        ({"fields": ["a", "b", "c"]}, "one or two"),
    ]:
        with naming((overrides, part)):
            assert part in message("rte", write(tmp_path, rte_files()), words, **overrides)


# fingerprint, holdout, fraction, truncation


def many(count=60):
    return PAIR_HEADER + "".join(
        row(str(i), f"premise number {i}", "hypothesis", ("entailment", "not_entailment")[i % 2]) for i in range(count)
    )


def test_fingerprint_changes_with_the_data_and_nothing_else(tmp_path, words):
    (tmp_path / "same").mkdir()
    folder = write(tmp_path, rte_files(train=many()))
    again = write(tmp_path / "same", rte_files(train=many()))
    reference = task_of("rte", data_dir=folder).load(words).fingerprint
    assert len(reference) == 64
    assert task_of("rte", data_dir=again).load(words).fingerprint == reference
    other_settings = task_of("rte", seed=7, data_dir=folder, max_length=6, holdout=0.1, train_fraction=0.5)
    assert other_settings.load(words).fingerprint == reference
    changes = [
        many().replace("number 7\t", "number  7\t"),
        many().replace("premise number 8\thypothesis\tentailment", "premise number 8\thypothesis\tnot_entailment"),
        many(59),
    ]
    for change in changes:
        changed = task_of("rte", data_dir=write(tmp_path / "same", rte_files(train=change)))
        assert changed.load(words).fingerprint != reference


def test_fingerprint_depends_on_order_split_and_borders():
    one, two = Examples([("a", "b"), ("c", "d")], [0, 1]), Examples([("c", "d"), ("a", "b")], [1, 0])
    joined = Examples([("a b",), ("c d",)], [0, 1])
    prints = [fingerprint({name: split}) for name in ("train", "dev") for split in (one, two, joined)]
    assert len(set(prints)) == 6


def test_fingerprint_of_scores_does_not_depend_on_their_precision():
    single = torch.tensor([3.8, 2.6], dtype=torch.float32).tolist()
    texts = [("a", "b")] * 2
    assert single != [3.8, 2.6]
    assert fingerprint({"dev": Examples(texts, single)}) == fingerprint({"dev": Examples(texts, [3.8, 2.6])})


def test_holdout_is_disjoint_and_deterministic(tmp_path):
    folder = write(tmp_path, rte_files(train=many()))

    def texts(seed, **overrides):
        task = task_of("rte", seed=seed, data_dir=folder, **overrides)
        data = task.load(word_tokenizer())  # of single characters, so that no two rows are alike
        return {
            name: list(map(tuple, split.input_ids)) for name, split in [("train", data.train), *data.evaluation.items()]
        }

    whole, parts = texts(1), texts(1, holdout=0.1)
    assert list(parts) == ["train", "dev", "holdout"] and "holdout" not in whole
    assert len(parts["holdout"]) == 6 and len(parts["train"]) == 54
    assert sorted(parts["train"] + parts["holdout"]) == sorted(whole["train"])
    assert parts["dev"] == whole["dev"]
    assert texts(1, holdout=0.1) == parts
    assert texts(2, holdout=0.1)["holdout"] != parts["holdout"]
    half, tenth = texts(1, train_fraction=0.5)["train"], texts(1, train_fraction=0.1)["train"]
    assert len(half) == 30 and len(tenth) == 6 and set(tenth) < set(half) < set(whole["train"])
    both = texts(1, train_fraction=0.5, holdout=0.1)
    assert len(both["holdout"]) == 3 and sorted(both["train"] + both["holdout"]) == sorted(half)


def test_holdout_is_tokenised_with_its_labels(tmp_path, words):
    data = task_of("rte", data_dir=write(tmp_path, rte_files(train=many())), holdout=0.25).load(words)
    assert list(data.evaluation) == ["dev", "holdout"]
    assert data.sizes == {"train": 45, "dev": 1, "holdout": 15}
    assert len(data.evaluation["holdout"].labels) == len(data.evaluation["holdout"]) == 15


def test_dev_and_held_out_examples_are_one_split_too(tmp_path, words):
    data = task_of("rte", data_dir=write(tmp_path, rte_files(train=many())), holdout=0.25, joint=True).load(words)
    dev, held, both = data.evaluation.values()
    assert list(data.evaluation) == ["dev", "holdout", "dev+holdout"] and data.sizes["dev+holdout"] == 1 + 15
    assert both.input_ids == dev.input_ids + held.input_ids and both.labels == dev.labels + held.labels
    with pytest.raises(UserError, match=r"^task\.joint=true .*: set task\.holdout"):
        task_of("rte", joint=True)
    with pytest.raises(UserError, match=r"^task rte: `labels` must be a list, it is 'abc'"):
        task_of("rte", labels="abc")


def test_truncation_is_counted_and_cuts_the_longer_text(tmp_path, words):
    train = PAIR_HEADER + row("0", "a b c d e f", "g h", "entailment") + row("1", "a b c", "g h", "entailment")
    data = task_of("rte", data_dir=write(tmp_path, rte_files(train=train)), max_length=8).load(words)
    assert data.truncated == {"train": 1, "dev": 0}
    assert data.train.lengths == [8, 8]
    assert data.train.input_ids[0] == [1, 3, 3, 3, 2, 3, 3, 2]
    assert data.train.token_type_ids[0] == [0, 0, 0, 0, 0, 1, 1, 1]


# loss, predictions, scores


def test_classification(words):
    task = task_of("mrpc")
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]], dtype=torch.bfloat16)
    loss = task.loss(logits, torch.tensor([0, 1, 1]))
    assert loss.dtype == torch.float32
    expected = (torch.log(1 + torch.exp(torch.tensor([-2.0, -1.0, 3.0])))).mean()
    torch.testing.assert_close(loss, expected)
    assert task.predict(logits).tolist() == [0, 1, 0]
    scores = task.evaluate(task.predict(logits), [0, 1, 1])
    assert scores == {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3), "score": pytest.approx(2 / 3)}


def test_regression():
    task = task_of("stsb")
    logits = torch.tensor([[1.0], [2.0], [4.0]])
    assert task.loss(logits, torch.tensor([0.0, 2.0, 2.0])).item() == pytest.approx((1 + 0 + 4) / 3)
    assert task.predict(logits).tolist() == [1.0, 2.0, 4.0]
    scores = task.evaluate([1.0, 2.0, 4.0], [0.0, 2.0, 1.0])
    assert scores["score"] == pytest.approx((scores["pearson"] + scores["spearmanr"]) / 2)
    assert scores["spearmanr"] == pytest.approx(0.5)
    assert task.evaluate([float("nan")] * 3, [0.0, 2.0, 1.0])["score"] == 0.0


# the hub, without a network


class Hub:
    """Stands for `datasets.load_dataset`."""

    def __init__(self, splits):
        self.splits, self.calls = splits, []

    def __call__(self, path, subset, split, revision):
        import datasets

        self.calls.append((path, subset, split, revision))
        return datasets.Dataset.from_dict(self.splits[split])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import datasets

    from increlora.glue import hub as hub_module

    asked = []
    monkeypatch.setattr(hub_module, "require_hub", asked.append)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    mnli = {"premise": ["a", "b"], "hypothesis": ["c", ""], "label": [2, 0], "idx": [0, 1]}
    stand_in = Hub({split: mnli for split in ("train", "validation_matched", "validation_mismatched")})
    stand_in.asked = asked
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return stand_in


def test_the_hub_gives_pinned_splits(hub, words):
    data = task_of("mnli").load(words)
    assert hub.calls == [
        ("nyu-mll/glue", "mnli", split, tasks.GLUE_REVISION)
        for split in ("train", "validation_matched", "validation_mismatched")
    ]
    assert hub.asked == ["task.data_dir=DIR"] * 3
    assert data.source == f"nyu-mll/glue@{tasks.GLUE_REVISION}" and len(tasks.GLUE_REVISION) == 40
    assert list(data.evaluation) == ["dev_matched", "dev_mismatched"]
    assert data.train.labels == [2, 0]


def test_scores_from_the_hub(hub):
    table = {"sentence1": ["a"], "sentence2": ["b"], "label": [3.8]}
    hub.splits = {"train": table, "validation": table}
    assert task_of("stsb").read()[1]["dev"].labels == [3.8]


def test_an_unlabelled_row_of_the_hub_is_refused(hub, words):
    hub.splits["train"]["label"][1] = -1
    with pytest.raises(UserError, match="mnli train, row 1: unknown label '-1'"):
        task_of("mnli").load(words)


def test_a_failing_hub_names_the_alternative(hub, words, monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"Couldn't reach the hub.*task\.data_dir=DIR"):
        task_of("mnli").load(words)


def test_what_is_cached_needs_no_hub(hub, words, tmp_path):
    from datasets.arrow_writer import ArrowWriter

    folder = tmp_path / "nyu-mll___glue" / "mnli" / "0.0.0" / tasks.GLUE_REVISION
    folder.mkdir(parents=True)
    for split, table in hub.splits.items():
        with ArrowWriter(path=str(folder / f"glue-{split}.arrow")) as writer:
            writer.write_batch(table)
            writer.finalize()
    assert task_of("mnli").load(words).sizes == {"train": 2, "dev_matched": 2, "dev_mismatched": 2}
    assert hub.calls == hub.asked == []


def test_a_task_without_hub_and_folder():
    with pytest.raises(UserError, match=r"task\.data_dir=DIR"):
        task_of("rte", subset=None).read()


# the real files


def test_real_files_have_the_official_sizes(shared):
    for name in FOLDERS:
        with naming(name):
            official = {"cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "stsb": (5749, 1500),
                        "rte": (2490, 277), "wnli": (635, 71)}  # fmt: skip
            splits = task_of(name, data_dir=str(shared / "glue" / FOLDERS[name])).read()[1]
            assert (len(splits["train"].labels), len(splits["dev"].labels)) == official[name]


def test_padding_on_real_data(shared):
    for name in ["rte", "mrpc", "cola", "stsb"]:
        with naming(name):
            from increlora.glue.tokenizing import sentencepiece_tokenizer

            tokenizer = sentencepiece_tokenizer(shared / "deberta-v3-tokenizer" / "spm.model")
            lengths = task_of(name, data_dir=str(shared / "glue" / FOLDERS[name])).load(tokenizer).train.lengths
            for epoch in range(3):
                assert padding_share(lengths, epoch_batches(lengths, 32, 41, epoch)) <= 0.06


# the synthetic task


@pytest.fixture(scope="module")
def generated():
    return task_of("synthetic_entailment").read()[1]


def test_generated_data_is_pinned(generated):
    assert fingerprint(generated) == "32ac075dbe5fac449de9ed1b793faba7b7ac6298f7bedf24cbc171752f0a44fd"


def test_generated_splits(generated, words):
    train, dev = generated["train"], generated["dev"]
    assert (len(train.labels), len(dev.labels)) == (4000, 500)
    assert sum(train.labels) == 2000 and sum(dev.labels) == 250
    assert len({*train.texts, *dev.texts}) == 4500
    assert sorted({word for pair in train.texts + dev.texts for text in pair for word in text.split()}) == VOCABULARY
    data = task_of("synthetic_entailment", seed=5).load(words)
    assert data.source == "synthetic" and data.fingerprint == fingerprint(generated)
    assert task_of("synthetic_entailment", generator_seed=1).load(words).fingerprint != data.fingerprint


def test_generated_labels_are_those_of_the_class_names(generated):
    same = {
        label
        for split in generated.values()
        for (premise, hypothesis), label in zip(split.texts, split.labels, strict=True)
        if premise == hypothesis
    }
    assert same == {task_of("synthetic_entailment").labels.index("entailment")}


def test_no_word_tells_the_label(generated):
    for sentence in [0, 1]:
        with naming(sentence):
            train = generated["train"]
            for word in VOCABULARY:
                present = [word in texts[sentence].split() for texts in train.texts]
                agree = sum(has == label for has, label in zip(present, train.labels, strict=True)) / len(present)
                assert max(agree, 1 - agree) < 0.55, word


def test_generator_settings(tmp_path):
    with pytest.raises(UserError, match=r"task\.data_dir"):
        task_of("synthetic_entailment", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="20000"):
        task_of("synthetic_entailment", train_size=20000)


# the semantics, by going through every model with up to four things


NOUN_PAIRS = {"same": ("dogs", "dogs"), "wider": ("dogs", "animals"), "narrower": ("animals", "dogs"),
              "unrelated": ("dogs", "oaks")}  # fmt: skip
PROPERTY_PAIRS = {"same": ("wet", "wet"), "wider": ("soaked", "wet"), "narrower": ("wet", "soaked"),
                  "unrelated": ("wet", "old")}  # fmt: skip
HOLDS = {
    "all": lambda inside, size: inside == size,
    "most": lambda inside, size: 2 * inside > size,
    "some": lambda inside, size: inside > 0,
    "no": lambda inside, size: inside == 0,
    "not all": lambda inside, size: inside < size,
}
ALLOWED = {
    "same": {(0, 0), (1, 1)},
    "wider": {(0, 0), (0, 1), (1, 1)},
    "narrower": {(0, 0), (1, 0), (1, 1)},
    "unrelated": {(0, 0), (0, 1), (1, 0), (1, 1)},
}


def models(nouns, properties):
    """In every model: (members with the property, members) of the premise's noun, and of the hypothesis's."""
    things = list(product(nouns - {(0, 0)}, properties))
    for size in range(1, 5):
        for model in combinations_with_replacement(things, size):
            counts = [(sum(n[i] * p[i] for n, p in model), sum(n[i] for n, _ in model)) for i in (0, 1)]
            if counts[0][1] and counts[1][1]:
                yield counts


def true_in_every_model(nouns, properties):
    """The (premise, hypothesis) quantifiers of which no model is a counterexample."""
    distinct = {tuple(counts) for counts in models(nouns, properties)}
    return {
        (first, second)
        for first, second in product(HOLDS, HOLDS)
        if all(HOLDS[second](*hypothesis) for premise, hypothesis in distinct if HOLDS[first](*premise))
    }


def test_labels_are_true_in_all_small_models():
    for noun, property_ in list(product(NOUN_PAIRS, PROPERTY_PAIRS)):
        with naming((noun, property_)):
            nouns, properties = NOUN_PAIRS[noun], PROPERTY_PAIRS[property_]
            claimed = {
                (first, second)
                for first, second in product(HOLDS, HOLDS)
                if entails(Statement(first, nouns[0], properties[0]), Statement(second, nouns[1], properties[1]))
            }
            assert claimed == true_in_every_model(ALLOWED[noun], ALLOWED[property_])
            if noun == "unrelated":  # nothing changes for classes that exclude each other, as dogs and oaks do
                assert claimed == true_in_every_model(ALLOWED[noun] - {(1, 1)}, ALLOWED[property_])


def test_inclusions_are_a_tree():
    for parents in (NOUNS, PROPERTIES):
        assert {parent for parent in parents.values() if parent} <= set(parents)
        assert all(includes(parent, child, parents) for child, parent in parents.items() if parent)
    assert includes("animals", "poodles", NOUNS) and not includes("poodles", "animals", NOUNS)
