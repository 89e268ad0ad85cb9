"""The names under which Trainer's loggers show what is logged: train.py's own (@ 3adf61e), where it has one."""

from collections.abc import Mapping
from typing import Any

# What train.py logs to wandb as train/loss is its estimate, so the loss of the updates, which is `loss` in Trainer,
# gets another name: train.py prints it after the word iter.
_SHOWN = {"train/loss": "train/loss", "val/loss": "val/loss", "iter": "iter", "loss": "iter/loss"}


class LogName(str):
    """A name of a log that loggers show in a form of its own.

    Trainer's loggers (TensorBoard, wandb, trackio and others) show "train/" + name, which would be train/val/loss.
    """

    def __radd__(self, prefix: str) -> str:
        return _SHOWN[self]


def name_logs(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns logs whose names are equal to what they were, and are shown as train.py shows them."""
    return {LogName(name) if name in _SHOWN else name: value for name, value in logs.items()}
