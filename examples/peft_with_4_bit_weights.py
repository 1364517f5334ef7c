"""IncreLoRA on a model in 4 bits, in a plain loop, on a CPU: `python examples/peft_with_4_bit_weights.py FOLDER`"""

import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup, set_seed

from increlora.integrations.peft import IncreLoraConfig, attach

STEPS, WARMUP, folder = 80, 5, Path(sys.argv[1])
set_seed(0)
shape = dict(vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.2)).save_pretrained(folder / "base")
four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
model = LlamaForCausalLM.from_pretrained(folder / "base", quantization_config=four_bits, dtype=torch.float32)
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
model = get_peft_model(model, IncreLoraConfig(target_r=4, total_step=STEPS, seed=0))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
scheduler = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
training = attach(model, optimizer, warmup_steps=WARMUP, linear=True)
model.train()
for step in range(STEPS):
    numbers = (torch.randint(0, 32, (8, 1)) + torch.arange(12)) % 32
    loss = model(input_ids=numbers, labels=numbers).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}, total rank {sum(training.ranks().values())}")
model.save_pretrained(folder / "adapter")
fresh = LlamaForCausalLM.from_pretrained(folder / "base", quantization_config=four_bits, dtype=torch.float32)
loaded, model = PeftModel.from_pretrained(fresh, folder / "adapter"), model.eval()
with torch.no_grad():
    print("the same after loading:", torch.equal(loaded(input_ids=numbers).logits, model(input_ids=numbers).logits))
