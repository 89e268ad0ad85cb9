"""nanoGPT's learning rate (train.py @ 3adf61e, get_lr): linear warmup, cosine decay, constant minimum."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ..errors import ConversionError
from .train_settings import TRAIN_DEFAULTS


def compute_lr(iter_num: int, config: Mapping[str, Any]) -> float:
    """Returns the learning rate of update number iter_num, equal to nanoGPT's to the last bit.

    Args:
        iter_num: Number of updates already made.
        config: train.py's settings learning_rate, decay_lr, warmup_iters, lr_decay_iters and min_lr; missing ones are
            train.py's defaults.

    Raises:
        ConversionError: If warmup_iters, lr_decay_iters and iter_num are equal, where train.py divides by zero.
    """
    setting = {**TRAIN_DEFAULTS, **config}
    highest, lowest = setting["learning_rate"], setting["min_lr"]
    warmup_iters, decay_iters = setting["warmup_iters"], setting["lr_decay_iters"]
    if not setting["decay_lr"]:
        return highest
    if iter_num < warmup_iters:
        return highest * (iter_num + 1) / (warmup_iters + 1)
    if iter_num > decay_iters:
        return lowest
    if decay_iters == warmup_iters:
        raise ConversionError(
            f"lr_decay_iters: expected another number than warmup_iters, got {decay_iters} for both; change one"
        )
    progress = (iter_num - warmup_iters) / (decay_iters - warmup_iters)
    return lowest + 0.5 * (1.0 + math.cos(math.pi * progress)) * (highest - lowest)


class NanoGPTSchedule(LRScheduler):
    """nanoGPT's learning rate as a torch scheduler, for Trainer or a loop that steps it after every update.

    It sets the learning rate of every parameter group, where other schedulers multiply the group's own, so that it
    equals nanoGPT's.

    Args:
        optimizer: Any optimizer.
        config: See compute_lr.
        iter_num: Number of updates already made, for a run that continues.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: Mapping[str, Any], iter_num: int = 0):
        self.config = dict(config)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # LRScheduler needs it if it does not begin at 0
        super().__init__(optimizer, last_epoch=iter_num - 1)

    def set_iter_num(self, iter_num: int) -> None:
        """Sets the learning rate of every parameter group to that of an update, as train.py does before each."""
        self.last_epoch = iter_num
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the number of updates only; the settings stay those asked for now, as when train.py resumes."""
        super().load_state_dict({**state_dict, "config": self.config})
        self.set_iter_num(self.last_epoch)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Returns the learning rate of the coming update, for each parameter group."""
        return [compute_lr(self.last_epoch, self.config) for _ in self.optimizer.param_groups]
