"""A run of nanoGPT's train.py (@ 3adf61e) inside NanoGPTTrainer, from its settings to its last checkpoint.

What train.py computes comes out bit for bit; what it lacks is Trainer's: going on after a kill as if nothing had
happened, loggers, and this package's savings of memory.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..convert.nanogpt import remember_training_state
from ..convert.source import choose_device
from ..errors import ConversionError, list_some, require
from ..files import check_folder
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from .arguments import training_arguments_from_nanogpt
from .data import TokenDataset
from .limits import check_settings
from .out_dir import Beginning, choose_beginning, hold_out_dir
from .progress import BarCallback, TrainPyCallback, is_complete, say
from .start import start_again, start_run
from .trainer import NanoGPTTrainer


def run_training(
    settings: Mapping[str, Any],
    *,
    resume: bool = False,
    force: bool = False,
    report_to: str | list[str] = "none",
    folder: str | os.PathLike[str] | None = None,
    loss_chunk_size: int | None = None,
    gradient_checkpointing: bool = False,
    bf16: bool = False,
    fsdp: bool = False,
    has_bar: bool = False,
) -> NanoGPTTrainer:
    """Does what train.py does with these settings, and prints its lines.

    It writes out_dir/ckpt.pt whenever train.py would, and next to it, at every evaluation, one checkpoint of Trainer's
    to resume from. Under torchrun every process calls this.

    After Ctrl-C or SIGTERM it finishes the update, writes both checkpoints and ends the process; a second signal ends
    it at once.

    Args:
        settings: All of train.py's settings, as read_settings makes them. data/<dataset> is looked for in the working
            directory, as train.py does.
        resume: Go on from the last whole checkpoint of Trainer's in out_dir, as if nothing had happened; if there is
            none, from out_dir/ckpt.pt as init_from="resume" does; if that does not exist either, begin as init_from
            says.
        force: Overwrite what an earlier run left in out_dir, or what is in folder.
        report_to: Names of Trainer's loggers, such as "tensorboard" or "trackio". wandb_log adds "wandb".
        folder: Folder for Transformers to write with every ckpt.pt.
        loss_chunk_size: See NanoGPTConfig; changes the numbers a little.
        gradient_checkpointing: Compute activations again instead of keeping them; changes no number.
        bf16: Compute in bfloat16, on a CPU too, where train.py does not.
        fsdp: Split parameters and moments between the processes (FSDP2) instead of keeping them in each (DDP).
        has_bar: Show a progress bar on standard error.

    Returns:
        The trainer, after the last update; of an eval_only run, after the evaluation.

    Raises:
        NanoGPTError: If a setting, the data, the start or the checkpoint to resume from cannot be used, a logger is
            not installed, another run trains in out_dir, or what an earlier run left there would be overwritten and
            neither resume nor force is given.
        SystemExit: With code 130 after Ctrl-C or 143 after SIGTERM, once the checkpoints are written.
    """
    _check_settings(settings, fsdp)
    loggers = _list_loggers(settings, report_to)
    rank = int(os.environ.get("RANK", "0"))
    tell = say if rank == 0 else _say_nothing
    n_tokens = settings["gradient_accumulation_steps"] * settings["batch_size"] * settings["block_size"]
    tell(f"tokens per iteration will be: {n_tokens:,}")
    is_evaluation = settings["eval_only"]
    with contextlib.nullcontext() if is_evaluation or rank else hold_out_dir(Path(settings["out_dir"])):
        beginning = choose_beginning(settings, resume, force)
        if folder is not None and not is_evaluation:
            check_folder(Path(folder), overwrite=force or beginning.is_going_on)
        data_dir = Path("data") / settings["dataset"]
        train_dataset, eval_dataset = (
            TokenDataset(data_dir / f"{split}.bin", settings["block_size"]) for split in ("train", "val")
        )
        start_from = start_run if beginning.folder is None else start_again
        model, state, random_state = start_from(settings, beginning, data_dir, rank, tell)
        remember_training_state(model, state)
        _save_memory(model, loss_chunk_size, gradient_checkpointing)
        args = _make_arguments(settings, state.iter_num, beginning.folder is not None, loggers, bf16, fsdp)
        trainer = NanoGPTTrainer(
            model, args, train_dataset, eval_dataset, training_state=state, random_state=random_state
        )
        callback = TrainPyCallback(trainer, settings, beginning, None if folder is None else Path(folder), tell)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(callback)
        if has_bar and rank == 0:
            trainer.add_callback(BarCallback())
        if is_evaluation:
            trainer.evaluate()
        else:
            _train(trainer, callback, beginning)
    return trainer


def _train(trainer: NanoGPTTrainer, callback: TrainPyCallback, beginning: Beginning) -> None:
    """Trains to the end, or until a signal has come, and then ends the process as the signal would."""
    settings, iter_num = trainer.config, trainer.iter_num
    if iter_num > 0 and is_complete(settings, iter_num):
        callback.say(
            f"the run is complete: after iteration {iter_num} nothing is saved with max_iters={settings['max_iters']} "
            f"and eval_interval={settings['eval_interval']}; give a larger --max_iters to go on"
        )
        if beginning.folder is not None and not beginning.is_ckpt_due:
            return
    with callback.interruption.listen():
        trainer.train(resume_from_checkpoint=None if beginning.folder is None else str(beginning.folder))
    if callback.stop_signal is not None:
        raise SystemExit(128 + callback.stop_signal)


def _save_memory(model: NanoGPTLMHeadModel, loss_chunk_size: int | None, gradient_checkpointing: bool) -> None:
    model.config.loss_chunk_size = loss_chunk_size
    if gradient_checkpointing:
        enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()  # renamed in Transformers 5.23


def _check_settings(settings: Mapping[str, Any], fsdp: bool) -> None:
    if fsdp and "LOCAL_RANK" not in os.environ:
        raise ConversionError(
            "fsdp: expected the processes that torchrun starts, got a process alone; start it with `torchrun "
            "--nproc-per-node=N --no-python hugging-nano-gpt train ...`, or leave fsdp out"
        )
    check_settings(settings)
    is_cuda = str(settings["device"]).startswith("cuda")
    if is_cuda and not torch.cuda.is_available():
        raise ConversionError(
            f"device: expected a GPU for {settings['device']!r}, as train.py's default asks, got none; give "
            f"--device=cpu --compile=False"
        )
    if not (is_cuda and "LOCAL_RANK" in os.environ):  # torchrun's processes take a GPU each, as train.py's do
        choose_device(str(settings["device"]))


def _list_loggers(settings: Mapping[str, Any], report_to: str | list[str]) -> list[str]:
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


def _make_arguments(
    settings: Mapping[str, Any], iter_num: int, is_resumed: bool, loggers: list[str], bf16: bool, fsdp: bool
) -> TrainingArguments:
    """Makes Trainer's arguments: it logs to its loggers alone; TrainPyCallback says when to evaluate and save."""
    if "wandb" in loggers:
        os.environ.setdefault("WANDB_PROJECT", settings["wandb_project"])
    # train.py makes one update after its last evaluation; of a run that is complete, it makes that one again
    end = iter_num if is_resumed and is_complete(settings, iter_num) else int(settings["max_iters"])
    args, _ = training_arguments_from_nanogpt(
        settings,
        iter_num,
        max_steps=max(end - iter_num + 1, 1),
        eval_strategy="no",
        save_strategy="no",
        eval_on_start=not is_resumed and iter_num % settings["eval_interval"] == 0,
        logging_strategy="steps" if loggers else "no",
        report_to=loggers or "none",
        **({"project": settings["wandb_project"]} if "trackio" in loggers else {}),
        disable_tqdm=True,
        fsdp=fsdp,
        **({"bf16": True, "fp16": False} if bf16 else {}),
    )
    return args


def _say_nothing(line: str) -> None:
    pass
