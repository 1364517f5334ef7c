"""Labels and probabilities (in regression: values) for texts, from a finished run.

    python scripts/predict.py RUN_DIR texts.tsv --output predictions.tsv
    python scripts/predict.py RUN_DIR - < texts.jsonl > predictions.jsonl

FILE is a TSV file with a header, or JSON lines, whose fields are the task's (sst2: sentence; rte: sentence1,
sentence2). Predictions come in the same format, one per row, in the same order. Rows are read and written chunk by
chunk, so a file may be larger than the memory.
"""

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from torch import Tensor

from increlora.errors import UserError
from increlora.files import as_json, parsed_json, replacing, shown, writing
from increlora.glue import config, finished_run
from increlora.glue.tasks import Task
from increlora.glue.tsv import decoded

FORMATS = {".tsv": "tsv", ".jsonl": "jsonl", ".json": "jsonl", "-": "jsonl"}


@config.guarded
def main() -> None:
    arguments = parser().parse_intermixed_args()
    kind = arguments.format or format_of(arguments.file)
    with reading(arguments.file) as (lines, name):
        run = finished_run.load(arguments.run_dir, arguments.checkpoint, arguments.overrides)
        run.merge()
        with destination(arguments.output) as out:
            texts = READERS[kind](lines, name, run.task)
            WRITERS[kind](run.stream(texts, arguments.batch_size), run.task.labels, out)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a finished run")
    made.add_argument("file", metavar="FILE", help="TSV (.tsv) or JSON lines (.jsonl); - is standard input")
    made.add_argument("--output", type=Path, metavar="OUT", help="default: standard output")
    made.add_argument("--format", choices=sorted(READERS), help="default: by the file's name; jsonl for -")
    made.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    made.add_argument("--checkpoint", choices=("best", "last"), default="best", help="default: best")
    made.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="backbone.path=DIR, device=cpu|cuda, precision=fp32|bf16, ..."
    )
    return made


def format_of(file: str) -> str:
    suffix = file if file == "-" else Path(file).suffix
    if suffix not in FORMATS:
        raise UserError(f"{file}: the format is not clear from the name; say --format tsv or --format jsonl")
    return FORMATS[suffix]


# read


@contextlib.contextmanager
def reading(file: str) -> Iterator[tuple[BinaryIO, str]]:
    """The lines of a file, and what to call it in messages."""
    if file == "-":
        yield sys.stdin.buffer, "standard input"
        return
    try:
        stream = open(file, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    with stream:
        yield stream, file


def numbered(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, str]]:
    """Number and text of every line but an empty last one; only an empty line waits for the one after it."""
    empty = None
    for number, line in decoded(lines, name):
        if empty:
            yield empty
        empty = None if line.strip(" ") else (number, line)
        if not empty:
            yield number, line


def tsv_texts(lines: Iterable[bytes], name: str, task: Task) -> Iterator[tuple[str, ...]]:
    """The texts of every row below the header, whose columns may also be called as in the public GLUE files."""
    rows = ((number, line.split("\t")) for number, line in numbered(lines, name))
    _, header = next(rows, (1, []))
    places = [place_of(field, task, header, name) for field in task.fields]
    for number, row in rows:
        where = f"{name}, line {number}"
        if len(row) != len(header):
            raise UserError(
                f"{where}: {len(row)} fields, the header has {len(header)}; tabs separate fields, quotes do not"
            )
        yield tuple(task.text(row[place], where) for place in places)


def place_of(field: str, task: Task, header: list[str], name: str) -> int:
    for column in (field, task.column(field)):
        if header.count(column) > 1:
            raise UserError(f"{name}, line 1: {header.count(column)} columns are called {column}; one must be")
        if column in header:
            return header.index(column)
    raise UserError(f"{name}, line 1: no column {field}; the header has {shown(', '.join(header)) or 'nothing'}")


def json_texts(lines: Iterable[bytes], name: str, task: Task) -> Iterator[tuple[str, ...]]:
    """The texts of every line, an object with the task's fields."""
    for number, line in numbered(lines, name):
        where = f"{name}, line {number}"
        try:
            row = parsed_json(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); give one object per line") from None
        yield tuple(task.text(json_text(row, field, where), where) for field in task.fields)


def json_text(row: object, field: str, where: str) -> str:
    if not isinstance(row, dict) or field not in row:
        raise UserError(f"{where}: no field '{field}'; give one object per line, with every field of the task")
    if not isinstance(row[field], str):
        raise UserError(f"{where}: '{field}' is not a text but {json.dumps(row[field])[:60]}")
    try:
        row[field].encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: '{field}' has half of a character ({error.object[error.start]!a})") from None
    return row[field]


READERS: dict[str, Callable] = {"tsv": tsv_texts, "jsonl": json_texts}


# write


@contextlib.contextmanager
def destination(output: Path | None) -> Iterator[TextIO]:
    """Where predictions go; a file is there whole or not at all."""
    if output is None:
        yield sys.stdout
    elif output.exists() and not (output.is_file() or output.is_dir()):  # a device or a pipe takes what comes
        with writing(output), output.open("w", encoding="utf-8", newline="") as out:
            yield out
    else:
        with replacing(output) as temporary, temporary.open("w", encoding="utf-8", newline="") as out:
            yield out


def write_tsv(chunks: Iterable[Tensor], labels: list[str] | None, out: TextIO) -> None:
    """A header, then per row the label and the probability of every label; in regression the value."""
    chunks = iter(chunks)
    first = list(itertools.islice(chunks, 1))  # bad columns end it here, before anything is written
    print("prediction", *(labels or []), sep="\t", file=out)
    for logits in itertools.chain(first, chunks):
        for prediction, probabilities in rows_of(logits, labels):
            print(prediction, *(f"{p:.6f}" for p in probabilities), sep="\t", file=out)
        out.flush()


def write_json(chunks: Iterable[Tensor], labels: list[str] | None, out: TextIO) -> None:
    """Per row an object with `prediction` and, for classes, `probabilities` by label."""
    for logits in chunks:
        for prediction, probabilities in rows_of(logits, labels):
            row = {"prediction": prediction}
            if labels is not None:
                row["probabilities"] = {name: round(p, 6) for name, p in zip(labels, probabilities, strict=True)}
            print(as_json(row, ensure_ascii=False), file=out)
        out.flush()


def rows_of(logits: Tensor, labels: list[str] | None) -> Iterator[tuple[str | float, list[float]]]:
    """Label and probabilities, or value and nothing, of every row of (examples, outputs)."""
    if labels is None:
        for value in logits.squeeze(-1).tolist():
            yield round(value, 6), []
        return
    for best, probabilities in zip(logits.argmax(-1).tolist(), logits.softmax(-1).tolist(), strict=True):
        yield labels[best], probabilities


WRITERS: dict[str, Callable] = {"tsv": write_tsv, "jsonl": write_json}


if __name__ == "__main__":
    main()
