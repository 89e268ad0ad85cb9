"""train.py's settings (@ 3adf61e): their names, defaults and types, and the values that train.py can run with.

train.py stops at other values somewhere in its run, in an error of torch's or Python's that names no setting; here
they are refused by name before the run. The values that train.py can run with mean the same here: max_iters below 1 is
one update, grad_clip=0 clips nothing, eval_iters=0 gives losses of NaN. Three of them are refused too: an interval
below 0, a negative grad_clip, which reverses the gradient, and dropout=1, which leaves nothing of the model.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from ..errors import ConversionError, show

# In train.py's order, which is the order of the config in its checkpoints.
TRAIN_DEFAULTS: dict[str, Any] = {
    "out_dir": "out",
    "eval_interval": 2000,
    "log_interval": 1,
    "eval_iters": 200,
    "eval_only": False,
    "always_save_checkpoint": True,
    "init_from": "scratch",
    "wandb_log": False,
    "wandb_project": "owt",
    "wandb_run_name": "gpt2",
    "dataset": "openwebtext",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600_000,
    "weight_decay": 1e-1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "lr_decay_iters": 600_000,
    "min_lr": 6e-5,
    "backend": "nccl",
    "device": "cuda",
    "dtype": "float16",  # bfloat16 on a GPU that supports it: see complete_settings
    "compile": True,
}

_Rule = tuple[str, Callable[[Any], bool]]


def _is_device(name: Any) -> bool:
    try:
        torch.device(str(name))
    except RuntimeError:
        return False
    return True


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, Integral) and int(value) >= least


_COUNT: _Rule = ("a whole number of at least 1", _is_count)
_INTERVAL: _Rule = ("a number of at least 1", lambda value: value >= 1)
_NOT_NEGATIVE: _Rule = ("a number of at least 0", lambda value: value >= 0)
_BELOW_ONE: _Rule = ("a number of at least 0 and below 1", lambda value: 0 <= value < 1)

_RULES: dict[str, _Rule] = {
    "out_dir": ("a folder", lambda value: os.fspath(value) != "" and not Path(value).is_file()),
    **dict.fromkeys(("eval_interval", "log_interval"), _INTERVAL),
    "eval_iters": ("a whole number of at least 0", lambda value: _is_count(value, least=0)),
    **dict.fromkeys(("gradient_accumulation_steps", "batch_size", "block_size"), _COUNT),
    **dict.fromkeys(("n_layer", "n_head", "n_embd"), _COUNT),
    **dict.fromkeys(("dropout", "beta1", "beta2"), _BELOW_ONE),
    **dict.fromkeys(("learning_rate", "weight_decay", "grad_clip"), _NOT_NEGATIVE),
    "device": ("cpu, cuda, cuda:N, mps or another device of torch's", _is_device),
    "dtype": ("float32, bfloat16 or float16", lambda value: value in ("float32", "bfloat16", "float16")),
}


def complete_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all settings of a run: its own, and train.py's defaults for the others."""
    has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return {**TRAIN_DEFAULTS, **({"dtype": "bfloat16"} if has_bfloat16 else {}), **config}


def check_settings(settings: Mapping[str, Any], names: Collection[str] = TRAIN_DEFAULTS) -> None:
    """Refuses settings that train.py cannot run with.

    Args:
        settings: All of train.py's settings.
        names: The settings that are used, and therefore checked.

    Raises:
        ConversionError: If there are any; it names each of them with the values that it may have.
    """
    wrong = {name: fault for name in names if (fault := _find_fault(name, settings[name]))}
    faults = [*wrong.values(), *_find_conflicts(settings, set(names) - wrong.keys())]
    if faults:
        raise ConversionError(f"settings: {'; '.join(faults)}; change the config file, or give another --name=value")


def find_type_fault(name: str, value: Any) -> str | None:
    """Returns what is wrong with the type of a setting's value, or None."""
    default = TRAIN_DEFAULTS[name]
    if not _has_type_of(default, value):
        kind = type(default).__name__
        return f"{name}: wrong type: expected {kind}, as train.py's default has, got {show(value)}; change it"
    if isinstance(value, Integral) and abs(int(value)) >= 2**63:
        return f"{name}: too large: expected a number below 2**63, got {show(value)}; change it"
    return None


def _has_type_of(default: Any, value: Any) -> bool:
    """Returns whether a value has the type of a default; a whole number may be an int or a float for either."""
    if isinstance(default, bool | str) or isinstance(value, bool):
        return type(value) is type(default)
    return isinstance(value, Integral) or (
        isinstance(value, float) and (isinstance(default, float) or value.is_integer())
    )


def _find_fault(name: str, value: Any) -> str | None:
    if not isinstance(TRAIN_DEFAULTS[name], str) and (fault := find_type_fault(name, value)):
        return fault
    expected, is_usable = _RULES.get(name, ("", None))
    return f"{name}: expected {expected}, got {show(value)}" if is_usable and not is_usable(value) else None


def _find_conflicts(settings: Mapping[str, Any], names: Collection[str]) -> Iterator[str]:
    """Finds settings with usable values that cannot be used together."""
    init_from = settings["init_from"]
    if {"n_embd", "n_head"} <= set(names) and init_from == "scratch" and settings["n_embd"] % settings["n_head"]:
        yield f"n_embd: expected a multiple of n_head={settings['n_head']}, got {settings['n_embd']}"
    if {"max_iters", "warmup_iters", "lr_decay_iters", "decay_lr"} <= set(names) and settings["decay_lr"]:
        warmup = settings["warmup_iters"]
        is_reached = 0 <= warmup <= settings["max_iters"] and init_from != "resume"  # which is often past the warmup
        if is_reached and warmup == settings["lr_decay_iters"]:
            yield f"lr_decay_iters: expected another number than warmup_iters={warmup}, got the same"
