"""Measures the ONNX export at the size of the demo and at 124M: bytes, seconds to write, greedy tokens/s, batch 1.

Two ways with the same weights in float32 and the same number of threads, one after the other in every round, in
alternating order: "ours" is NanoGPTLMHeadModel.generate; "onnx" is ONNX Runtime with numpy arrays in and out, as in
docs/onnx.md.

The ratios are medians of the ratios within each round.

Run: python benchmarks/onnx_runtime.py [--rounds 5] [--sizes demo 124m]
The last line is one JSON object: bytes, seconds, tokens/s, ratios, versions and threads.
"""

import argparse
import importlib.metadata
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from common import PROMPT_LENGTH, Run, make_generate, make_model, print_result, print_table, time_ways
from transformers.utils import logging

from hugging_nano_gpt import NanoGPTLMHeadModel, export_onnx
from hugging_nano_gpt.demo import CKPT_PATH

NEW_TOKENS = 108  # with the prompt, within the demo's block_size


@torch.no_grad()
def main() -> None:
    """Times every size and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each size (default 5)")
    parser.add_argument("--sizes", nargs="+", choices=("demo", "124m"), default=["demo", "124m"])
    args = parser.parse_args()
    args.device = "cpu"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(1337)
    figures: dict[str, Any] = {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime")}
    for size in args.sizes:
        figures |= measure_size(size, args)
    print_result({"benchmark": "onnx_runtime", **vars(args), **figures}, [])


def measure_size(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """Exports and times one size, prints a table, and returns the figures under names that end in the size."""
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH) if size == "demo" else make_model("124m", "cpu")
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT_LENGTH))
    figures: dict[str, Any] = {"weight_bytes": 4 * model.num_parameters()}
    onnx = export_decoder(model, figures)
    ways: dict[str, Run] = {"ours": make_generate(model), "onnx": onnx}
    times_s, tokens = time_ways(ways, prompt, NEW_TOKENS, args)
    rows = []
    for name, seconds in times_s.items():
        per_step = statistics.median(seconds) / NEW_TOKENS
        to_ours = statistics.median(t / u for t, u in zip(times_s["ours"], seconds, strict=True))
        rows.append((name, round(1 / per_step), 1e3 * per_step, to_ours))
        figures |= {f"{name}_tokens_per_s": round(1 / per_step, 1), f"{name}_to_ours": round(to_ours, 3)}
    figures["are_tokens_ours"] = torch.equal(tokens["onnx"], tokens["ours"])
    print(f"\n{size}, batch 1, {NEW_TOKENS} new tokens, {figures['file_bytes']:,} bytes in {figures['export_s']} s")
    print_table(("", "tokens/s", "ms a step", "x ours"), rows)
    return {f"{name}_{size}": figure for name, figure in figures.items()}


def export_decoder(model: NanoGPTLMHeadModel, figures: dict[str, Any] | None = None) -> Run:
    """Exports a model and makes its greedy loop; adds the export's size and seconds to the figures."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        export_onnx(model, Path(folder) / "onnx")
        export_s = time.perf_counter() - start
        path = Path(folder) / "onnx" / "model.onnx"
        if figures is not None:
            figures |= {"file_bytes": path.stat().st_size, "export_s": round(export_s, 2)}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return make_decoder(onnxruntime.InferenceSession(path, options))


def make_decoder(session: onnxruntime.InferenceSession) -> Run:
    """Makes the greedy loop of docs/onnx.md."""

    def run(prompt: torch.Tensor, count: int) -> torch.Tensor:
        new = tokens = prompt.numpy()
        inputs = (each for each in session.get_inputs() if each.name.startswith("past_key_values"))
        past = {each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32) for each in inputs}
        for _ in range(count):
            feeds = {
                "input_ids": new,
                "attention_mask": np.ones_like(tokens),
                "position_ids": np.arange(tokens.shape[1] - new.shape[1], tokens.shape[1])[None],
            }
            logits, *present = session.run(None, feeds | past)
            past = dict(zip(past, present, strict=True))
            new = logits[:, -1].argmax(-1, keepdims=True)
            tokens = np.concatenate((tokens, new), axis=1)
        return torch.from_numpy(tokens)

    return run


if __name__ == "__main__":
    main()
