"""What a run or a measurement ran on: commit, versions, processor, threads, and the command."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from increlora import distributed

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("--", ":/run.py", ":/increlora", ":/baselines", ":/configs")  # where a new file may change what is computed
PACKAGES = ("torch", "transformers", "datasets", "peft", "tokenizers", "numpy")


def describe(command: Sequence[str], device: str) -> dict[str, Any]:
    """What is needed to repeat a measurement; the command is without folders."""
    code = code_state(device)
    script, *arguments = command
    words = ["python", f"scripts/{Path(script).name}", *(re.sub(r"[^\s=]*/", "", word) for word in arguments)]
    return {
        "command": " ".join(words),
        "commit": code["commit"],
        "dirty": code["dirty"],
        "torch": torch.__version__,
        **{name: code[name] for name in ("processor", "threads", "gpu")},
        "cores": os.cpu_count(),
    }


def code_state(device: str) -> dict[str, Any]:
    """Commit, whether the tree is dirty, versions of what computes, the machine and the number of processes.

    Without git, or in a repository that git refuses to read, commit and `dirty` are None: unknown is not clean.
    """
    commit = _git("rev-parse", "HEAD")
    changed = [_git("status", "--porcelain", *which) for which in (("--untracked-files=no",), SOURCES)]
    return {
        "commit": commit,
        "dirty": None if commit is None or None in changed else any(changed),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": device,
        "processes": distributed.processes(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def _git(*arguments: str) -> str | None:
    """What git says of the repository of this code; None without one, also where this code lies in somebody else's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        top, said = (
            subprocess.run(
                ["git", "--no-optional-locks", *words],  # a full disk would leave the lock behind
                cwd=ROOT / "increlora",
                env=environment,
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
            for words in (("rev-parse", "--show-toplevel"), arguments)
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said if Path(top).resolve() == ROOT else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The name of the processor, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
