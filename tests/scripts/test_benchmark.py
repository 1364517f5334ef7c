"""The benchmark runs and reports every ratio that has a bar; its numbers are not asserted here."""

import json
import subprocess

from conftest import ROOT
from warm_python import python


def test_the_benchmark_measures_every_arm(tmp_path):
    command = [python(), ROOT / "scripts" / "benchmark.py", "--backbone", "tiny", "--batch", "2", "--length", "8"]
    command += ["--repeats", "2", "--rank", "3", "--no-memory", "--json", tmp_path / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert all(len(values) == 2 and min(values) > 0 for values in result["seconds"].values())
    assert {"increlora, scoring", "increlora, after growth", "adalora", "full", "our loop / bare loop",
            "recipe RTE r2", "recipe MNLI r2", "growth event / step"} <= set(result["ratios"])  # fmt: skip
    assert "| increlora, scoring |" in done.stdout
