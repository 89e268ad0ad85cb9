"""Measures training and decoding at 124M against the reference, GPT2LMHeadModel and the limits of the card.

The card's limits are measured in the same run: the rate of a bfloat16 matrix product, and of reading memory.
"""

import argparse
import functools
import statistics
import time
from functools import partial
from typing import Any

import torch
from generate import count_read_bytes, make_gpt2, measure_bandwidth
from torch import nn
from train_step import Contender, make_contenders, take_step

from .probe import Outcome, Probe, Setting, make_batch, make_pair, measure_differences

LIMIT_S = 220.0
MOST_TIMES_SLOWER = 1.03  # as in train_step.py
ROUNDS = {"full": 10, "toy": 2}
WARM_UP_ROUNDS = 3
BATCH = {"full": 16, "toy": 2}
CHUNK_SIZE = 2048  # tokens
MOST_OF_MEMORY = 0.8
DECODED = {"full": 64, "toy": 8}


def probe_card(setting: Setting) -> Outcome:
    """Measures the rate of matrix products and the bandwidth of the memory."""
    figures = {
        "bfloat16 matrix product, TFLOP/s": measure_matmul(setting) / 1e12,
        "read bandwidth, GB/s": measure_read(setting) / 1e9,
    }
    return Outcome(all(value > 0 for value in figures.values()), "what the card can do", figures)


@functools.cache
def measure_matmul(setting: Setting) -> float:
    """Returns the floating-point operations per second of a large product of random bfloat16 matrices."""
    size = setting.choose(8192, 256)
    torch.manual_seed(0)
    left, right = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    times_s = []
    for _ in range(13):
        setting.synchronize()
        start = time.perf_counter()
        torch.mm(left, right)
        setting.synchronize()
        times_s.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times_s[3:])


@functools.cache
def measure_read(setting: Setting) -> float:
    """Returns the bytes per second at which memory is read."""
    return measure_bandwidth(setting.device, setting.choose(1 << 32, 1 << 24))


def probe_training(setting: Setting, is_compiled: bool) -> Outcome:
    """Trains ours, the reference and GPT-2 in turns on the same batches, bfloat16 autocast, fused AdamW."""
    sizes = setting.sizes()
    args = argparse.Namespace(
        device=setting.device,
        dtype="bfloat16",
        compile=is_compiled and setting.is_cuda,  # compiling C++ takes minutes, and is tested on CPUs
        batch_size=setting.choose(BATCH["full"], BATCH["toy"]),
    )
    with torch.device(setting.device):
        contenders, figures = make_contenders(sizes, args, dropout=0.0), setting.figures
    figures["batch"] = f"{args.batch_size} x {sizes['block_size']}"
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in contenders}
    names = list(contenders)
    for round_index in range(WARM_UP_ROUNDS + setting.choose(ROUNDS["full"], ROUNDS["toy"])):
        batch = make_batch(setting, args.batch_size, sizes["block_size"], sizes["vocab_size"], seed=round_index)
        first = round_index % len(names)
        for name in names[first:] + names[:first]:
            seconds, peak_bytes, loss = measure_step(setting, contenders[name], batch, args)
            losses[name].append(loss)
            contenders[name].times_s.append(seconds)
            if round_index == 0:
                figures[f"{name}: first step, s"] = seconds
            figures[f"{name}: memory of a step, GB"] = peak_bytes / 1e9
    figures |= summarise_training(setting, contenders, sizes, args.batch_size)
    difference = max(float((a - b).abs() / b) for a, b in zip(losses["ours"], losses["reference"], strict=True))
    figures["largest relative difference of a loss"] = difference
    is_true = difference <= 2e-2 and all(torch.stack(each).isfinite().all() for each in losses.values())
    if not setting.is_toy:
        is_true = is_true and figures["ours / reference, time"] <= MOST_TIMES_SLOWER
    return Outcome(is_true, f"no more than {MOST_TIMES_SLOWER} times the reference's time, and its losses")


def measure_step(
    setting: Setting, contender: Contender, batch: tuple[torch.Tensor, ...], args: argparse.Namespace
) -> tuple[float, int, torch.Tensor]:
    """Takes a step; returns its seconds, its bytes in addition to weights and moments, and the loss."""
    if setting.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if setting.is_cuda else 0
    setting.synchronize()
    start = time.perf_counter()
    loss = take_step(contender, *batch, args)
    setting.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if setting.is_cuda else 0
    return seconds, peak - before, loss


def summarise_training(
    setting: Setting, contenders: dict[str, Contender], sizes: dict[str, int], batch: int
) -> dict[str, Any]:
    """Returns tokens per second, the share of the card's matrix rate (MFU), and the ratios of the rounds' times."""
    tokens = batch * sizes["block_size"]
    times_s = {name: contender.times_s[WARM_UP_ROUNDS:] for name, contender in contenders.items()}
    figures: dict[str, Any] = {}
    for name, seconds in times_s.items():
        median = statistics.median(seconds)
        figures[f"{name}: tokens/s"] = round(tokens / median)
        flops = tokens * count_flops_per_token(contenders[name].model, sizes) / median
        figures[f"{name}: MFU of the measured rate"] = flops / measure_matmul(setting)
    for name in ("reference", "gpt2"):
        ratios = [ours / other for ours, other in zip(times_s["ours"], times_s[name], strict=True)]
        figures[f"ours / {name}, time"] = statistics.median(ratios)
    return figures


