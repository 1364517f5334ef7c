"""scripts/predict.py: what it writes against the model's own forward, text by text, and every kind of bad row."""

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from finished_runs import SYNTHETIC, finished
from in_process import call, load
from naming import naming
from warm_python import python

from increlora.errors import UserError
from increlora.glue import finished_run, token_cache
from increlora.linear import IncrementalLinear

script = load(ROOT / "scripts" / "predict.py")
LABELS = ["entailment", "not_entailment"]
PAIRS = [("all dogs are wet" + " and cold" * (7 * i % 11), f"some poodles are soaked {i}") for i in range(70)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("run"), "backbone=tiny", *SYNTHETIC, "method=increlora", "method.top_h=4")


@pytest.fixture(scope="module")
def expected(run_dir) -> torch.Tensor:
    """Probabilities of `PAIRS`, one text at a time, without padding."""
    run = finished_run.load(run_dir)
    return torch.cat([forward(run, pair).softmax(-1) for pair in PAIRS])


@torch.no_grad()
def forward(run, texts) -> torch.Tensor:
    return run.model(**run.tokenizer(*texts, truncation=True, max_length=64, return_tensors="pt")).logits


def tsv(*rows, header=("premise", "hypothesis")) -> str:
    return "".join("\t".join(row) + "\n" for row in (header, *rows))


def jsonl(*rows) -> str:
    return "".join(json.dumps({"premise": a, "hypothesis": b}) + "\n" for a, b in rows)


def same(probabilities, expected: torch.Tensor) -> bool:
    return (torch.tensor(probabilities) - expected).abs().max().item() < 2e-6


def test_tsv_to_tsv(run_dir, expected, tmp_path, monkeypatch, capsys):
    (tmp_path / "in.tsv").write_text(tsv(*PAIRS))
    out = tmp_path / "out.tsv"
    assert call(script, monkeypatch, run_dir, tmp_path / "in.tsv", "--output", out, "--batch-size", 2) == 0
    assert not capsys.readouterr().out
    header, *rows = [line.split("\t") for line in out.read_text().splitlines()]
    assert header == ["prediction", *LABELS]
    assert same([[float(p) for p in row[1:]] for row in rows], expected)
    assert [row[0] for row in rows] == [LABELS[i] for i in expected.argmax(-1).tolist()]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.tsv", "out.tsv"]


def test_json_lines_from_standard_input_on_the_command_line(run_dir, expected):
    done = subprocess.run(
        [python(), ROOT / "scripts" / "predict.py", run_dir, "-", "device=cpu"],
        input=jsonl(*PAIRS), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert same([[row["probabilities"][label] for label in LABELS] for row in rows], expected)
    assert [row["prediction"] for row in rows] == [LABELS[i] for i in expected.argmax(-1).tolist()]


def test_the_dev_set_gives_the_score_of_the_result_file(run_dir, tmp_path, monkeypatch):
    run = finished_run.load(run_dir)
    dev = run.task.read()[1]["dev"]
    (tmp_path / "dev.tsv").write_text(tsv(*dev.texts))
    for name in ("best", "last"):
        out = tmp_path / f"{name}.tsv"
        arguments = (tmp_path / "dev.tsv", "--output", out, "--checkpoint", name)
        assert call(script, monkeypatch, run_dir, *arguments) == 0
        found = [line.split("\t")[0] for line in out.read_text().splitlines()[1:]]
        right = sum(LABELS[label] == word for label, word in zip(dev.labels, found, strict=True))
        assert right / len(found) == pytest.approx(run.result["scores"][name]["score"])


def test_rows_are_read_and_written_chunk_by_chunk(run_dir):
    run, read = finished_run.load(run_dir), []

    def lines():
        for line in jsonl(*PAIRS).encode().splitlines(keepends=True):
            read.append(line)
            yield line

    out = io.StringIO()
    chunks = run.stream(script.json_texts(lines(), "texts", run.task), batch_size=1)
    seen = []

    def watched():
        for logits in chunks:
            seen.append((len(read), out.getvalue().count("\n")))
            yield logits

    script.write_json(watched(), run.task.labels, out)
    assert seen == [(16, 0), (32, 16), (48, 32), (64, 48), (70, 64)] and out.getvalue().count("\n") == 70


@pytest.mark.parametrize(("precision", "merged"), [("fp32", True), ("bf16", False)])
def test_weights_are_merged_where_that_loses_no_digits(run_dir, precision, merged):
    run = finished_run.load(run_dir, overrides=[f"precision={precision}"])
    before = run.logits(PAIRS)
    run.merge()
    assert any(isinstance(module, IncrementalLinear) for module in run.model.modules()) != merged
    assert (run.logits(PAIRS) - before).abs().max() < (1e-5 if merged else 1e-9)


def test_no_text_is_kept_on_disk(run_dir, monkeypatch):
    monkeypatch.setattr(token_cache, "FROM", 30)
    monkeypatch.setattr(token_cache, "_write", lambda path, found: pytest.fail("texts to predict were cached"))
    run = finished_run.load(run_dir)
    assert [len(logits) for logits in run.stream(PAIRS, batch_size=50)] == [29, 29, 12]


def test_regression_and_the_columns_of_public_files(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    rows = [(str(i), "all dogs are wet", f"some dogs are wet {i}", str(i % 6)) for i in range(24)]
    for name in ("train", "dev"):
        (data / f"{name}.tsv").write_text(tsv(*rows, header=("index", "left", "right", "score")))
    columns = "+task.columns={sentence1: left, sentence2: right, label: score}"
    run_dir = finished(
        tmp_path / "run", "backbone=tiny", "task=stsb", "~task.columns", columns, f"task.data_dir={data}",
        "method=lora", "train.max_steps=3",
    )  # fmt: skip
    run, out = finished_run.load(run_dir), tmp_path / "out"
    values = [forward(run, row[1:3]).item() for row in rows]
    assert call(script, monkeypatch, run_dir, data / "dev.tsv", "--output", out) == 0
    assert out.read_text().splitlines()[0] == "prediction"
    assert [float(line) for line in out.read_text().splitlines()[1:]] == pytest.approx(values, abs=2e-6)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"sentence1": r[1], "sentence2": r[2]}) + "\n" for r in rows))
    assert call(script, monkeypatch, run_dir, tmp_path / "in.jsonl", "--output", out) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prediction"] for row in found] == pytest.approx(values, abs=2e-6) and set(found[0]) == {"prediction"}


