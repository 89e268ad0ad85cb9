"""Measures NanoGPTTrainer against a plain loop in nanoGPT's style, and the command against nanoGPT's train.py.

NanoGPTTrainer and the loop make the same updates at the size of train_shakespeare_char.py (2 micro-steps), on the same
windows of a token file, with nanoGPT's optimizer, schedule and clipping. The loop does only what train.py does. They
take turns, and both end at the same bits. Progress bars and logging are on, as by default. train_step.py runs this
part.

`hugging-nano-gpt train` and train.py itself make the same run in turns. The times compared are the processor's seconds
between the lines that both print for every update.

Run: NANOGPT_DIR=/path/to/nanoGPT python benchmarks/trainer.py [--rounds 5] [--updates 20]
The last line is one JSON object.
"""

import argparse
import contextlib
import io
import itertools
import os
import pickle
import runpy
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Target, print_result
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar

from hugging_nano_gpt import NanoGPTConfig, NanoGPTLMHeadModel, TrainingState
from hugging_nano_gpt.training import (
    NanoGPTSchedule,
    NanoGPTTrainer,
    TokenDataset,
    collate_windows,
    make_optimizer,
    read_settings,
    run_training,
    training_arguments_from_nanogpt,
)
from hugging_nano_gpt.training.drawing import make_random_state

# The shape of config/train_shakespeare_char.py, with an evaluation only at the first update.
SHAKESPEARE = {
    "dataset": "random",
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "block_size": 256,
    "dropout": 0.2,
    "eval_interval": 1000,
    "eval_iters": 1,
}

MICRO_STEPS = 2
WARM_UP_UPDATES = 3
MOST_OVERHEAD = 0.05


class UpdateTimes(TrainerCallback):
    """Records when each update ends."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times_s.append(time.perf_counter())


def measure_trainer(
    sizes: dict[str, int],
    n_updates: int = 10,
    rounds: int = 4,
    device: str = "cpu",
    dtype: str = "float32",
    batch_size: int = 4,
) -> dict[str, Any]:
    """Returns the seconds of an update both ways, and whether they ended at the same bits.

    They take turns by whole runs, so a disturbance affects only one of them. Therefore the medians of the least
    disturbed run of each are compared.
    """
    seconds: dict[str, list[float]] = {"trainer": [], "loop": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        np.random.default_rng(0).integers(0, sizes["vocab_size"], 100_000, dtype=np.uint16).tofile(path)
        dataset = TokenDataset(path, sizes["block_size"])
        config = make_config(folder, n_updates + WARM_UP_UPDATES, device, dtype, batch_size)
        for _ in range(rounds):
            for way, run in (("trainer", run_trainer), ("loop", run_loop)):
                model = make_model(sizes).to(device)
                ends = run(model, dataset, config)
                ends = ends[WARM_UP_UPDATES - 1 :]
                seconds[way].append(statistics.median(end - start for start, end in itertools.pairwise(ends)))
                if way == "trainer":
                    expected = model.state_dict()
            is_same = all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())
    least = {way: min(medians) for way, medians in seconds.items()}
    return {
        "trainer_ms": round(1e3 * least["trainer"], 3),
        "loop_ms": round(1e3 * least["loop"], 3),
        "trainer_overhead": round(least["trainer"] / least["loop"] - 1, 4),
        "is_trainer_at_the_bits_of_the_loop": is_same,
    }


def make_model(sizes: dict[str, int]) -> NanoGPTLMHeadModel:
    """Makes the same model each time."""
    torch.manual_seed(1337)
    return NanoGPTLMHeadModel(NanoGPTConfig(**sizes, dropout=0.0, bias=False)).train()


def make_config(folder: str, n_updates: int, device: str, dtype: str, batch_size: int) -> dict[str, Any]:
    """Returns the settings of both under train.py's names."""
    return {
        "out_dir": folder,
        "max_iters": n_updates,
        "batch_size": batch_size,
        "gradient_accumulation_steps": MICRO_STEPS,
        "learning_rate": 1e-3,
        "min_lr": 1e-4,
        "warmup_iters": 10,
        "lr_decay_iters": 1000,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.99,
        "grad_clip": 1.0,
        "log_interval": 10,
        "device": device,
        "dtype": dtype,
        "compile": False,
        "wandb_log": False,
    }


def run_trainer(model: NanoGPTLMHeadModel, dataset: TokenDataset, config: dict[str, Any]) -> list[float]:
    """Trains with NanoGPTTrainer; returns the time at the end of each update."""
    args, _ = training_arguments_from_nanogpt(config, eval_strategy="no", save_strategy="no")
    times = UpdateTimes()
    trainer = NanoGPTTrainer(model, args, dataset, training_state=TrainingState(config=config), callbacks=[times])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer.train()
    return times.times_s


