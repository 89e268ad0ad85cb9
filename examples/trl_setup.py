"""What the TRL examples share: the demo model's tokenizer, lines sampled from it, and the command line.

TRL needs an end token and a padding token, and a character model has neither. Here the newline is both, so that a text
is a line and the model needs no change; docs/tokenizers.md shows how to add a token instead.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedTokenizerFast

from hugging_nano_gpt import NanoGPTLMHeadModel, build_character_tokenizer, read_meta
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

SPEAKERS = ["ROMEO:\n", "JULIET:\n", "MENENIUS:\n", "KING RICHARD III:\n", "DUKE VINCENTIO:\n", "First Citizen:\n"]
LINE_LENGTH = 60  # with the longest speaker, well within the demo model's block_size of 128

# Settings of every trainer here: float32 on a CPU, without gradient checkpointing, which a small model does not need.
ARGUMENTS = {
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
}

datasets.disable_progress_bars()


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Makes the demo model's tokenizer, with the newline as its end and padding."""
    tokenizer = build_character_tokenizer(read_meta(META_PATH), block_size=128)
    tokenizer.eos_token = tokenizer.pad_token = "\n"  # noqa: S105
    return tokenizer


def sample_lines(prompts: list[str], temperature: float) -> list[str]:
    """Samples a line from the demo model for each prompt; the line ends before the newline."""
    tokenizer = load_tokenizer()
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(1337)
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=LINE_LENGTH, do_sample=True, temperature=temperature)
    texts = tokenizer.decode(tokens[:, inputs.input_ids.shape[1] :])
    return [text.partition("\n")[0] for text in texts]


def sample_pairs(n_pairs: int) -> datasets.Dataset:
    """Samples pairs of lines for the same prompt: chosen at temperature 0.5, rejected at 1.0."""
    prompts = (SPEAKERS * n_pairs)[:n_pairs]
    pairs = {"prompt": prompts, "chosen": sample_lines(prompts, 0.5), "rejected": sample_lines(prompts, 1.0)}
    return datasets.Dataset.from_dict(pairs)


def parse_command(doc: str, n_updates: int, trainers: Sequence[str] = ()) -> argparse.Namespace:
    """Parses out_dir, the folder to write to; n_updates, ten times as many with --full; and trainer, if any."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("out_dir", nargs="?", type=Path, help="the folder to write to (default: a temporary one)")
    full = {"action": "store_const", "dest": "n_updates", "const": 10 * n_updates, "default": n_updates}
    parser.add_argument("--full", **full, help=f"make {10 * n_updates} updates instead of {n_updates}")
    if trainers:
        parser.add_argument("--trainer", choices=trainers, default=trainers[0])
    args = parser.parse_args()
    args.out_dir = (args.out_dir or Path(tempfile.mkdtemp(prefix="out-example-"))).absolute()
    return args


def conclude(claim: str, is_true: bool) -> None:
    """Prints the claim as the last line, and exits with 1 if it is not true."""
    print(claim if is_true else f"NOT TRUE: {claim}")
    sys.exit(not is_true)
