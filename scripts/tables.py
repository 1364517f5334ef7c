"""Write the tables of results/ and of the README from the result files alone.

python scripts/tables.py            # or: make tables
python scripts/tables.py --check    # exit 1 if a table is stale
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from increlora import results

ROOT = Path(__file__).resolve().parent.parent


TABLES = ROOT / "results" / "tables"


def runs_of(experiment: str) -> list[dict[str, Any]]:
    """The committed runs of an experiment, by task and method."""
    runs = results.load_runs(ROOT / "results" / "runs")
    runs = [result for result in runs if f"experiment={experiment}" in result["run"]["overrides"]]
    return sorted(runs, key=lambda result: (result["run"]["task"], result["run"]["method"]))


def four_tasks() -> str:
    """The best value over training of every metric of the tasks' first runs."""
    rows = ["| task | best on dev over training, each metric by itself | total rank | seconds |", "|---|---|---|---|"]
    for result in runs_of("minilm_5_epochs"):
        curve = [point["scores"]["dev"] for point in result["curve"]]
        metrics = [metric for metric in curve[0] if metric not in ("loss", "score")]
        best = ", ".join(f"{metric} {max(scores[metric] for scores in curve):.4f}" for metric in metrics)
        total = sum(result["ranks"]["last"].values())
        rows.append(f"| {result['run']['task']} | {best} | {total} | {result['cost']['seconds']:.0f} |")
    return "\n".join(rows)


def insert(text: str, name: str, content: str) -> str:
    """The text with the part between the markers `name` replaced."""
    return re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.S)


def tables() -> dict[Path, str]:
    """Path -> content of every generated file."""
    readme, overview = (
        path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "results" / "README.md")
    )
    cost = (TABLES / "benchmark_deberta_v3_base_cpu.md").read_text(encoding="utf-8").rstrip()
    every_method, tasks = results.runs_table(runs_of("minilm_comparison")), four_tasks()
    return {
        TABLES / "every_method_once.md": every_method + "\n",
        TABLES / "four_tasks.md": tasks + "\n",
        ROOT / "README.md": insert(insert(readme, "every_method_once", every_method), "cost", cost),
        ROOT / "results" / "README.md": insert(overview, "four_tasks", tasks),
    }


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
