"""Training with nanoGPT's numbers: optimizer state, schedule, data and a Trainer. Needs accelerate."""

from .arguments import training_arguments_from_nanogpt
from .data import FixedOffsetSampler, RandomOffsetSampler, TokenDataset, collate_windows
from .drawing import make_random_state
from .optimizer import load_moments, make_optimizer, read_optimizer
from .schedule import NanoGPTSchedule, compute_lr
from .trainer import NanoGPTCheckpointCallback, NanoGPTTrainer

__all__ = [
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
    "training_arguments_from_nanogpt",
]
