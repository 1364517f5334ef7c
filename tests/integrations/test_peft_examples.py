"""The examples for users of PEFT run as they say, learn, and reach their budget."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from peft import PeftModel
from safetensors.torch import load_file
from test_peft import STEPS, counting, llama
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from increlora.integrations.peft import export_lora

BUDGET = {"gpt2": 4 * 8, "others": 4 * 14}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def run(name: str, folder: Path, *launcher: str) -> str:
    script = ROOT / "examples" / f"peft_with_{name}.py"
    assert len(script.read_text().splitlines()) < 40
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, script, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def total_rank(out: str) -> int:
    return int(re.findall(r"total rank (\d+)", out)[-1])


def losses(out: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss'?:? '?([\d.]+)", out)]


def test_gpt2_grows_saves_and_merges(tmp_path):
    out = run("gpt2", tmp_path)
    assert "step 100: " in out and total_rank(out) == BUDGET["gpt2"]
    merged, x = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval(), torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        assert losses(out)[0] > 3 > 2 > merged(input_ids=x, labels=x).loss
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "INCRELORA"


def test_the_sft_trainer_grows_and_resumes_to_the_same_bits(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed (the extra `quantized` has it)")
    out = run("sft_trainer", tmp_path)
    assert total_rank(out) == BUDGET["others"] and losses(out)[0] > 2 > 0.5 > losses(out)[2]
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for number in (50, 75):  # stopped at step 25, within growth
        shutil.rmtree(tmp_path / f"checkpoint-{number}")
    export_lora(tmp_path / "checkpoint-25", tmp_path / "growing", pad_to=16)
    export_lora(tmp_path / "adapter", tmp_path / "lora")  # of the same ranks
    ours, lora = ((tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("adapter", "lora"))
    assert 0.9 * lora <= ours <= 1.1 * lora
    shutil.rmtree(tmp_path / "adapter")
    run("sft_trainer", tmp_path)
    again = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == again.keys() and all(torch.equal(adapter[key], again[key]) for key in adapter)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    run("sft_trainer", tmp_path)  # from the checkpoint of the last step
    again = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == again.keys() and all(torch.equal(adapter[key], again[key]) for key in adapter)


def test_a_model_in_4_bits_trains_on_a_cpu(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra `quantized` has it)")
    out = run("4_bit_weights", tmp_path)
    assert total_rank(out) == BUDGET["others"] and losses(out)[0] > 0.5 > 0.2 > losses(out)[-1]
    assert "the same after loading: True" in out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 200_000


def test_two_processes_grow_and_learn_as_one_does(tmp_path):
    out = [run("two_processes", tmp_path / processes, *TORCHRUN, processes) for processes in ("1", "2")]
    one, two = (load_file(tmp_path / processes / "adapter_model.safetensors") for processes in ("1", "2"))
    assert [total_rank(said) for said in out] == [BUDGET["others"]] * 2
    assert one.keys() == two.keys()
    for key, value in one.items():  # of the same shapes, so all ranks are the same
        # sums of another order, which Adam magnifies where gradients are small: 1.3e-10 on a CPU with AVX2 alone
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-9)


def test_the_page_for_users_of_peft_says_what_runs(tmp_path):
    first, loop, _, serve = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "peft.md").read_text(), flags=re.S)
    assert len(first.splitlines()) == 6
    rows = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in counting(step)]
    args = TrainingArguments(
        str(tmp_path), max_steps=STEPS, report_to="none", save_steps=STEPS, disable_tqdm=True, use_cpu=True
    )
    said = {"model": llama(), "args": args, "data": rows, "Trainer": Trainer, "torch": torch, "STEPS": STEPS}
    exec(first, said)
    assert sum(said["trainer"].model.base_model.adapters["default"].ranks().values()) == 8 * 14
    exec(loop, said | {"model": llama()})
    for word, here in (("out/checkpoint-500", f"checkpoint-{STEPS}"), ("out/lora", "lora")):
        serve = serve.replace(word, str(tmp_path / here))
    exec(serve.replace("pad_to=16", "pad_to=32"), said)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    with torch.no_grad():
        expected = said["trainer"].model.eval()(input_ids=counting(9)).logits
        torch.testing.assert_close(loaded(input_ids=counting(9)).logits, expected, rtol=0, atol=1e-5)
