"""A run of nanoGPT's train.py (@ 3adf61e) inside NanoGPTTrainer, from its settings to its last checkpoint.

What train.py computes comes out bit for bit; what it lacks is Trainer's: going on after a kill as if nothing had
happened, loggers, and this package's savings of memory.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..convert.nanogpt import remember_training_state
from ..convert.source import choose_device
from ..errors import CheckpointError, ConversionError, MissingDependencyError, list_some
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from .arguments import training_arguments_from_nanogpt
from .data import TokenDataset
from .drawing import make_random_state
from .limits import check_settings
from .progress import BarCallback, TrainPyCallback, say
from .start import Start, start_run
from .trainer import NanoGPTTrainer
from .trainer_checkpoint import choose_checkpoint


def run_training(
    settings: Mapping[str, Any],
    *,
    resume: bool = False,
    report_to: str | list[str] = "none",
    folder: str | os.PathLike[str] | None = None,
    loss_chunk_size: int | None = None,
    gradient_checkpointing: bool = False,
    bf16: bool = False,
    fsdp: bool = False,
    has_bar: bool = False,
) -> NanoGPTTrainer:
    """Does what train.py does with these settings, and prints its lines.

    It writes out_dir/ckpt.pt whenever train.py would, and beside it, at every evaluation, one checkpoint of Trainer's
    to resume from. Under torchrun every process calls this.

    Args:
        settings: All of train.py's settings, as read_settings makes them. data/<dataset> is looked for in the working
            directory, as train.py does.
        resume: Go on from the last whole checkpoint of Trainer's in out_dir, as if nothing had happened; if there is
            none, begin as init_from says.
        report_to: Names of Trainer's loggers, such as "tensorboard" or "trackio". wandb_log adds "wandb".
        folder: Folder for Transformers to write with every ckpt.pt.
        loss_chunk_size: See NanoGPTConfig; changes the numbers a little.
        gradient_checkpointing: Compute activations again in place of keeping them; changes no number.
        bf16: Compute in bfloat16, on a CPU too, where train.py does not.
        fsdp: Split parameters and moments between the processes (FSDP2) in place of keeping them in each (DDP).
        has_bar: Show a progress bar on standard error.

    Returns:
        The trainer, after the last update; of an eval_only run, after the evaluation.

    Raises:
        NanoGPTError: If a setting, the data, the start or the checkpoint to resume from cannot be used, a logger is
            not installed, or an earlier run in out_dir could go on and resume is not given.
    """
    _check_settings(settings, fsdp)
    loggers = _list_loggers(settings, report_to)
    rank = int(os.environ.get("RANK", "0"))
    tell = say if rank == 0 else _say_nothing
    n_tokens = settings["gradient_accumulation_steps"] * settings["batch_size"] * settings["block_size"]
    tell(f"tokens per iteration will be: {n_tokens:,}")
    last = None if settings["eval_only"] and not resume else _find_last_checkpoint(settings["out_dir"])
    if last is not None and not resume:
        raise ConversionError(
            f"{last}: an earlier run can go on from here: expected --resume, or another --out_dir, got neither; add "
            f"one, or remove the folder"
        )
    data_dir = Path("data") / settings["dataset"]
    train_dataset, eval_dataset = (
        TokenDataset(data_dir / f"{split}.bin", settings["block_size"]) for split in ("train", "val")
    )
    start = start_run(settings, data_dir, rank, tell) if last is None else _start_again(last, settings, rank)
    model, state, random_state = start
    remember_training_state(model, state)
    model.config.loss_chunk_size = loss_chunk_size
    if gradient_checkpointing:
        enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()  # renamed in Transformers 5.23
    args = _make_arguments(settings, state.iter_num, last is not None, loggers, bf16, fsdp)
    trainer = NanoGPTTrainer(model, args, train_dataset, eval_dataset, training_state=state, random_state=random_state)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TrainPyCallback(trainer, None if folder is None else Path(folder), tell))
    if has_bar and rank == 0:
        trainer.add_callback(BarCallback())
    if settings["eval_only"]:
        trainer.evaluate()
    else:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return trainer


def _find_last_checkpoint(out_dir: str) -> Path | None:
    try:
        return choose_checkpoint(True, out_dir)
    except CheckpointError:  # none that is whole
        return None


def _start_again(folder: Path, settings: Mapping[str, Any], rank: int) -> Start:
    """Makes the model of a checkpoint of Trainer's, which then gives it its weights, and where its run began."""
    model = NanoGPTLMHeadModel.from_pretrained(folder, dropout=settings["dropout"]).train()
    state = replace(model.nanogpt_training_state, config=dict(settings))
    return Start(model, state, make_random_state(model.config, rank))


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
    missing = [name for name in loggers if name not in get_available_reporting_integrations()]
    if missing:
        raise MissingDependencyError(f"report_to: {missing[0]} is not installed; pip install {missing[0]}")
    return loggers


def _make_arguments(
    settings: Mapping[str, Any], iter_num: int, is_resumed: bool, loggers: list[str], bf16: bool, fsdp: bool
) -> TrainingArguments:
    """Makes Trainer's arguments: it logs to its loggers alone; TrainPyCallback says when to evaluate and save."""
    if "wandb" in loggers:
        os.environ.setdefault("WANDB_PROJECT", settings["wandb_project"])
    args, _ = training_arguments_from_nanogpt(
        settings,
        iter_num,
        max_steps=max(int(settings["max_iters"]) - iter_num + 1, 1),  # train.py makes one after its last evaluation
        eval_strategy="no",
        save_strategy="no",
        eval_on_start=not is_resumed and iter_num % settings["eval_interval"] == 0,
        logging_strategy="steps" if loggers else "no",
        report_to=loggers or "none",
        disable_tqdm=True,
        fsdp=fsdp,
        **({"bf16": True, "fp16": False} if bf16 else {}),
    )
    return args


def _say_nothing(line: str) -> None:
    pass
