"""Write a finished run as a PEFT LoRA adapter or as a merged model, for use without this repository.

    python scripts/export.py RUN_DIR --format peft|merged [--output DIR] [--pad-to RANK] [backbone.path=DIR]

What was written is read back with PEFT and transformers, as its users do, and compared with the trained model (fp32).
If the logits differ by 1e-5 or more, nothing is kept; for logits above 1, by 1e-5 of the largest, since fp32 sums of
that size are no more exact: the trained model itself differs by as much from one batch to another.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from increlora.errors import UserError
from increlora.glue import config, export, finished_run
from increlora.glue.finished_run import Trained
from increlora.glue.tasks import zip_columns
from increlora.integrations.peft_export import whole
from increlora.streams import stream

TOLERANCE = 1e-5  # of the largest logit, or of 1
ODD_CHARACTERS = "½ µ ﬁ Ｆｕｌｌ \u00a0 naïve 😀"  # what a newly built tokenizer may read in another way


@config.guarded
def main() -> None:
    arguments = parser().parse_intermixed_args()
    if arguments.pad_to is not None and arguments.format != "peft":
        raise UserError("--pad-to is of adapters: give it with --format peft")
    output = arguments.output or arguments.run_dir / arguments.format
    if output.exists():
        raise UserError(f"{output} exists already; remove it, or choose another folder with --output DIR")
    quiet()
    run = finished_run.load(
        arguments.run_dir, arguments.checkpoint, [*arguments.overrides, "device=cpu", "precision=fp32"]
    )
    with whole(output) as folder:
        difference, largest = write_and_compare(
            run, folder, arguments.format, arguments.base, arguments.tokenizer, arguments.pad_to
        )
    print(f"{output}: read back, its logits differ by at most {difference:.1e} (largest logit {largest:.2f})")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a finished run")
    made.add_argument("--format", choices=("peft", "merged"), required=True, help="what to write")
    made.add_argument("--output", type=Path, metavar="DIR", help="default: RUN_DIR/peft or RUN_DIR/merged")
    made.add_argument("--checkpoint", choices=("best", "last"), default="best", help="default: best")
    made.add_argument("--base", metavar="NAME", help="name of the base model to write into the adapter")
    made.add_argument(
        "--without-tokenizer", dest="tokenizer", action="store_false", help="of an adapter: the base model has it"
    )
    made.add_argument(
        "--pad-to", type=int, metavar="RANK", help="rank of every matrix in the adapter, filled up with zeros"
    )
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="backbone.path=DIR, method.pattern=RUN_DIR")
    return made


def quiet() -> None:
    """Keep transformers' load reports, progress bars and warnings to developers off the screen."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def write_and_compare(
    run: Trained, folder: Path, kind: str, base: str | None = None, tokenizer: bool = True, pad_to: int | None = None
) -> tuple[float, float]:
    """Write to an empty folder and read it back: the largest difference between logits, and the largest logit.

    Raises:
        UserError: the method cannot be written like this, or what was written is not the trained model.
    """
    texts = probes(run)
    expected = run.logits(texts)
    if kind == "peft":
        export.write_adapter(run, folder, base, tokenizer, pad_to)
        model = adapter_model(run, folder)
    else:
        export.write_merged(run, folder)
        model = merged_model(folder)
    folders_own = tokenizer or kind == "merged"
    found = logits(model, read_tokenizer(folder) if folders_own else run.tokenizer, run.task.max_length, texts)
    difference = (found - expected).abs().max().item()
    largest = expected.abs().max().item()
    if not difference < TOLERANCE * max(1.0, largest):
        raise UserError(
            f"the exported model's logits differ by {difference:.1e} from the trained model's (largest {largest:.2f}); "
            "nothing was kept.\nThe versions of peft and transformers may not be those in constraints.txt."
        )
    return difference, largest


def adapter_model(run: Trained, folder: Path) -> nn.Module:
    """The adapter on a fresh base model with a newly drawn head."""
    from peft import PeftModel

    return PeftModel.from_pretrained(run.backbone.model(run.task.num_labels), folder).eval()


def merged_model(folder: Path) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def probes(run: Trained, count: int = 16, longest: int = 48) -> list[tuple[str, ...]]:
    """Texts of random tokens of the vocabulary, of several lengths, and one with odd characters."""
    generator, fields = stream(0, "probes"), len(run.task.fields)
    size = min(len(run.tokenizer), run.model.config.vocab_size)
    lengths = torch.randint(1, longest, (count, fields), generator=generator).tolist()
    texts = [
        tuple(run.tokenizer.decode(torch.randint(size, (n,), generator=generator)) for n in row) for row in lengths
    ]
    return [*texts, (ODD_CHARACTERS,) * fields]


def read_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def logits(model: nn.Module, tokenizer: Any, max_length: int, texts: list[tuple[str, ...]]) -> Tensor:
    """Logits of the texts, tokenised as the adapter's users do it."""
    rows = tokenizer(*zip_columns(texts), truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    return model(**rows).logits


if __name__ == "__main__":
    main()
