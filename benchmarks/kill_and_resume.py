"""Kills `hugging-nano-gpt train` at random moments, resumes it each time, and compares where it ends.

Each round starts the run, or resumes it with --resume, and kills it with SIGKILL at a random moment; saving is slow
enough here to be hit. After the last kill the run continues to its end, and its ckpt.pt is compared bit for bit with
that of a run that nobody stopped. The toy run evaluates and saves every few updates, with dropout.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hugging_nano_gpt import read_checkpoint

SETTINGS: dict[str, Any] = {
    "dataset": "toy",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 64,
    "block_size": 32,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "dropout": 0.2,
    "eval_iters": 2,
    "eval_interval": 4,
    "learning_rate": 1e-3,
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
}


def main() -> None:
    """Runs everything, prints a line for each kill, and exits with 1 if a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        length_s = run_to_the_end(folder, "whole", options.updates)
        while_saving = 0
        for number in range(options.kills):
            # the kill comes after the first update's line, before the rest of the run is over
            moment_s = draw.uniform(0.0, length_s / (options.kills + 2))
            state = kill(folder, options.updates, moment_s)
            while_saving += state != "training"
            print(f"kill {number + 1}: {moment_s:.3f} s after the first update, while {state}", flush=True)
        run_to_the_end(folder, "killed", options.updates, "--resume")
        whole, killed = (read_numbers(folder / name / "ckpt.pt") for name in ("whole", "killed"))
    differences = [name for name, tensor in whole.items() if not torch.equal(tensor, killed[name])]
    result = {"kills": options.kills, "while_saving": while_saving, "updates": options.updates}
    print(json.dumps({**result, "different_tensors": len(differences), "torch": torch.__version__}))
    sys.exit(bool(differences))


def write_data(folder: Path) -> None:
    """Writes random tokens and a vocabulary of 64 to the folder that train.py reads."""
    data_dir = folder / "data" / SETTINGS["dataset"]
    data_dir.mkdir(parents=True)
    for split, seed in (("train", 0), ("val", 1)):
        np.random.default_rng(seed).integers(0, 64, 20_000, dtype=np.uint16).tofile(data_dir / f"{split}.bin")
    (data_dir / "meta.pkl").write_bytes(b"\x80\x04}\x8c\x0avocab_size\x4b\x40s.")


def list_flags(out_dir: str, n_updates: int) -> list[str]:
    """Lists the settings of a run as flags."""
    settings = {**SETTINGS, "out_dir": out_dir, "max_iters": n_updates, "lr_decay_iters": n_updates}
    return [f"--{name}={value}" for name, value in settings.items()]


def start(folder: Path, out_dir: str, n_updates: int, *flags: str) -> subprocess.Popen[str]:
    """Starts the command."""
    command = [sys.executable, "-m", "hugging_nano_gpt", "train", *list_flags(out_dir, n_updates), *flags]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, **pipes)


def run_to_the_end(folder: Path, out_dir: str, n_updates: int, *flags: str) -> float:
    """Runs the command; returns the seconds from its first update to its end."""
    process = start(folder, out_dir, n_updates, *flags)
    wait_for_update(process)
    began = time.perf_counter()
    process.communicate()
    if process.returncode:
        sys.exit(f"the command ended with {process.returncode}")
    return time.perf_counter() - began


def wait_for_update(process: subprocess.Popen[str]) -> None:
    """Reads lines until that of the first update."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("iter"):
            return


def kill(folder: Path, n_updates: int, moment_s: float) -> str:
    """Resumes the run, kills it, and returns what it was doing: training, or writing which file."""
    process = start(folder, "killed", n_updates, "--resume")
    wait_for_update(process)
    time.sleep(moment_s)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    out_dir = folder / "killed"
    if list(out_dir.glob(".writing-*")):
        return "writing ckpt.pt"
    checkpoints = list(out_dir.glob("checkpoint-*"))
    is_whole = len(checkpoints) <= 1 and all((path / "trainer_state.json").exists() for path in checkpoints)
    return "training" if is_whole else "writing or removing a checkpoint of Trainer's"


def read_numbers(path: Path) -> dict[str, torch.Tensor]:
    """Reads weights, moments, iter_num and best_val_loss of a ckpt.pt, by name."""
    checkpoint = read_checkpoint(path)
    state = checkpoint.training_state
    moments = {
        f"{key} of {name}": value for name, kept in state.optimizer.moments.items() for key, value in kept.items()
    }
    counts = {
        name: torch.tensor(float(getattr(state, name)), dtype=torch.float64) for name in ("iter_num", "best_val_loss")
    }
    return {**checkpoint.state_dict, **moments, **counts}


if __name__ == "__main__":
    main()
