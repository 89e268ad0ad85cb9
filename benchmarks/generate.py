"""Measures greedy generation at the sizes of the demo, of train_shakespeare_char.py and of 124M, batch 1 and 8.

Five ways with the same weights, one after the other in every round, each round starting with another one:
"nanogpt" computes the last block_size tokens again for every token, as nanoGPT's generate does, in
tests/helpers/reference.py;
"gpt2" is transformers' GPT2LMHeadModel.generate, with zeros for the biases that it always has;
"ours" is NanoGPTLMHeadModel.generate with default settings; "fastest" is the fastest setting in docs/generation.md for
the batch: on a CPU float16 for one row and bfloat16 for more, on a GPU the static cache, which Transformers compiles;
"onnx" is ONNX Runtime on our export in float32, on a CPU with one row, if it is installed.

The ratios are medians of the ratios within each round. "bandwidth" is the share of the memory's bandwidth, measured in
the same run, that reading every weight once a step needs. Past block_size, only the small model is timed: exact,
against nanoGPT, and with a stride.

Run: python benchmarks/generate.py [--rounds 5] [--sizes demo shakespeare 124m] [--batches 1 8] [--device cuda]
The last line is one JSON object: tokens/s, ratios, bandwidths, targets, versions and threads.
"""

import argparse
import importlib.util
import statistics
import time
from typing import Any

import torch
from common import (
    PROMPT_LENGTH,
    SIZES,
    Run,
    Target,
    import_reference,
    make_generate,
    make_model,
    print_result,
    print_table,
    synchronize,
    time_ways,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from hugging_nano_gpt import NanoGPTLMHeadModel

NEW_TOKENS = {"demo": 108, "shakespeare": 240, "124m": 64, "tiny": 16}  # within block_size
NEW_TOKENS_PAST = 64
STRIDE = 64
TO_ONNX = "ours_time_to_onnx"
ONNX_RATIO = 1.15  # at most
BANDWIDTH_BYTES = 1 << 29


@torch.no_grad()
def main() -> None:
    """Times every size and batch and prints the results."""
    args = parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(1337)
    figures: dict[str, Any] = {"bandwidth_gb_per_s": round(measure_bandwidth(args.device) / 1e9, 1)}
    for size in args.sizes:
        for batch in args.batches:
            figures |= measure_case(size, batch, args, figures["bandwidth_gb_per_s"])
    if "shakespeare" in args.sizes:
        figures |= measure_past_block_size(args)
    targets = list_targets(figures, args)
    print_result({"benchmark": "generate", **vars(args), **figures}, targets, args.device)


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each case (default 5)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["demo", "shakespeare", "124m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="rows (default 1 and 8)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or mps")
    return parser.parse_args()


def measure_bandwidth(device: str, n_bytes: int = BANDWIDTH_BYTES) -> float:
    """Returns the bytes per second that all threads together can read from memory."""
    data = torch.ones(n_bytes // 4, device=device)
    times_s = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        data.sum()
        synchronize(device)
        times_s.append(time.perf_counter() - start)
    return n_bytes / min(times_s)


def measure_case(size: str, batch: int, args: argparse.Namespace, bandwidth_gb_per_s: float) -> dict[str, Any]:
    """Times the ways at one size and batch, prints a table, and returns the figures under prefixed names."""
    model = make_model(size, args.device)
    fast_dtype = torch.float32 if args.device.startswith("cuda") else torch.float16 if batch == 1 else torch.bfloat16
    fast_settings = {"cache_implementation": "static"} if args.device.startswith("cuda") else {}
    fast = NanoGPTLMHeadModel(model.config).to(args.device).eval()
    fast.load_state_dict(model.state_dict())
    fast.to(fast_dtype)
    ways: dict[str, Run] = {
        "nanogpt": make_reforward(model, args.device),
        "gpt2": make_generate(make_gpt2(model)),
        "ours": make_generate(model),
        "fastest": make_generate(fast, **fast_settings),
    }
    if args.device == "cpu" and batch == 1 and importlib.util.find_spec("onnxruntime") is not None:
        from onnx_runtime import export_decoder

        ways["onnx"] = export_decoder(model)
    prompt = torch.randint(SIZES[size]["vocab_size"], (batch, PROMPT_LENGTH)).to(args.device)
    times_s, tokens = time_ways(ways, prompt, NEW_TOKENS[size], args)
    read_bytes = {name: count_read_bytes(model, 4) for name in ways}
    read_bytes["fastest"] = count_read_bytes(model, fast_dtype.itemsize)
    figures: dict[str, Any] = {f"fastest_dtype_{size}_{batch}": str(fast_dtype).removeprefix("torch.")}
    rows = []
    for name, seconds in times_s.items():
        per_step = statistics.median(seconds) / NEW_TOKENS[size]
        share = read_bytes[name] / per_step / 1e9 / bandwidth_gb_per_s
        to_gpt2 = statistics.median(t / u for t, u in zip(times_s["gpt2"], seconds, strict=True))
        to_nanogpt = statistics.median(t / u for t, u in zip(times_s["nanogpt"], seconds, strict=True))
        rows.append((name, round(batch / per_step), 1e3 * per_step, to_nanogpt, to_gpt2, share))
        figures |= {
            f"{name}_tokens_per_s_{size}_{batch}": round(batch / per_step, 1),
            f"{name}_to_nanogpt_{size}_{batch}": round(to_nanogpt, 3),
            f"{name}_to_gpt2_{size}_{batch}": round(to_gpt2, 3),
            f"{name}_bandwidth_{size}_{batch}": round(share, 3),
        }
    if "onnx" in ways:
        ratios = [t / u for t, u in zip(times_s["ours"], times_s["onnx"], strict=True)]
        figures[f"{TO_ONNX}_{size}_{batch}"] = round(statistics.median(ratios), 3)
    figures[f"are_tokens_nanogpts_{size}_{batch}"] = bool(torch.equal(tokens["ours"], tokens["nanogpt"]))
    print(f"\n{size}, batch {batch}, {NEW_TOKENS[size]} new tokens")
    print_table(("", "tokens/s", "ms a step", "x nanogpt", "x gpt2", "bandwidth"), rows)
    return figures


def measure_past_block_size(args: argparse.Namespace) -> dict[str, Any]:
    """Times the small model when every token is past block_size: nanoGPT, ours, and ours with a stride."""
    model = make_model("shakespeare", args.device)
    ways = {
        "nanogpt": make_reforward(model, args.device),
        "ours": make_generate(model),
        "stride": make_generate(model, stride=STRIDE),
    }
    prompt = torch.randint(SIZES["shakespeare"]["vocab_size"], (1, SIZES["shakespeare"]["block_size"] + 1))
    times_s, _ = time_ways(ways, prompt.to(args.device), NEW_TOKENS_PAST, args)
    figures: dict[str, Any] = {}
    rows = []
    for name, seconds in times_s.items():
        ratio = statistics.median(t / u for t, u in zip(times_s["nanogpt"], seconds, strict=True))
        per_step = statistics.median(seconds) / NEW_TOKENS_PAST
        rows.append((name, round(1 / per_step), 1e3 * per_step, ratio))
        figures[f"{name}_past_tokens_per_s"] = round(1 / per_step, 1)
        figures[f"{name}_past_to_nanogpt"] = round(ratio, 3)
    print(f"\nshakespeare past block_size, batch 1, stride {STRIDE} for the last line")
    print_table(("", "tokens/s", "ms a step", "x nanogpt"), rows)
    return figures


def make_reforward(model: nn.Module, device: str) -> Run:
    """Makes nanoGPT's own loop, which computes the logits of the last position only."""
    reference = import_reference()(**{k: getattr(model.config, k) for k in SIZES["tiny"]}, dropout=0.0, bias=False)
    reference.load_state_dict(model.state_dict())
    reference.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0][:, [-1]],))
    return reference.to(device).eval().generate_greedily  # type: ignore[return-value]


