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

from ..data.dataset import TokenDataset
from ..errors import ConversionError
from .train_settings import check_settings, complete_settings

logger = logging.get_logger(__name__)

# train.py's settings (@ 3adf61e), and what they are called in TrainingArguments.
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

# Settings that _apply_rules maps.
_RULED = ("max_iters", "gradient_accumulation_steps", "wandb_log", "device", "dtype", "backend")

_READ_FROM_CONFIG = ("decay_lr", "warmup_iters", "lr_decay_iters", "min_lr", "eval_iters")
_OF_MODEL = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")

# Settings without a counterpart, and where they are instead.
_WITHOUT_COUNTERPART = {
    **dict.fromkeys(_READ_FROM_CONFIG, "NanoGPTTrainer reads it from config"),
    **dict.fromkeys(_OF_MODEL, "it is in the model's config"),
    "eval_only": "call trainer.evaluate()",
    "always_save_checkpoint": "every save writes a checkpoint",
    "init_from": "from_nanogpt_ckpt resumes, a new NanoGPTLMHeadModel starts from scratch",
    "wandb_project": "set the environment variable WANDB_PROJECT",
    "dataset": "give the files to TokenDataset",
}


@dataclass
class NanoGPTArguments(TrainingArguments):
    """TrainingArguments whose every setting is intended: the run's own or train.py's default.

    Args:
        nanogpt_config: The run's settings that they were made from.
    """

    nanogpt_config: dict[str, Any] = field(default_factory=dict)


def training_arguments_from_nanogpt(
    config: Mapping[str, Any], iter_num: int = 0, **overrides: Any
) -> tuple[TrainingArguments, dict[str, str]]:
    """Maps train.py's settings to TrainingArguments.

    Args:
        config: train.py's settings, such as a checkpoint's `config`. Missing ones are train.py's defaults, but without
            a CUDA GPU a missing device is the one that Trainer chooses, which may be the CPU.
        iter_num: Number of updates already made: the run ends when nanoGPT's iter_num reaches max_iters.
        **overrides: Arguments of TrainingArguments that take precedence; num_train_epochs over max_iters too.

    Returns:
        The arguments, from which NanoGPTTrainer reads all of config if it is given no training state; and the settings
        of config without a counterpart in them, each with the reason or the place to go.

    Raises:
        ConversionError: If a setting has a value that train.py cannot run with, the micro-steps cannot be divided by
            the number of processes, or device is "mps" and torch has no MPS.
    """
    settings = complete_settings(config)
    if "device" not in config and not torch.cuda.is_available():  # the device that Trainer chooses
        gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        settings["device"] = "cpu" if gpu is None else gpu.type
    check_settings(settings, [*_RENAMED, *_RULED, *_READ_FROM_CONFIG])
    values = {ours: settings[theirs] for theirs, ours in _RENAMED.items()}
    values |= _apply_rules(settings, iter_num)
    values |= {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": values["eval_steps"]}
    values["save_total_limit"] = 1  # as train.py keeps one file
    if "num_train_epochs" in overrides:
        del values["max_steps"]
    left = {
        key: _WITHOUT_COUNTERPART.get(key, "unknown to nanoGPT") for key in config if key not in {*_RENAMED, *_RULED}
    }
    _, _, index = str(config.get("device", "")).partition("cuda:")
    if index not in ("", "0") and "LOCAL_RANK" not in os.environ:  # train.py does not read it under torchrun either
        left["device"] = f"Trainer takes the first GPU that it sees: set CUDA_VISIBLE_DEVICES={index}"
    return NanoGPTArguments(**{**values, **overrides}, nanogpt_config=dict(config)), left


def complete_arguments(
    args: TrainingArguments, config: Mapping[str, Any], dataset: TokenDataset | None
) -> TrainingArguments:
    """Returns arguments with train.py's settings of the optimizer where they are Transformers' defaults.

    Those that training_arguments_from_nanogpt made keep theirs. Without max_steps, num_train_epochs=1 draws as many
    tokens as a data set has; without a data set the batches are given, and with them the length of an epoch.
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
    if args.metric_for_best_model in ("val/loss", "eval_val/loss"):  # in Trainer, which adds eval_ to the name
        changes["metric_for_best_model"] = "eval_loss"
    completed = copy(args)
    for name, value in changes.items():
        setattr(completed, name, value)
    return completed


def _apply_rules(config: Mapping[str, Any], iter_num: int) -> dict[str, Any]:
    # A loss of NaN is logged as NaN, as in nanoGPT; Trainer's filter would wait for the GPU at each update.
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
    if is_mps and not torch.backends.mps.is_available():  # Trainer would train on the CPU and not say so
        raise ConversionError(
            f"config: device: expected a GPU of Apple's for {config['device']!r}, got a torch that finds no MPS; give "
            f"--device=cpu, which is config['device'] = 'cpu' in Python"
        )
    if is_mps:
        values["dataloader_pin_memory"] = False  # which torch does not support for MPS
    if is_cpu:
        values["use_cpu"] = True
    elif is_torch_tf32_available():
        values["tf32"] = True  # as train.py's two lines allow
    if not (is_cpu or is_mps) and config["dtype"] in ("bfloat16", "float16"):  # train.py autocasts on CUDA alone
        values["bf16" if config["dtype"] == "bfloat16" else "fp16"] = True
    if world_size > 1:
        values["ddp_backend"] = "gloo" if is_cpu else config["backend"]  # nanoGPT's nccl needs GPUs
        values["ddp_find_unused_parameters"] = False  # all are used, and the search takes time
    return values
