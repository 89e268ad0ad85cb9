"""train.py's settings where Trainer has others: kept to, or told."""

from dataclasses import replace
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from .schedule import NanoGPTSchedule

logger = logging.get_logger(__name__)


class SettingsCallback(TrainerCallback):
    """Keeps to train.py where Trainer leaves it: an update that fp16 skips counts in the schedule.

    It says so where the optimizer has other settings than the arguments: moments bring their own, as in train.py.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        group = self.trainer.optimizer.param_groups[0]
        asked = {"weight_decay": args.weight_decay, "betas": (args.adam_beta1, args.adam_beta2)}
        for name, value in asked.items():
            if name in group and group[name] != value:
                logger.warning(
                    f"optimizer: {name}: the arguments ask for {value}, the moments come with {group[name]}, which "
                    f"counts, as in train.py; set it in trainer.optimizer.param_groups to change it"
                )
        self._record(group)

    def _record(self, group: dict[str, Any]) -> None:
        """Makes the config that checkpoints record what the optimizer computes with."""
        state = self.trainer.training_state
        used = {"weight_decay": group.get("weight_decay")}
        used |= dict(zip(("beta1", "beta2"), group.get("betas", ()), strict=False))
        changed = {name: value for name, value in used.items() if name in state.config and state.config[name] != value}
        if changed:
            self.trainer.training_state = replace(state, config={**state.config, **changed})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        schedule = self.trainer.lr_scheduler
        if self.trainer.accelerator.optimizer_step_was_skipped and isinstance(schedule, NanoGPTSchedule):
            schedule.set_iter_num(schedule.last_epoch + 1)
