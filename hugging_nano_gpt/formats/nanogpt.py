"""nanoGPT's own ckpt.pt, as train.py @ 3adf61e writes it: read, and written so that train.py resumes from it.

A dict of model, optimizer, model_args, iter_num, best_val_loss and config. Only model and model_args must be there:
people strip the rest to make a file smaller, and sample.py needs no more.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

from .check import find_key_faults, find_model_faults
from .contents import NO_VAL_LOSS, Checkpoint, TrainingState
from .torch_file import TorchFile

_REQUIRED_KEYS = ("model", "model_args")
_KEYS = ("model", "optimizer", "model_args", "iter_num", "best_val_loss", "config")

# torch.compile and DistributedDataParallel put these before every name, in either order or both.
_WRAPPER_PREFIXES = ("_orig_mod.", "module.")

# Where torch lacks SDPA (before 2.0) nanoGPT stores its causal mask as a buffer. attn.c_attn.bias is a parameter.
_MASK_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.bias")


def recognise(contents: Any) -> bool:
    """Tells whether an unpickled file is meant to be a nanoGPT checkpoint."""
    return isinstance(contents, dict) and any(key in contents for key in _REQUIRED_KEYS)


def read(file: TorchFile, with_optimizer: bool) -> Checkpoint:
    """Reads a nanoGPT checkpoint, after checking every key, shape and dtype in it.

    Raises:
        CheckpointError: With all faults found, before any tensor is read.
    """
    contents: dict[str, Any] = file.contents
    faults = find_key_faults("checkpoint", contents, _REQUIRED_KEYS, _KEYS)
    faults += _find_type_faults(contents)
    tensors: dict[str, torch.Tensor] = {}
    if not faults or all(isinstance(contents.get(key), dict) for key in _REQUIRED_KEYS):
        tensors, name_faults = _strip_names(contents["model"])
        faults += name_faults + find_model_faults(contents["model_args"], tensors)
    if faults:
        advice = "give a checkpoint of today's nanoGPT, with nothing added, removed or reshaped"
        raise file.fail(f"not a whole nanoGPT checkpoint: {'; '.join(faults)}", advice)
    return Checkpoint(
        model_args=dict(contents["model_args"]),
        state_dict=file.read_tensors(tensors),
        training_state=_read_training_state(file, with_optimizer),
        path=file.path,
        assumptions=("exact GELU, as nanoGPT computes since 2023-06-14: the file does not record the activation",),
    )


def write(checkpoint: Checkpoint, file: BinaryIO) -> None:
    """Writes a checkpoint of today's format; the caller has checked it."""
    state = checkpoint.training_state
    torch.save(
        {
            "model": OrderedDict(checkpoint.state_dict),
            "optimizer": state.optimizer,
            "model_args": checkpoint.model_args,
            "iter_num": state.iter_num,
            "best_val_loss": state.best_val_loss,
            "config": state.config,
        },
        file,
    )


def _find_type_faults(contents: Mapping[str, Any]) -> list[str]:
    expected_types = {"model": dict, "model_args": dict, "optimizer": dict, "config": dict, "iter_num": int}
    faults = [
        f"{key}: expected {expected.__name__}, got {type(contents[key]).__name__}"
        for key, expected in expected_types.items()
        if key in contents and not isinstance(contents[key], expected)
    ]
    loss = contents.get("best_val_loss", NO_VAL_LOSS)
    if not isinstance(loss, int | float) and not (isinstance(loss, torch.Tensor) and loss.numel() == 1):
        faults.append(f"best_val_loss: expected a number, got {type(loss).__name__}")
    return faults


def _strip_names(state_dict: Mapping[Any, Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Removes wrapper prefixes and mask buffers; returns the tensors and what is wrong with the names."""
    tensors: dict[str, torch.Tensor] = {}
    faults = []
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            faults.append(f"model: expected names and tensors, got {key!r}: {type(value).__name__}")
            continue
        name = key
        while name.startswith(_WRAPPER_PREFIXES):
            for prefix in _WRAPPER_PREFIXES:
                name = name.removeprefix(prefix)
        if name in tensors:
            faults.append(f"model: expected each tensor once, got {name!r} again as {key!r}")
        if not (_MASK_BUFFER.fullmatch(name) and value.ndim == 4):
            tensors[name] = value
    return tensors, faults


def _read_training_state(file: TorchFile, with_optimizer: bool) -> TrainingState:
    contents = file.contents
    loss = file.read_tree(contents.get("best_val_loss", NO_VAL_LOSS))
    return TrainingState(
        iter_num=contents.get("iter_num", 0),
        best_val_loss=float(loss),
        config=file.read_tree(contents.get("config", {})),
        optimizer=file.read_tree(contents.get("optimizer")) if with_optimizer else None,
    )
