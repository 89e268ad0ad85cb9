"""Writes samples at every evaluation of nanoGPT's own train.py, with one more line in it.

The line passes train.py's model to NanoGPTLMHeadModel.from_nanogpt, which shares its tensors: generate has a cache,
and nothing is copied. This script adds the line to a copy of train.py and runs it briefly. Its ckpt.pt has the same
bits as that of a run without the line.

Run: NANOGPT_DIR=/path/to/nanoGPT python examples/sample_in_train.py [out-example]
"""

import contextlib
import os
import runpy
import sys
from pathlib import Path

import torch
from shakespeare_sample import choose_out_dir, write_data

from hugging_nano_gpt import NanoGPTLMHeadModel, build_character_tokenizer, read_checkpoint, read_meta

# The line is inserted after this one of train.py, where raw_model exists.
PLACE = "        losses = estimate_loss()\n"
LINE = "        __import__('sample_in_train').write_sample(raw_model, iter_num, data_dir)\n"

FLAGS = (
    "--device=cpu --compile=False --n_layer=2 --n_head=2 --n_embd=64 --block_size=64 --batch_size=8 --dropout=0.2 "
    "--gradient_accumulation_steps=1 --learning_rate=1e-2 --max_iters=40 --lr_decay_iters=40 --warmup_iters=4 "
    "--eval_interval=20 --eval_iters=5 --log_interval=10 --dataset=sample"
).split()


def write_sample(gpt: torch.nn.Module, iter_num: int, data_dir: str) -> None:
    """Appends a sample of a model in training to samples.txt; torch's random generator keeps its state."""
    model = NanoGPTLMHeadModel.from_nanogpt(gpt)
    tokenizer = build_character_tokenizer(read_meta(Path(data_dir) / "meta.pkl"))
    with torch.random.fork_rng():
        tokens = model.generate(torch.tensor([[0]], device=model.device), max_new_tokens=60, do_sample=True)
    with Path("samples.txt").open("a", encoding="utf-8") as file:
        file.write(f"--- iteration {iter_num}{tokenizer.decode(tokens[0])}\n")


def main(out_dir: Path) -> None:
    """Runs train.py without and with the line, and compares the checkpoints."""
    nanogpt_dir = Path(os.environ["NANOGPT_DIR"])
    script = (nanogpt_dir / "train.py").read_text(encoding="utf-8")
    assert script.count(PLACE) == 1
    data_dir = write_data(out_dir / "data" / "sample")
    for name, text in (("plain", script), ("sampled", script.replace(PLACE, PLACE + LINE))):
        run(out_dir / name, text, nanogpt_dir, data_dir)
    plain, sampled = (read_checkpoint(out_dir / name / "out" / "ckpt.pt") for name in ("plain", "sampled"))
    assert all(torch.equal(sampled.state_dict[name], tensor) for name, tensor in plain.state_dict.items())
    samples = (out_dir / "sampled" / "samples.txt").read_text(encoding="utf-8")
    assert samples.count("--- iteration") == 3
    print(samples)
    print(f"Three samples, and the bits of iteration {plain.training_state.iter_num} as without them.")


def run(folder: Path, script: str, nanogpt_dir: Path, data_dir: Path) -> None:
    """Runs a train.py in its own folder, with links to the checkout's other files."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "sample").symlink_to(data_dir)
    (folder / "train.py").write_text(script, encoding="utf-8")
    for name in ("model.py", "configurator.py"):
        (folder / name).symlink_to(nanogpt_dir / name)
    sys.argv = ["train.py", *FLAGS]
    sys.path.insert(0, str(folder))
    with contextlib.chdir(folder):
        runpy.run_path("train.py", run_name="__main__")


if __name__ == "__main__":
    main(choose_out_dir())
