"""A Trainer with an adapter that grows, for several processes: `torchrun ... peft_worker.py FOLDER`."""

import os
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from test_peft import GROWTH, RATE, STEPS, WARMUP, counting, llama
from transformers import Trainer, TrainingArguments

from increlora import distributed
from increlora.errors import UserError
from increlora.integrations.peft import IncreLoraCallback, IncreLoraConfig, attach

folder, BATCH = Path(sys.argv[1]), 8
args = TrainingArguments(
    str(folder), max_steps=STEPS, learning_rate=RATE, warmup_steps=WARMUP, report_to="none", disable_tqdm=True,
    per_device_train_batch_size=BATCH // int(sys.argv[2]), save_steps=10, use_cpu=True,
)  # fmt: skip
rows = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in counting(step)]
model, seed = llama(torch.float64), distributed.rank()
torch.manual_seed(5 + seed)  # every process draws a seed of its own, and all take the first one's
model = get_peft_model(model, IncreLoraConfig(**GROWTH | {"seed": None}))
callback = IncreLoraCallback()
trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
trainer.train()
assert distributed.processes() == int(sys.argv[2])
trainer.save_model(str(folder / "adapter"))
refusals = []
for setting, value in (("lora_alpha", 8 + seed), ("deltaT", 3 + seed), ("total_step", STEPS + seed)):
    model = get_peft_model(llama(), IncreLoraConfig(**GROWTH | {"total_step": STEPS, setting: value}))
    try:
        attach(model, torch.optim.AdamW(model.parameters()))
    except UserError as error:
        refusals.append(str(error))
if distributed.is_main():
    allocations = [(a.step, a.added) for a in callback.training.method.allocations]
    torch.save((allocations, refusals), folder / "growth.pt")
distributed.gather(None)  # leave together
distributed.stop()
os._exit(0)  # at a normal exit a thread of torch's can still run, which aborts the process
