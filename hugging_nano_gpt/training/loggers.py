"""Trainer's loggers (TensorBoard, wandb, trackio and others): which a run uses, and the names that they show.

train.py (@ 3adf61e) logs to wandb alone; wandb_log asks for it.
"""

from collections.abc import Mapping
from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..errors import ConversionError, list_some, require

# train.py logs its estimate as train/loss, so the loss of the updates, `loss` in Trainer, gets another name: the word
# that train.py prints it after.
_SHOWN = {"train/loss": "train/loss", "val/loss": "val/loss", "iter": "iter", "loss": "iter/loss"}


class LogName(str):
    """A name in Trainer's logs that loggers show as train.py does.

    They show "train/" + name, which would be train/val/loss.
    """

    def __radd__(self, prefix: str) -> str:
        return _SHOWN[self]


def name_logs(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns logs whose names compare equal to the given ones and are shown as in train.py."""
    return {LogName(name) if name in _SHOWN else name: value for name, value in logs.items()}


def list_loggers(settings: Mapping[str, Any], report_to: str | list[str]) -> list[str]:
    """Returns the names of the loggers that a run uses.

    Raises:
        ConversionError: If Trainer has no logger of a name.
        MissingDependencyError: If a logger is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else report_to
    wanted = [*names, "wandb"] if settings["wandb_log"] else names
    loggers = [name for name in dict.fromkeys(wanted) if name != "none"]
    unknown = [name for name in loggers if name not in INTEGRATION_TO_CALLBACK]
    if unknown:
        raise ConversionError(
            f"report_to: expected names of Trainer's loggers, got {list_some(unknown)}; give tensorboard, wandb or "
            f"trackio"
        )
    require("report_to", *(name for name in loggers if name not in get_available_reporting_integrations()))
    return loggers
