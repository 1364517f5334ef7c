"""A loop inside a test says which of its cases failed."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def naming(case: object) -> Iterator[None]:
    """Add the case's name to whatever error its body raises; pytest shows it below the error."""
    try:
        yield
    except Exception as error:
        error.add_note(f"the case: {case}")
        raise
