"""Measures the time and memory that it takes to load a nanoGPT checkpoint as a Transformers model.

The file is what train.py writes for GPT-2's 124M parameters with AdamW's moments: about 1.5 GB, of which the optimizer
is two thirds.
"ours" is NanoGPTLMHeadModel.from_nanogpt_ckpt, "ours_stripped" the same for a file without the optimizer.
"usual" is what the public converter scripts do: torch.load of the whole file, a GPT2LMHeadModel constructed with
random weights, and a copy of every tensor, transposed for Conv1D.

Each load runs in a fresh process, after the imports and a tiny warm-up load, with the file in the page cache. The
kinds take turns. Memory is the growth of the peak resident set during the load, in multiples of the weights' bytes
(the tied matrix counts once). Each process then checks what it loaded: ours against the file bit for bit, usual by its
logits.

Then it times `hugging-nano-gpt convert` of the whole file, in turns with a copy of the weights' bytes to the same disk
(both end with an fsync) and with only the start of Python and the imports, which the command's time includes.

Run: python benchmarks/load.py [--repeats 5] [--size tiny]; the file is in TMPDIR. The last line is one JSON object:
medians, ratios (also of the fastest loads, which other work disturbs least), targets, versions and threads.
"""

import argparse
import gc
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    Target,
    import_reference,
    print_result,
    print_table,
    read_resident_bytes,
    reset_peak_bytes,
    run_in_child,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import hugging_nano_gpt
from hugging_nano_gpt import NanoGPTLMHeadModel

SIZES = {
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304},
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 96},
}
DEMO_PATH = Path(hugging_nano_gpt.__file__).parent / "demo" / "ckpt.pt"
CONV1D_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
PROC_STATUS = Path("/proc/self/status")


def main() -> None:
    """Writes the checkpoint, measures both ways in turn and prints what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="loads of each kind (default 5)")
    parser.add_argument("--size", choices=SIZES, default="124m", help="tiny: a smoke test that takes seconds")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path, stripped_path = Path(folder) / "ckpt.pt", Path(folder) / "stripped.pt"
        weights_bytes = run_in_child(write_checkpoint, path, stripped_path, SIZES[args.size])
        read_once(path)
        read_once(stripped_path)
        print(f"{args.size}: {path.stat().st_size / 1e6:.0f} MB of file, {weights_bytes / 1e6:.0f} MB of weights")
        ways = {
            "ours": partial(measure_ours, path),
            "ours_stripped": partial(measure_ours, stripped_path),
            "usual": partial(measure_usual, path),
        }
        samples: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way, measured in samples.items():
                measured.append(run_in_child(ways[way]))
        commands = measure_commands(path, Path(folder), args.repeats)
    report(samples, weights_bytes, commands, {"benchmark": "load", "size": args.size, "repeats": args.repeats})


def measure_commands(path: Path, folder: Path, repeats: int) -> dict[str, float]:
    """Returns the median seconds of a conversion by the command line, a copy of the weights, and a start of Python."""
    program = [sys.executable, "-m", "hugging_nano_gpt", "convert", str(path)]
    times_s: dict[str, list[float]] = {"convert": [], "copy": [], "start": []}
    start = [sys.executable, "-c", "import hugging_nano_gpt"]
    for index in range(1 + repeats):  # the first round warms up
        target = folder / f"converted-{index}"
        times_s["convert"].append(time_call(partial(run_command, [*program, str(target)])))
        times_s["copy"].append(time_call(partial(copy_to_disk, target / "model.safetensors", folder / "copy")))
        times_s["start"].append(time_call(partial(run_command, start)))
        shutil.rmtree(target)
    return {name: statistics.median(measured[1:]) for name, measured in times_s.items()}


def run_command(command: list[str]) -> None:
    """Runs a command to its end, and raises if it fails."""
    subprocess.run(command, check=True, capture_output=True)


def copy_to_disk(source: Path, target: Path) -> None:
    """Copies a file and flushes the copy to disk."""
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    target.unlink()


def time_call(function: Callable[[], Any]) -> float:
    """Returns the seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def report(
    samples: dict[str, list[dict[str, float]]],
    weights_bytes: int,
    commands: dict[str, float],
    settings: dict[str, Any],
) -> None:
    """Prints the table, the targets and the JSON line."""
    times = {way: [sample["time_s"] for sample in measured] for way, measured in samples.items()}
    memory = {
        way: statistics.median(sample["peak_growth_bytes"] for sample in measured) / weights_bytes
        for way, measured in samples.items()
    }
    medians = {way: statistics.median(measured) for way, measured in times.items()}
    print_table(
        ("", "median s", "fastest s", "slowest s", "memory x weights"),
        [(way, medians[way], min(times[way]), max(times[way]), memory[way]) for way in samples],
    )
    time_ratio = medians["usual"] / medians["ours"]
    figures = {
        **settings,
        **{f"{way}_s": round(medians[way], 4) for way in samples},
        "time_ratio": round(time_ratio, 3),
        "time_ratio_of_fastest": round(min(times["usual"]) / min(times["ours"]), 3),
        **{f"{way}_memory_ratio": round(memory[way], 3) for way in samples},
        "weights_bytes": weights_bytes,
        **{f"{name}_command_s": round(seconds, 4) for name, seconds in commands.items()},
        "convert_to_copy": round(commands["convert"] / commands["copy"], 3),
        "convert_without_start_to_copy": round((commands["convert"] - commands["start"]) / commands["copy"], 3),
    }
    print_table(("command", "median s"), list(commands.items()))
    targets = [
        Target("time_ratio", time_ratio, 8, is_minimum=True),
        Target("ours_memory_ratio", memory["ours"], 1.3),
        Target("optimizer_memory_ratio", memory["ours"] - memory["ours_stripped"], 0.05),
        Target("convert_to_copy", figures["convert_to_copy"], 3),
    ]
    print_result(figures, targets if settings["size"] == "124m" else [])


