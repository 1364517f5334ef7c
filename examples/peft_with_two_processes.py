"""IncreLoRA by PEFT in two processes: `torchrun --nproc-per-node 2 examples/peft_with_two_processes.py FOLDER`"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from increlora.integrations.peft import IncreLoraConfig, attach

STEPS, BATCH, folder = 40, 8, Path(sys.argv[1])
dist.init_process_group("gloo")
torch.manual_seed(0)
shape = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.2)).double()  # the order of sums is not seen then
model = get_peft_model(model, IncreLoraConfig(target_r=4, total_step=STEPS, seed=0))  # the same seed everywhere
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
training = attach(model, optimizer, warmup_steps=5)  # before anything wraps the model
parallel = DistributedDataParallel(model)
for _ in range(STEPS):
    numbers = (torch.randint(0, 32, (BATCH, 1)) + torch.arange(12)) % 32  # the whole batch, the same everywhere
    mine = numbers.chunk(dist.get_world_size())[dist.get_rank()]  # of it as many tokens for every process
    optimizer.zero_grad()
    loss = parallel(input_ids=mine, labels=mine).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
if dist.get_rank() == 0:
    model.save_pretrained(folder)
    print(f"loss {loss.item():.3f}, total rank {sum(training.ranks().values())}")
dist.barrier()  # leave together
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # at a normal exit a thread of torch's can still run, which aborts the process
