"""The values of its settings that train.py (@ 3adf61e) can run with: others are refused by name, before the run.

train.py stops at such a value somewhere in its run, in an error of torch's or Python's that names no setting. What it
can run with is taken as it takes it: max_iters below 1 is one update, grad_clip=0 clips nothing, eval_iters=0 gives
losses of NaN. Three that it can run with are refused: an interval below 0, a negative grad_clip, which turns the
gradient around, and dropout=1, which leaves nothing of the model.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from ..errors import ConversionError, show
from .configurator import TRAIN_DEFAULTS, find_type_fault

_Rule = tuple[str, Callable[[Any], bool]]


def _is_device(name: Any) -> bool:
    try:
        torch.device(str(name))
    except RuntimeError:
        return False
    return True


_COUNT: _Rule = ("a whole number of at least 1", lambda value: isinstance(value, Integral) and int(value) >= 1)
_INTERVAL: _Rule = ("a number of at least 1", lambda value: value >= 1)
_NOT_NEGATIVE: _Rule = ("a number of at least 0", lambda value: value >= 0)
_BELOW_ONE: _Rule = ("a number of at least 0 and below 1", lambda value: 0 <= value < 1)
_DTYPES = ("float32", "bfloat16", "float16")

_RULES: dict[str, _Rule] = {
    "out_dir": ("a folder", lambda value: os.fspath(value) != "" and not Path(value).is_file()),
    **dict.fromkeys(("eval_interval", "log_interval"), _INTERVAL),
    "eval_iters": ("a whole number of at least 0", lambda value: isinstance(value, Integral) and int(value) >= 0),
    **dict.fromkeys(("gradient_accumulation_steps", "batch_size", "block_size"), _COUNT),
    **dict.fromkeys(("n_layer", "n_head", "n_embd"), _COUNT),
    **dict.fromkeys(("dropout", "beta1", "beta2"), _BELOW_ONE),
    **dict.fromkeys(("learning_rate", "weight_decay", "grad_clip"), _NOT_NEGATIVE),
    "device": ("cpu, cuda, cuda:N, mps or another device of torch's", _is_device),
    "dtype": (", ".join(_DTYPES[:2]) + f" or {_DTYPES[2]}", lambda value: value in _DTYPES),
}


def check_settings(settings: Mapping[str, Any], names: Collection[str] = TRAIN_DEFAULTS) -> None:
    """Refuses settings that train.py cannot run with.

    Args:
        settings: All of train.py's settings.
        names: Those that are used, and so are checked.

    Raises:
        ConversionError: If there are any; it names each, and what it may be.
    """
    wrong = {name: fault for name in names if (fault := _find_fault(name, settings[name]))}
    faults = [*wrong.values(), *_find_conflicts(settings, set(names) - wrong.keys())]
    if faults:
        raise ConversionError(f"settings: {'; '.join(faults)}; change the config file, or give another --name=value")


def _find_fault(name: str, value: Any) -> str | None:
    if not isinstance(TRAIN_DEFAULTS[name], str) and (fault := find_type_fault(name, value)):
        return fault
    expected, is_usable = _RULES.get(name, ("", None))
    return f"{name}: expected {expected}, got {show(value)}" if is_usable and not is_usable(value) else None


def _find_conflicts(settings: Mapping[str, Any], names: Collection[str]) -> Iterator[str]:
    """Finds pairs of settings, each of which could be used, that cannot be used together."""
    init_from = settings["init_from"]
    if {"n_embd", "n_head"} <= set(names) and init_from == "scratch" and settings["n_embd"] % settings["n_head"]:
        yield f"n_embd: expected a multiple of n_head={settings['n_head']}, got {settings['n_embd']}"
    if {"max_iters", "warmup_iters", "lr_decay_iters", "decay_lr"} <= set(names) and settings["decay_lr"]:
        warmup = settings["warmup_iters"]
        is_reached = 0 <= warmup <= settings["max_iters"] and init_from != "resume"  # which is often past the warmup
        if is_reached and warmup == settings["lr_decay_iters"]:
            yield f"lr_decay_iters: expected another number than warmup_iters={warmup}, got the same"
