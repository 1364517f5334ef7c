"""scripts/submit_glue.py: every file of the zip row by row, against predictions made text by text."""

import zipfile
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from finished_runs import finished
from in_process import call, load
from naming import naming
from test_tasks import LAYOUTS, row, task_of, write

from increlora.glue import finished_run, tasks

script = load(ROOT / "scripts" / "submit_glue.py")
SENTENCES = ["all dogs are wet", "no trees are old", "some fish are big", "most birds are tired", "bees are red"]
ROWS = {"CoLA": 5, "SST-2": 4, "MRPC": 3, "STS-B": 5, "QQP": 4, "MNLI-m": 3, "MNLI-mm": 4, "QNLI": 5, "RTE": 4,
        "WNLI": 3, "AX": 5}  # fmt: skip
# file of the zip -> folder and file of its test set in the public archive, with the header there
TESTS = {
    "CoLA": ("CoLA/test.tsv", "index sentence"),
    "SST-2": ("SST-2/test.tsv", "index sentence"),
    "MRPC": ("MRPC/test.tsv", "index|#1 ID|#2 ID|#1 String|#2 String"),
    "STS-B": ("STS-B/test.tsv", "index genre filename year old_index source1 source2 sentence1 sentence2"),
    "QQP": ("QQP/test.tsv", "id question1 question2"),
    "MNLI-m": ("MNLI/test_matched.tsv", "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
               "sentence1_parse sentence2_parse sentence1 sentence2"),
    "MNLI-mm": ("MNLI/test_mismatched.tsv", "index promptID pairID genre sentence1_binary_parse "
                "sentence2_binary_parse sentence1_parse sentence2_parse sentence1 sentence2"),
    "QNLI": ("QNLI/test.tsv", "index question sentence"),
    "RTE": ("RTE/test.tsv", "index sentence1 sentence2"),
    "WNLI": ("WNLI/test.tsv", "index sentence1 sentence2"),
    "AX": ("diagnostic/diagnostic.tsv", "index sentence1 sentence2"),
}  # fmt: skip
# what the server reads, by class id of the task as published
WORDS = {
    "CoLA": "0 1", "SST-2": "0 1", "MRPC": "0 1", "QQP": "0 1", "WNLI": "0 1", "RTE": "entailment not_entailment",
    "QNLI": "entailment not_entailment", "MNLI-m": "entailment neutral contradiction",
    "MNLI-mm": "entailment neutral contradiction", "AX": "entailment neutral contradiction",
}  # fmt: skip
FOLDERS = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "mnli": "MNLI",
           "qnli": "QNLI", "rte": "RTE", "wnli": "WNLI"}  # fmt: skip
TASK_OF = {**{folder: task for task, folder in FOLDERS.items()}, "MNLI-m": "mnli", "MNLI-mm": "mnli", "AX": "mnli"}
# lines of the files that the server took (README of BERT on STILTs, header included)
LINES = {"AX": 1105, "CoLA": 1064, "MNLI-mm": 9848, "MNLI-m": 9797, "MRPC": 1726, "QNLI": 5464, "QQP": 390966,
         "RTE": 3001, "SST-2": 1822, "STS-B": 1380, "WNLI": 147}  # fmt: skip


def texts_of(name: str) -> list[tuple[str, ...]]:
    """The texts of a generated test set, none like another."""
    count = 2 if name not in ("CoLA", "SST-2") else 1
    return [tuple(f"{SENTENCES[(i + j) % 5]} {name.lower()} {i}" for j in range(count)) for i in range(ROWS[name])]


def write_test_set(folder, name: str, texts) -> None:
    file, header = TESTS[name]
    columns = header.split("|" if "|" in header else " ")
    columns, width = [*columns], len(columns) - len(texts[0])
    body = [row(str(i), *["x"] * (width - 1), *pair) for i, pair in enumerate(texts)]
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(row(*columns) + "".join(body))


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """A GLUE folder in the public layout, all of it tiny."""
    folder = tmp_path_factory.mktemp("glue")
    for task, (files, *_) in LAYOUTS.items():
        (folder / FOLDERS[task]).mkdir()
        if task == "stsb":  # a correlation needs two scores
            files = {**files, "dev.tsv": files["train.tsv"]}
        write(folder / FOLDERS[task], files)
    for name in TESTS:
        write_test_set(folder, name, texts_of(name))
    return folder


