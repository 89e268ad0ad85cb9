"""The README's Python runs as written, and its table of files names files that exist."""

import re
from pathlib import Path

import numpy as np
import pytest

from hugging_nano_gpt.demo import CKPT_PATH

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_readme_python_runs_as_written(block, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ckpt.pt").write_bytes(CKPT_PATH.read_bytes())
    data_dir = tmp_path / "data" / "shakespeare_char"
    data_dir.mkdir(parents=True)
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 65, 1000, dtype=np.uint16).tofile(data_dir / f"{split}.bin")
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert (tmp_path / "out-back" / "ckpt.pt").is_file()


def test_readme_shows_both_commands():
    assert "make demo" in README
    assert "make test" in README


def test_readme_names_existing_files():
    table = README.split("## Finding your way")[1]
    rows = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([\w./]+)`", row)]
    assert len(names) >= 8
    missing = [
        name for name in names if not (ROOT / name).exists() and not (ROOT / "hugging_nano_gpt" / name).exists()
    ]
    assert not missing
