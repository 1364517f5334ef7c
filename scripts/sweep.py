"""Run a sweep: one process per run; finished runs are not repeated, interrupted runs continue.

    python scripts/sweep.py NAME [overrides] [--on local|slurm|FILE] [--jobs N] [--known DIR] [--dry-run]

NAME is a file of configs/sweep, or a path to a YAML file, which says what runs there are:

    common:   overrides of every run
    where:    overrides of the runs that have an override, e.g. `method=lora: {method.dropout: 0.0}`
    runs:     blocks of override -> value or list of values; a block is their product, its first key slowest

A value may depend on other runs, which then run first:

    {best_of: [VALUES], split: SPLIT, seed: K}    the value whose run with seed K ended best on that split
    {run_with: {OVERRIDE: VALUE}}              the directory of the same run with other overrides

An override on the command line of a key that the sweep varies keeps only those values (`task=cola,stsb`); any
other goes to every run (`task.data_dir=GLUE`). Ctrl-C stops the runs, which keep what they have. Runs lie in
the current directory; what a run prints is in its sweep.log.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from rich.console import Console

from increlora.errors import UserError
from increlora.glue import config
from increlora.glue.sweep_engine import Cluster, Sweep, gpus
from increlora.glue.sweep_plan import expand, parted, read_sweep


class Unheard(Console):
    """A reader who leaves (`| head`) does not end the sweep."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@config.guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a file of configs/sweep")
    parser.add_argument("overrides", nargs="*", help="overrides of run.py")
    parser.add_argument("--on", default="local", help="local, a file of configs/cluster (slurm), or one of your own")
    parser.add_argument("--jobs", type=int, help="runs side by side (default: one per GPU, else one)")
    parser.add_argument("--known", type=Path, help="results/runs: what is finished there is not run again either")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and the time they take, start none")
    arguments = parser.parse_intermixed_args()
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: at least one run must go at a time; leave it out for one per GPU")
    if arguments.known and not arguments.known.is_dir():
        raise UserError(f"--known {arguments.known}: no such folder; give one of results, as results/runs is")
    sweep = read_sweep(arguments.name)
    runs = expand(sweep, *parted(sweep, arguments.overrides))
    jobs = arguments.jobs or max(1, len(gpus()))
    console = Unheard(soft_wrap=True)
    cluster = None if arguments.on == "local" else Cluster.read(arguments.on)
    queue = Sweep(runs, jobs, arguments.known and arguments.known.resolve(), console, cluster)
    console.print(f"{arguments.name}: {sweep['about']}")
    console.print(f"{len(runs)} runs, {queue.side_by_side} at a time: {queue.counts()}")
    if arguments.dry_run:
        for run in runs:
            console.print(f"  {run.state:9s} {run.name}{f': {run.error}' if run.error else ''}", highlight=False)
        return int(any(run.state == "failed" for run in runs))
    queue.work()
    console.print(queue.summary(), highlight=False)
    if any(run.state in ("stopped", "not begun") for run in runs):
        return 128 + signal.SIGINT
    return int(any(run.state == "failed" for run in runs))


if __name__ == "__main__":
    sys.exit(main())
