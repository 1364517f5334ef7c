"""Tiny finished runs for tests, trained in this process by run.py's own code."""

import json
from dataclasses import replace
from pathlib import Path

from conftest import ROOT
from in_process import load
from test_backbone import make
from tokenizers import pre_tokenizers

from increlora.glue import config
from increlora.glue.tokenizing import word_tokenizer

SMALL = {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "initializer_range": 0.2,
}  # fmt: skip
TRAINING = [
    "train.batch_size=20", "train.epochs=2", "train.warmup_steps=2", "train.learning_rate=1e-2",
    "train.eval_interval=5", "train.progress=false", "tracker=jsonl", "device=cpu",
]  # fmt: skip
SYNTHETIC = ["task=synthetic_entailment", "task.train_size=100", "task.dev_size=40"]


run_script = load(ROOT / "run.py")


def base_model(backbone: str, folder: Path) -> Path:
    """A small encoder of this architecture as published: weights without a classifier, and a tokenizer."""
    full = make(backbone)
    small = replace(full, weights="random", architecture=full.architecture | SMALL, seed=7)
    small.model(2).base_model.save_pretrained(folder)
    if small.model_type == "roberta":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet]
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
    else:
        word_tokenizer().save_pretrained(folder)
    return folder


def finished(run_dir: Path, *overrides: str) -> Path:
    """The directory of a run that has just finished."""
    arguments = [*TRAINING, *overrides]
    cfg = config.load(arguments)
    run_script.train(cfg, config.identity(cfg, arguments), run_dir, config.resolved(cfg))
    return run_dir
