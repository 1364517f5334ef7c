"""IncreLoRA in TRL's SFTTrainer; run again, it resumes: `python examples/peft_with_sft_trainer.py FOLDER`"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from increlora.integrations.peft import IncreLoraCallback, IncreLoraConfig

folder = Path(sys.argv[1])
words = [f"w{number}" for number in range(30)]
words_to_ids = {word: number for number, word in enumerate(["<pad>", "<eos>", *words])}
tokenizer = Tokenizer(models.WordLevel(words_to_ids, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
set_seed(0)
starts = torch.randint(0, 30, (600,)).tolist()
texts = Dataset.from_dict({"text": [" ".join(words[(start + i) % 30] for i in range(12)) for start in starts]})
shape = dict(vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.2, bos_token_id=None, eos_token_id=1, pad_token_id=0))
model.save_pretrained(folder / "base")  # a random one, in the place of a model from the hub
args = SFTConfig(
    str(folder), num_train_epochs=1, learning_rate=2e-2, warmup_steps=5, per_device_train_batch_size=8, save_steps=25,
    logging_steps=25, report_to="none", use_cpu=True, bf16=False, max_length=16, disable_tqdm=True,
)  # fmt: skip
trainer = SFTTrainer(
    str(folder / "base"), args, train_dataset=texts, processing_class=tokenizer,
    peft_config=IncreLoraConfig(target_r=4, task_type="CAUSAL_LM", seed=0), callbacks=[IncreLoraCallback()],
)  # fmt: skip
trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
trainer.save_model(str(folder / "adapter"))
loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
print(f"total rank {sum(loaded.base_model.adapters['default'].ranks().values())}")
