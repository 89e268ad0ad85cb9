"""Measures the peak memory of a training step with and without config.loss_chunk_size; part of train_step.py.

The vocabulary is GPT-2's padded 50,304, so that the logits take most of the memory: 2 layers, width 256, 8 x 256
tokens. Each way runs in a fresh process, three times; memory is the growth of the peak resident set over the second
step.
"""

import time
from statistics import median
from typing import Any

import torch
from common import read_resident_bytes, reset_peak_bytes, run_in_child

from hugging_nano_gpt import NanoGPTConfig, NanoGPTLMHeadModel

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 256, "block_size": 256, "vocab_size": 50304, "bias": False}
BATCH_SIZE = 8
CHUNK_SIZE = 256
ROUNDS = 3

# With loss_chunk_size compared with the default, which has nanoGPT's bits; measured with torch 2.13.
LOSS_LIMITS = {
    "loss_memory_ratio": 0.14,
    "loss_time_ratio": 1.0,
    "loss_difference": 1e-6,
    "gradient_difference": 1e-5,
}


def measure_loss_memory() -> dict[str, Any]:
    """Returns bytes and seconds of a step both ways (medians), and the differences of loss and gradients."""
    pairs = [(run_in_child(measure_step, None), run_in_child(measure_step, CHUNK_SIZE)) for _ in range(ROUNDS)]
    default, chunked = pairs[0]
    peak_mb, chunked_peak_mb = (median(pair[way]["peak_bytes"] / 1e6 for pair in pairs) for way in (0, 1))
    gradients = zip(default["gradients"], chunked["gradients"], strict=True)
    return {
        "loss_memory_ratio": round(chunked_peak_mb / peak_mb, 3),
        "loss_time_ratio": round(median(pair[1]["time_s"] / pair[0]["time_s"] for pair in pairs), 3),
        "default_peak_mb": round(peak_mb),
        "chunked_peak_mb": round(chunked_peak_mb),
        "loss_difference": abs(chunked["loss"] / default["loss"] - 1),
        "gradient_difference": max(float((a - b).norm() / a.norm()) for a, b in gradients),
    }


def measure_step(loss_chunk_size: int | None) -> dict[str, Any]:
    """Takes two steps, forward and backward, and measures the second."""
    torch.manual_seed(1337)
    model = NanoGPTLMHeadModel(NanoGPTConfig(**SIZES, loss_chunk_size=loss_chunk_size)).train()
    tokens = torch.randint(SIZES["vocab_size"], (BATCH_SIZE, SIZES["block_size"] + 1))
    idx, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    model(idx, shift_labels=targets).loss.backward()
    model.zero_grad(set_to_none=True)
    reset_peak_bytes()
    bytes_before, start = read_resident_bytes("VmRSS"), time.perf_counter()
    loss = model(idx, shift_labels=targets).loss
    loss.backward()
    time_s, peak_bytes = time.perf_counter() - start, read_resident_bytes("VmHWM") - bytes_before
    gradients = [parameter.grad for parameter in model.parameters()]
    return {"peak_bytes": peak_bytes, "time_s": time_s, "loss": loss.item(), "gradients": gradients}
