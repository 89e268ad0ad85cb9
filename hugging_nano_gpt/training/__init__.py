"""Training with nanoGPT's numbers: optimizer state, schedule, data and a Trainer. Needs accelerate."""

from .arguments import training_arguments_from_nanogpt
from .configurator import TRAIN_DEFAULTS, read_settings
from .data import FixedOffsetSampler, RandomOffsetSampler, TokenDataset, collate_windows
from .drawing import make_random_state
from .optimizer import load_moments, make_optimizer, read_optimizer
from .run import run_training
from .schedule import NanoGPTSchedule, compute_lr
from .trainer import NanoGPTCheckpointCallback, NanoGPTTrainer

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
    "load_moments",
    "make_optimizer",
    "make_random_state",
    "read_optimizer",
    "read_settings",
    "run_training",
    "training_arguments_from_nanogpt",
]
