"""Two kills of the torture script: real runs, SIGKILL, one of them with a checkpoint half written."""

import subprocess
import sys

from conftest import ROOT


def test_killed_runs_end_as_if_nothing_had_happened():
    script = ROOT / "scripts" / "torture.py"
    done = subprocess.run(
        [sys.executable, script, "--kills", "2", "--methods", "increlora"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills 2 (1 with a checkpoint half written), resumes 2," in done.stdout
    assert "identical results 2" in done.stdout
