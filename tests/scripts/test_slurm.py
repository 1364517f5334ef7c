"""Sweeps on a real SLURM: jobs that end, a node that is drained, a driver that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm
import yaml
from conftest import ROOT

from increlora.errors import UserError
from increlora.glue.sweep_engine import Cluster

RUNS = {
    "backbone": "tiny", "task": "synthetic_entailment", "task.train_size": 200, "task.dev_size": 40, "device": "cpu",
    "train.batch_size": 10, "train.epochs": 1000, "train.max_steps": 150, "train.checkpoint_interval": 5,
    "train.warmup_steps": 5, "tracker": "jsonl", "method": "lora",
}  # fmt: skip
BEST = {"best_of": [1e-3, 1e-2], "split": "dev", "seed": 1}


def wait_for(condition, seconds: float = 240):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)
    return found


@pytest.mark.skipif(bool(slurm.missing()), reason=f"no SLURM here: {', '.join(slurm.missing())} missing")
def test_a_sweep_survives_jobs_that_end_a_drained_node_and_a_killed_driver(tmp_path):
    (tmp_path / "here.yaml").write_text(yaml.safe_dump({
        "partition": "main", "time": "00:10:00", "jobs": 1, "runs_per_job": 2, "gpus_per_job": 0,
        "cpus_per_run": None, "memory_per_job": None, "notice": 30, "address": "127.0.0.1",
    }))  # fmt: skip
    blocks = [{"seed": [2, 3], "train.learning_rate": BEST}]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"about": "on SLURM", "common": RUNS, "runs": blocks}))
    command = [sys.executable, ROOT / "scripts" / "sweep.py", "sweep.yaml", "--on", "here.yaml"]

    def cut_off() -> list[Path]:
        return [f.parent for f in tmp_path.rglob("checkpoint.safetensors") if not (f.parent / "result.json").exists()]

    with slurm.cluster(tmp_path / "slurm") as environment:

        def ask(*words: str) -> str:
            return subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout

        def start() -> subprocess.Popen:
            output = (tmp_path / "driver.log").open("a")
            return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT)

        first = start()
        try:
            cut = wait_for(cut_off)[0]
            (job,) = ask("squeue", "--noheader", "--format=%i", "--states=running").split()
            node = os.uname().nodename.partition(".")[0]
            ask("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
            ask("scancel", job)  # as at the end of its time
            slurm.wait_for_node(environment, "drain")
            assert not (cut / "result.json").exists()
            ask("scontrol", "update", f"nodename={node}", "state=resume")
            wait_for(lambda: list(tmp_path.rglob("result.json")) and not cut_off())  # they go on in the next job
            first.send_signal(signal.SIGKILL)
            first.wait()
            second = start()
            assert second.wait(240) == 0, (tmp_path / "driver.log").read_text()
        finally:
            print((tmp_path / "driver.log").read_text())
            first.kill()
    told = (tmp_path / "driver.log").read_text()
    assert "cut off, it continues" in told and told.rstrip().endswith("4 finished"), told
    assert "continuing from step" in (cut / "sweep.log").read_text()
    results = [json.loads(file.read_text()) for file in tmp_path.rglob("result.json")]
    assert len(results) == 4 and all(result["cost"]["steps"] == 150 for result in results)


def test_what_describes_no_cluster_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--on nosuch: there is no such cluster; there is: local, slurm"):
        Cluster.read("nosuch")
    for text, said in (("partitoin: main", "partitoin"), ("jobs: many", "many"), ("- 1", "")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=f"bad.yaml does not describe a cluster.*{said}"):
            Cluster.read(str(tmp_path / "bad.yaml"))
    assert Cluster.read("slurm").time == "04:00:00"
