"""PEFT's own tests on IncreLoRA's tuner: `python scripts/peft_tests.py [--quick] [pytest arguments]`.

The tests come with the source package of the installed peft, which pip fetches into a temporary folder; nothing of them
is in this repository. There, the lists of cases of their modules are replaced by cases of IncreLoRA, and the models of
the hub by tiny random ones. Every other test (of other methods) is left out.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from increlora.errors import UserError
from increlora.glue.config import guarded

ROOT = Path(__file__).resolve().parents[1]
LISTS = {  # module -> its lists of cases, each replaced by an expression over what CASES makes
    "test_custom_models": {
        "TEST_CASES": "CUSTOM", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": "TWO_ADAPTERS",
    },
    "test_config": {"ALL_CONFIG_CLASSES": "CONFIGS"},
    "test_decoder_models": {
        "PEFT_DECODER_MODELS_TO_TEST": "MODELS('llama', 'gpt2')", "SMALL_GRID_MODELS": "MODELS('llama')",
        "ALL_CONFIGS": "OF_TASK('CAUSAL_LM')",
    },
    "test_encoder_decoder_models": {
        "PEFT_ENCODER_DECODER_MODELS_TO_TEST": "MODELS('t5')", "ALL_CONFIGS": "OF_TASK('SEQ_2_SEQ_LM')",
    },
    "test_feature_extraction_models": {
        "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST": "MODELS('bert')", "ALL_CONFIGS": "OF_TASK('FEATURE_EXTRACTION')",
    },
    "test_seq_classifier": {
        "PEFT_SEQ_CLS_MODELS_TO_TEST": "MODELS('bert-classifier', 'llama-classifier')",
        "ALL_CONFIGS": "OF_TASK('SEQ_CLS')",
    },
}  # fmt: skip
HUB = (
    "test_from_pretrained",
    "test_from_pretrained_cache_dir",
    "test_save_pretrained_with_runtime_config",
)  # of test_config
# it counts the tensors that train; those of a bank are shared by all layers (PEFT leaves VB-LoRA out for this reason)
LAYERS = "layer_indexing"
QUICK = ["test_custom_models", "test_config"]
CASES = """
import os
import peft
from increlora.integrations.peft import IncreLoraConfig

