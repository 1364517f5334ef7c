"""Copy the results of finished runs into the repository: runs/.../result.json -> results/runs/.../seed<k>.json.

    python scripts/collect.py runs

Only results of one clean commit are taken; `--dirty` takes the others too. Of a data folder with an absolute path only
the name is kept: where it lay on one machine is of no use to others.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from increlora import result_files
from increlora.files import as_json
from increlora.glue import config

DESTINATION = Path(__file__).resolve().parent.parent / "results" / "runs"


def published(result: dict[str, Any]) -> dict[str, Any]:
    """The result without what only one machine knows."""
    source = Path(result["data"]["source"])
    return result | {"data": result["data"] | {"source": source.name if source.is_absolute() else str(source)}}


@config.guarded
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder that holds run directories")
    parser.add_argument("--dirty", action="store_true", help="also results of a tree with uncommitted changes")
    arguments = parser.parse_args()
    taken = 0
    for path in sorted(arguments.source.rglob(result_files.FILE_NAME)):
        result = result_files.read(path)
        commits = result["code"].get("commits", [])
        if (result["code"]["dirty"] or len(commits) > 1) and not arguments.dirty:
            reason = f"it ran on {', '.join(commits)}" if len(commits) > 1 else "the tree had uncommitted changes"
            print(f"left out, {reason}: {path}", file=sys.stderr)
            continue
        target = DESTINATION / path.parent.relative_to(arguments.source).with_suffix(".json")
        target.parent.mkdir(parents=True, exist_ok=True)
        written = json.loads(path.read_text(encoding="utf-8"))  # a file keeps the format that it was written in
        target.write_text(as_json(published(written), indent=1) + "\n", encoding="utf-8")
        taken += 1
    print(f"{taken} results copied to {DESTINATION.relative_to(DESTINATION.parent.parent)}")


if __name__ == "__main__":
    main()
