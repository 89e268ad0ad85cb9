"""What happens between updates, as callbacks of Trainer: train.py's lines, evaluations and saves (@ 3adf61e)."""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback
from transformers.utils import logging

from ..convert.folder import convert_to_folder
from .interruption import Interruption
from .log import LOG_NAME, RunLog
from .out_dir import Beginning, remove_superseded
from .schedule import NanoGPTSchedule, compute_lr

logger = logging.get_logger(__name__)

# bfloat16 operations a second of an A100, which nanoGPT measures by (model.py @ 3adf61e, estimate_mfu).
_A100_FLOPS = 312e12

# The first updates are slower, and train.py does not count them in its mean.
_SETTLING_UPDATES = 5


class NumbersCallback(TrainerCallback):
    """Begins train.py's drawing, and counts an update that fp16 skips in the schedule, as train.py does.

    As in train.py, moments bring settings of their own. A warning says so, and checkpoints record what is used.

    Args:
        trainer: The trainer to which it is added.
        begin_drawing: Draws the first batch.
    """

    def __init__(self, trainer: Any, begin_drawing: Callable[[], None]):
        self.trainer = trainer
        self.begin_drawing = begin_drawing

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin_drawing()
        group = self.trainer.optimizer.param_groups[0]
        asked = {"weight_decay": args.weight_decay, "betas": (args.adam_beta1, args.adam_beta2)}
        for name, value in asked.items():
            if name in group and group[name] != value:
                logger.warning(
                    f"optimizer: {name}: the arguments ask for {value}, the moments come with {group[name]}, which "
                    f"counts, as in train.py; set it in trainer.optimizer.param_groups to change it"
                )
        used = {"weight_decay": group.get("weight_decay")}
        used |= dict(zip(("beta1", "beta2"), group.get("betas", ()), strict=False))
        start = self.trainer.training_state
        changed = {name: value for name, value in used.items() if start.config.get(name, value) != value}
        self.trainer.training_state = replace(start, config={**start.config, **changed})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        schedule = self.trainer.lr_scheduler
        if self.trainer.accelerator.optimizer_step_was_skipped and isinstance(schedule, NanoGPTSchedule):
            schedule.set_iter_num(schedule.last_epoch + 1)


class NanoGPTCheckpointCallback(TrainerCallback):
    """Writes a nanoGPT checkpoint whenever Trainer saves one of its own.

    Args:
        trainer: The trainer to which it is added.
        path: The ckpt.pt to write; it is replaced each time, as train.py replaces its own.
    """

    def __init__(self, trainer: Any, path: str | os.PathLike[str]):
        self.trainer = trainer
        self.path = path

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_nanogpt_ckpt(self.path)


