"""IncreLoRA in a plain torch loop: a tiny random Llama learns to count. `python examples/train_in_your_own_loop.py`"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from increlora import IncreLoRA, multiplier

STEPS, WARMUP, LEARNING_RATE = 150, 5, 2e-2

torch.manual_seed(0)
shape = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.2))
# head=None: no part is freshly initialised, so only the adapted matrices train; kinds={} would adapt all seven kinds
kinds = {"q_proj": r".*\.q_proj", "v_proj": r".*\.v_proj", "down_proj": r".*\.down_proj"}
method = IncreLoRA(kinds=kinds, head=None, target_rank=4, interval=5, init_warmup=5)
method.prepare(model, STEPS)
optimizer = torch.optim.AdamW(method.param_groups(model), lr=LEARNING_RATE, weight_decay=0.0)

model.train()
for step in range(STEPS):
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * multiplier(step, group.get("born", 0), STEPS, WARMUP)
    numbers = (torch.randint(0, 32, (16, 1)) + torch.arange(12)) % 32
    method.begin_step(step)
    loss = model(input_ids=numbers, labels=numbers).loss
    (loss + method.extra_loss()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    method.before_step(step)
    optimizer.step()
    method.after_step(step)
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.3f}, total rank {sum(method.ranks().values())}")

method.merge(model)  # a plain Llama again: model.save_pretrained(...)
