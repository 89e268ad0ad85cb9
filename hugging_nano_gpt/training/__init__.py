"""Training with nanoGPT's numbers: optimizer state, schedule, data and a Trainer, which alone needs accelerate."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import require
from .arguments import training_arguments_from_nanogpt
from .configurator import TRAIN_DEFAULTS, read_settings
from .data import FixedOffsetSampler, RandomOffsetSampler, TokenDataset, collate_windows
from .drawing import make_random_state
from .interruption import leave_processes
from .optimizer import load_moments, make_optimizer, read_optimizer
from .schedule import NanoGPTSchedule, compute_lr

if TYPE_CHECKING:
    from .run import run_training
    from .saving import NanoGPTCheckpointCallback
    from .trainer import NanoGPTTrainer

__all__ = [
    "TRAIN_DEFAULTS",
    "FixedOffsetSampler",
    "NanoGPTCheckpointCallback",
    "NanoGPTSchedule",
    "NanoGPTTrainer",
    "RandomOffsetSampler",
    "TokenDataset",
    "collate_windows",
    "compute_lr",
    "leave_processes",
    "load_moments",
    "make_optimizer",
    "make_random_state",
    "read_optimizer",
    "read_settings",
    "run_training",
    "training_arguments_from_nanogpt",
]

_OF_TRAINER = {"NanoGPTCheckpointCallback": ".saving", "NanoGPTTrainer": ".trainer", "run_training": ".run"}


def __getattr__(name: str) -> Any:
    """Imports what Trainer is needed for when it is asked for: evaluating needs the data alone."""
    if name not in _OF_TRAINER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("training", "accelerate")
    return getattr(import_module(_OF_TRAINER[name], __name__), name)
