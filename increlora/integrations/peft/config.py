"""The configuration of an IncreLoRA adapter, in the words of PEFT and of its AdaLoRA."""

from dataclasses import dataclass, field
from typing import Any, cast

from peft import PeftConfig, PeftType

from increlora.algorithm import IncreLoRA
from increlora.errors import UserError

PEFT_TYPE = "INCRELORA"
# ours -> theirs, where they differ
WORDS = {
    "target_rank": "target_r", "init_rank": "init_r", "interval": "deltaT", "init_warmup": "tinit",
    "alpha": "lora_alpha", "dropout": "lora_dropout", "orth_weight": "orth_reg_weight", "total_steps": "total_step",
    "`micro_batches` of begin_step": "`gradient_accumulation_steps` of attach",
    "method.param_groups(model)": "model.parameters()",
}  # fmt: skip
GROWTHS = 20  # times `deltaT` is the first half of training, where it is not given


def _add_peft_type() -> None:
    """PEFT registers only methods that its enum has a member for."""
    if PEFT_TYPE in PeftType.__members__:
        return
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_, member._value_ = PEFT_TYPE, PEFT_TYPE
    PeftType._member_map_[PEFT_TYPE] = PeftType._value2member_map_[PEFT_TYPE] = member
    PeftType._member_names_.append(PEFT_TYPE)
    type.__setattr__(PeftType, PEFT_TYPE, member)


_add_peft_type()


@dataclass
class IncreLoraConfig(PeftConfig):
    """LoRA whose ranks grow where the loss needs them (arXiv 2308.12043).

    Args:
        target_r: average rank at the end; the budget is target_r * number of matrices.
        init_r: rank of every matrix at the start.
        total_step: optimizer steps of the whole run; None: the callback asks the Trainer.
        deltaT: optimizer steps between growths; None: a 40th of the run, so that there are up to 19 in its first half.
        tinit: no growth up to this step; None: deltaT.
        top_h: matrices per growth; None: the fewest with which growth ends in the first half of training.
        rank_step: ranks that a chosen matrix gains in a growth; None: half of target_r.
        max_rank: no matrix grows above it, e.g. the limit of a server; None: no limit. A matrix grows by whole steps,
            so it ends at init_r + k * rank_step or below.
        beta1, beta2: decay of the averages of sensitivity and uncertainty.
        orth_reg_weight: weight of the orthogonal penalty.
        reserve_lambda: lambda of the components that learn in advance.
        lora_alpha: scale of the update, divided by the rank that a matrix has.
        lora_dropout: dropout on the input of the update.
        target_modules: names of modules, a regular expression over whole names, or "all-linear", the default: every
            linear layer but the output layer.
        exclude_modules: names or a regular expression of modules to leave out.
        modules_to_save: modules that train in full and are saved with the adapter, e.g. a classifier.
        layers_to_transform, layers_pattern: only layers with these numbers, in the module list of this name.
        fan_in_fan_out: set by itself for transformers' Conv1D.
        init_weights: False draws an update that is not zero, for tests.
        seed: of the random streams of the components; None: drawn from torch's generator.
    """

    target_r: int = field(default=8, metadata={"help": "Average rank at the end."})
    init_r: int = field(default=1, metadata={"help": "Rank of every matrix at the start."})
    total_step: int | None = field(default=None, metadata={"help": "Optimizer steps of the whole run."})
    deltaT: int | None = field(default=None, metadata={"help": "Optimizer steps between growths."})
    tinit: int | None = field(default=None, metadata={"help": "No growth up to this step."})
    top_h: int | None = field(default=None, metadata={"help": "Matrices per growth."})
    rank_step: int | None = field(default=None, metadata={"help": "Ranks that a chosen matrix gains in a growth."})
    max_rank: int | None = field(default=None, metadata={"help": "No matrix grows above it."})
    beta1: float = field(default=0.85, metadata={"help": "Decay of the average of sensitivity."})
    beta2: float = field(default=0.85, metadata={"help": "Decay of the average of uncertainty."})
    orth_reg_weight: float = field(default=0.1, metadata={"help": "Weight of the orthogonal penalty."})
    reserve_lambda: float = field(default=1e-5, metadata={"help": "Lambda of components that learn in advance."})
    lora_alpha: float = field(default=32.0, metadata={"help": "Scale of the update, divided by the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the update."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules that train in full."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Numbers of layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Weights are (in, out), as in Conv1D."})
    init_weights: bool = field(default=True, metadata={"help": "False draws an update that is not zero."})
    seed: int | None = field(default=None, metadata={"help": "Seed of the components; None: from torch's generator."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        for name in ("total_step", "target_r", "init_r", "deltaT", "top_h", "rank_step", "max_rank"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value > 0):
                raise ValueError(f"`{name}` must be a whole number above 0, it is {value!r}")
        if self.tinit is not None and not (type(self.tinit) is int and self.tinit >= 0):
            raise ValueError(f"`tinit` must be a whole number, 0 or more, it is {self.tinit!r}")
        self.settings()

    def settings(self) -> dict[str, Any]:
        """The arguments of the method, `seed` and what depends on `total_step` aside.

        Raises:
            ValueError: a value is out of range; the message has the names of this class.
        """
        settings: dict[str, Any] = {
            "target_rank": self.target_r, "init_rank": self.init_r, "rank_step": self.rank_step, "top_h": self.top_h,
            "max_rank": self.max_rank, "beta1": self.beta1, "beta2": self.beta2, "orth_weight": self.orth_reg_weight,
            "reserve_lambda": self.reserve_lambda, "alpha": self.lora_alpha, "dropout": self.lora_dropout,
        }  # fmt: skip
        with in_words_of_peft():
            IncreLoRA(**settings)
        return settings

    def interval_and_warmup(self, total_steps: int) -> tuple[int, int]:
        """Steps between growths and up to which there is none, in a run of this length."""
        deltaT = self.deltaT or max(1, total_steps // (2 * GROWTHS))
        return deltaT, deltaT if self.tinit is None else self.tinit


class in_words_of_peft:
    """Raise what the method refuses as the ValueError of a PEFT method, with the names of `IncreLoraConfig`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, UserError) and not isinstance(error, Refused):
            message = str(error)
            for ours, theirs in WORDS.items():
                message = message.replace(ours, theirs)
            raise Refused(message) from cast(BaseException, error)


class Refused(UserError, ValueError):
    """A UserError that is also the ValueError that users of PEFT expect."""
