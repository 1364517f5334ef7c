"""Who may import whom: read from the syntax tree, so that nothing needs to run."""

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from increlora import moved_modules

PACKAGES = ("increlora", "baselines")
# room -> folder, the packages of others that it may import
ROOMS = {
    "root": ("increlora", {"torch"}),
    "integrations": ("increlora/integrations", {"torch", "transformers", "accelerate", "peft", "safetensors"}),
    "peft": ("increlora/integrations/peft", {"torch", "transformers", "accelerate", "peft", "safetensors"}),
    "glue": ("increlora/glue", {
        "torch", "numpy", "scipy", "sklearn", "safetensors", "transformers", "tokenizers", "sentencepiece",
        "datasets", "filelock", "parsl",
        "huggingface_hub", "evaluate", "hydra", "omegaconf", "yaml", "tqdm", "rich", "wandb", "matplotlib", "PIL",
    }),
    "analysis": ("increlora/analysis", {"numpy", "scipy", "pandas", "matplotlib"}),
    "baselines": ("baselines", {"torch", "peft"}),
    "notebooks": ("notebooks", {"numpy", "scipy", "pandas", "matplotlib", "IPython"}),
}  # fmt: skip
# room -> the modules of ours that it may import, as a name or as a room of its own
OURS = {
    "root": {"root"},
    "integrations": {"root", "integrations"},
    "peft": {"root", "integrations"},
    "glue": {"root", "glue"},
    "analysis": {"analysis", "errors", "files", "matrices", "result_files"},
    "baselines": {"method", "surgery", "linear", "bank", "importance", "streams", "errors"},
    "notebooks": {"analysis", "result_files"},
}
# what a single file may import beside what its room may
MORE = {
    "increlora/__init__.py": {"integrations"},  # on first use
    "increlora/distributed.py": {"accelerate"},  # on first use, where a launcher started several processes
    "increlora/glue/export.py": {"integrations"},
    "baselines/authors.py": {"algorithm"},  # IncreLoRA in another arithmetic
    # the controls are IncreLoRA but for one decision, and read the ranks of its results
    "baselines/controls.py": {"algorithm", "result_files"},
}
# package -> the only files of the library that import it
HOMES = {
    "wandb": {"glue/tracker.py"},
    "hydra": {"glue/config.py"},
    "datasets": {"glue/tasks.py"},
    "parsl": {"glue/sweep_engine.py"},
    "peft": {
        "integrations/peft_export.py",
        *(f"integrations/peft/{module}.py" for module in ("__init__", "config", "export", "layer", "model")),
    },
    "transformers": {
        "integrations/hf_trainer.py",
        "integrations/peft_export.py",  # to load a base model once more
        *(f"integrations/peft/{module}.py" for module in ("layer", "model", "training")),
        "glue/backbone.py",
        "glue/model_files.py",
        "glue/tokenizing.py",
    },
    "matplotlib": {"glue/tracker.py", "analysis/figures.py"},
}
PARTS = {"linear", "bank", "orthogonality", "importance", "allocator"}  # of the algorithm


def files(folder: str, pattern: str = "*.py") -> list[Path]:
    """The Python files of a folder, of which there must be some."""
    found = sorted((ROOT / folder).glob(pattern))
    assert found, f"no file matches {folder}/{pattern}"
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def library() -> list[Path]:
    return [path for package in PACKAGES for path in files(package, "**/*.py")]


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, also inside functions and for the type checker."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name(path)} imports by a relative name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def others(path: Path) -> set[str]:
    """The packages that a file imports, ours and the standard library's aside."""
    found = {imported.partition(".")[0] for imported in imports(path)}
    return found - set(sys.stdlib_module_names) - {"increlora"}


def ours(path: Path) -> Iterator[tuple[str, str]]:
    """The room and the module of each import from `increlora` (of the package itself: root and its name)."""
    for imported in imports(path):
        first, *parts = imported.split(".")
        if first == "increlora":
            room = parts[0] if (ROOT / "increlora" / parts[0]).is_dir() else "root"
            yield room, parts[0] if room == "root" else parts[1]


def test_every_room_imports_what_it_may():
    for room, (folder, packages) in ROOMS.items():
        for path in files(folder):
            more = MORE.get(name(path), set())
            assert others(path) <= packages | more, name(path)
            for other, module in ours(path):
                assert {other, module} & (OURS[room] | more), f"{name(path)} imports {module} of {other}"


def test_no_room_lies_outside_the_rules():
    known = {path for folder, _ in ROOMS.values() for path in files(folder)}
    assert set(library()) <= known


def test_a_package_has_a_home():
    for package, homes in HOMES.items():
        found = {path.relative_to(ROOT / "increlora").as_posix() for path in files("increlora", "**/*.py")
                 if package in others(path)}  # fmt: skip
        assert found == homes, package


def test_only_the_algorithm_knows_its_parts():
    assert {"linear", "importance", "allocator"} <= {module for _, module in ours(ROOT / "increlora/algorithm.py")}
    known_to = {"algorithm", "surgery", *PARTS}  # surgery finds the matrices and puts the layers in
    for path in files("increlora", "**/*.py"):
        if name(path) not in {f"increlora/{module}.py" for module in known_to}:
            found = {module for room, module in ours(path) if room == "root"}
            second_door = path.parent.name == "peft"  # the same method in PEFT's layers
            assert not found & (PARTS | {"algorithm"}) or path.name == "__init__.py" or second_door, name(path)
    assert {module for _, module in ours(ROOT / "increlora/allocator.py")} <= {"errors"}
    assert not set(ours(ROOT / "increlora/schedule.py"))


def test_nothing_imports_what_a_person_runs():
    for path in [*library(), *files("scripts"), *files("notebooks"), ROOT / "run.py"]:
        assert not others(path) & {"scripts", "run", "tests", "notebooks"}, name(path)


def test_no_module_is_called_like_one_of_the_standard_library():
    for path in library():
        assert path.stem not in sys.stdlib_module_names, name(path)


def test_the_library_does_not_print_and_swallows_nothing():
    for path in library():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            printed = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
            assert not printed or name(path) == "increlora/glue/config.py"  # which speaks to the person at the keyboard
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), name(path)


def test_old_names_of_modules_still_import():
    for old, new in moved_modules.MOVED.items():
        with pytest.warns(DeprecationWarning, match=f"increlora.{old} is now increlora.{new}"):
            sys.modules.pop(f"increlora.{old}", None)
            module = importlib.import_module(f"increlora.{old}")
        real = importlib.import_module(f"increlora.{new}")
        names = [name for name in vars(real) if not name.startswith("_")]
        assert names and all(getattr(module, name) is getattr(real, name) for name in names)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("increlora.nothing")
