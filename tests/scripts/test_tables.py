"""The committed tables are those of the result files, and stand in the pages between their markers."""

import re

import pytest
from conftest import ROOT
from in_process import call, load

from increlora import result_files

tables = load(ROOT / "scripts" / "tables.py")


def test_no_table_is_stale(monkeypatch, capsys):
    assert call(tables, monkeypatch, "--check") == 0, capsys.readouterr().out


def test_committed_results_are_finished_clean_runs_without_paths_of_a_machine():
    runs = result_files.load_runs(ROOT / "results" / "runs")
    assert runs
    for result in runs:
        assert result["status"] == "finished" and not result["code"]["dirty"] and result["code"]["commit"]
        assert not re.search(r"/(home|root|tmp)/", str(result))


def test_insert_needs_its_markers():
    text = "x\n<!-- t -->\nold\n<!-- /t -->\ny"
    assert tables.insert(text, "t", "new") == "x\n<!-- t -->\nnew\n<!-- /t -->\ny"
    assert tables.insert(text, "other", "new") == text


@pytest.mark.parametrize("name", ["glue_deberta_v3_base"])
def test_published_averages_are_those_of_the_paper(name):
    """AdaLoRA's Table 1 prints its averages; ours over its cells agree to .02."""
    printed = {"Full FT 184M": 88.09, "BitFit 0.1M": 86.02, "LoRA r=8 1.33M": 88.34, "AdaLoRA 0.32M": 88.86}
    text = (ROOT / "results" / "tables" / f"{name}.md").read_text()
    for row, average in printed.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {row} | published"))
        assert abs(float(line.split("|")[-3]) - average) <= 0.02