def run_loop(model: NanoGPTLMHeadModel, dataset: TokenDataset, config: dict[str, Any]) -> list[float]:
    """Trains with a loop like train.py's; returns the time at the end of each update."""
    optimizer = make_optimizer(model, config)
    schedule = NanoGPTSchedule(optimizer, config)
    torch.set_rng_state(make_random_state(model.config))
    batch = draw_batch(dataset, config["batch_size"], model.device)
    ends = []
    is_autocast = config["dtype"] == "bfloat16" and model.device.type == "cuda"  # as in train.py
    for _ in range(config["max_iters"]):
        for _ in range(MICRO_STEPS):
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=is_autocast):
                loss = model(**batch).loss / MICRO_STEPS
            batch = draw_batch(dataset, config["batch_size"], model.device)  # while the model is computing
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        ends.append(time.perf_counter())
    return ends


def draw_batch(dataset: TokenDataset, batch_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Samples a batch like train.py's get_batch, and copies it to a GPU from pinned memory without waiting."""
    batch = collate_windows([dataset[offset] for offset in torch.randint(len(dataset), (batch_size,)).tolist()])
    if device.type != "cuda":
        return batch
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}


class UpdateLines(io.StringIO):
    """Receives what a run prints, and records both clocks at the line of every update."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[tuple[float, float]] = []

    def write(self, text: str) -> int:
        """Receives a piece of a line."""
        if text.startswith("iter "):
            self.ends.append((time.perf_counter(), time.process_time()))
        return super().write(text)


def measure_command(nanogpt_dir: Path, rounds: int, n_updates: int) -> dict[str, Any]:
    """Returns the seconds of an update of the command and of train.py, and the median ratio of a round's medians.

    In every round each of them makes one run, in alternating order. The targets are for the processor's seconds;
    wall-clock time, which is also returned, is longer if other programs are running.
    """
    seconds: dict[str, dict[str, list[float]]] = {clock: {"command": [], "train_py": []} for clock in ("wall", "cpu")}
    with tempfile.TemporaryDirectory() as name:
        folder = make_workplace(Path(name), nanogpt_dir)
        settings = {**make_config("out", n_updates, "cpu", "float32", batch_size=4), **SHAKESPEARE, "log_interval": 1}
        flags = [f"--{name}={value}" for name, value in settings.items()]
        ways = {"command": run_command, "train_py": run_train_py}
        for number in range(rounds):
            for way in sorted(ways, reverse=number % 2 == 1):
                lines = UpdateLines()
                with contextlib.chdir(folder), contextlib.redirect_stdout(lines), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # warnings about names that torch has changed since
                    ways[way]([*flags, f"--out_dir=out-{way}-{number}"])
                for clock, ends in zip(seconds, zip(*lines.ends[WARM_UP_UPDATES - 1 :], strict=True), strict=True):
                    times_s = [end - start for start, end in itertools.pairwise(ends)]
                    seconds[clock][way].append(round(statistics.median(times_s), 4))
    overheads = {
        clock: round(statistics.median(a / b for a, b in zip(*found.values(), strict=True)) - 1, 4)
        for clock, found in seconds.items()
    }
    return {"seconds": seconds, "command_overhead": overheads["cpu"], "command_overhead_wall": overheads["wall"]}


def make_workplace(folder: Path, nanogpt_dir: Path) -> Path:
    """Makes a folder to run train.py in: random data of 65 characters, and links to the checkout."""
    data_dir = folder / "data" / str(SHAKESPEARE["dataset"])
    data_dir.mkdir(parents=True)
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 65, 100_000, dtype=np.uint16).tofile(data_dir / f"{split}.bin")
    (data_dir / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65}))
    for script in ("train.py", "model.py", "configurator.py"):
        (folder / script).symlink_to(nanogpt_dir / script)
    return folder


def run_command(flags: list[str]) -> None:
    """Runs the same as `hugging-nano-gpt train`."""
    run_training(read_settings(flags))


def run_train_py(flags: list[str]) -> None:
    """Runs the train.py of the working directory, in this process."""
    sys.argv, sys.path[:0] = ["train.py", *flags], [str(Path.cwd())]
    runpy.run_path("train.py", run_name="__main__")


def main() -> None:
    """Measures the command and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=20, help="of each run")
    options = parser.parse_args()
    disable_progress_bar()
    figures = measure_command(Path(os.environ["NANOGPT_DIR"]).absolute(), options.rounds, options.updates)
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    target = Target("command_overhead", figures["command_overhead"], MOST_OVERHEAD)
    print_result({"benchmark": "trainer", **vars(options), **figures}, [target])


if __name__ == "__main__":
    main()
