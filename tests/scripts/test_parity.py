"""The replay of the authors' recorded run, and that the check can fail."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from in_process import call, load

TRACE = ROOT / "tests" / "reference_trace"


script = load(ROOT / "scripts" / "check_parity.py")


# transformers takes the loss in float32, whose last bit torch's plain kernels compute otherwise than its AVX ones
plain = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="the trace was recorded with AVX kernels"
)


@plain
def test_the_authors_run_is_reproduced(monkeypatch, capsys):
    code = call(script, monkeypatch, TRACE)
    said = capsys.readouterr().out
    assert code == 0, said
    assert said.count("selection identical") == 8 and "parity: passed" in said


def test_a_trace_that_differs_is_noticed(tmp_path, monkeypatch, capsys):
    shutil.copytree(TRACE, tmp_path / "trace")
    trace = json.loads((TRACE / "trace.json").read_text())
    trace["hyperparameters"]["beta1"] = 0.86
    (tmp_path / "trace" / "trace.json").write_text(json.dumps(trace))
    assert call(script, monkeypatch, tmp_path / "trace") == 1
    assert "parity: FAILED" in capsys.readouterr().out


def test_a_missing_trace_is_said_in_a_line(tmp_path, monkeypatch, capsys):
    assert call(script, monkeypatch, tmp_path) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "trace.json is missing" in said
