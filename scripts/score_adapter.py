"""Score a released adapter (a folder of results/adapters) on its task, beside the score that its run reported.

    python scripts/score_adapter.py results/adapters/mrpc [task.data_dir=GLUE] [backbone.path=DIR] [--checkpoint last]

The folder holds a PEFT adapter and the result of the run that it comes from, which says task, backbone and precision.
The adapter is loaded by PEFT on the pretrained model and scored by the benchmark's own evaluation. The update is
computed here in another order of operations than in training, so in bf16 a few borderline examples may change sides.
"""

import argparse
import sys
from pathlib import Path

from increlora.errors import UserError
from increlora.glue import config, finished_run, identity, results
from increlora.glue.evaluate import evaluate


@config.guarded
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="ADAPTER", help="a folder of results/adapters")
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="what export.py was given (default: best)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="task.data_dir=DIR, backbone.path=DIR, ...")
    arguments = parser.parse_intermixed_args()
    from peft import PeftModel

    result = finished_run.read_result(arguments.folder)
    precision = f"precision={result['config']['train']['precision']}"
    cfg = finished_run.run_config(result["config"], [precision, *arguments.overrides])
    settings, task, backbone = (config.build(cfg[key]) for key in ("train", "task", "backbone"))
    if not (arguments.folder / "adapter_config.json").is_file():
        raise UserError(f"{arguments.folder} holds no adapter; give a folder of results/adapters")
    tokenizer = backbone.tokenizer()
    data = task.load(tokenizer)
    model = PeftModel.from_pretrained(backbone.model(task.num_labels), arguments.folder).to(settings.torch_device)
    if other := results.changed_inputs(result, identity.inputs(task, backbone)):
        print(f"not what the adapter was trained with: {results.in_words(other)}", file=sys.stderr)
    scores = evaluate(model, task, data, settings, tokenizer.pad_token_id)
    reported = result["scores"][arguments.checkpoint]["metrics"]
    for split, metrics in scores.items():
        for metric, value in metrics.items():
            print(f"{split:12s} {metric:10s} {value:.4f}   reported {reported[split][metric]:.4f}")


if __name__ == "__main__":
    main()
