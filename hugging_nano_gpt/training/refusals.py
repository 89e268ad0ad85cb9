"""What Trainer takes and NanoGPTTrainer would ignore, because train.py has its own way: refused by name.

Batches, loss, optimizer, schedule, evaluation and random numbers are train.py's, so Trainer's settings of them are not
read.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from ..data.dataset import collate_windows
from ..data.offsets import NANOGPT_SEED
from ..errors import ConversionError, join_some, list_some

_LOSS = "the loss is nanoGPT's cross-entropy; use plain Trainer"
_METRICS = "evaluate() computes the losses alone; use plain Trainer"
_BATCHES = "batches are train.py's windows; give train_batch_sampler"
_OPTIMIZER = "nanoGPT's AdamW has no such setting; give optimizers=(optimizer, None), or use plain Trainer"
_SCHEDULE = "set decay_lr, warmup_iters, lr_decay_iters and min_lr in the config"
_SEED = f"train.py seeds with {NANOGPT_SEED} and the rank; give random_state or train_batch_sampler"

# Parameters of Trainer.
_PARAMETERS = {
    "data_collator": _BATCHES,
    "compute_loss_func": _LOSS,
    "compute_metrics": _METRICS,
    "preprocess_logits_for_metrics": _METRICS,
    "optimizer_cls_and_kwargs": "the optimizer is nanoGPT's AdamW; give optimizers=(optimizer, None)",
}

# Settings of TrainingArguments. Some releases of Transformers lack some.
_SETTINGS = {
    "label_smoothing_factor": _LOSS,
    **dict.fromkeys(("train_sampling_strategy", "group_by_length", "auto_find_batch_size"), _BATCHES),
    "split_batches": _BATCHES,  # in accelerator_config
    "per_device_eval_batch_size": "train.py evaluates in batches of per_device_train_batch_size; set that",
    "bf16_full_eval": "evaluations compute as training does; set bf16",
    "fp16_full_eval": "evaluations compute as training does; set fp16",
    **dict.fromkeys(("optim", "optim_args", "optim_target_modules", "adam_epsilon"), _OPTIMIZER),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"), _SCHEDULE),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    "parallelism_config": "each process draws batches of its own; use DDP, or fsdp=True",
}


def refuse_ignored(args: TrainingArguments, parameters: Mapping[str, Any]) -> None:
    """Refuses what would have no effect in a NanoGPTTrainer.

    Args:
        args: Any TrainingArguments.
        parameters: Parameters of Trainer by name.

    Raises:
        ConversionError: If there is any, and it names all of them; if eval_dataset is a dict of data sets, or several
            GPUs are visible to one process.
    """
    defaults = {field.name: field.default for field in fields(args)}
    same: dict[str, list[Any]] = {
        "data_collator": [collate_windows],
        "optim": ["adamw_torch", "adamw_torch_fused"],
        "per_device_eval_batch_size": [args.per_device_train_batch_size],
        "seed": [NANOGPT_SEED],
    }
    asked = {name: value for name in _PARAMETERS if (value := parameters.get(name)) is not None}
    for name in _SETTINGS:
        value = getattr(args, name, getattr(args.accelerator_config, name, None))
        if value not in (None, {}, defaults.get(name, False)):
            asked[name] = value
    ignored = [name for name, value in asked.items() if value not in same.get(name, [])]
    if ignored:
        advice = {**_PARAMETERS, **_SETTINGS}
        raise ConversionError(
            f"NanoGPTTrainer: expected nothing that it would ignore, got "
            f"{join_some([f'{name}={asked[name]!r} ({advice[name]})' for name in ignored])}"
        )
    refuse_several(parameters.get("eval_dataset"))
    if args.n_gpu > 1:  # Trainer would split each batch over them by DataParallel, which nanoGPT never does
        raise ConversionError(
            f"NanoGPTTrainer: several GPUs in one process: expected one, got {args.n_gpu}; start it with "
            f"`torchrun --nproc-per-node={args.n_gpu}`, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    if args.metric_for_best_model in ("train/loss", "eval_train/loss"):
        raise ConversionError(
            f"NanoGPTTrainer: metric_for_best_model: expected the validation loss, 'loss', got "
            f"{args.metric_for_best_model!r}; give 'loss'"
        )


def refuse_several(eval_dataset: Any) -> None:
    """Raises ConversionError if eval_dataset is a dict of data sets, where train.py has one data set."""
    if isinstance(eval_dataset, dict):
        raise ConversionError(
            f"NanoGPTTrainer: eval_dataset: expected one data set, train.py's val.bin, got a dict of "
            f"{list_some(eval_dataset)}; evaluate others by trainer.evaluate(dataset, "
            f"metric_key_prefix=name)"
        )
