"""The one exception that is addressed to the person at the keyboard, and the check of numbers that a person gives."""

import dataclasses
import math
import numbers
from typing import Any, get_args


class UserError(Exception):
    """Bad input, said in one or two lines: what is wrong, where, and what to do about it.

    `run.py` and the scripts print the message and leave with exit code 2; only a request for a
    traceback (`HYDRA_FULL_ERROR=1`) shows one. Anything else that escapes is a defect of ours.
    """

    exit_code = 2


class Interrupted(UserError):
    """The run was asked to stop by a signal; the exit code is that of a process the signal ended."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
        self.exit_code = 128 + signal


def check_numbers(settings: Any, prefix: str) -> None:
    """Refuse values of a dataclass's fields for numbers and switches that are not of the field's kind, or not finite.

    Raises:
        UserError: named `prefix.field`.
    """
    for field in dataclasses.fields(settings):
        kinds = get_args(field.type) or (field.type,)
        value = getattr(settings, field.name, None)
        if not {bool, int, float} & set(kinds) or (type(value) in kinds and type(value) is not float):
            continue
        kind = numbers.Real if float in kinds else numbers.Integral  # those of numpy too
        if isinstance(value, bool) or bool in kinds or not isinstance(value, kind) or not math.isfinite(value):
            words = " or ".join(KINDS[kind] for kind in kinds)
            raise UserError(f"{prefix}.{field.name} must be {words}, it is {value!r}")


KINDS = {bool: "true or false", int: "a whole number", float: "a number", type(None): "null", str: "a word"}


def first_line(error: Exception) -> str:
    """The first line of what an error says, at most 200 characters; its type if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
