"""nanoGPT's train.py settings as Transformers' TrainingArguments."""

import math
import os
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_tf32_available, logging

from ..errors import ConversionError
from .configurator import complete_settings
from .data import TokenDataset
from .limits import check_settings

logger = logging.get_logger(__name__)

# train.py's settings that TrainingArguments has under another name (train.py @ 3adf61e).
_RENAMED = {
    "out_dir": "output_dir",
    "eval_interval": "eval_steps",
    "log_interval": "logging_steps",
    "wandb_run_name": "run_name",
    "batch_size": "per_device_train_batch_size",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "grad_clip": "max_grad_norm",
    "compile": "torch_compile",
}

# Those that are mapped by a rule below.
_RULED = ("max_iters", "gradient_accumulation_steps", "wandb_log", "device", "dtype", "backend")

_READ_BY_TRAINER = "NanoGPTTrainer reads it from config"
_READ_FROM_CONFIG = ("decay_lr", "warmup_iters", "lr_decay_iters", "min_lr", "eval_iters")
_IN_THE_MODEL = "it is in the model's config"

# Those without a counterpart, and where they are instead.
_WITHOUT_COUNTERPART = {
    **dict.fromkeys(_READ_FROM_CONFIG, _READ_BY_TRAINER),
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout"), _IN_THE_MODEL),
    "eval_only": "call trainer.evaluate()",
    "always_save_checkpoint": "every save writes a checkpoint",
    "init_from": "from_nanogpt_ckpt resumes, a new NanoGPTLMHeadModel starts from scratch",
    "wandb_project": "set the environment variable WANDB_PROJECT",
    "dataset": "give the files to TokenDataset",
}


@dataclass
class NanoGPTArguments(TrainingArguments):
    """TrainingArguments in which every setting is meant: the run's own or train.py's default.

    Args:
        nanogpt_config: The run's settings that they were made of.
    """

    nanogpt_config: dict[str, Any] = field(default_factory=dict)


