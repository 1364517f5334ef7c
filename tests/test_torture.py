"""Five kills of the torture script: real runs, SIGKILL, half of them with a checkpoint half written."""

import subprocess
import sys

from conftest import ROOT


def test_killed_runs_end_as_if_nothing_had_happened():
    script = ROOT / "scripts" / "torture.py"
    done = subprocess.run([sys.executable, script, "--kills", "5"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "identical results 5" in done.stdout
