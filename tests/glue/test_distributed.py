"""Two processes (gloo) are one: same growth, same losses, in sync; evaluation counts every example once."""

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import HELPERS, ROOT
from warm_python import python

from increlora import distributed
from increlora.errors import UserError
from increlora.glue import checkpoint

WORKER = HELPERS / "distributed_worker.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PATH = [ROOT, *(ROOT / "tests" / name for name in ("", "glue", "integrations"))]  # of a worker, beside its own folder
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, PATH)), **AS_ROOT}
needs_mpi = pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun on this machine")


def run(arguments: list, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [python(), *map(str, arguments)], capture_output=True, text=True, timeout=300, env=ENVIRONMENT, **kwargs
    )


def outcome(folder: Path) -> tuple[dict, list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "outcome.json").read_text()), [x["train/loss"] for x in lines if "train/loss" in x]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    done = run([WORKER, folder, 1])
    assert done.returncode == 0, done.stderr
    return outcome(folder)


def same(a, b, tolerance: float) -> None:
    """Growth identical; scores of growth and losses within a relative tolerance; evaluations equal."""
    assert len(a[1]) == len(b[1]) == 30
    assert b[1] == pytest.approx(a[1], rel=tolerance, abs=0)
    for x, y in zip(a[0]["allocations"], b[0]["allocations"], strict=True):
        assert (x["step"], x["added"]) == (y["step"], y["added"])
        assert list(y["scores"].values()) == pytest.approx(list(x["scores"].values()), rel=tolerance, abs=0)
    assert len(a[0]["allocations"]) == 3  # 8 ranks to add, 3 at a time
    for x, y in zip(a[0]["curve"], b[0]["curve"], strict=True):
        assert y["scores"]["dev"] == pytest.approx(x["scores"]["dev"], rel=1e-9)
        assert x["ranks"] == y["ranks"] and x["parameters"] == y["parameters"]


@pytest.mark.parametrize("accumulation", [2, 5])
def test_accumulation_equals_one_batch(single, tmp_path, accumulation):
    done = run([WORKER, tmp_path, accumulation])
    assert done.returncode == 0, done.stderr
    same(single, outcome(tmp_path), 1e-9)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_equal_one(single, tmp_path, accumulation):
    done = run([*TORCHRUN, WORKER, tmp_path, accumulation])
    assert done.returncode == 0, done.stderr
    same(single, outcome(tmp_path), 1e-6)


def test_a_process_that_dies_ends_the_job_and_leaves_a_good_checkpoint(tmp_path):
    done = run([*TORCHRUN, WORKER, tmp_path, 1, 17])
    assert done.returncode != 0 and "exitcode" in done.stderr
    state = checkpoint.newest(tmp_path / "checkpoint.safetensors")[0]["state"]
    assert state["progress"]["step"] == 15
    assert not (tmp_path / "outcome.json").exists()


SMALL = [
    "backbone=tiny", "task=synthetic_entailment", "task.train_size=200", "task.dev_size=50", "train.batch_size=20",
    "train.epochs=4", "train.warmup_steps=4", "method.top_h=6", "train.progress=false", "device=cpu", "tracker=jsonl",
    "train.checkpoint_interval=5",
]  # fmt: skip


def test_run_py_under_torchrun_writes_one_record_and_one_result(tmp_path):
    done = run([*TORCHRUN, ROOT / "run.py", *SMALL, "run_dir=run"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "finished" and sum(result["ranks"]["last"].values()) == 24
    assert result["code"]["processes"] == 2
    assert done.stdout.count("total rank 12 -> 24") == 1


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=needs_mpi)])
def test_run_py_under_accelerate_launch(tmp_path, processes):
    """On CPUs accelerate starts several processes only through mpirun."""
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", processes]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher += ["--mpirun_hostfile", "hosts", "--main_process_port", port] if processes > 1 else []
    done = run([*launcher, ROOT / "run.py", *SMALL, "run_dir=run"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "finished" and result["code"]["processes"] == processes
    assert done.stdout.count("total rank 12 -> 24") == 1


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path):
    done = run([*TORCHRUN, ROOT / "run.py", *SMALL, "train.batch_size=15"], cwd=tmp_path)
    assert done.returncode != 0 and not list(tmp_path.iterdir())
    assert "times the processes (2) must divide train.batch_size (15)" in done.stderr


def test_a_single_gradient_is_averaged_too(tmp_path):
    (tmp_path / "one.py").write_text(
        "import torch, torch.distributed as dist\n"
        "from increlora import distributed\n"
        "dist.init_process_group('gloo')\n"
        "a, b = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))\n"
        "a.grad = torch.full((3, 2), float(dist.get_rank())).t()\n"  # not contiguous
        "b.grad = torch.full((2,), 2.0 * dist.get_rank(), dtype=torch.float64)\n"
        "distributed.average_gradients([a, b])\n"
        "assert a.grad.unique().tolist() == [0.5] and b.grad.tolist() == [1.0, 1.0]\n"
        "dist.destroy_process_group()\n"
    )
    done = run([*TORCHRUN, tmp_path / "one.py"])
    assert done.returncode == 0, done.stderr


def test_what_a_process_passes_over_is_not_mixed_up_with_what_it_uses(tmp_path):
    found = []
    for name, command in (("one", []), ("two", TORCHRUN)):
        (tmp_path / name).mkdir()
        done = run([*command, HELPERS / "routed_worker.py", tmp_path / name])
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / name / "outcome.json").read_text()))
    one, two = found
    assert len(one["allocations"]) == 4 and len({tuple(a["added"]) for a in one["allocations"]}) == 2
    for a, b in zip(one["allocations"], two["allocations"], strict=True):
        assert (a["step"], a["added"]) == (b["step"], b["added"])
        assert list(b["scores"].values()) == pytest.approx(list(a["scores"].values()), rel=1e-9)
    assert list(one["weights"]) == list(two["weights"])
    for name, value in one["weights"].items():
        torch.testing.assert_close(torch.tensor(two["weights"][name]), torch.tensor(value), rtol=1e-7, atol=1e-9)


def test_a_broken_environment_is_named(monkeypatch):
    for name in (*distributed.SIZES, "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE=2, but MASTER_ADDR is not set: start the processes with torchrun"):
        distributed.start("cpu")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UserError, match="the environment variable RANK must be a whole number, it is 'x'"):
        distributed.start("cpu")
