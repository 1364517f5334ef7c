"""`pip install increlora` brings torch, and that is enough to train with the method."""

import os
import re
import subprocess
import sys

from conftest import HELPERS, ROOT


def test_the_method_trains_where_only_torch_can_be_imported():
    done = subprocess.run(
        [sys.executable, HELPERS / "torch_alone.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        int(re.fullmatch(r"trained without (\d+) other packages\n", done.stdout)[1]) > 20
    )  # so the hook does hide some