def write_checkpoint(path: Path, stripped_path: Path, sizes: dict[str, int]) -> int:
    """Writes the checkpoint of a model that made one AdamW step, and one without the optimizer; returns the bytes of
    the weights."""
    torch.manual_seed(1337)
    model_args = {**sizes, "bias": True, "dropout": 0.0}
    model = import_reference()(**model_args)
    parameters = list(model.parameters())  # the tied matrix once
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))
    for parameter in parameters:
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": model_args,
        "iter_num": 1,
        "best_val_loss": 10.9,
        "config": {"out_dir": "out", "learning_rate": 6e-4, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95},
    }
    stripped = {key: value for key, value in checkpoint.items() if key != "optimizer"}
    for contents, target in ((checkpoint, path), (stripped, stripped_path)):
        with target.open("wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())  # otherwise the disk would still be busy during the first loads
    return sum(parameter.nbytes for parameter in parameters)


def read_once(path: Path) -> None:
    """Reads the whole file, so that it is in the page cache for every load."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def measure_ours(path: Path) -> dict[str, float]:
    """Measures from_nanogpt_ckpt, and checks that every tensor equals the file's."""
    load_ours(DEMO_PATH)
    model, sample = measure(partial(load_ours, path))
    expected = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]
    found = model.state_dict()
    wrong = [name for name in expected.keys() | found.keys() if not is_same(expected.get(name), found.get(name))]
    if wrong:
        raise SystemExit(f"ours: expected the tensors of the file, got others: {sorted(wrong)}")
    return sample


def measure_usual(path: Path) -> dict[str, float]:
    """Measures the usual way, and checks that its model computes the same as ours."""
    GPT2LMHeadModel(GPT2Config(**rename_model_args(SIZES["tiny"] | {"dropout": 0.0})))
    model, sample = measure(partial(load_usual, path))
    ours = load_ours(path)
    idx = torch.arange(16)[None]
    with torch.no_grad():
        difference = float((model(idx).logits - ours(idx).logits).abs().max())
    if not difference < 1e-4:  # float32 sums in another order; one matrix not transposed gives far more
        raise SystemExit(f"usual: expected the logits of ours to within 1e-4, got a difference of {difference}")
    return sample


def load_ours(path: Path) -> PreTrainedModel:
    """Loads the checkpoint with this package."""
    return NanoGPTLMHeadModel.from_nanogpt_ckpt(path)


def load_usual(path: Path) -> PreTrainedModel:
    """Loads the checkpoint as the public converter scripts do."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model = GPT2LMHeadModel(GPT2Config(**rename_model_args(checkpoint["model_args"])))
    tensors = checkpoint["model"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = tensors[name]
            parameter.copy_(tensor.t() if name.endswith(CONV1D_WEIGHTS) else tensor)
    return model.eval()


def rename_model_args(model_args: dict[str, Any]) -> dict[str, Any]:
    """Translates nanoGPT's model_args to GPT2Config's arguments."""
    dropout = model_args["dropout"]
    return {
        "n_layer": model_args["n_layer"],
        "n_head": model_args["n_head"],
        "n_embd": model_args["n_embd"],
        "n_positions": model_args["block_size"],
        "vocab_size": model_args["vocab_size"],
        "activation_function": "gelu",
        "bos_token_id": None,  # GPT-2's ids would be outside a tiny vocabulary
        "eos_token_id": None,
        "attn_pdrop": dropout,
        "embd_pdrop": dropout,
        "resid_pdrop": dropout,
    }


def is_same(expected: torch.Tensor | None, found: torch.Tensor | None) -> bool:
    """Returns whether two tensors exist and have the same numbers and dtype."""
    if expected is None or found is None:
        return False
    return expected.dtype == found.dtype and torch.equal(expected, found)


def measure(load: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, dict[str, float]]:
    """Runs a load; returns the model, the time, and the growth of the peak resident set."""
    gc.collect()
    reset_peak_bytes()
    bytes_before = read_resident_bytes("VmRSS")
    start = time.perf_counter()
    model = load()
    time_s = time.perf_counter() - start
    return model, {"time_s": time_s, "peak_growth_bytes": read_resident_bytes("VmHWM") - bytes_before}


if __name__ == "__main__":
    main()
