"""Who may import whom (the house rules): read from the syntax tree, so that nothing needs to run."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

LIBRARY = sorted((ROOT / "increlora").rglob("*.py"))
BASELINES = sorted((ROOT / "baselines").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
EVERYTHING = [*LIBRARY, *BASELINES, *sorted((ROOT / "scripts").glob("*.py")), ROOT / "run.py"]


def imports(path: Path) -> set[str]:
    """Full names of the modules a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def modules(path: Path, package: str = "increlora") -> set[str]:
    """Modules of ours that a file imports, as paths within the package: `linear`, `glue/results`."""
    names = {name.removeprefix(f"{package}.").replace(".", "/") for name in imports(path) if name.startswith(package)}
    return {name for name in names if (ROOT / package / f"{name}.py").exists()}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.name)
def test_the_library_knows_neither_baselines_nor_scripts(path):
    assert not packages(path) & {"baselines", "scripts", "run"}


@pytest.mark.parametrize("path", BASELINES, ids=lambda p: p.name)
def test_baselines_see_the_interface_only(path):
    allowed = {"method", "surgery", "linear", "importance", "streams", "errors"}
    allowed |= {"algorithm"} if path.name == "controls.py" else set()  # the controls are IncreLoRA but for one decision
    assert modules(path) <= allowed
    assert not modules(path, "baselines")


def test_only_the_algorithm_knows_its_four_parts():
    parts = {"linear", "importance", "allocator", "schedule"}
    assert parts - {"schedule"} <= modules(ROOT / "increlora" / "algorithm.py")
    assert modules(ROOT / "increlora" / "allocator.py") <= {"errors"}
    assert not modules(ROOT / "increlora" / "schedule.py")
    for name in (
        "method",
        "glue/loop",
        "glue/results",
        "glue/tracker",
        "integrations/growth",
        "integrations/hf_trainer",
    ):
        assert not modules(ROOT / "increlora" / f"{name}.py") & (parts - {"schedule"} | {"algorithm"})


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: p.name)
@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("wandb", {"tracker.py"}),
        ("transformers", {"hf_trainer.py", "backbone.py", "tasks.py", "hub.py"}),
        ("datasets", {"backbone.py", "tasks.py", "hub.py"}),
        ("hydra", {"config.py", "run.py"}),
    ],
)
def test_a_package_has_a_home(path, package, homes):
    if path.parent.name != "scripts":
        assert package not in packages(path) or path.name in homes


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.name)
def test_nothing_needs_the_part_for_the_trainer(path):
    # the package itself imports it on first use
    assert "integrations/hf_trainer" not in modules(path) or path == ROOT / "increlora" / "__init__.py"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.name)
def test_peft_stays_out_of_the_library_but_for_export(path):
    assert "peft" not in packages(path) or path.name == "peft_export.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_read_results_only(path):
    assert modules(path) <= {"glue/results", "analysis/comparison", "analysis/figures"}
    assert not packages(path) & {"torch", "baselines", "scripts", "run"}


@pytest.mark.parametrize("path", [*LIBRARY, *BASELINES], ids=lambda p: p.name)
def test_the_library_does_not_print_and_swallows_nothing(path):
    if path.name == "config.py":  # speaks to the person at the keyboard
        return
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print")
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None)
