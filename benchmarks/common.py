"""What the benchmarks share: the machine they ran on, the models they compare, timing in turns, and how they print.

Each benchmark prints a table for people, then, as its last line, one JSON object for programs.
"""

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from hugging_nano_gpt import NanoGPTConfig, NanoGPTLMHeadModel

SIZES: dict[str, dict[str, int]] = {
    "demo": {"n_layer": 3, "n_head": 3, "n_embd": 96, "block_size": 128, "vocab_size": 65},
    "shakespeare": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65},
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304},
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 65},
}
PROMPT_LENGTH = 16
Run = Callable[[torch.Tensor, int], torch.Tensor]

ROOT = Path(__file__).resolve().parent.parent
PROC_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Target:
    """A figure and its bound.

    Args:
        name: What the figure is, as a key of the JSON object.
        value: The figure.
        limit: The bound, which the figure may equal.
        is_minimum: Whether the bound is a minimum; otherwise it is a maximum.
    """

    name: str
    value: float
    limit: float
    is_minimum: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the figure is within its bound."""
        return self.value >= self.limit if self.is_minimum else self.value <= self.limit


def import_reference() -> type[torch.nn.Module]:
    """Imports nanoGPT's architecture in plain torch from the tests; it uses nothing of this package."""
    sys.path.insert(0, str(ROOT))
    from tests.helpers.reference import ReferenceGPT

    return ReferenceGPT


def synchronize(device: str) -> None:
    """Waits until a GPU has finished its work."""
    if not device.startswith("cpu"):
        torch.accelerator.synchronize(device)


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Returns the versions, threads and processors that the figures depend on."""
    return {
        "python": platform.python_version(),
        **{name: find_version(name) for name in ("torch", "transformers", "hugging-nano-gpt")},
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
    }


def find_version(name: str) -> str | None:
    """Returns an installed version, or None for this package if it runs from a checkout."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Prints rows under a header: the first column left-aligned, numbers right-aligned with three decimals."""
    for row in (header, *rows):
        cells = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row]
        print(f"{cells[0]:<22}" + "".join(f"{cell:>18}" for cell in cells[1:]))


def print_result(figures: dict[str, Any], targets: list[Target], device: str = "cpu") -> None:
    """Prints whether the targets are met, then everything as one line of JSON."""
    for target in targets:
        bound = "at least" if target.is_minimum else "at most"
        print(f"{target.name} {target.value:.3f}: {bound} {target.limit:g}, {'met' if target.is_met else 'MISSED'}")
    is_met = {target.name: target.is_met for target in targets}
    print(json.dumps({**figures, "is_met": is_met, **describe_machine(device)}), flush=True)


def run_in_child(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in a fresh process, so that no memory of an earlier call is reused or counted."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=disable_progress_bar) as pool:  # they would clutter the output
        return pool.submit(function, *args).result()


def reset_peak_bytes() -> None:
    """Resets the peak resident set to what is resident now, if the system supports it (proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def read_resident_bytes(field: str) -> int:
    """Reads VmRSS (now) or VmHWM (peak) of this process; without /proc, returns the peak for both."""
    if PROC_STATUS.exists():
        lines = PROC_STATUS.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def make_model(size: str, device: str) -> NanoGPTLMHeadModel:
    """Makes our model with random weights, large enough that no two logits are nearly the same."""
    model = NanoGPTLMHeadModel(NanoGPTConfig(**SIZES[size], bias=False))
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(4)
    return model.to(device).eval()


def time_ways(
    ways: dict[str, Run], prompt: torch.Tensor, count: int, args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Returns the seconds of each round and the tokens of each way; the first round is a warm-up and is ignored.

    A way is called until half a second has passed, and its seconds are the median of the calls: the first ones wake
    its threads while those of the way before are still waiting for work.
    """
    times_s: dict[str, list[float]] = {name: [] for name in ways}
    tokens = {}
    names = list(ways)
    for round_index in range(1 + args.rounds):
        first = round_index % len(names)
        for name in names[first:] + names[:first]:
            seconds: list[float] = []
            while sum(seconds) < 0.5:
                synchronize(args.device)
                start = time.perf_counter()
                tokens[name] = ways[name](prompt, count)
                synchronize(args.device)
                seconds.append(time.perf_counter() - start)
            if round_index > 0:
                times_s[name].append(statistics.median(seconds))
    return times_s, tokens


def make_generate(model: nn.Module, **settings: Any) -> Run:
    """Makes a way of Transformers' generate()."""

    def run(prompt: torch.Tensor, count: int) -> torch.Tensor:
        return model.generate(prompt, max_new_tokens=count, do_sample=False, **settings)

    return run