class BarCallback(ProgressCallback):
    """A progress bar alone, which begins where the run does: Trainer's own prints the logs too, and begins at 0."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.current_step = self.training_bar.initial = self.training_bar.n = state.global_step
            self.training_bar.refresh()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pass


def is_complete(settings: Mapping[str, Any], iter_num: int) -> bool:
    """Returns whether train.py would save nothing more after iter_num updates; it saves only when it evaluates."""
    interval = settings["eval_interval"]
    return (iter_num // interval + 1) * interval > settings["max_iters"]


class TrainPyCallback(TrainerCallback):
    """Evaluates, saves, prints and logs when train.py does, and stops when a signal asks for it.

    ckpt.pt is written after Trainer's own checkpoint is whole, so a kill never leaves it as the newer one: a ckpt.pt
    that is newer was written by train.py.

    Args:
        trainer: The trainer to which it is added; its config has all of train.py's settings.
        settings: The settings that were asked for.
        beginning: What the run begins from.
        folder: Folder for Transformers to write with every ckpt.pt, or None.
        say: Prints a line, on the first process.
    """

    def __init__(
        self,
        trainer: Any,
        settings: Mapping[str, Any],
        beginning: Beginning,
        folder: Path | None,
        say: Callable[[str], None],
    ):
        self.trainer = trainer
        self.settings = settings
        self.out_dir = Path(settings["out_dir"])
        self.folder = folder
        self.say = say
        self.interruption = Interruption(trainer.args.device)
        self.mfu = math.nan
        self.stop_signal: int | None = None
        self._superseded = beginning.superseded
        self._is_ckpt_due = beginning.is_ckpt_due
        self._n_updates = 0
        args, config = trainer.args, trainer.model.config
        n_parameters = trainer.model.num_parameters() - config.block_size * config.n_embd
        n_tokens = config.block_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.log = RunLog(self.out_dir / LOG_NAME, n_tokens * args.world_size, is_writing=args.process_index == 0)
        self._n_flops = (6 * n_parameters + 12 * config.n_layer * config.n_embd * config.block_size) * n_tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        used = {name: self.trainer.config[name] for name in ("weight_decay", "beta1", "beta2")}
        other = [f"{name}={value}" for name, value in used.items() if value != self.settings[name]]
        if other:
            self.say(f"{', '.join(other)}, as the checkpoint's moments have it")
        if self._is_ckpt_due:
            self._write_ckpt(state)
        self.log.cut(self.trainer.iter_num, is_evaluated_again=args.eval_on_start)
        self._best_val_loss = self.trainer.best_val_loss
        self._update_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        seconds, self._update_began = now - self._update_began, now
        config, iter_num = self.trainer.config, self.trainer.iter_num
        if (iter_num - 1) % config["log_interval"] == 0:
            self._say_update(iter_num - 1, seconds)
        self._n_updates += 1
        control.should_evaluate = iter_num % config["eval_interval"] == 0 and iter_num <= config["max_iters"]
        control.should_save = control.should_evaluate
        self.stop_signal = self.interruption.agree()
        if self.stop_signal is not None and not control.should_evaluate:
            self._stop_between_evaluations(control)
        if control.should_save and state.is_world_process_zero:
            remove_superseded(self._superseded)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if "val/loss" not in metrics:  # another data set's
            return
        iter_num, val_loss = self.trainer.iter_num, metrics["val/loss"]
        self.say(f"step {iter_num}: train loss {metrics['train/loss']:.4f}, val loss {val_loss:.4f}")
        if not self.trainer.is_in_train:  # eval_only
            return
        lr = compute_lr(iter_num, self.trainer.config)
        self.log.add_evaluation(iter_num, train_loss=metrics["train/loss"], val_loss=val_loss, lr=lr)
        is_kept = self.trainer.config["always_save_checkpoint"] or val_loss < self._best_val_loss
        self._best_val_loss = self.trainer.best_val_loss
        self._is_ckpt_due = is_kept and iter_num > 0
        if self._is_ckpt_due and not control.should_save:  # the evaluation before the first update
            self._write_ckpt(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        written = [str(self.out_dir / f"checkpoint-{state.global_step}")]
        if self._is_ckpt_due:
            self._write_ckpt(state)
            written.append(str(self.out_dir / "ckpt.pt"))
        if self.stop_signal is not None:
            control.should_training_stop = True  # only now, or Trainer's checkpoint would tell a resumed run to stop
            self.say(
                f"stopped after iteration {self.trainer.iter_num}: wrote {' and '.join(written)}; go on with --resume"
            )

    def _stop_between_evaluations(self, control: Any) -> None:
        """Saves as an evaluation would; after the last evaluation of the run it keeps that one's checkpoint."""
        config, iter_num = self.trainer.config, self.trainer.iter_num
        self._is_ckpt_due = config["always_save_checkpoint"]  # otherwise ckpt.pt keeps the best weights
        control.should_save = not is_complete(config, iter_num)
        if not control.should_save:
            control.should_training_stop = True
            self.say(f"stopped after iteration {iter_num}: the run's last checkpoint was written before it")

    def _write_ckpt(self, state: Any) -> None:
        self._is_ckpt_due = False
        self.say(f"saving checkpoint to {self.out_dir}")
        self.trainer.save_nanogpt_ckpt(self.out_dir / "ckpt.pt")
        if self.folder is not None and state.is_world_process_zero:
            convert_to_folder(self.out_dir / "ckpt.pt", self.folder, overwrite=True)

    def _say_update(self, iter_num: int, seconds: float) -> None:
        loss = self.trainer.micro_loss.item()
        if self._n_updates >= _SETTLING_UPDATES:
            mfu = self._n_flops / seconds / _A100_FLOPS
            self.mfu = mfu if math.isnan(self.mfu) else 0.9 * self.mfu + 0.1 * mfu
        percent = -100.0 if math.isnan(self.mfu) else 100 * self.mfu  # -100 before the first estimate, as in train.py
        self.say(f"iter {iter_num}: loss {loss:.4f}, time {1000 * seconds:.2f}ms, mfu {percent:.2f}%")
        self.log.add_update(iter_num, loss=loss, lr=compute_lr(iter_num, self.trainer.config), seconds=seconds)
