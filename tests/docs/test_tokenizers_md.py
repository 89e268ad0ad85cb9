"""docs/tokenizers.md: its Python runs as written, from top to bottom, and its figures are the code's."""

import re
import shutil

import hugging_nano_gpt.tokenization.bpe as bpe
from hugging_nano_gpt import read_meta
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

from ..helpers.folders import DOCS_DIR

DOC = (DOCS_DIR / "tokenizers.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)


def test_tokenizers_md_python_runs_as_written(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "data" / "shakespeare_char").mkdir(parents=True)
    shutil.copy(CKPT_PATH, tmp_path / "out" / "ckpt.pt")
    shutil.copy(META_PATH, tmp_path / "data" / "shakespeare_char" / "meta.pkl")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in BLOCKS:
        exec(block, names)
    assert len(BLOCKS) == 6
    assert names["batch"].input_ids.tolist()[1][:5] == [0] * 5
    assert names["model"].config.vocab_size == 66
    assert read_meta(tmp_path / "data" / "back" / "meta.pkl") == read_meta(META_PATH)


def test_tokenizers_md_gives_the_number_of_probes():
    assert f"{2 * bpe._N_PROBES:,} strings" in DOC
