"""Every bar of a measurement stands beside its value, and a missed one is called so."""

import pytest

from increlora.analysis.benchmark_table import benchmark_table

ABOUT = {"command": "python x", "processor": "P", "cores": 2, "threads": 1, "torch": "2", "gpu": None}


def table(measure, **content):
    options = {"backbone": "deberta_v3_base", "precision": "bf16", "batch": 32} | content.pop("options", {})
    return benchmark_table({"measure": measure, "about": ABOUT, "options": options, **content})


@pytest.mark.parametrize(
    ("precision", "shape", "arm", "bar"),
    [
        ("fp32", "8x128", "increlora, not scoring", 0.95),
        ("fp32", "8x128", "increlora, scoring", 1.25),
        ("bf16", "8x128", "increlora, after growth", 0.90),
        ("bf16", "8x128", "increlora, scoring", 1.20),
        ("bf16", "32x12", "increlora, not scoring", 0.80),
        ("bf16", "32x64", "increlora, not scoring", 0.85),
        ("bf16", "8x128", "recipe RTE r2", 1.00),
        ("bf16", "8x128", "recipe MNLI r2", 0.92),
    ],
)
def test_bars_of_steps(precision, shape, arm, bar):
    for value, missed in ((bar, ""), (bar + 0.001, " **missed**")):
        text = table(
            "steps", options={"precision": precision}, shapes={shape: {"ratios": {arm: value}, "seconds": {arm: [2.0]}}}
        )
        assert f"| {arm} | {value:.3f}{missed} (at most {bar:.2f}) |" in text
        assert f"| {arm} | 2.000 s, " in text


def test_shapes_stand_side_by_side_and_small_encoders_have_no_such_bars():
    of = {"ratios": {"increlora, scoring": 9.0}, "seconds": {"lora": [1.0]}}
    text = table("steps", options={"backbone": "minilm"}, shapes={"8x128": of, "32x12": of})
    assert "| increlora, scoring | 9.000 | 9.000 |" in text and "| lora | 1.000 s, 1,024/s | 1.000 s, 384/s |" in text
    assert text.endswith("`python x` on P, 2 cores, threads: 1, torch 2")


def test_bars_of_the_launch_bound_step():
    arms = {"lora": (1, 2183, 148), "increlora r8": (0.96, 2180, 201), "increlora r8, scoring": (1.3, 2900, 200)}
    of = {
        "ratios": {name: ratio for name, (ratio, _, _) in arms.items() if name != "lora"},
        "seconds": {name: [0.04] for name in arms},
        "operations": {name: count for name, (_, count, _) in arms.items()},
        "tensors": {name: count for name, (_, _, count) in arms.items()},
        "growths": {"increlora r8": 7},
    }
    text = table("launch", shapes={"1x4": of})
    assert "| lora | 1.000 | 2,183 | 148 |  | 40.0 |" in text
    assert (
        "| increlora r8 | 0.960 **missed** (at most 0.95) | 2,180 **missed** (at most 2,179) | "
        "201 **missed** (at most 200) | 7 | 40.0 |"
    ) in text
    assert "| increlora r8, scoring | 1.300 (at most 1.30) | 2,900 (at most 2,900) | 200 (at most 200) |" in text


def test_bars_of_memory():
    runs = {"lora": {"peak_memory_mb": 5000}, "increlora": {"peak_memory_mb": 5300}}
    text = table("memory", runs=runs, frozen={"frozen weights": {"fp32": 100, "bf16": 55}})
    assert "| peak of a run, increlora, MB | 5,300 **missed** (at most 5,120) |" in text
    assert "| peak of a run, increlora / lora | 1.060 **missed** (at most 1.05) |" in text
    assert "(55 / 100 MB) | 0.550 (at most 0.55) |" in text
