"""Damage to a file: a flipped bit, or in every fourth case a lost end."""

import random


def damaged(whole: bytes, number: int, draw: random.Random) -> bytes:
    """The bytes of a file after the damage of this number."""
    found = bytearray(whole)
    if number % 4:
        found[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    else:
        del found[draw.randrange(len(whole)) :]
    return bytes(found)
