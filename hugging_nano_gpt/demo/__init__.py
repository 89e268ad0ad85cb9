"""The bundled demonstration: a real nanoGPT checkpoint through the whole round trip, each claim checked as it is made.

ckpt.pt is a 3-layer character model of Shakespeare that nanoGPT's train.py @ 3adf61e wrote (5,000 iterations),
meta.pkl its alphabet, golden.safetensors the logits that nanoGPT's own model computed from it.
"""

import sys
import tempfile
from pathlib import Path
from typing import TextIO

import torch
from safetensors.torch import load_file
from transformers.generation.streamers import BaseStreamer

from ..checkpoint.read_write import read_checkpoint
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from ..tokenization.characters import CharacterTable, read_meta

DEMO_DIR = Path(__file__).parent
CKPT_PATH = DEMO_DIR / "ckpt.pt"
META_PATH = DEMO_DIR / "meta.pkl"
GOLDEN_PATH = DEMO_DIR / "golden.safetensors"

# Other processors and torch builds order float32 sums differently; the same machine gives 0.0.
GOLDEN_TOLERANCE = 1e-5


class CharacterStreamer(BaseStreamer):
    """Prints each token as its character as soon as it is generated."""

    def __init__(self, table: CharacterTable, stream: TextIO):
        self._table = table
        self._stream = stream

    def put(self, value: torch.Tensor) -> None:
        self._stream.write(self._table.decode(value.flatten().tolist()))
        self._stream.flush()

    def end(self) -> None:
        self._stream.write("\n")


def run_demo(stream: TextIO = sys.stdout) -> bool:
    """Loads the bundled checkpoint, generates, compares with nanoGPT, converts back, and compares again.

    Returns:
        Whether every comparison came out equal.
    """

    def say(text: str) -> None:
        print(text, file=stream)

    say("1. Load: NanoGPTLMHeadModel.from_nanogpt_ckpt(ckpt.pt)")
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    config, state = model.config, model.nanogpt_training_state
    say(f"   {CKPT_PATH}")
    say(f"   {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, block_size {config.block_size},")
    say(f"   vocabulary {config.vocab_size}, bias {config.bias}, {model.num_parameters():,} parameters, {model.dtype}")
    say(f"   trained by nanoGPT for {state.iter_num:,} iterations, validation loss {state.best_val_loss:.4f}\n")

    say("2. Generate: model.generate(max_new_tokens=120, do_sample=True, temperature=0.8)")
    torch.manual_seed(1337)
    table = read_meta(META_PATH)
    prompt = torch.tensor([table.encode("\n")])
    streamer = CharacterStreamer(table, stream)
    model.generate(prompt, max_new_tokens=120, do_sample=True, temperature=0.8, streamer=streamer)

    say("\n3. Compare the logits with those nanoGPT computed from the same file")
    golden = load_file(GOLDEN_PATH)
    with torch.no_grad():
        difference = (model(golden["idx"]).logits - golden["logits"]).abs().max().item()
    is_same_function = difference <= GOLDEN_TOLERANCE
    shape = " x ".join(map(str, golden["logits"].shape))
    verdict = _judge(is_same_function, f"at most {GOLDEN_TOLERANCE:g}")
    say(f"   {shape} logits, largest difference {difference:g} {verdict}\n")

    say("4. Convert back: model.to_nanogpt_ckpt(ckpt.pt), and read what was written")
    with tempfile.TemporaryDirectory() as folder:
        model.to_nanogpt_ckpt(Path(folder) / "ckpt.pt")
        first, second = read_checkpoint(CKPT_PATH).state_dict, read_checkpoint(Path(folder) / "ckpt.pt").state_dict
        again = NanoGPTLMHeadModel.from_nanogpt_ckpt(Path(folder) / "ckpt.pt").state_dict()
    is_round_trip = list(first) == list(second) == list(again)
    equal = [name for name in first if is_round_trip and _are_equal(first[name], second[name], again[name])]
    is_round_trip = is_round_trip and len(equal) == len(first)
    say(f"   {len(equal)} of {len(first)} tensors bitwise equal {_judge(is_round_trip, 'same names, same bits')}\n")

    is_proved = is_same_function and is_round_trip
    say("Equal: nanoGPT -> Transformers -> nanoGPT." if is_proved else "NOT EQUAL: see above.")
    return is_proved


def _are_equal(*tensors: torch.Tensor) -> bool:
    first, *others = (tensor.contiguous().view(torch.uint8) for tensor in tensors)  # the bits: 0.0 is not -0.0
    return all(torch.equal(first, other) for other in others)


def _judge(is_right: bool, claim: str) -> str:
    return f"[ok: {claim}]" if is_right else f"[WRONG: expected {claim}]"
