"""docs/generation.md: its Python runs as written, from top to bottom, and gives the tokens that the page claims."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hugging_nano_gpt.demo import CKPT_PATH, SAMPLES_PATH

from ..helpers.folders import DOCS_DIR
from ..helpers.tiny import TORCH_VERSION

DOC = (DOCS_DIR / "generation.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)


@pytest.mark.skipif(TORCH_VERSION < (2, 7), reason="torch.compile does not work with torch 2.6 and Transformers 5")
def test_generation_md_python_runs_as_written(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    shutil.copy(CKPT_PATH, tmp_path / "out" / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    assert len(BLOCKS) == 4
    for block in BLOCKS:
        exec(block, names)
        if block is BLOCKS[0]:
            recorded = load_file(SAMPLES_PATH)
            assert torch.equal(names["tokens"][0], recorded["samples"][0])
    greedy = names["model"].generate(names["newline"], max_new_tokens=100, do_sample=False)
    assert torch.equal(names["tokens"], greedy)
