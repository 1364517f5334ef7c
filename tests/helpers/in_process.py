"""A script loaded as a module and called as its command line would, without the cost of a process of its own."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load(path: Path) -> ModuleType:
    """The script as a module; dataclasses look it up by its name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The script's main with these arguments; its exit code."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # `guarded` sets it; this puts it back
    try:
        return script.main() or 0
    except SystemExit as stop:
        return stop.code