def test_files_of_other_systems(run_dir, expected, tmp_path, monkeypatch):
    """Byte-order mark, CRLF, further columns, no last line end; and a name that does not tell the format."""
    rows = [("x", hypothesis, premise) for premise, hypothesis in PAIRS]
    content = "\ufeff" + tsv(*rows, header=("id", "hypothesis", "premise")).rstrip("\n").replace("\n", "\r\n")
    (tmp_path / "in.txt").write_bytes(content.encode())
    out = tmp_path / "out"
    assert call(script, monkeypatch, run_dir, tmp_path / "in.txt", "--format", "tsv", "--output", out) == 0
    found = [[float(p) for p in line.split("\t")[1:]] for line in out.read_text().splitlines()[1:]]
    assert same(found, expected)


GOOD = ("all dogs are wet", "no dogs are dry")
BAD = {
    "half of a character": ("in.jsonl", '{"premise": "a\\ud83d", "hypothesis": "b"}\n', "'premise' has half of a"),
    "two columns of a name": ("in.tsv", "premise\thypothesis\tpremise\na\tb\tc\n", "2 columns are called premise"),
    "terminal codes": ("in.tsv", "premise\t\x1b[31mred\na\tb\n", "the header has premise, \\x1b[31mred"),
    "too few fields": ("in.tsv", tsv(GOOD, ("one",)), "in.tsv, line 3: 1 fields, the header has 2"),
    "no such column": ("in.tsv", tsv(header=("a", "b")), "in.tsv, line 1: no column premise; the header has a, b"),
    "an empty file": ("in.tsv", "", "in.tsv, line 1: no column premise; the header has nothing"),
    "an empty text": ("in.tsv", tsv(GOOD, GOOD, ("", "b")), "in.tsv, line 4: an empty text"),
    "not JSON": ("in.jsonl", jsonl(GOOD) + "{premise: 1}\n", "in.jsonl, line 2: not JSON"),
    "an empty line": ("in.jsonl", jsonl(GOOD) + "\n" + jsonl(GOOD), "in.jsonl, line 2: not JSON"),
    "two empty lines": ("in.jsonl", jsonl(GOOD) + "\n\n", "in.jsonl, line 2: not JSON"),
    "an empty row": ("in.tsv", tsv(GOOD) + "\n" + "a\tb\n", "in.tsv, line 3: 1 fields, the header has 2"),
    "a last row of empty texts": ("in.tsv", tsv(GOOD, ("", "")), "in.tsv, line 3: an empty text"),
    "a list": ("in.jsonl", '["a", "b"]\n', "in.jsonl, line 1: no field 'premise'"),
    "no such field": ("in.jsonl", '{"premise": "a"}\n', "in.jsonl, line 1: no field 'hypothesis'"),
    "a number": ("in.jsonl", '{"premise": "a", "hypothesis": 3}\n', "line 1: 'hypothesis' is not a text but 3"),
    "not UTF-8": ("in.jsonl", jsonl(GOOD).encode() + b'{"premise": "\xff"}\n', "in.jsonl, line 2: not UTF-8 (byte 14)"),
    "no such format": ("in.csv", "", "in.csv: the format is not clear from the name"),
}  # fmt: skip


