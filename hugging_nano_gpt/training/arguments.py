"""nanoGPT's train.py settings as Transformers' TrainingArguments."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_tf32_available

from ..errors import ConversionError

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
_IN_THE_MODEL = "it is in the model's config"

# Those without a counterpart, and where they are instead.
_WITHOUT_COUNTERPART = {
    **dict.fromkeys(("decay_lr", "warmup_iters", "lr_decay_iters", "min_lr", "eval_iters"), _READ_BY_TRAINER),
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout"), _IN_THE_MODEL),
    "eval_only": "call trainer.evaluate()",
    "always_save_checkpoint": "every save writes a checkpoint",
    "init_from": "from_nanogpt_ckpt resumes, a new NanoGPTLMHeadModel starts from scratch",
    "wandb_project": "set the environment variable WANDB_PROJECT",
    "dataset": "give the files to TokenDataset",
}


def training_arguments_from_nanogpt(
    config: Mapping[str, Any], iter_num: int = 0, **overrides: Any
) -> tuple[TrainingArguments, dict[str, str]]:
    """Maps train.py's settings to TrainingArguments.

    Args:
        config: train.py's settings, such as a checkpoint's `config`. What it lacks keeps Transformers' default.
        iter_num: Number of updates already made: the run ends when nanoGPT's iter_num reaches max_iters.
        **overrides: Arguments of TrainingArguments that take precedence.

    Returns:
        The arguments, and the settings that have no counterpart in them, each with the reason or the place to go.

    Raises:
        ConversionError: If the micro-steps do not divide among the processes.
    """
    values = {ours: config[theirs] for theirs, ours in _RENAMED.items() if theirs in config}
    values |= _apply_rules(config, iter_num)
    if "eval_steps" in values:
        values |= {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": values["eval_steps"]}
    left = {
        key: _WITHOUT_COUNTERPART.get(key, "unknown to nanoGPT") for key in config if key not in {*_RENAMED, *_RULED}
    }
    _, _, index = str(config.get("device", "")).partition("cuda:")
    if index not in ("", "0") and "LOCAL_RANK" not in os.environ:  # under torchrun, train.py does not read it either
        left["device"] = f"Trainer takes the first GPU that it sees: set CUDA_VISIBLE_DEVICES={index}"
    return TrainingArguments(**{**values, **overrides}), left


def _apply_rules(config: Mapping[str, Any], iter_num: int) -> dict[str, Any]:
    # A loss that is no number is reported as such, as nanoGPT does; looking for one would wait for the GPU each time.
    values: dict[str, Any] = {"remove_unused_columns": False, "logging_nan_inf_filter": False}
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if "max_iters" in config:
        values["max_steps"] = max(config["max_iters"] - iter_num, 1)
    if "gradient_accumulation_steps" in config:  # nanoGPT counts micro-steps over all processes
        micro_steps, rest = divmod(config["gradient_accumulation_steps"], world_size)
        if rest:
            raise ConversionError(
                f"config: gradient_accumulation_steps: expected a multiple of the {world_size} processes, got "
                f"{config['gradient_accumulation_steps']}; change one of the two, as nanoGPT asks too"
            )
        values["gradient_accumulation_steps"] = micro_steps
    if "wandb_log" in config:
        values["report_to"] = "wandb" if config["wandb_log"] else "none"
    device = str(config.get("device", ""))
    is_cpu = device.startswith("cpu")
    if is_cpu:
        values["use_cpu"] = True
    elif is_torch_tf32_available():
        values["tf32"] = True  # train.py's two switches
    if not is_cpu and config.get("dtype") in ("bfloat16", "float16"):  # nanoGPT autocasts on an accelerator only
        values["bf16" if config["dtype"] == "bfloat16" else "fp16"] = True
    if "backend" in config and world_size > 1:  # nanoGPT's default is nccl on every machine, CPUs too
        values["ddp_backend"] = "gloo" if is_cpu else config["backend"]
    if world_size > 1:
        values["ddp_find_unused_parameters"] = False  # all are used, and looking for others costs time
    return values
