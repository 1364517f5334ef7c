"""Write the tables of results/ and docs/ from the result files alone.

python scripts/tables.py            # or: make tables
python scripts/tables.py --check    # exit 1 if a table is stale

Scores are in per cent. last is the last step; best is the best on dev over training, the paper's protocol and
optimistic; clean is scored once on dev at the checkpoint chosen on held-out training data.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from increlora import result_files
from increlora.analysis import base_size, decision, selection, study_c
from increlora.analysis.benchmark_table import benchmark_table
from increlora.analysis.claims import Evidence, claims
from increlora.analysis.glue_table import glue
from increlora.analysis.looks import TASKS, position
from increlora.analysis.sequential import Plan
from increlora.analysis.study_tables import ablation, learning_rates, study
from increlora.analysis.tables import Table, best_of_every_metric, runs_table
from increlora.files import write_text
from increlora.glue import config

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "results" / "tables"
# tables stand between markers here
PAGES = [ROOT / page for page in ("results/README.md", "docs/cost.md", "docs/claims.md")]
ALLOCATION = ROOT / "results" / "paper" / "allocation.csv"
PUBLISHED = ROOT / "results" / "paper" / "published.csv"


def insert(text: str, name: str, content: str) -> str:
    """The text with the part between the markers `name` replaced."""
    return re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.S)


def built(runs: Sequence[selection.Run], repeats: Sequence[selection.Run] = ()) -> dict[str, Table]:
    """Name -> table, of what there are runs for; the published rows are always there.

    Args:
        repeats: runs of study C that were made a second time.
    """
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        published = list(csv.DictReader(file))
    ours = [r for r in runs if r["run"]["backbone"] == "deberta_v3_base" and selection.is_published(r)]
    found = {"glue_deberta_v3_base": glue(ours, published)}
    ablated = ablation(runs)
    if ablated.rows:
        found["ablation"] = ablated
    of_study = selection.of_experiment(runs, "minilm_study")
    if of_study:
        trials = [r for r in of_study if r["run"]["seed"] == selection.TUNING_SEED]
        names = sorted({r["run"]["task"] for r in of_study}, key=lambda task: position(task, TASKS))
        tasks = {
            t: selection.by_method(r for r in of_study if r["run"]["task"] == t and r not in trials) for t in names
        }
        found |= study("minilm_study", {task: methods for task, methods in tasks.items() if methods})
        found["minilm_study_learning_rates"] = learning_rates("minilm_study", trials)
    allocation = base_size.published_allocation(ALLOCATION)
    of_base_size = selection.of_experiment(runs, base_size.EXPERIMENT)
    if of_base_size:
        found |= base_size.built(of_base_size, allocation)
    return found | study_c.built(selection.of_experiment(runs, study_c.EXPERIMENT), repeats)


def tables(passed_over: list[str] | None = None) -> dict[Path, str]:
    """Path -> content of every generated file.

    Args:
        passed_over: as in `result_files.load_runs`.
    """
    runs = result_files.load_runs(ROOT / "results" / "runs", passed_over, without=("allocations",))
    repeats = result_files.load_runs(ROOT / "results" / "repeats", passed_over, without=("allocations",))
    pages = {path: path.read_text(encoding="utf-8") for path in PAGES}
    content = {
        "every_method_once": runs_table(selection.of_experiment(runs, "minilm_comparison")) + "\n",
        "four_tasks": best_of_every_metric(selection.of_experiment(runs, "minilm_5_epochs")) + "\n",
    }
    for path in sorted((ROOT / "results" / "benchmark").glob("*.json")):
        measured = json.loads(path.read_text(encoding="utf-8"))
        content[f"benchmark_{path.stem}"] = benchmark_table(measured) + "\n"
    files = {TABLES / f"{name}.md": text for name, text in content.items()}
    plan = Plan.of(config.read_study("study_a"), "study_a")
    study_a = decision.progress(plan, decision.read(plan, runs))
    for name, table in (built(runs, repeats) | decision.tables(plan, study_a, runs)).items():
        content[name] = table.markdown()
        files |= {TABLES / f"{name}.md": table.markdown(), TABLES / f"{name}.tex": table.latex()}
    evidence = Evidence(runs, base_size.published_allocation(ALLOCATION), study_a)
    content["claims"] = claims(evidence).markdown()  # its links lead from docs/
    for name, text in content.items():
        pages = {path: insert(page, name, text.rstrip()) for path, page in pages.items()}
    return files | pages


@config.guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    check = parser.parse_args().check
    passed_over: list[str] = []
    wanted = tables(passed_over)
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, wanted[path])
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
    for sentence in passed_over:
        print(f"left out, {sentence}", file=sys.stderr)
    return int(bool(passed_over) or (check and bool(stale)))


if __name__ == "__main__":
    sys.exit(main())
