"""What a measurement ran on: processor, threads, version of torch, commit and command."""

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from increlora.glue.results import code_state


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
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def processor() -> str:
    """The name of the processor, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
