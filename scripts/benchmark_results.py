"""What many results cost: time and memory of collect.py and tables.py on so many made-up ones.

    python scripts/benchmark_results.py --results 10000

They are made from the committed runs of the first study: each has numbers, ranks and a seed of its own, so that no two
share more than runs do. All of it happens in a copy of the repository in a temporary folder (50 KB a result), on Linux.
"""

import argparse
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from increlora import result_files
from increlora.analysis import selection
from increlora.files import as_json
from increlora.glue import config, machine

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("scripts", "docs", "results/paper", "results/benchmark")
MEASURED = """
import re, runpy, sys, time
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(time.process_time(), re.search("VmHWM: *\\t* *([0-9]+)", open("/proc/self/status").read())[1])
"""  # the peak that the system counts for a child process would be at least its parent's
OWN = ("scores", "curve", "allocations", "cost")  # parts whose numbers are a run's own


@config.guarded
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=int, default=10_000)
    number = parser.parse_args().results
    print(json.dumps(machine.describe(sys.argv, "cpu")))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_copy(root)
        made = result_files.load_runs(ROOT / "results" / "runs")
        write(selection.of_experiment(made, "minilm_study"), number, root / "runs")
        for command in (["scripts/collect.py", "runs"], ["scripts/tables.py"]):
            seconds, megabytes = cost(command, root)
            print(f"{command[0]:20s} {number} results: {seconds:.1f} s of processor time, {megabytes:.0f} MB")


def make_copy(root: Path) -> None:
    """What the two scripts read and write, without results."""
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name)
    for name in ("README.md", "results/README.md"):
        shutil.copy(ROOT / name, root / name)
    (root / "results" / "tables").mkdir()


def write(runs: list[selection.Run], number: int, folder: Path) -> None:
    """So many results, as run.py would write them."""
    chance = random.Random(0)
    for k in range(number):
        result = copy.deepcopy(dict(runs[k % len(runs)]))
        result |= {part: varied(result[part], chance) for part in OWN}
        for name, ranks in result["ranks"].items():
            result["ranks"][name] = dict(zip(ranks, chance.sample([*ranks.values()], len(ranks)), strict=True))
        result["run"]["seed"] = result["config"]["seed"] = 1000 + k
        result |= {"format": result_files.FORMAT, "code": result["code"] | {"dirty": False}}
        path = folder / str(k // 200) / f"seed{1000 + k}" / result_files.FILE_NAME
        path.parent.mkdir(parents=True)
        path.write_text(as_json(result_files.sealed(result), indent=1) + "\n", encoding="utf-8")


def varied(value: Any, chance: random.Random) -> Any:
    """The same with slightly other numbers."""
    if isinstance(value, dict):
        return {key: varied(item, chance) for key, item in value.items()}
    if isinstance(value, list):
        return [varied(item, chance) for item in value]
    return value * (1 + chance.random() / 1000) if isinstance(value, float) else value


def cost(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds of processor time and peak memory in MB of a script that must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True,
        check=True,
    )  # fmt: skip
    seconds, kilobytes = done.stdout.split()[-2:]
    return float(seconds), float(kilobytes) / 1024


if __name__ == "__main__":
    main()
