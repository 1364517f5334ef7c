"""Run the notebooks on the committed results and write their outputs into the .ipynb files beside them.

    python scripts/notebooks.py                       # or: make notebooks
    python scripts/notebooks.py notebooks/cost.py     # these only

The .py file (jupytext, percent format) is the notebook. Each runs in a fresh kernel, and nothing that changes from
one run to the next is kept: no times, no kernel versions, no random ids. A file that would stay the same is not
touched. The figures go to results/figures. Needs `pip install -e '.[glue,notebooks]'`.
"""

import argparse
import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from increlora.errors import UserError
from increlora.files import write_text
from increlora.glue import config

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
KEPT = ("jupytext", "kernelspec")  # of a notebook's metadata
SECONDS = 300  # a notebook may take this long


@config.guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help=".py files; default: all of notebooks/")
    paths = parser.parse_args().notebooks or sorted(NOTEBOOKS.glob("*.py"))
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # whatever the shell has set
    for path in paths:
        text = nbformat.writes(executed(path)) + "\n"
        target = path.with_suffix(".ipynb")
        changed = not target.exists() or target.read_text(encoding="utf-8") != text
        if changed:
            write_text(target, text)
        print(f"{'written' if changed else 'unchanged'}: {os.path.relpath(target)}", flush=True)
    return 0


def executed(path: Path) -> NotebookNode:
    """The notebook of a .py file, run in a fresh kernel in its folder.

    Raises:
        UserError: it is not there, a cell failed, or it wrote to stderr, where warnings name files of this machine.
    """
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"{path.name} is no notebook; give a .py file of {NOTEBOOKS.name}/")
    notebook = jupytext.read(path)
    try:
        NotebookClient(
            notebook, timeout=SECONDS, startup_timeout=SECONDS, kernel_name="python3", record_timing=False,
            coalesce_streams=True,  # however the kernel happened to cut what a cell prints
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": str(path.resolve().parent)}},
        ).execute()  # fmt: skip
    except CellExecutionError as error:
        raise UserError(f"{path.name} failed: {error.ename}: {error.evalue}") from None
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise UserError(f"{path.name} wrote to stderr: {output.text.strip()}")
    return cleaned(notebook, path.stem)


def cleaned(notebook: NotebookNode, name: str) -> NotebookNode:
    """The notebook without what changes from run to run; a cell's id is its place."""
    kept = {key: notebook.metadata[key] for key in KEPT if key in notebook.metadata}
    notebook.metadata = nbformat.from_dict(kept | {"language_info": {"name": "python"}})
    for place, cell in enumerate(notebook.cells):
        cell.id = f"{name[:50]}-{place}"
        cell.metadata = nbformat.from_dict({})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


if __name__ == "__main__":
    sys.exit(main())