def test_bad_rows_are_named_and_leave_what_was_there(run_dir, tmp_path, monkeypatch, capsys):
    for case, (name, content, said) in BAD.items():
        with naming(case):
            folder = tmp_path / case
            folder.mkdir()
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
            (folder / "out").write_text("before")
            arguments = (folder / name, "--output", folder / "out", "--batch-size", 1)
            assert call(script, monkeypatch, run_dir, *arguments) == 2
            error = capsys.readouterr().err
            assert said in error and error.startswith("error: ") and error.count("\n") <= 2
            assert (folder / "out").read_text() == "before" and len(list(folder.iterdir())) == 2


def test_what_lies_at_the_output_stays_what_it_is(run_dir, tmp_path, monkeypatch):
    (tmp_path / "in.tsv").write_text(tsv(GOOD))
    secret, link, pipe = tmp_path / "secret", tmp_path / "link", tmp_path / "pipe"
    secret.write_text("before")
    secret.chmod(0o600)
    link.symlink_to(secret)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for output in (link, pipe):
        assert call(script, monkeypatch, run_dir, tmp_path / "in.tsv", "--output", output) == 0
    assert (
        link.is_symlink() and secret.read_text().startswith("prediction\t") and secret.stat().st_mode & 0o777 == 0o600
    )
    assert pipe.is_fifo() and os.read(reader, 9999).decode() == secret.read_text()
    os.close(reader)


def test_an_empty_last_line_is_no_row(run_dir, tmp_path, monkeypatch):
    for kind in ["tsv", "jsonl"]:
        for last in ["\n", "\r\n", "  ", " \n"]:
            with naming((last, kind)):
                content = {"tsv": tsv, "jsonl": jsonl}[kind](GOOD, GOOD)
                (tmp_path / "in").write_bytes((content + last).encode())
                out = tmp_path / "out"
                with (tmp_path / "in").open() as stdin:
                    monkeypatch.setattr(sys, "stdin", stdin)
                    for source in (tmp_path / "in", "-"):
                        assert call(script, monkeypatch, run_dir, source, "--format", kind, "--output", out) == 0
                        assert len(out.read_text().splitlines()) == 2 + (kind == "tsv")
                        out.unlink()


@pytest.mark.parametrize("wrong", [(), ("--batch-size", 0)], ids=["columns", "batch size"])
def test_nothing_is_written_before_the_input_is_checked(run_dir, tmp_path, monkeypatch, capsys, wrong):
    (tmp_path / "in.tsv").write_text(tsv(GOOD, header=("premise", "hypothesis" if wrong else "b")))
    assert call(script, monkeypatch, run_dir, tmp_path / "in.tsv", *wrong) == 2
    said = capsys.readouterr()
    assert said.out == "" and ("batch size" if wrong else "line 1: no column hypothesis; the header has") in said.err


def test_a_header_alone_gives_a_header(run_dir, tmp_path, monkeypatch):
    (tmp_path / "in.tsv").write_text(tsv())
    assert call(script, monkeypatch, run_dir, tmp_path / "in.tsv", "--output", tmp_path / "out") == 0
    assert (tmp_path / "out").read_text().splitlines() == ["\t".join(["prediction", *LABELS])]


def test_wrong_arguments(run_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "in.tsv").write_text(tsv(GOOD))
    assert call(script, monkeypatch, run_dir, tmp_path / "nowhere.tsv") == 2
    assert "nowhere.tsv: No such file" in capsys.readouterr().err
    assert call(script, monkeypatch, run_dir, tmp_path / "in.tsv", "--batch-size", 0) == 2
    assert "the batch size must be at least 1" in capsys.readouterr().err
    assert call(script, monkeypatch, tmp_path, tmp_path / "in.tsv") == 2
    assert "result.json: no such file" in capsys.readouterr().err
    assert call(script, monkeypatch, run_dir, tmp_path / "in.tsv", "--output", tmp_path / "no" / "out") == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_key_that_comes_twice_is_refused():
    line = b'{"premise": "a", "premise": "b", "hypothesis": "c"}'
    with pytest.raises(UserError, match=r"texts, line 1: not JSON \(the key 'premise' comes twice\)"):
        list(script.json_texts([line], "texts", SimpleNamespace(fields=["premise", "hypothesis"])))
