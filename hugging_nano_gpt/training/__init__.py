"""Training with nanoGPT's numbers: settings, optimizer, schedule, data, and a Trainer, which needs accelerate."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..data.dataset import TokenDataset, collate_windows
from ..data.offsets import RandomOffsetSampler
from ..errors import require
from .adamw import load_moments, make_optimizer, read_optimizer
from .arguments import training_arguments_from_nanogpt
from .configurator import read_settings
from .drawing import make_random_state
from .interruption import leave_processes
from .plot import plot_losses
from .schedule import NanoGPTSchedule, compute_lr
from .train_settings import TRAIN_DEFAULTS

if TYPE_CHECKING:
    from .callbacks import NanoGPTCheckpointCallback
    from .run import run_training
    from .trainer import NanoGPTTrainer

__all__ = [
    "TRAIN_DEFAULTS",
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
    "plot_losses",
    "read_optimizer",
    "read_settings",
    "run_training",
    "training_arguments_from_nanogpt",
]

_OF_TRAINER = {"NanoGPTCheckpointCallback": ".callbacks", "NanoGPTTrainer": ".trainer", "run_training": ".run"}


def __getattr__(name: str) -> Any:
    """Imports what needs Trainer on first use; nothing else needs accelerate."""
    if name not in _OF_TRAINER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("training", "accelerate")
    return getattr(import_module(_OF_TRAINER[name], __name__), name)
