"""PEFT's door in several processes: data parallel is as one process, and what shards a model is refused."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import HELPERS, ROOT
from naming import naming
from peft import get_peft_model
from safetensors.torch import load_file
from test_peft import GROWTH, RATE, STEPS, counting, llama
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from increlora.errors import UserError
from increlora.integrations.peft import IncreLoraCallback, IncreLoraConfig, attach

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def model_and_optimizer() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = get_peft_model(llama(), IncreLoraConfig(**GROWTH, total_step=STEPS))
    return model, torch.optim.AdamW(model.parameters(), lr=RATE)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(input_ids=counting(step), labels=counting(step)).loss.backward()
        optimizer.step()


def test_a_trainer_in_two_processes_grows_and_learns_as_in_one(tmp_path):
    for processes in ("1", "2"):
        path = os.pathsep.join(map(str, (ROOT, HELPERS, ROOT / "tests" / "integrations", ROOT / "tests")))
        command = [sys.executable, *TORCHRUN, processes, HELPERS / "peft_worker.py", tmp_path / processes, processes]
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("1", "2"))
    (growth, none), (growth_of_two, refusals) = (torch.load(tmp_path / n / "growth.pt") for n in ("1", "2"))
    assert growth == growth_of_two and len(growth) > 3
    assert not none and [refusal.split("; ")[0].partition(": ")[2] for refusal in refusals] == [
        "alpha 9 there, 8 here. Give all the same.",
        "deltaT 4 there, 3 here. Give all the same.",
        "total_step 31 there, 30 here. Give all the same.",
    ]
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-9)  # as in test_peft_examples


# what shards the model


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard_before() -> None:
    model, _ = model_and_optimizer()
    fully_shard(model)
    attach(model, torch.optim.AdamW(model.parameters(), lr=RATE))


def shard_layers_before() -> None:
    model, _ = model_and_optimizer()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    attach(model, torch.optim.AdamW(model.parameters(), lr=RATE))


def shard_after() -> None:
    model, optimizer = model_and_optimizer()
    attach(model, optimizer)
    fully_shard(model)
    train(model, optimizer, 1)


def shard_after_and_make_another_optimizer() -> None:
    model, optimizer = model_and_optimizer()
    attach(model, optimizer)
    fully_shard(model)
    train(model, torch.optim.AdamW(model.parameters(), lr=RATE), 1)


def zero_of_torch() -> None:
    model, _ = model_and_optimizer()
    attach(model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=RATE))


def flat_partitions() -> None:
    """ZeRO 1 and 2 put flat copies into the groups of the optimizer that they are given."""
    model, optimizer = model_and_optimizer()
    attach(model, optimizer)
    for group in optimizer.param_groups:
        group["params"] = [torch.nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))]
    train(model, optimizer, 1)


def engine() -> None:
    model, optimizer = model_and_optimizer()
    attach(type("DeepSpeedEngine", (torch.nn.Sequential,), {})(model), optimizer)


def test_a_sharded_model_or_optimizer_is_refused_whenever_it_was_sharded(one_process):
    for refused, match in (
        (shard_before, "FSDPModule is spread over processes or devices"),
        (shard_layers_before, "FSDPModule is spread over processes or devices"),
        (shard_after, "something has replaced them since `attach`"),
        (shard_after_and_make_another_optimizer, "was attached to another optimizer, with whose steps it grows"),
        (zero_of_torch, "ZeroRedundancyOptimizer is spread"),
        (flat_partitions, "something has replaced them since `attach`"),
        (engine, "DeepSpeedEngine is spread"),
    ):
        with naming(refused.__name__), pytest.raises(UserError, match=match) as error:
            refused()
        assert "DistributedDataParallel, not FSDP, DeepSpeed or DataParallel" in str(error.value)


def test_accelerate_s_engines_are_refused_by_every_door(monkeypatch):
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType[kind])
        with pytest.raises(UserError, match=f"accelerate runs with {kind}"):
            attach(*model_and_optimizer())
    monkeypatch.undo()
    for kind, gpus in (("FSDP", 1), ("DEEPSPEED", 1), ("NO", 2)):
        state = SimpleNamespace(distributed_type=DistributedType[kind])
        with pytest.raises(UserError, match="one process per GPU"):
            IncreLoraCallback().on_train_begin(
                SimpleNamespace(n_gpu=gpus), None, None, optimizer=SimpleNamespace(accelerator_state=state)
            )


# accelerate's optimizer, another optimizer


def test_what_accelerate_prepared_grows_as_the_optimizer_itself():
    plain = model_and_optimizer()
    expected = attach(*plain)
    train(*plain, STEPS)
    prepared = Accelerator(cpu=True).prepare(*model_and_optimizer())
    training = attach(*prepared)
    train(*prepared, STEPS)
    assert training.ranks() == expected.ranks() and sum(training.ranks().values()) == 4 * 14
    for mine, other in zip(training.bank.parameters(), expected.bank.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_another_optimizer_takes_no_step_unless_the_first_is_detached():
    model, optimizer = model_and_optimizer()
    training = attach(model, optimizer)
    train(model, optimizer, STEPS // 2)
    other, ranks = torch.optim.AdamW(model.parameters(), lr=RATE), training.ranks()
    with pytest.raises(UserError, match="was attached to another optimizer"):
        train(model, other, 1)
    training.detach()
    with pytest.warns(UserWarning, match="does not grow"):
        train(model, other, 1)
    assert training.ranks() == ranks
