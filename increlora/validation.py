"""The check of numbers and switches that a person gives, as the fields of a dataclass."""

import dataclasses
import math
import numbers
from typing import Any, get_args

from increlora.errors import UserError

KINDS = {bool: "true or false", int: "a whole number", float: "a number", type(None): "null", str: "a word"}


def check_numbers(settings: Any) -> None:
    """Refuse a dataclass whose number or true/false fields hold a value of another type, or one that is not finite.

    Raises:
        UserError: with the field's name.
    """
    for field in dataclasses.fields(settings):
        kinds = get_args(field.type) or (field.type,)
        value = getattr(settings, field.name, None)
        if not {bool, int, float} & set(kinds) or (type(value) in kinds and type(value) is not float):
            continue
        kind = numbers.Real if float in kinds else numbers.Integral  # those of numpy too
        if isinstance(value, bool) or bool in kinds or not isinstance(value, kind) or not math.isfinite(value):
            words = " or ".join(KINDS[kind] for kind in kinds)
            raise UserError(f"`{field.name}` must be {words}, it is {value!r}")
