"""Merging is exact on every kind of backbone: logits of the grown and of the merged model, fp32."""

import pytest
import torch
from test_backbone import ARCHITECTURES, make, save

from increlora.algorithm import IncreLoRA
from increlora.bank import Bank
from increlora.glue.loop import make_optimizer, take_step
from increlora.glue.settings import Settings
from increlora.groups import set_learning_rates


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_loaded_model_grows_and_merges_exactly(name, tmp_path, monkeypatch):
    backbone = make(name, path=str(save(name, tmp_path, encoder_only=True)))
    model = backbone.model(2)
    method = IncreLoRA(kinds=backbone.kinds, head=backbone.head, target_rank=2, top_h=6, interval=4, init_warmup=4)
    settings = Settings(learning_rate=2e-2, batch_size=8, warmup_steps=2, device="cpu")
    method.prepare(model, 20)
    optimizer, scaler = make_optimizer(model, method, settings), torch.amp.GradScaler("cpu", enabled=False)
    gathered = []
    gather = Bank._gather
    monkeypatch.setattr(Bank, "_gather", lambda bank, dtype: gathered.append(1) or gather(bank, dtype))
    torch.manual_seed(0)
    ids = torch.randint(4, 60, (20, 8, 12))
    model.train()
    for step, batch in enumerate(ids):
        set_learning_rates(optimizer, step, 20, settings.warmup_steps)
        labels = batch[:, 1] % 2
        take_step(
            step, [batch], lambda b, y=labels: model(input_ids=b, labels=y).loss, method, optimizer, settings, scaler
        )
    assert len(gathered) == 20, "the bank serves all matrices of a forward at once"
    assert method.total_rank == 2 * len(backbone.kinds) * 2
    model.eval()
    with torch.no_grad():
        before = model(input_ids=ids[0]).logits
        moved = [linear.delta().abs().max().item() for linear in method.linears.values()]
        method.merge(model)
        after = model(input_ids=ids[0]).logits
    assert min(moved) > 1e-4 and max(moved) > 1e-3  # there is something to merge, everywhere
    assert (after - before).abs().max() < 1e-5
    assert not [m for m in model.modules() if type(m).__name__ == "IncrementalLinear"]
