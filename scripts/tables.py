"""Write the tables of results/ and of the README from the result files alone.

python scripts/tables.py            # or: make tables
python scripts/tables.py --check    # exit 1 if a table is stale
"""

import argparse
import re
import sys
from pathlib import Path

from increlora import results

ROOT = Path(__file__).resolve().parent.parent


def first_runs() -> str:
    """Every committed MiniLM run of seed 41, by task and method."""
    runs = results.load_runs(ROOT / "results" / "runs" / "minilm")
    return results.runs_table(sorted(runs, key=lambda result: (result["run"]["task"], result["run"]["method"])))


def tables() -> dict[Path, str]:
    """Path -> content of every generated file."""
    runs = first_runs()
    readme = ROOT / "README.md"
    text = re.sub(
        r"(<!-- results -->\n).*?(<!-- /results -->)", rf"\1{runs}\n\2", readme.read_text(encoding="utf-8"), flags=re.S
    )
    return {ROOT / "results" / "tables" / "first_runs.md": runs + "\n", readme: text}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    check = parser.parse_args().check
    stale = [path for path, text in tables().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(tables()[path], encoding="utf-8")
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
