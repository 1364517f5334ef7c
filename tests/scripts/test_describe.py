"""scripts/describe.py: the parameter counts that the papers' tables call equal, on DeBERTaV3-base."""

import json

import pytest
from conftest import ROOT
from in_process import load
from naming import naming

from increlora.errors import UserError

script = load(ROOT / "scripts" / "describe.py")


def parameters(method: str, budget: str) -> dict:
    return script.describe([f"method={method}", f"budget={budget}", "backbone=deberta_v3_base", "task=rte"])[
        "parameters"
    ]


def test_constant_counts():
    for method, budget, update in [
        ("lora", "r2", 331_776),
        ("lora", "r8", 1_327_104),
        ("houlsby", "r2", 313_536),
        ("pfeiffer", "r2", 304_320),
        ("bitfit", "r2", 102_912),
        ("uniform", "r2", 331_776 + 144),
        ("full", "r2", 183_831_552),
    ]:
        with naming((method, budget, update)):
            found = parameters(method, budget)
            assert found["start"]["update"] == update and found["end"]["update"] == dict.fromkeys(
                ("lowest", "average", "highest"), update
            )
            assert found["start"]["head"] == found["end"]["head"] == 592_130
            assert found["start"]["total"] == 184_423_682 + (update if method not in ("full", "bitfit") else 0)


@pytest.mark.parametrize(("budget", "alone", "start"), [("r2", 331_776, 165_960), ("r8", 1_327_104, 165_960)])
def test_increlora_grows_to_what_lora_counts(budget, alone, start):
    found = parameters("increlora", budget)
    rank = int(budget[1:])
    step = max(1, rank // 2)
    assert found["start"]["update"] == start and found["start"]["reserve"] == step * 165_888 == found["end"]["reserve"]
    end = found["end"]
    assert end["A_and_B_alone"] == alone and end["update"]["average"] == alone + rank * 72
    assert end["update"]["lowest"] == start + 72 * (rank - 1) * 1537
    assert end["update"]["highest"] == start + 72 * (rank - 1) * 3841


def test_adalora_prunes_from_one_and_a_half_budgets():
    found = parameters("adalora", "r2")
    assert found["start"]["update"] == 3 * (165_888 + 72) and found["end"]["A_and_B_alone"] == 331_776
    assert found["end"]["update"]["average"] == 331_920 and found["end"]["reserve"] == 165_960
    assert found["end"]["total"] == found["start"]["total"]


def test_the_plan_of_ranks_matrices_and_steps():
    found = script.describe(["task=rte"])
    assert found["steps"] == {"total": 3900, "examples": 2490, "batch_size": 32, "epochs": 50}
    assert found["ranks"][0] == {"step": 0, "total": 72} and found["ranks"][-1] == {"step": 1600, "total": 144}
    assert [point["step"] for point in found["ranks"][1:]] == list(range(200, 1700, 100))
    assert len(found["matrices"]) == 6 and found["matrices"]["output"] == {"count": 12, "out": 768, "in": 3072}
    fewer = script.describe(["task=rte", "task.train_fraction=0.5", "task.holdout=0.1", "method.interval=10"])
    assert fewer["steps"]["examples"] == 1245 - 124


def test_large_needs_no_memory_and_pfeiffer_touches_one_kind():
    found = script.describe(["method=pfeiffer", "backbone=deberta_v3_large", "task=mnli"])
    assert found["matrices"] == {"output": {"count": 24, "out": 1024, "in": 4096}}


def test_table_and_json_say_the_same(capsys, monkeypatch):
    for method in ["increlora", "adalora", "lora", "bitfit"]:
        with naming(method):
            arguments = ["describe.py", f"method={method}", "backbone=tiny", "task=synthetic_entailment"]
            monkeypatch.setattr("sys.argv", arguments)
            script.main()
            text = capsys.readouterr().out
            monkeypatch.setattr("sys.argv", [*arguments, "--json"])
            script.main()
            data = json.loads(capsys.readouterr().out)
            for part in ("start", "end"):
                assert f"{data['parameters'][part]['total']:,}" in text
            assert f"{data['steps']['total']:,} steps: 4,000 examples" in text
            assert ("no ranks" in text) == (not data["ranks"])


def test_errors_are_said():
    with pytest.raises(UserError, match="does not fit"):
        script.describe(["method=adalora", "task=rte", "train.epochs=1"])
