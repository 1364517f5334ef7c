"""Tiny finished runs for tests, trained in this process by run.py's own code, and scripts loaded as modules."""

import importlib.util
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
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


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


run_script = module(ROOT / "run.py")


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


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The script's main with these arguments; its exit code."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # `guarded` sets it; this puts it back
    pipe = signal.getsignal(signal.SIGPIPE)  # which predict.py changes, for a process of its own
    try:
        script.main()
    except SystemExit as stop:
        return stop.code
    finally:
        signal.signal(signal.SIGPIPE, pipe)
    return 0
