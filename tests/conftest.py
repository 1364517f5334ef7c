"""Shared fixtures: where optional real data lies, and a tiny DeBERTa in float64."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
HELPERS = ROOT / "tests" / "helpers"
SHARED = Path(os.environ.get("INCRELORA_SHARED", ROOT.parent / "shared"))

# the caller's environment decides nothing
os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1,localhost"}
os.environ["no_proxy"] = os.environ["NO_PROXY"]
for name in ("HYDRA_FULL_ERROR", "INCRELORA_RESULTS"):
    os.environ.pop(name, None)
torch.set_num_threads(1)

TINY_KINDS = {
    "query": r".*\.attention\.self\.query_proj",
    "key": r".*\.attention\.self\.key_proj",
    "value": r".*\.attention\.self\.value_proj",
    "attention_output": r".*\.attention\.output\.dense",
    "intermediate": r".*\.intermediate\.dense",
    "output": r".*\.layer\.\d+\.output\.dense",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of long runs and many processes come first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.parent.name not in ("scripts", "integrations"))


@pytest.fixture
def shared() -> Path:
    """The folder with real data beside the project; the test is skipped, with the reason, where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"real data not found in {SHARED} (set INCRELORA_SHARED)")
    return SHARED


@pytest.fixture
def tiny_deberta():
    """A two-layer DeBERTaV2 classifier in float64 with all dropout off; W_q and W_k are used twice per forward."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=32, type_vocab_size=0,
        relative_attention=True, position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], position_biased_input=False, pooler_dropout=0.0, cls_dropout=0.0,
        initializer_range=0.2,
    )  # fmt: skip
    return DebertaV2ForSequenceClassification(config).double()


def tiny_batches(count: int, size: int = 8, length: int = 10) -> list[dict[str, torch.Tensor]]:
    """Random token batches whose label is whether the first token is even: learnable."""
    generator = torch.Generator().manual_seed(7)
    batches = []
    for _ in range(count):
        ids = torch.randint(4, 50, (size, length), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2})
    return batches
