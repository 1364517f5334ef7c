"""What only a GPU can show; skipped, and said so, where there is none."""

import pytest
import torch
from conftest import TINY_KINDS
from test_loop import TASK, data, increlora, settings

from increlora.glue.loop import train
from increlora.glue.tracker import Tracker

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_the_gpu_reaches_its_budget(tiny_deberta, tmp_path, precision):
    given, made, method = settings(device="cuda", precision=precision), data(), increlora()
    model = tiny_deberta.float()
    method.prepare(model, given.total_steps(len(made.train)))
    tracker = Tracker()
    tracker.start(tmp_path, {}, {"method": {"kinds": TINY_KINDS}})
    outcome = train(model, method, TASK, made, given, tracker)
    assert outcome.status == "finished" and sum(outcome.curve[-1].ranks.values()) == 24
    scores = [value for allocation in outcome.allocations for value in allocation["scores"].values()]
    assert all(0 <= score < 1 for score in scores)  # a loss scale of 65536 would show
    assert outcome.cost["peak_memory_mb"] > 0