@pytest.fixture(scope="module")
def runs(glue, tmp_path_factory):
    """A finished run of every task."""
    return {
        task: finished(
            tmp_path_factory.mktemp(task) / "learning=1", "backbone=tiny", f"task={task}", f"task.data_dir={glue}",
            "method=bitfit", "train.max_steps=3", "backbone.architecture.initializer_range=0.5",
        )
        for task in FOLDERS
    }  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """The server expects as many rows as were generated."""
    parts = {name: replace(part, rows=ROWS[name]) for name, part in script.PARTS.items()}
    monkeypatch.setattr(script, "PARTS", parts)


def content(path) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name).decode() for name in archive.namelist()}


@torch.no_grad()
def outputs(run, texts) -> list[float]:
    return run.model(**run.tokenizer(*texts, return_tensors="pt")).logits[0].tolist()


def test_every_file_row_by_row(glue, runs, small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "submission.zip"
    arguments = (*runs.values(), "--output", out, f"task.data_dir={glue}", "--batch-size", 2)
    assert call(script, monkeypatch, *arguments) == 0, capsys.readouterr().err
    files = content(out)
    assert set(files) == {f"{name}.tsv" for name in TESTS} and len(files) == 11
    seen = set()
    for name in TESTS:
        run = finished_run.load(runs[TASK_OF[name]])
        lines = files[f"{name}.tsv"].split("\n")
        assert lines[0] == "index\tprediction" and lines.pop() == "" and len(lines) == ROWS[name] + 1
        for i, texts in enumerate(texts_of(name)):
            found = outputs(run, texts)
            if name == "STS-B":
                word = f"{min(5, max(0, found[0])):.3f}"
            else:
                word = WORDS[name].split()[max(range(len(found)), key=found.__getitem__)]
            assert lines[i + 1] == f"{i}\t{word}", name
            seen.add((name, word))
    assert len(seen) > len(TESTS)  # not one and the same answer everywhere
    assert not capsys.readouterr().err and sorted(path.name for path in tmp_path.iterdir()) == ["submission.zip"]
    before = out.read_bytes()
    assert call(script, monkeypatch, *arguments) == 0 and out.read_bytes() == before


def test_scores_are_clipped_and_have_three_decimals():
    task = task_of("stsb")
    logits = torch.tensor([[5.2], [-0.3], [2.34567], [4.9996], [0.0]])
    assert script.words(task, script.PARTS["STS-B"], logits) == ["5.000", "0.000", "2.346", "5.000", "0.000"]


def test_words_go_by_name_not_by_order():
    task = replace(task_of("wnli"), labels=["entailment", "not_entailment"])
    assert script.words(task, script.PARTS["WNLI"], torch.tensor([[2.0, 1.0], [0.0, 1.0]])) == ["1", "0"]


def test_placeholders_of_the_right_length_are_said_aloud(glue, runs, tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "data", tmp_path / "s.zip"
    texts = [(f"{SENTENCES[i % 5]} {i}", SENTENCES[-i % 5]) for i in range(146)]
    data.mkdir()
    write_test_set(data, "WNLI", texts)
    arguments = (runs["wnli"], "--placeholders", "--output", out, f"task.data_dir={data}")
    assert call(script, monkeypatch, *arguments) == 0
    said = capsys.readouterr()
    assert said.err.count("is a placeholder") == 10 and "WNLI" not in said.err
    assert "CoLA.tsv is a placeholder: 1 in all 1063 rows" in said.err and "predicted: WNLI" in said.out
    files = content(out)
    assert {name.removesuffix(".tsv"): text.count("\n") for name, text in files.items()} == LINES
    for name, text in files.items():
        indices, words = zip(*(line.split("\t") for line in text.split("\n")[1:-1]), strict=True)
        assert list(indices) == [str(i) for i in range(len(indices))]
        if name == "STS-B.tsv":
            assert set(words) == {"2.701"}
        else:
            allowed = WORDS[name.removesuffix(".tsv")].split()
            assert set(words) <= set(allowed) and (name == "WNLI.tsv" or len(set(words)) == 1)


def test_what_is_refused(glue, runs, small, tmp_path, monkeypatch, capsys):
    def message(*arguments):
        out = tmp_path / "s.zip"
        assert call(script, monkeypatch, *arguments, "--output", out, f"task.data_dir={glue}") == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") <= 2 and not out.exists()
        return said

    assert "no run of mnli, qqp; the server" in message(
        *(runs[task] for task in FOLDERS if task not in ("mnli", "qqp"))
    )
    assert "two runs of rte" in message(runs["rte"], runs["rte"])
    assert "nowhere: no such directory" in message(tmp_path / "nowhere")
    synthetic = finished(
        tmp_path / "run", "backbone=tiny", "task=synthetic_entailment", "train.max_steps=1", "method=full"
    )
    assert "is a run of synthetic_entailment, which is not a task of GLUE" in message(synthetic)
    monkeypatch.setitem(script.PARTS, "RTE", replace(script.PARTS["RTE"], rows=3000))
    assert "the test set for RTE.tsv has 4 rows; the server expects 3000" in message(runs["rte"], "--placeholders")
    monkeypatch.setitem(script.PARTS, "RTE", replace(script.PARTS["RTE"], words={"yes": "1", "no": "0"}))
    assert "has the labels ['entailment', 'not_entailment']" in message(runs["rte"], "--placeholders")
    (glue / "MNLI" / "test_matched.tsv").rename(tmp_path / "kept")
    said = message(runs["mnli"], "--placeholders")
    assert "test_matched.tsv: no such file; task mnli needs test_matched.tsv" in said
    (tmp_path / "kept").rename(glue / "MNLI" / "test_matched.tsv")


# test sets


def test_a_row_too_short_or_empty_is_named(glue, tmp_path):
    text = (glue / "QQP" / "test.tsv").read_text()
    (tmp_path / "test.tsv").write_text(text + "9\tonly one\n")
    with pytest.raises(tasks.UserError, match=r"test\.tsv, line 6: 2 fields where the first line has 3"):
        task_of("qqp", data_dir=str(tmp_path)).read_test()  # lenient with train and dev, never with test
    (tmp_path / "test.tsv").write_text(text.replace(texts_of("QQP")[1][1], ""))
    assert task_of("qqp", data_dir=str(tmp_path)).read_test()[1] == (texts_of("QQP")[1][0], "")
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\t\n")
    with pytest.raises(tasks.UserError, match=r"test\.tsv, line 2: an empty text"):
        task_of("cola", data_dir=str(tmp_path)).read_test()


def test_the_hub_is_asked_for_the_same_sets(monkeypatch):
    asked = []

    def table(subset, split):
        asked.append((subset, split))
        return {name: ["text"] for part in LAYOUTS for name in task_of(part).fields}

    monkeypatch.setattr(tasks, "hub_table", table)
    for name, part in script.PARTS.items():
        script.test_set(task_of(part.task), replace(part, rows=1), name)
    plain = [(task, "test") for task in ("cola", "sst2", "mrpc", "stsb", "qqp", "qnli", "rte", "wnli")]
    assert sorted(asked) == sorted([*plain, ("mnli", "test_matched"), ("mnli", "test_mismatched"), ("ax", "test")])


def test_the_public_files_have_as_many_rows_as_the_server_expects(shared):
    for name in ["CoLA", "SST-2", "MRPC", "STS-B", "RTE", "WNLI"]:
        with naming(name):
            part = script.PARTS[name]
            texts = script.test_set(task_of(part.task, data_dir=str(shared / "glue")), part, name)
            assert len(texts) == LINES[name] - 1 and all(text.strip() for pair in texts for text in pair)
