"""The zip that the GLUE server takes (gluebenchmark.com), from the finished runs of its tasks.

    python scripts/submit_glue.py RUN_DIR... [--output submission.zip] [task.data_dir=GLUE]

Eleven files, `index` (from 0) and `prediction` per row: words for MNLI, QNLI, RTE and AX (the diagnostic set, predicted
by the MNLI run), 0 or 1 for CoLA, SST-2, MRPC, QQP and WNLI, numbers from 0 to 5 with three decimals for STS-B. The
test sets come from the hub, or from a folder in the public GLUE layout (`RTE/test.tsv`, `MNLI/test_matched.tsv`,
`diagnostic/diagnostic.tsv`, ...). Names, header and words are those that the benchmark's authors' own tools write.
"""

import argparse
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from increlora.errors import UserError
from increlora.files import replacing
from increlora.glue import config, finished_run
from increlora.glue.finished_run import Trained
from increlora.glue.tasks import Task

ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}
INFERENCE = {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"}


@dataclass(frozen=True)
class Part:
    """One file of the submission.

    Args:
        task: whose run predicts it.
        folder: where its test set lies in the public archive.
        rows: how many the server expects.
        words: label -> what the server takes; None for scores.
        constant: what stands in every row if there is no run: the majority in train where one label has it, else
            the first label; for STS-B the mean.
        subset, split: its test set on the hub.
        file: the local file without `.tsv`.
    """

    task: str
    folder: str
    rows: int
    words: Mapping[str, str] | None
    constant: str
    subset: str
    split: str = "test"
    file: str | None = None


PARTS = {
    "CoLA": Part("cola", "CoLA", 1063, {"unacceptable": "0", "acceptable": "1"}, "1", "cola"),
    "SST-2": Part("sst2", "SST-2", 1821, {"negative": "0", "positive": "1"}, "1", "sst2"),
    "MRPC": Part("mrpc", "MRPC", 1725, {"not_equivalent": "0", "equivalent": "1"}, "1", "mrpc"),
    "STS-B": Part("stsb", "STS-B", 1379, None, "2.701", "stsb"),
    "QQP": Part("qqp", "QQP", 390_965, {"not_duplicate": "0", "duplicate": "1"}, "0", "qqp"),
    "MNLI-m": Part("mnli", "MNLI", 9796, INFERENCE, "entailment", "mnli", "test_matched"),
    "MNLI-mm": Part("mnli", "MNLI", 9847, INFERENCE, "entailment", "mnli", "test_mismatched"),
    "QNLI": Part("qnli", "QNLI", 5463, ENTAILMENT, "entailment", "qnli"),
    "RTE": Part("rte", "RTE", 3000, ENTAILMENT, "entailment", "rte"),
    "WNLI": Part("wnli", "WNLI", 146, {"not_entailment": "0", "entailment": "1"}, "0", "wnli"),
    "AX": Part("mnli", "diagnostic", 1104, INFERENCE, "entailment", "ax", file="diagnostic"),
}


@config.guarded
def main() -> None:
    arguments = parser().parse_intermixed_args()
    directories, overrides = parted(arguments.runs)
    runs = by_task(directories)
    absent = sorted({part.task for part in PARTS.values()} - set(runs))
    if absent and not arguments.placeholders:
        raise UserError(
            f"no run of {', '.join(absent)}; the server takes only a whole submission.\n"
            "Give a run of each, or --placeholders for constant predictions there."
        )
    names = {task: [name for name, part in PARTS.items() if part.task == task] for task in runs}
    # all of it is read before anything is predicted, which may take hours
    texts = {task: test_sets(directory, overrides, names[task]) for task, directory in runs.items()}
    files = {}
    for task, directory in runs.items():
        run = finished_run.load(directory, arguments.checkpoint, overrides)
        run.merge()
        files |= {name: predictions(run, PARTS[name], rows, arguments.batch_size) for name, rows in texts[task].items()}
    constant = [name for name in PARTS if name not in files]
    files |= {name: [PARTS[name].constant] * PARTS[name].rows for name in constant}
    write(arguments.output, files)
    for name in constant:
        print(f"{name}.tsv is a placeholder: {PARTS[name].constant} in all {PARTS[name].rows} rows", file=sys.stderr)
    made = [name for name in PARTS if name not in constant]
    print(f"{arguments.output}: {len(files)} files, predicted: {', '.join(made)}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(finished_run.OVERRIDES)
    made.add_argument("runs", nargs="+", metavar="RUN_DIR | KEY=VALUE", help=f"directories of finished runs; {known}")
    made.add_argument("--output", type=Path, default=Path("submission.zip"), help="default: submission.zip")
    made.add_argument("--placeholders", action="store_true", help="constant predictions for tasks without a run")
    made.add_argument("--checkpoint", choices=("best", "last"), default="best", help="default: best")
    made.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    return made


def parted(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Run directories, whose names may hold `=` too, and overrides."""
    directories = [Path(word) for word in words if Path(word).is_dir()]
    overrides = [word for word in words if not Path(word).is_dir()]
    strange = [word for word in overrides if "=" not in word]
    if strange:
        raise UserError(f"{strange[0]}: no such directory; give directories of finished runs")
    return directories, overrides


def by_task(directories: Sequence[Path]) -> dict[str, Path]:
    """The directory of the run of each task.

    Raises:
        UserError: two runs of one task, or a task that is not in GLUE.
    """
    runs: dict[str, Path] = {}
    for directory in directories:
        task = finished_run.read_result(directory)["run"]["task"]
        if task not in {part.task for part in PARTS.values()}:
            raise UserError(f"{directory} is a run of {task}, which is not a task of GLUE")
        if task in runs:
            raise UserError(f"two runs of {task}: {runs[task]} and {directory}; give one")
        runs[task] = directory
    return runs


def test_sets(directory: Path, overrides: Sequence[str], names: Sequence[str]) -> dict[str, list[tuple[str, ...]]]:
    """The texts of every file that one run predicts, by the file's name.

    Raises:
        UserError: a test set is missing or has another length than the server expects, or the run has other labels.
    """
    cfg = finished_run.run_config(finished_run.read_result(directory)["config"], overrides)
    return {name: test_set(config.build(cfg.task), PARTS[name], name) for name in names}


def test_set(task: Task, part: Part, name: str) -> list[tuple[str, ...]]:
    expected = list(part.words or [])
    if set(task.labels or []) != set(expected):
        raise UserError(f"the run of {task.name} has the labels {task.labels}; {name}.tsv needs {expected}")
    texts = replace(task, folder=part.folder, subset=part.subset).read_test(part.split, part.file)
    if len(texts) != part.rows:
        raise UserError(f"the test set for {name}.tsv has {len(texts)} rows; the server expects {part.rows}")
    return texts


def predictions(run: Trained, part: Part, texts: Sequence[tuple[str, ...]], batch_size: int) -> list[str]:
    """What the server takes, row by row."""
    return [word for logits in run.stream(texts, batch_size) for word in words(run.task, part, logits)]


def words(task: Task, part: Part, logits: Tensor) -> list[str]:
    """Predictions of (examples, outputs) as the server takes them."""
    if part.words is None:
        return [f"{min(max(score, 0.0), 5.0):.3f}" for score in task.predict(logits).tolist()]
    return [part.words[task.labels[best]] for best in task.predict(logits).tolist()]


def write(output: Path, files: Mapping[str, Sequence[str]]) -> None:
    """The zip, whole or not at all; equal predictions give equal bytes."""
    with replacing(output) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in PARTS:
            rows = "".join(f"{index}\t{word}\n" for index, word in enumerate(files[name]))
            member = zipfile.ZipInfo(f"{name}.tsv")  # its date is fixed
            archive.writestr(member, f"index\tprediction\n{rows}", zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main()
