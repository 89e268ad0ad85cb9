"""Compares the greedy tokens of CTranslate2 and OpenVINO with generate's, on the demo's exports, in float32.

200 prompts of 1 to 127 tokens of the model's own text are continued to block_size. Nothing is timed.

Run: pip install ctranslate2 openvino && python benchmarks/other_runtimes.py
The exit code is 1 if the tokens of a prompt differ.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import ctranslate2
import numpy as np
import openvino
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hugging_nano_gpt import NanoGPTLMHeadModel, export_model
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

N_PROMPTS = 200

# Takes the ids of a prompt and the number of new tokens, and returns the new ids.
Continue = Callable[[list[int], int], list[int]]


def draw_prompts(model: NanoGPTLMHeadModel) -> list[list[int]]:
    """Cuts prompts of random lengths out of the model's texts, at random places."""
    block_size, rng = model.config.block_size, np.random.default_rng(1337)
    torch.manual_seed(1337)
    start = torch.zeros((N_PROMPTS, 1), dtype=torch.long)
    texts = model.generate(start, max_new_tokens=block_size - 1, do_sample=True).tolist()
    lengths = rng.integers(1, block_size, N_PROMPTS)
    begins = [rng.integers(0, block_size - length + 1) for length in lengths]
    return [text[begin : begin + n] for text, begin, n in zip(texts, begins, lengths, strict=True)]


def load_ctranslate2(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Continue:
    """Converts the GPT-2 export, as docs/exporting.md does with CTranslate2's program."""
    out_dir = folder / "ct2"
    ctranslate2.converters.TransformersConverter(str(folder / "gpt2")).convert(str(out_dir))
    config = out_dir / "config.json"
    config.write_text(config.read_text().replace('_token": null', '_token": "<none>"'))
    generator = ctranslate2.Generator(str(out_dir), compute_type="float32")

    def go_on(prompt: list[int], n_tokens: int) -> list[int]:
        tokens = [tokenizer.convert_ids_to_tokens(prompt)]
        settings = {"max_length": n_tokens, "sampling_topk": 1, "include_prompt_in_result": False}
        return generator.generate_batch(tokens, **settings)[0].sequences_ids[0]

    return go_on


def load_openvino(folder: Path) -> Continue:
    """Compiles the ONNX export."""
    graph = openvino.compile_model(folder / "onnx" / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    shapes = {port.any_name: port.partial_shape for port in graph.inputs if "past" in port.any_name}
    empty = {name: np.zeros((1, s[1].get_length(), 0, s[3].get_length()), np.float32) for name, s in shapes.items()}

    def go_on(prompt: list[int], n_tokens: int) -> list[int]:
        new, tokens, past = prompt, list(prompt), empty
        for _ in range(n_tokens):
            positions = np.arange(len(tokens) - len(new), len(tokens))[None]
            inputs = {"input_ids": np.array([new]), "position_ids": positions}
            outputs = graph({**inputs, "attention_mask": np.ones((1, len(tokens)), np.int64), **past})
            logits, *present = (outputs[port] for port in graph.outputs)
            past = dict(zip(past, present, strict=True))
            new = [int(logits[0, -1].argmax())]
            tokens += new
        return tokens[len(prompt) :]

    return go_on


def main() -> None:
    """Exports the model, generates, and compares."""
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for to in ("gpt2", "onnx"):
            conversion = export_model(CKPT_PATH, folder / to, to=to, meta_path=META_PATH)
        model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
        ways = {"CTranslate2": load_ctranslate2(folder, conversion.tokenizer), "OpenVINO": load_openvino(folder)}
        prompts = {tuple(prompt): model.config.block_size - len(prompt) for prompt in draw_prompts(model)}
        expected = {
            prompt: model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False)[
                0, len(prompt) :
            ].tolist()
            for prompt, n in prompts.items()
        }
        n_equal = {
            way: sum(go_on(list(prompt), n) == expected[prompt] for prompt, n in prompts.items())
            for way, go_on in ways.items()
        }
    for way, n in n_equal.items():
        print(f"{way}: {n} of {len(prompts)} prompts equal, {sum(prompts.values()):,} tokens")
    sys.exit(set(n_equal.values()) != {len(prompts)})


if __name__ == "__main__":
    main()
