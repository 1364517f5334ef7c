"""IncreLoRA in the Hugging Face Trainer; run again, it resumes. `python examples/train_with_trainer.py FOLDER`"""

import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from increlora import IncreLoRA, IncreLoRACallback

folder = Path(sys.argv[1])
set_seed(0)
rows = torch.randint(2, 34, (1000, 12))
examples = [{"input_ids": row, "labels": int(row[0] > row[1])} for row in rows]
model = BertForSequenceClassification(
    BertConfig(vocab_size=34, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
)
model.accepts_loss_kwargs = False  # its loss is a mean over the micro-batch, not a share of the batch's
args = TrainingArguments(
    output_dir=str(folder), max_steps=60, learning_rate=1e-2, warmup_steps=5, per_device_train_batch_size=16,
    gradient_accumulation_steps=2, save_steps=30, eval_strategy="steps", eval_steps=30, logging_steps=10,
    report_to="none",
)  # fmt: skip
method = IncreLoRA(target_rank=4, interval=5, init_warmup=5)  # every linear layer of the encoder; pooler and classifier
method.prepare(model, args.max_steps)
callback = IncreLoRACallback(method, model, args)
trainer = Trainer(
    model, args, train_dataset=examples[:900], eval_dataset=examples[900:], callbacks=[callback],
    optimizers=callback.optimizers,
)  # fmt: skip
trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
print(f"step {callback.growth.step}: total rank {sum(method.ranks().values())}")

callback.growth.merge()
trainer.save_model(str(folder / "merged"))
print(BertForSequenceClassification.from_pretrained(folder / "merged").num_parameters(), "parameters, a plain BERT")
