"""IncreLoRA with accelerate; run again, it resumes. `accelerate launch examples/train_with_accelerate.py FOLDER`"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from increlora import Growth, IncreLoRA

STEPS, MICRO_BATCHES, folder = 60, 2, Path(sys.argv[1])
accelerator = Accelerator(gradient_accumulation_steps=MICRO_BATCHES)
set_seed(0)
loader = torch.utils.data.DataLoader((torch.randint(0, 32, (2000, 1)) + torch.arange(12)) % 32, batch_size=8)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2))
method = IncreLoRA(head=None, target_rank=4, interval=5, init_warmup=5)  # every linear layer of the decoder
method.prepare(model, STEPS)
optimizer = torch.optim.AdamW(method.param_groups(model), lr=2e-2)
growth = Growth(method, model, optimizer, STEPS, warmup_steps=5)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
if (folder / "model.safetensors").exists():  # structure, weights, optimizer, random states, and growth.step
    accelerator.load_state(folder)
    loader = accelerator.skip_first_batches(loader, growth.step * MICRO_BATCHES)
for batch in loader:
    if growth.step == STEPS:
        break
    with accelerator.accumulate(model):
        growth.begin_step(MICRO_BATCHES, accelerator.scaler)
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            growth.before_step()
        optimizer.step()
        growth.after_step()
        optimizer.zero_grad()
    if accelerator.sync_gradients and growth.step % 30 == 0:
        accelerator.print(f"step {growth.step}: loss {loss.item():.3f}, total rank {sum(method.ranks().values())}")
        accelerator.save_state(folder)
