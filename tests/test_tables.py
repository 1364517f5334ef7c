"""The generated tables are those of the committed result files."""

import re
import subprocess
import sys

from conftest import ROOT

from increlora import results


def test_no_table_is_stale():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_committed_results_are_finished_clean_runs_without_paths_of_a_machine():
    runs = results.load_runs(ROOT / "results" / "runs")
    assert runs
    for result in runs:
        assert result["status"] == "finished" and not result["code"]["dirty"] and result["code"]["commit"]
        assert not re.search(r"/(home|root|tmp)/", str(result))
