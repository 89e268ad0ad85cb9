"""A toy run with train.py's settings, none of them a default, and the contents of its ckpt.pt as tensors by name."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hugging_nano_gpt import read_checkpoint
from hugging_nano_gpt.training import TRAIN_DEFAULTS, NanoGPTTrainer, run_training
from hugging_nano_gpt.training.callbacks import TrainPyCallback

from .trace import TRACE_DIR

VOCAB_SIZE = 31  # of the trace's meta.pkl

SETTINGS: dict[str, Any] = {
    **TRAIN_DEFAULTS,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "bias": True,
    "dropout": 0.2,
    "batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_iters": 12,
    "eval_interval": 4,
    "eval_iters": 2,
    "learning_rate": 1e-2,
    "warmup_iters": 3,
    "lr_decay_iters": 10,
    "min_lr": 1e-3,
    "beta2": 0.99,
    "dataset": "toy",
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
}


def make_workplace(folder: Path) -> Path:
    """Puts the toy data set where train.py looks for it."""
    (folder / "data").mkdir(exist_ok=True)
    link = folder / "data" / SETTINGS["dataset"]
    if not link.exists():
        link.symlink_to(TRACE_DIR)
    return folder


def train(folder: Path, /, **changes: Any) -> NanoGPTTrainer:
    """Makes the toy run in a folder, with changes to train.py's settings or to the arguments of run_training."""
    arguments = {name: changes.pop(name) for name in changes.keys() - TRAIN_DEFAULTS.keys()}
    with contextlib.chdir(make_workplace(folder)):
        return run_training({**SETTINGS, **changes}, **arguments)


@contextlib.contextmanager
def signalled(number: int, iter_num: int, again: bool = False) -> Iterator[None]:
    """Sends this process a signal during the update that reaches iter_num and, with again, during the next one."""

    def send(self, args, state, control, **kwargs):
        if self.trainer.iter_num in ([iter_num - 1, iter_num] if again else [iter_num - 1]):
            signal.raise_signal(number)

    with mock.patch.object(TrainPyCallback, "on_step_begin", send):
        yield


def flatten_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Reads weights, moments, iter_num and best_val_loss of a ckpt.pt, by name."""
    checkpoint = read_checkpoint(path)
    state = checkpoint.training_state
    moments = {
        f"{key} of {name}": value for name, kept in state.optimizer.moments.items() for key, value in kept.items()
    }
    counts = {"iter_num": torch.tensor(state.iter_num), "best_val_loss": torch.tensor(state.best_val_loss).double()}
    return {**checkpoint.state_dict, **moments, **counts}


def list_differences(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Lists the names whose bits differ."""
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]
