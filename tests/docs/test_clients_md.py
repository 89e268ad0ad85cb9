"""docs/clients.md: its Python runs as written, its files exist, and its versions are those of constraints.txt."""

import re
import shutil

import pytest

from hugging_nano_gpt import read_checkpoint
from hugging_nano_gpt.demo import CKPT_PATH

from ..helpers.folders import ROOT

DOC = (ROOT / "docs" / "clients.md").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # a warning of PEFT
def test_clients_md_merges_an_adapter_as_written(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    (tmp_path / "out").mkdir()
    shutil.copy(CKPT_PATH, tmp_path / "out" / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    block, _ = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)  # test_tensor_parallel.py runs the other
    exec(block, {})
    assert read_checkpoint(tmp_path / "out-lora" / "ckpt.pt").training_state.iter_num == 5000


def test_clients_md_names_existing_files():
    names = re.findall(r"`(?:python|sh|pytest) ([^`]+)`", DOC)
    files = [word for name in names for word in name.split() if "/" in word]
    assert len(files) >= 6
    assert not [file for file in files if not (ROOT / file).is_file()]


@pytest.mark.parametrize(
    "name",
    [
        "accelerate",
        "bitsandbytes",
        "lm-eval",
        "nnsight",
        "peft",
        "torchao",
        "transformer-lens",
        "transformers",
        "trl",
    ],
)
def test_clients_md_gives_the_versions_of_the_known_good_set(name):
    (version,) = re.findall(rf"^{name}==(.*)$", CONSTRAINTS, flags=re.MULTILINE)
    assert f"| {version} |" in DOC or f"| {name} {version} |" in DOC
