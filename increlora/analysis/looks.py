"""How methods, tasks, backbones and matrices are called and look, in every table and figure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """How a method looks, in every figure."""

    label: str
    color: str
    marker: str


# Okabe and Ito's palette for published methods, Tol's muted one for controls: colour-blind readers tell them apart
LOOKS = {
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
}
TASKS = {
    "stsb": "STS-B", "cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "sst2": "SST-2", "qnli": "QNLI", "qqp": "QQP",
    "mnli": "MNLI", "wnli": "WNLI",
}  # fmt: skip
BACKBONES = {"minilm": "MiniLM", "deberta_v3_base": "DeBERTaV3-base"}
KINDS = {
    "query": "$W_q$", "key": "$W_k$", "value": "$W_v$", "attention_output": "$W_o$", "intermediate": "$W_{f1}$",
    "output": "$W_{f2}$",
}  # fmt: skip
METRICS = {
    "accuracy": "accuracy (%)",
    "matthews_correlation": "Matthews correlation (×100)",
    "pearson+spearmanr": "mean of Pearson and Spearman (×100)",
}