def count_flops_per_token(model: nn.Module, sizes: dict[str, int]) -> int:
    """Counts like nanoGPT's estimate_mfu: 6 for each weight except the positions', and the products of attention."""
    weights = sum(p.numel() for p in model.parameters()) - sizes["block_size"] * sizes["n_embd"]
    return 6 * weights + 12 * sizes["n_layer"] * sizes["n_embd"] * sizes["block_size"]


def probe_chunked_loss(setting: Setting) -> Outcome:
    """Compares memory, time and gradients of a step with and without loss_chunk_size."""
    figures: dict[str, Any] = {}
    gradients = []
    batch = setting.choose(BATCH["full"], BATCH["toy"])
    for size in (None, setting.choose(CHUNK_SIZE, 16)):
        ours, _ = make_pair(setting, scale=1.0)
        ours.config.loss_chunk_size = size
        idx, targets = make_batch(setting, batch, ours.config.block_size, ours.config.vocab_size)
        seconds, peak_bytes = [], 0
        for _ in range(4):
            ours.zero_grad(set_to_none=True)
            if setting.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if setting.is_cuda else 0
            setting.synchronize()
            start = time.perf_counter()
            with torch.autocast(torch.device(setting.device).type, dtype=torch.bfloat16):
                loss = ours(idx, shift_labels=targets).loss
            loss.backward()
            setting.synchronize()
            seconds.append(time.perf_counter() - start)
            peak_bytes = (torch.cuda.max_memory_allocated() if setting.is_cuda else 0) - before
        gradients.append({name: parameter.grad for name, parameter in ours.named_parameters()})
        name = "all logits" if size is None else f"{size} tokens at a time"
        figures |= {f"{name}: ms": 1e3 * min(seconds), f"{name}: GB": peak_bytes / 1e9}
    figures["largest difference of a gradient"] = measure_differences(gradients[1], gradients[0])
    is_true = (
        figures["largest difference of a gradient"] <= 2e-2
    )  # sums of bfloat16 products are added in another order
    if setting.is_cuda and not setting.is_toy:
        used = [value for name, value in figures.items() if name.endswith(": GB")]
        figures["memory, chunked / all"] = used[1] / used[0]
        is_true = is_true and used[1] <= MOST_OF_MEMORY * used[0]
    return Outcome(is_true, f"the same gradients in at most {MOST_OF_MEMORY} times the memory", figures)


@torch.no_grad()
def probe_decoding(setting: Setting, batch: int, is_gpt2_compiled: bool = True) -> Outcome:
    """Times greedy tokens in bfloat16: ours and GPT-2 by default, then with the static cache, which is compiled.

    Compiling takes most of the time, so GPT-2 with a static cache can be skipped.
    """
    ours, _ = make_pair(setting)
    ours.eval()
    with torch.device(setting.device):
        gpt2 = make_gpt2(ours).to(torch.bfloat16)
    ours.to(torch.bfloat16)
    prompt, _ = make_batch(setting, batch, setting.choose(16, 4), ours.config.vocab_size)
    count = setting.choose(DECODED["full"], DECODED["toy"])
    limit = measure_read(setting) / count_read_bytes(ours, 2) * batch
    figures = setting.figures
    figures["tokens/s at the bandwidth limit"] = round(limit)
    for way, settings in (("", {}), (", static", {"cache_implementation": "static"})):
        for name, model in (("ours", ours), ("gpt2", gpt2)):
            if way and name == "gpt2" and not is_gpt2_compiled:
                continue
            try:
                speed = batch * count / time_generate(setting, model, prompt, count, settings)
            except Exception as error:
                if name == "ours":
                    raise
                figures[f"{name}{way}"] = f"{type(error).__name__}: {error}"[:200]
                continue
            figures[f"{name}{way}: tokens/s"] = round(speed, 1)
            figures[f"{name}{way}: of the limit"] = speed / limit
    is_true = all(
        figures[f"ours{way}: tokens/s"] >= figures.get(f"gpt2{way}: tokens/s", 0) for way in ("", ", static")
    )
    return Outcome(is_true or setting.is_toy, "at least as many tokens a second as GPT2LMHeadModel")


def time_generate(setting: Setting, model: Any, prompt: torch.Tensor, count: int, settings: dict[str, Any]) -> float:
    """Returns the seconds of the fastest of a few calls of generate, after one that compiles."""
    times_s = []
    for _ in range(3):
        setting.synchronize()
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=count, do_sample=False, **settings)
        setting.synchronize()
        times_s.append(time.perf_counter() - start)
    return min(times_s[1:])


PROBES: dict[str, Probe] = {
    "the card": probe_card,
    "training, not compiled": partial(probe_training, is_compiled=False),
    "loss_chunk_size": probe_chunked_loss,
    "decoding, batch 1": partial(probe_decoding, batch=1),
    "decoding, batch 64": partial(probe_decoding, batch=64, is_gpt2_compiled=False),
    "training, compiled": partial(probe_training, is_compiled=True),  # compiles three models, which takes a minute
}
