"""Writes the data that the examples train on: text sampled from the bundled demo model.

The package contains no data, so this replaces your own data/shakespeare_char: the same three files in the format of
nanoGPT's prepare.py, with the same alphabet. The text is sampled at temperature 0.5, so it is more regular than what
the model expects, and the model can learn from it. For real work, use the files that prepare.py wrote.

Run: python examples/shakespeare_sample.py FOLDER
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from hugging_nano_gpt import NanoGPTLMHeadModel
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

N_SAMPLES = 256
VAL_SHARE = 10  # one token in ten, as in nanoGPT's data/shakespeare_char/prepare.py


def write_data(data_dir: Path) -> Path:
    """Writes train.bin, val.bin (uint16 tokens) and meta.pkl (the alphabet) into a folder, and returns the folder."""
    data_dir.mkdir(parents=True, exist_ok=True)
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    torch.manual_seed(1337)
    newlines = torch.zeros(N_SAMPLES, 1, dtype=torch.long)  # token 0, where nanoGPT's sample.py starts
    n_new = model.config.block_size - 1
    samples = model.generate(newlines, max_new_tokens=n_new, do_sample=True, temperature=0.5)  # (rows, block_size)
    tokens = samples.flatten().numpy().astype(np.uint16)
    n_val = len(tokens) // VAL_SHARE
    tokens[:-n_val].tofile(data_dir / "train.bin")
    tokens[-n_val:].tofile(data_dir / "val.bin")
    shutil.copy(META_PATH, data_dir / "meta.pkl")
    return data_dir


def choose_out_dir() -> Path:
    """Returns the folder named on the command line, or a new temporary one."""
    return Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="out-example-")).absolute()


if __name__ == "__main__":
    print(f"Wrote {write_data(choose_out_dir())}")