def make_gpt2(model: NanoGPTLMHeadModel) -> GPT2LMHeadModel:
    """Makes transformers' GPT-2 with the same weights: transposed for Conv1D, with zeros for biases."""
    config = model.config
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_positions=config.block_size,
            vocab_size=config.vocab_size,
            activation_function="gelu",
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    state = model.state_dict()
    for name, parameter in gpt2.named_parameters():
        is_transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        source = state.get(name)
        parameter.copy_(torch.zeros_like(parameter) if source is None else source.t() if is_transposed else source)
    return gpt2.to(model.device).eval()


def count_read_bytes(model: nn.Module, itemsize: int) -> int:
    """Returns the bytes of the weights that a step reads: all, except the position table."""
    return itemsize * (sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel())


def list_targets(figures: dict[str, Any], args: argparse.Namespace) -> list[Target]:
    """Returns the targets for what was measured, on a CPU or on a GPU."""
    is_cpu = args.device == "cpu"
    bounds = {
        "ours_to_gpt2_demo_1": 2.0,
        "ours_to_gpt2_shakespeare_1": 1.8,
        "ours_to_gpt2_124m_1": 1.6,
        "fastest_to_gpt2_124m_1": 3.3,
        "ours_to_nanogpt_shakespeare_1": 5.0,
    }
    if not is_cpu:
        bounds = {"fastest_to_gpt2_124m_1": 5.0, "fastest_to_gpt2_shakespeare_1": 5.0}
    targets = [
        Target(name, figures[name], bound, is_minimum=True) for name, bound in bounds.items() if name in figures
    ]
    return targets + [Target(name, figures[name], ONNX_RATIO) for name in figures if name.startswith(TO_ONNX)]


if __name__ == "__main__":
    main()
