"""TSV files in GLUE's own layout, row by row; what is malformed is named with file and line.

UTF-8, one example per line, fields separated by single tabs, no quoting (a `"` is an ordinary character), a header
line unless the columns are given by position.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from increlora.errors import UserError
from increlora.files import shown

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class Table:
    """Rows of a TSV file: line number (from 1) and the chosen columns; `skipped` rows were left out."""

    rows: list[tuple[int, list[str]]]
    skipped: int = 0


def read_tsv(path: Path, columns: Sequence[str | int], lenient: bool = False) -> Table:
    """The chosen columns of a TSV file.

    Args:
        columns: names in the header, or positions from 0 in a file without header.
        lenient: leave out and count rows with a wrong number of fields instead of refusing them.

    Raises:
        UserError: with file and line.
    """
    lines = _decoded_lines(path)
    first = next(lines)
    headless = all(isinstance(column, int) for column in columns)
    width = len(first[1])
    positions = _positions(path, first[1], columns, headless)
    table = Table([])
    for number, values in ([first] if headless else []) + list(lines):
        if len(values) == width:
            table.rows.append((number, [values[position] for position in positions]))
        elif lenient:
            table.skipped += 1
        else:
            raise UserError(
                f"{path}, line {number}: {len(values)} fields where the first line has {width}; "
                "fields are separated by single tabs and never quoted"
            )
    if not table.rows:
        raise UserError(f"{path}: no examples, only a header")
    return table


def _decoded_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of every line; the byte-order mark, line ends and a last empty line are dropped."""
    content = path.read_bytes().removeprefix(BYTE_ORDER_MARK)
    if not content.strip():
        raise UserError(f"{path}: the file is empty; task.data_dir must hold the task's TSV files")
    lines = content.split(b"\n")
    if not lines[-1].strip():
        lines.pop()
    for number, line in decoded(lines, path):
        yield number, line.split("\t")


def decoded(lines: Iterable[bytes], source: object) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of every line; the byte-order mark and line ends are dropped.

    Raises:
        UserError: it is not UTF-8, with source and line.
    """
    for number, line in enumerate(lines, start=1):
        line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        try:
            yield number, line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{source}, line {number}: not UTF-8 (byte {error.start + 1}); save it as UTF-8") from None


def _positions(path: Path, first: Sequence[str], columns: Sequence[str | int], headless: bool) -> list[int]:
    names: list[str | int] = [*range(len(first))] if headless else [*first]
    missing = [str(column) for column in columns if column not in names]
    if missing:
        have = f"{len(first)} columns and no header" if headless else f"the columns {shown(', '.join(first))}"
        raise UserError(f"{path}, line 1: no column {', '.join(missing)}; the file has {have} (see task.columns)")
    for column in columns:
        if names.count(column) > 1:
            raise UserError(f"{path}, line 1: {names.count(column)} columns are called {column}; one must be")
    return [names.index(column) for column in columns]
