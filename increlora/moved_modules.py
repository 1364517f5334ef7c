"""Modules under the names that they had when all lay in one folder: they still import, with a DeprecationWarning."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "export": "integrations.peft_export",
    "figures": "analysis.figures",
    "growth": "integrations.growth",
    "signals": "glue.stop_request",
    "statistics": "analysis.comparison",
    "train": "glue.loop",
    "trained": "glue.finished_run",
    "trainer": "integrations.hf_trainer",
    **{
        name: f"glue.{name}"
        for name in (
            "backbone", "batching", "checkpoint", "config", "hub", "metrics", "results", "synthetic", "tasks",
            "token_cache", "tracker",
        )
    },
}  # fmt: skip


class Finder(MetaPathFinder, Loader):
    """Finds `increlora.<old name>`: a module whose names are looked up in the one that took its place."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "increlora" and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        name = f"increlora.{MOVED[module.__name__.partition('.')[2]]}"
        warnings.warn(f"{module.__name__} is now {name}", DeprecationWarning, stacklevel=2)
        new = import_module(name)
        module.__dict__["__getattr__"] = lambda attribute: getattr(new, attribute)
        module.__doc__ = f"Now `{name}`."


def find() -> None:
    """Let the old names be imported from now on."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
