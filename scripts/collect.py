"""Copy the results of finished runs into the repository: runs/.../result.json -> results/runs/.../seed<k>.json.

    python scripts/collect.py runs
    python scripts/collect.py runs --into results/repeats      # runs that were made a second time

Wherever a result is found, it goes where its run belongs. Only results of one clean commit are taken; `--dirty` takes
the others too.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from increlora import result_files
from increlora.errors import UserError
from increlora.files import as_json, write_text
from increlora.glue import config, results

DESTINATION = Path(__file__).resolve().parent.parent / "results" / "runs"


def published(text: str) -> str:
    """The text of a result file without what only one machine knows (`results.place`), which earlier versions wrote."""
    result = json.loads(text)
    kept = result | {"data": result["data"] | {"source": results.place(result["data"]["source"])}}
    return as_json(result_files.sealed(kept) if "checksum" in kept else kept, indent=1) + "\n"


def unclean(code: Mapping[str, Any]) -> str | None:
    """Why the code of a run is not one clean commit; None if it is."""
    commits = code.get("commits", [])
    if len(commits) > 1:
        return f"it ran on {', '.join(commits)}"
    if code["commit"] is None or code["dirty"] is None:
        return "its commit is not known (git was absent, or did not read the repository)"
    return "the tree had uncommitted changes" if code["dirty"] else None


@config.guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder that holds run directories")
    parser.add_argument("--dirty", action="store_true", help="also results of a tree with uncommitted changes")
    parser.add_argument("--into", type=Path, default=DESTINATION, help="folder to copy to, default: results/runs")
    arguments = parser.parse_args()
    if not arguments.source.is_dir():
        raise UserError(f"{arguments.source}: no such folder; give the one that holds run directories, as runs/ does")
    found: dict[Path, Path] = {}  # where it goes -> where it was
    replaced = refused = 0
    for path in sorted(arguments.source.rglob(result_files.FILE_NAME)):
        try:
            result = result_files.read(path)
        except UserError as error:  # one bad file must not keep the others out
            print(f"left out, {error}", file=sys.stderr)
            refused += 1
            continue
        if (reason := unclean(result["code"])) and not arguments.dirty:
            print(f"left out, {reason}: {path}", file=sys.stderr)
            continue
        directory = config.directory_of(result["run"])
        target = arguments.into / directory.relative_to("runs").with_name(f"{directory.name}.json")
        text, source = path.read_text(encoding="utf-8"), result["data"]["source"]
        text = text if results.place(source) == source else published(text)
        before = target.read_text(encoding="utf-8") if target.exists() else text
        if target in found and before != text:
            print(f"left out, another result of the same run as {found[target]}: {path}", file=sys.stderr)
            refused += 1
            continue
        replaced += before != text
        found[target] = path
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, text)
    there = f", {replaced} of them in place of others," if replaced else ""
    print(f"{len(found)} results copied{there} to {arguments.into.parent.name}/{arguments.into.name}")
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())