peft.IncreLoraConfig = IncreLoraConfig
RUN = {"total_step": 1000}
TARGETS = [
    ("Vanilla MLP 1", "MLP", {"target_modules": "lin0"}),
    ("Vanilla MLP 2", "MLP", {"target_modules": ["lin0"]}),
    ("Vanilla MLP 3", "MLP", {"target_modules": ["lin1"]}),
    ("Vanilla MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("Vanilla MLP 5", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("Vanilla MLP 6", "MLP", {"target_modules": ["lin0"], "init_r": 2, "lora_alpha": 8, "lora_dropout": 0.1}),
    ("Embedding + transformers Conv1D 1", "EmbConv1D", {"target_modules": ["conv1d"]}),
]
CUSTOM = [(f"{name} IncreLoRA", model, IncreLoraConfig, {**kwargs, **RUN}) for name, model, kwargs in TARGETS]
TWO_ADAPTERS = [
    (f"IncreLoRA {name}", "increlora", IncreLoraConfig, {"target_modules": one, "init_weights": False},
     {"target_modules": two, "init_weights": False})
    for name, one, two in (("Same", ["lin0"], ["lin0"]), ("Different", ["lin0"], ["lin1"]))
]
CONFIGS = [(IncreLoraConfig, {})]


def MODELS(*names):
    return [os.path.join(os.environ["TINY_MODELS"], f"tiny-random-{name}") for name in names]


def OF_TASK(task):
    return [(IncreLoraConfig, {"task_type": task, "target_modules": None, **RUN})]
"""


def fetch(folder: Path) -> Path:
    """The source package of the installed peft, unpacked; the folder of its tests."""
    release = f"peft=={version('peft')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft", release]
    if subprocess.run([*command, "--no-build-isolation", "--dest", str(folder)], check=False).returncode:
        raise UserError(f"pip could not fetch the source package of {release}: a package index is needed")
    (archive,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(folder, filter="data")
    return next(folder.glob("peft-*/tests"))


def put_cases(tests: Path) -> None:
    """Replace the lists of cases in the modules by IncreLoRA's."""
    (tests / "__init__.py").touch()
    if find_spec("diffusers") is None:  # imported by all of them, for image models that are not tested here
        (tests.parent / "diffusers.py").write_text("class StableDiffusionPipeline: ...\n", encoding="utf-8")
    (tests / "increlora_cases.py").write_text(CASES, encoding="utf-8")
    for module, lists in LISTS.items():
        path = tests / f"{module}.py"
        lines = path.read_text(encoding="utf-8").splitlines()
        found = {
            node.targets[0].id: node for node in ast.parse("\n".join(lines)).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }  # fmt: skip
        for name, value in sorted(lists.items(), key=lambda item: -found[item[0]].lineno):
            node = found[name]
            lines[node.lineno - 1 : node.end_lineno] = [f"from .increlora_cases import *; {name} = {value}"]
        path.write_text("\n".join(lines), encoding="utf-8")


def make_models(folder: Path) -> None:
    """Tiny random models, in the place of those that PEFT's tests fetch from the hub."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    wide = {"vocab_size": 1000, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    gpt2 = t.GPT2Config(vocab_size=1000, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2, **ends)
    t5 = t.T5Config(vocab_size=1000, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    llama = t.LlamaConfig(**wide, num_attention_heads=2, initializer_range=0.2, **ends)
    bert = t.BertConfig(**wide, num_attention_heads=2, initializer_range=0.2)
    models = {
        "llama": t.LlamaForCausalLM(llama),
        "llama-classifier": t.LlamaForSequenceClassification(llama),
        "gpt2": t.GPT2LMHeadModel(gpt2),
        "t5": t.T5ForConditionalGeneration(t5),
        "bert": t.BertModel(bert),
        "bert-classifier": t.BertForSequenceClassification(bert),
    }
    for name, model in models.items():
        model.save_pretrained(folder / f"tiny-random-{name}")


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help=f"only {' and '.join(QUICK)}, as continuous integration does"
    )
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="peft-tests-") as temporary:
        tests = fetch(Path(temporary))
        put_cases(tests)
        modules = QUICK if options.quick else list(LISTS)
        if not options.quick:
            make_models(Path(temporary))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TINY_MODELS": temporary}
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(ROOT), str(tests.parent), os.environ.get("PYTHONPATH")))
        )
        files = [f"tests/{module}.py" for module in modules]
        left_out = [f"--deselect=tests/test_config.py::TestPeftConfig::{name}" for name in HUB]
        fixed = ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tests.parent), "-q", "-rs"]
        ours = f"increlora and not {LAYERS}"
        command = [sys.executable, "-m", "pytest", *fixed, "-W", "ignore", *left_out, "-k", ours, *files, *more]
        process = subprocess.Popen(command, cwd=tests.parent, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        output = []
        for line in process.stdout:
            output.append(line)
            if not line.startswith("SKIPPED"):
                print(line, end="", flush=True)
        code = process.wait()
    skipped: Counter[str] = Counter()
    for line in output:
        if match := re.match(r"SKIPPED \[(\d+)\] \S+: (.*)", line):
            skipped[match[2]] += int(match[1])
    print("skipped, and why:")
    if "test_config" in modules:
        print(f"  {len(HUB):4}  left out: they load configurations from the hub ({', '.join(HUB)})")
    if not options.quick:
        print(f"        left out: tests of {LAYERS}, which count tensors by layers; a bank's are shared")
    for reason, count in skipped.most_common():
        print(f"  {count:4}  {reason}")
    return code


if __name__ == "__main__":
    sys.exit(main())
