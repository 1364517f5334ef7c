"""IncreLoRA by get_peft_model on GPT-2 in the Trainer, then merged: `python examples/peft_with_gpt2.py FOLDER`"""

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from increlora.integrations.peft import IncreLoraCallback, IncreLoraConfig

folder = Path(sys.argv[1])
set_seed(0)
rows = (torch.randint(0, 32, (800, 1)) + torch.arange(12)) % 32
examples = [{"input_ids": row, "labels": row} for row in rows]
shape = dict(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None))
model = get_peft_model(model, IncreLoraConfig(target_r=4, task_type="CAUSAL_LM", seed=0))  # every layer but the head
args = TrainingArguments(
    str(folder), num_train_epochs=1, learning_rate=2e-2, lr_scheduler_type="cosine", warmup_steps=5, save_steps=50,
    per_device_train_batch_size=8, logging_steps=20, report_to="none", use_cpu=True, disable_tqdm=True,
)  # fmt: skip
callback = IncreLoraCallback()
trainer = Trainer(model, args, train_dataset=examples, callbacks=[callback])
trainer.train()
print(f"step {callback.training.step}: total rank {sum(callback.training.ranks().values())}")
model.save_pretrained(folder / "adapter")
model.merge_and_unload().save_pretrained(folder / "merged")
print(GPT2LMHeadModel.from_pretrained(folder / "merged").num_parameters(), "parameters, a plain GPT-2")