def training_arguments_from_nanogpt(
    config: Mapping[str, Any], iter_num: int = 0, **overrides: Any
) -> tuple[TrainingArguments, dict[str, str]]:
    """Maps train.py's settings to TrainingArguments.

    Args:
        config: train.py's settings, such as a checkpoint's `config`. What it lacks is train.py's default; but where
            no CUDA GPU is, the device is then the one that Trainer takes, which may be the CPU.
        iter_num: Number of updates already made: the run ends when nanoGPT's iter_num reaches max_iters.
        **overrides: Arguments of TrainingArguments that take precedence; num_train_epochs over max_iters too.

    Returns:
        The arguments, which NanoGPTTrainer asks for the rest of config too where it is given no training state; and
        the settings of config without a counterpart in them, each with the reason or the place to go.

    Raises:
        ConversionError: If a setting has a value that train.py cannot run with, the micro-steps do not divide among
            the processes, or device is "mps" where torch has no MPS.
    """
    settings = complete_settings(config)
    if "device" not in config and not torch.cuda.is_available():  # the device that Trainer takes
        gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        settings["device"] = "cpu" if gpu is None else gpu.type
    check_settings(settings, [*_RENAMED, *_RULED, *_READ_FROM_CONFIG])
    values = {ours: settings[theirs] for theirs, ours in _RENAMED.items()}
    values |= _apply_rules(settings, iter_num)
    values |= {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": values["eval_steps"]}
    values["save_total_limit"] = 1  # train.py keeps one file
    if "num_train_epochs" in overrides:
        del values["max_steps"]
    left = {
        key: _WITHOUT_COUNTERPART.get(key, "unknown to nanoGPT") for key in config if key not in {*_RENAMED, *_RULED}
    }
    _, _, index = str(config.get("device", "")).partition("cuda:")
    if index not in ("", "0") and "LOCAL_RANK" not in os.environ:  # under torchrun, train.py does not read it either
        left["device"] = f"Trainer takes the first GPU that it sees: set CUDA_VISIBLE_DEVICES={index}"
    return NanoGPTArguments(**{**values, **overrides}, nanogpt_config=dict(config)), left


def complete_arguments(
    args: TrainingArguments, config: Mapping[str, Any], dataset: TokenDataset | None
) -> TrainingArguments:
    """Returns arguments with train.py's settings of the optimizer where they were left at Transformers' default.

    Those that training_arguments_from_nanogpt made stay as they are. Where no max_steps is given, num_train_epochs
    says how many times as many tokens are drawn as the file has.

    Args:
        args: Any TrainingArguments.
        config: train.py's settings; its defaults stand in for missing ones.
        dataset: What is drawn from; None where the batches are given, and with them the length of an epoch.
    """
    changes: dict[str, Any] = {}
    if not isinstance(args, NanoGPTArguments):
        settings, defaults = complete_settings(config), {field.name: field.default for field in fields(args)}
        for theirs in ("learning_rate", "weight_decay", "beta1", "beta2", "grad_clip"):
            name, value = _RENAMED[theirs], settings[theirs]
            if getattr(args, name) == defaults[name] != value:
                changes[name] = value
        if changes:
            logger.warning(
                f"arguments: {', '.join(f'{name}={value}' for name, value in changes.items())}, as train.py has them: "
                f"Transformers' defaults count as not given; make the arguments with training_arguments_from_nanogpt "
                f"to choose any value"
            )
    if args.max_steps < 0 and dataset is not None:
        n_windows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        changes["max_steps"] = math.ceil(args.num_train_epochs * dataset.n_tokens / (n_windows * dataset.block_size))
    if args.metric_for_best_model in ("val/loss", "eval_val/loss"):  # its name in Trainer, which puts eval_ before it
        changes["metric_for_best_model"] = "eval_loss"
    completed = copy(args)
    for name, value in changes.items():
        setattr(completed, name, value)
    return completed


def _apply_rules(config: Mapping[str, Any], iter_num: int) -> dict[str, Any]:
    # A loss that is no number is reported as such, as nanoGPT does; looking for one would wait for the GPU each time.
    values: dict[str, Any] = {"remove_unused_columns": False, "logging_nan_inf_filter": False}
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    values["max_steps"] = max(config["max_iters"] - iter_num, 1)
    micro_steps, rest = divmod(config["gradient_accumulation_steps"], world_size)
    if rest:  # nanoGPT counts micro-steps over all processes
        raise ConversionError(
            f"config: gradient_accumulation_steps: expected a multiple of the {world_size} processes, got "
            f"{config['gradient_accumulation_steps']}; change one of the two, as nanoGPT asks too"
        )
    values["gradient_accumulation_steps"] = micro_steps
    values["report_to"] = "wandb" if config["wandb_log"] else "none"
    is_cpu, is_mps = (str(config["device"]).startswith(kind) for kind in ("cpu", "mps"))
    if is_mps and not torch.backends.mps.is_available():  # Trainer would train on the CPU without a word
        raise ConversionError(
            f"config: device: expected a GPU of Apple's for {config['device']!r}, got a torch that finds no MPS; give "
            f"--device=cpu, which is config['device'] = 'cpu' in Python"
        )
    if is_mps:
        values["dataloader_pin_memory"] = False  # torch does not have it there
    if is_cpu:
        values["use_cpu"] = True
    elif is_torch_tf32_available():
        values["tf32"] = True  # train.py's two switches
    if not (is_cpu or is_mps) and config["dtype"] in ("bfloat16", "float16"):  # train.py autocasts on CUDA alone
        values["bf16" if config["dtype"] == "bfloat16" else "fp16"] = True
    if world_size > 1:
        values["ddp_backend"] = "gloo" if is_cpu else config["backend"]  # nanoGPT's nccl needs GPUs
        values["ddp_find_unused_parameters"] = False  # all are used, and looking for others costs time
    return values
