"""The claims page: every row has a verdict, and the runs decide it."""

from test_base_size import OURS, PUBLISHED, arm
from test_study_c import factorial

from increlora.analysis import decision
from increlora.analysis.claims import CLAIMS, VERDICTS, Evidence, claims
from increlora.analysis.sequential import Plan
from increlora.glue import config

PLAN = Plan.of(config.read_study("study_a"), "study_a")
STUDY_A = decision.progress(PLAN, decision.read(PLAN, []))


def verdicts(*runs) -> list[str]:
    return [claim.verdict(Evidence(runs, PUBLISHED, STUDY_A)) for claim in CLAIMS]


def test_without_runs_nothing_is_claimed():
    assert set(verdicts()) == {"not run here"}


def test_the_runs_decide():
    gaps = (0.010, 0.012, 0.011, 0.009, 0.013)
    runs = [
        *arm("increlora", OURS, added=(4, 0, 0, 0, 0, 0)),
        *arm("increlora", OURS, "stsb", added=(4, 0, 0, 0, 0, 0)),
    ]
    for task in ("cola", "stsb"):
        runs += [*arm("lora", OURS - gaps, task), *arm("adalora", OURS + gaps, task)]
    runs += arm("increlora", OURS, "rte", added=(1, 1, 2, 0, 1, 1))  # kinds as published, layers the other way round
    found = verdicts(*runs)
    assert set(found) <= set(VERDICTS)
    table = {(row[0], row[1]): row[3] for row in claims(Evidence(runs, PUBLISHED, STUDY_A)).rows}
    assert table["Table 1, Figure 1", "better than LoRA at equal budget"] == "**supported**"
    assert table["Table 1, Figure 1", "better than AdaLoRA at equal budget"] == "**contradicted**"
    assert table["Figure 2", "ranks of single matrices grow beyond the cap that pruning starts from"] == "**supported**"
    assert table["Figure 6", "ranks go to certain kinds of matrices"] == "**supported**"
    assert table["Figure 6", "ranks go to certain layers"] == "**contradicted**"
    assert found.count("not run here") == 16 and found.count("undecided") == 2  # no run of the two controls


def test_every_test_of_study_c_is_a_claim_of_its_own():
    runs = factorial({"orth_weight": 1.0, "advance_learning": -0.8, "restart_warmup": 0.0})
    found = {row[1]: row[3] for row in claims(Evidence(runs, PUBLISHED, STUDY_A)).rows if row[0] == "Table 2"}
    assert found == {
        "orthogonality helps": "**supported**", "advance learning helps": "**contradicted**",
        "restart warmup helps": "**no effect**",
    }  # fmt: skip
    missing = {row[1]: row[3] for row in claims(Evidence(runs[1:], PUBLISHED, STUDY_A)).rows if row[0] == "Table 2"}
    assert set(missing.values()) == {"**undecided**"}  # seven of eight seeds
