"""What a run is: which keys of a configuration count, in which two runs differ, and what a run reads.

This is the one place that decides. Directories, stored results, checkpoints and sweeps all ask here.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from increlora.files import changed_keys

KEYS = ("backbone", "budget", "method", "task", "seed")
# where a run lies and what it shows; results do not hold these keys
NEUTRAL = (
    "tracker", "run_dir", "overwrite", "device", "hydra", "backbone.path", "task.data_dir",
    "train.progress", "train.log_interval", "train.checkpoint_interval",
)  # fmt: skip
# remarks and places of computation; results hold these keys, and the run is the same with any value
REMARKS = ("settings_from", "train.device", "task.folder", "task.train_examples")
CLASS = "_target_"  # moving a class to another file does not make another run


def counts(key: str) -> bool:
    """Whether a dotted key is part of what a run is."""
    key = key.replace("/", ".")
    if key.rpartition(".")[2] == CLASS:
        return False
    return not any(key == name or key.startswith(f"{name}.") for name in (*NEUTRAL, *REMARKS))


def counted(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The part of a configuration that says what the run is."""
    found = {}
    for key, value in config.items():
        if counts(path := f"{prefix}{key}"):
            found[key] = counted(value, f"{path}.") if isinstance(value, Mapping) else value
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The dotted keys that make two configurations two runs."""
    return changed_keys(counted(one), counted(other))


class Reads(Protocol):
    """A part of a run that may read files: a task, a backbone, a method."""

    def inputs(self) -> dict[str, str]:
        """Digests of what this part reads, by name."""


def inputs(*parts: Reads) -> dict[str, str]:
    """Digests of everything that these parts of a run read, by name; each part gives its own."""
    return {name: digest for part in parts for name, digest in part.inputs().items()}


def of_checkpoint(config: Mapping[str, Any], inputs: Mapping[str, str], processes: int) -> dict[str, Any]:
    """What must stay the same for a run to be continued, in plain data."""
    return {"config": dict(config), "processes": processes, **inputs}


LATER = ("architecture", "tokenizer")  # digests that earlier checkpoints do not have


def changed_since(checkpoint: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The dotted keys in which a checkpoint's identity differs from this run's; None stands for nothing read."""
    before, after = (
        {key: value for key, value in which.items() if key != "config" and value is not None}
        for which in (checkpoint, now)
    )
    after = {key: value for key, value in after.items() if key in before or key not in LATER}
    configs = [which.get("config", {}) for which in (checkpoint, now)]
    return [*(f"config.{key}" for key in differences(configs[0], configs[1])), *changed_keys(before, after)]
