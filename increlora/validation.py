"""Checks of what a person gives: numbers, switches, regular expressions; and settings that differ, in words."""

import dataclasses
import math
import numbers
import re
from collections.abc import Mapping
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


def check_patterns(patterns: Mapping[str, Any]) -> None:
    """Refuse what is no regular expression.

    Args:
        patterns: by the name under which they were given.

    Raises:
        UserError: with the name.
    """
    for name, pattern in patterns.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"`{name}` must be a regular expression, it is {pattern!r} ({error})") from None


def other_settings(theirs: Mapping[str, Any], mine: Mapping[str, Any], mark: str = "") -> list[str]:
    """What differs from my settings, in words: `alpha 8.0 there, 32.0 here`.

    Args:
        mark: around names, e.g. backquotes.
    """
    return [
        f"{mark}{name}{mark} {theirs.get(name)} there, {value} here"
        for name, value in mine.items()
        if theirs.get(name) != value
    ]
