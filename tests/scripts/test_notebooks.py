"""The notebooks run on the committed results, in a fresh kernel and anywhere, and what they show is what lies there."""

import json
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT
from in_process import call, load
from naming import naming

jupytext = pytest.importorskip("jupytext", reason="needs the extra 'notebooks': pip install -e '.[notebooks]'")
nbclient = pytest.importorskip("nbclient", reason="needs the extra 'notebooks': pip install -e '.[notebooks]'")

SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
RESULTS = ROOT / "results"
OF_A_MACHINE = re.compile(
    r"(?<![\w.])/(home|root|tmp|usr|work|Users|opt|var)/|site-packages|Traceback|ipykernel_\d|0x[0-9a-f]{8}"
)


def committed(source: Path):
    return jupytext.read(source.with_suffix(".ipynb"))


def words(notebook) -> list[str]:
    """Every text in the outputs, in order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [
        text
        for output in outputs
        for text in (
            output.get("text"),
            output.get("data", {}).get("text/plain"),
            output.get("data", {}).get("text/html"),
        )
        if text and not text.startswith("<Figure")
    ]


def pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def without_runs(notebook) -> bool:
    """Whether a notebook says that its runs are still to be made, and how."""
    return any(re.match(r"No runs yet: python scripts/sweep\.py \w+", text) for text in words(notebook))


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """The committed results in a folder of their own, so that figures are written there."""
    for name in ("runs", "paper", "benchmark"):
        (tmp_path / name).symlink_to(RESULTS / name)
    return tmp_path


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_shows_what_the_results_say(source, elsewhere):
    notebook = jupytext.read(source)
    backend = "module://matplotlib_inline.backend_inline"
    client = nbclient.NotebookClient(
        notebook, timeout=300, startup_timeout=300, kernel_name="python3", extra_arguments=["--log-level=ERROR"],
        coalesce_streams=True,
        resources={"metadata": {"path": str(elsewhere)}},
    )  # fmt: skip
    client.execute(env=os.environ | {"INCRELORA_RESULTS": str(elsewhere), "MPLBACKEND": backend})
    assert words(notebook) == words(committed(source)), "stale: run `make notebooks`"
    assert pictures(notebook) == pictures(committed(source))
    saved = re.findall(r'figures\.save\(figure, "(\w+)"\)', source.read_text(encoding="utf-8"))
    written = {path.stem for path in (elsewhere / "figures").glob("*.svg")}
    assert (written or without_runs(notebook)) and written <= set(saved)
    assert all((RESULTS / "figures" / f"{name}.svg").exists() for name in written)


def test_a_pair_is_in_step_and_holds_its_outputs():
    for source in SOURCES:
        with naming(source):
            notebook = committed(source)
            cells = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
            assert [(cell.cell_type, cell.source) for cell in notebook.cells] == cells
            code = [cell for cell in notebook.cells if cell.cell_type == "code"]
            assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
            assert notebook.cells[0].source.startswith("# ")
            if not without_runs(notebook):
                assert pictures(notebook) and re.search(r"\bn = \d|seeds? ", " ".join(words(notebook)))


def test_a_committed_notebook_is_small_and_tells_nothing_of_the_machine():
    for source in SOURCES:
        with naming(source):
            path = source.with_suffix(".ipynb")
            assert path.stat().st_size < 1_000_000
            notebook = json.loads(path.read_text(encoding="utf-8"))
            assert set(notebook["metadata"]) == {"jupytext", "kernelspec", "language_info"}
            assert notebook["metadata"]["language_info"] == {"name": "python"}
            assert [cell["id"] for cell in notebook["cells"]] == [
                f"{source.stem[:50]}-{i}" for i in range(len(notebook["cells"]))
            ]
            for cell in notebook["cells"]:
                assert cell["metadata"] == {}
                for output in cell.get("outputs", []):
                    assert output["output_type"] != "error" and output.get("name") != "stderr"
                    output.get("data", {}).pop("image/png", None)
                    assert not OF_A_MACHINE.search(json.dumps(output))


def test_no_figure_is_left_over():
    named = {name for source in SOURCES for name in re.findall(r'figures\.save\(figure, "(\w+)"\)', source.read_text())}
    figures = list((RESULTS / "figures").iterdir())
    assert figures and all(path.suffix == ".svg" and path.stem in named for path in figures)
    for path in figures:
        assert not OF_A_MACHINE.search(path.read_text(encoding="utf-8"))


# the script

SMALL = """# %% [markdown]
# # Small

# %%
import matplotlib.pyplot as plt

from increlora.analysis import figures

figures.use_style()
figure, axes = plt.subplots(figsize=(1, 1))
figures.save(figure, "small")
"""


@pytest.fixture
def script(monkeypatch):
    """The script as a module; the environment that it changes is put back."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    return load(ROOT / "scripts" / "notebooks.py")


def test_running_twice_changes_nothing(script, tmp_path, monkeypatch, capsys):
    source = tmp_path / "small.py"
    source.write_text(SMALL)
    monkeypatch.setenv("INCRELORA_RESULTS", str(tmp_path))
    assert call(script, monkeypatch, source) == 0 and capsys.readouterr().out.startswith("written")
    target, drawing = source.with_suffix(".ipynb"), tmp_path / "figures" / "small.svg"
    before = target.read_bytes(), drawing.read_bytes(), target.stat().st_mtime_ns
    assert pictures(jupytext.read(target)) == 1
    assert call(script, monkeypatch, source) == 0 and capsys.readouterr().out.startswith("unchanged")
    assert (target.read_bytes(), drawing.read_bytes(), target.stat().st_mtime_ns) == before


def test_a_notebook_that_fails_is_said_and_not_written(script, tmp_path, monkeypatch, capsys):
    source = tmp_path / "bad.py"
    for text, said in [
        ("# %%\n1 / 0\n", "bad.py failed: ZeroDivisionError: division by zero"),
        ("# %%\nimport warnings\nwarnings.warn('old')\n", "bad.py wrote to stderr"),
        (None, "bad.py is no notebook"),
    ]:
        with naming(said):
            source.unlink(missing_ok=True)
            if text:
                source.write_text(text)
            assert call(script, monkeypatch, source) == 2
            error = capsys.readouterr().err
            assert said in error and "Traceback" not in error
            assert not source.with_suffix(".ipynb").exists()
