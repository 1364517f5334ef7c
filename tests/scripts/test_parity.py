"""The replay of the authors' recorded run, and that the check can fail."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

SCRIPT = ROOT / "scripts" / "check_parity.py"
TRACE = ROOT / "tests" / "reference_trace"


def check(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, timeout=300)


# transformers takes the loss in float32, whose last bit torch's plain kernels compute otherwise than its AVX ones
plain = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="the trace was recorded with AVX kernels"
)


@plain
def test_the_authors_run_is_reproduced():
    done = check(TRACE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("selection identical") == 8 and "parity: passed" in done.stdout


def test_a_trace_that_differs_is_noticed(tmp_path):
    shutil.copytree(TRACE, tmp_path / "trace")
    trace = json.loads((TRACE / "trace.json").read_text())
    trace["hyperparameters"]["beta1"] = 0.86
    (tmp_path / "trace" / "trace.json").write_text(json.dumps(trace))
    done = check(tmp_path / "trace")
    assert done.returncode == 1 and "parity: FAILED" in done.stdout


def test_a_missing_trace_is_said_in_a_line(tmp_path):
    done = check(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "trace.json is missing" in done.stderr
