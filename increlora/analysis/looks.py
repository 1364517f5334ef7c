"""Names, colours and markers of methods, tasks, backbones and matrices, for every table and figure."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """How a method looks, in every figure."""

    label: str
    color: str
    marker: str


class Looks(dict[str, Look]):
    """Method -> look; a method that is not listed has its own name and a spare look, the same one every time."""

    def __missing__(self, method: str) -> Look:
        return Look(method, *SPARE[zlib.crc32(method.encode()) % len(SPARE)])


class Labels(dict[str, str]):
    """Name -> what is written for it; a name that is not listed is written as it is."""

    def __missing__(self, name: str) -> str:
        return name


def position(name: str, listed: Iterable[str]) -> tuple[int, str]:
    """A key to sort names by: first as they are listed, then what is not listed by name."""
    names = list(listed)
    return (names.index(name) if name in names else len(names), name)


SPARE = (("#44AA99", "<"), ("#AA4499", ">"), ("#117733", "H"), ("#661100", "8"))  # of Tol's palette too
# Okabe and Ito's palette for published methods, Tol's muted one for controls: colour-blind readers tell them apart
LOOKS = Looks({
    "increlora": Look("IncreLoRA", "#D55E00", "o"),
    "adalora": Look("AdaLoRA", "#009E73", "^"),
    "lora": Look("LoRA", "#0072B2", "s"),
    "houlsby": Look("Houlsby adapter", "#E69F00", "P"),
    "pfeiffer": Look("Pfeiffer adapter", "#56B4E9", "X"),
    "bitfit": Look("BitFit", "#CC79A7", "v"),
    "full": Look("full fine-tuning", "#000000", "D"),
    "uniform": Look("uniform ranks", "#332288", "h"),
    "random_growth": Look("random growth", "#882255", "p"),
    "permuted_growth": Look("permuted growth", "#44AA99", "H"),
    "static_pattern": Look("static pattern", "#999933", "*"),
    "shuffled_pattern": Look("shuffled pattern", "#777777", "d"),
})  # fmt: skip
TASKS = Labels({
    "stsb": "STS-B", "cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "sst2": "SST-2", "qnli": "QNLI", "qqp": "QQP",
    "mnli": "MNLI", "wnli": "WNLI",
})  # fmt: skip
BACKBONES = {"minilm": "MiniLM", "deberta_v3_base": "DeBERTaV3-base", "mpnet_base": "MPNet-base"}
SIX_KINDS = {  # the paper's
    "query": "$W_q$", "key": "$W_k$", "value": "$W_v$", "attention_output": "$W_o$", "intermediate": "$W_{f1}$",
    "output": "$W_{f2}$",
}  # fmt: skip
KINDS = {**SIX_KINDS, "query_key_value": "$W_{qkv}$"}
METRICS = {
    "accuracy": "accuracy (%)",
    "matthews_correlation": "Matthews correlation (×100)",
    "pearson+spearmanr": "mean of Pearson and Spearman (×100)",
}
