"""A run of nanoGPT's train.py (@ 3adf61e) inside NanoGPTTrainer, from its settings to its last checkpoint.

It computes train.py's bits. What train.py lacks is Trainer's or this package's: resuming as if the run had never
stopped, loggers, and ways to save memory.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, TrainingArguments

from ..convert.nanogpt import remember_training_state
from ..convert.source import choose_device
from ..data.dataset import TokenDataset
from ..data.shards import find_split
from ..errors import ConversionError
from ..files.files import check_folder
from .arguments import training_arguments_from_nanogpt
from .callbacks import BarCallback, TrainPyCallback, is_complete
from .loggers import list_loggers
from .out_dir import Beginning, choose_beginning, lock_out_dir
from .start import start_run
from .train_settings import check_settings
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

    It writes out_dir/ckpt.pt whenever train.py would, and at every evaluation one checkpoint of Trainer's to resume
    from. Under torchrun every process calls this.

    After Ctrl-C or SIGTERM it finishes the update, writes both checkpoints and ends the process; a second signal ends
    it at once.

    Args:
        settings: All of train.py's settings, as read_settings returns them. As in train.py, data/<dataset> is a folder
            in the working directory.
        resume: Resume from the last whole checkpoint of Trainer's in out_dir, as if the run had never stopped; if none
            exists, from out_dir/ckpt.pt as init_from="resume" does; without that either, begin as init_from says.
        force: Overwrite what an earlier run left in out_dir, or what is in folder.
        report_to: Names of Trainer's loggers, such as "tensorboard" or "trackio". wandb_log adds "wandb".
        folder: Folder for Transformers to write with every ckpt.pt.
        loss_chunk_size: See NanoGPTConfig; changes the numbers a little.
        gradient_checkpointing: Compute activations again instead of keeping them; changes no number.
        bf16: Compute in bfloat16, on a CPU too, where train.py does not.
        fsdp: Shard parameters and moments between the processes (FSDP2) instead of keeping them in each (DDP).
        has_bar: Show a progress bar on standard error.

    Returns:
        The trainer, after the last update; of an eval_only run, after the evaluation.

    Raises:
        NanoGPTError: If a setting, the data, the start or the checkpoint to resume from cannot be used, a logger is
            not installed, another run trains in out_dir, or what an earlier run left there would be overwritten and
            neither resume nor force is given.
        SystemExit: With code 130 after Ctrl-C or 143 after SIGTERM, once the checkpoints are written.
    """
    _check(settings, fsdp)
    loggers = list_loggers(settings, report_to)
    rank = int(os.environ.get("RANK", "0"))
    say: Callable[[str], None] = _print_line if rank == 0 else lambda line: None
    n_tokens = settings["gradient_accumulation_steps"] * settings["batch_size"] * settings["block_size"]
    say(f"tokens per iteration will be: {n_tokens:,}")
    is_evaluation = settings["eval_only"]
    with contextlib.nullcontext() if is_evaluation or rank else lock_out_dir(Path(settings["out_dir"])):
        beginning = choose_beginning(settings, resume, force)
        is_continued = beginning.folder is not None or beginning.init_from == "resume"
        if folder is not None and not is_evaluation:
            check_folder(Path(folder), overwrite=force or is_continued)
        data_dir = Path("data") / settings["dataset"]
        train, val = (TokenDataset(find_split(data_dir, split), settings["block_size"]) for split in ("train", "val"))
        model, state, random_state = start_run(settings, beginning, data_dir, rank, say)
        remember_training_state(model, state)
        model.config.loss_chunk_size = loss_chunk_size
        if gradient_checkpointing:  # renamed in Transformers 5.23
            enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable()
        args = _make_arguments(settings, state.iter_num, beginning.folder is not None, loggers, bf16, fsdp)
        trainer = NanoGPTTrainer(model, args, train, val, state, random_state=random_state)
        callback = TrainPyCallback(trainer, settings, beginning, None if folder is None else Path(folder), say)
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
    """Trains to the end, or until a signal comes; then it ends the process as the signal would."""
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


def _print_line(line: str) -> None:
    """Prints a line above a progress bar, and at once, also to a file or a pipe."""
    tqdm.write(line)
    sys.stdout.flush()


def _check(settings: Mapping[str, Any], fsdp: bool) -> None:
    """Refuses settings and devices that cannot be used, before anything is read."""
    is_of_torchrun = "LOCAL_RANK" in os.environ
    if fsdp and not is_of_torchrun:
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
    if not (is_cuda and is_of_torchrun):  # whose processes use one GPU each, as train.py's do
        choose_device(str(settings["device"]))


def _make_arguments(
    settings: Mapping[str, Any], iter_num: int, is_resumed: bool, loggers: list[str], bf16: bool, fsdp: bool
) -> TrainingArguments:
    """Makes Trainer's arguments: it logs to its loggers only, TrainPyCallback decides when to evaluate and save."""
    if "wandb" in loggers:
        os.environ.setdefault("WANDB_PROJECT", settings["wandb_project"])
    # train.py makes one update after its last evaluation; resuming a complete run makes that update again
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
