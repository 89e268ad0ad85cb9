"""What torch wraps around nanoGPT's tensor names, and the buffers that are no parameters: taken off on the way in."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# torch.compile and DistributedDataParallel put these before every name, in either order or both.
_WRAPPER_PREFIXES = ("_orig_mod.", "module.")

# The causal mask, where attention is written out: minGPT, nanoGPT before SDPA or on torch before 2.0. Beside it,
# attn.c_attn.bias is a parameter.
_MASK_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.bias")


@dataclass(frozen=True)
class CleanNames:
    """A state dict with nanoGPT's own names.

    Args:
        tensors: Parameters by name.
        has_masks: Whether there were mask buffers, which are left out.
        faults: What is wrong with the names, a sentence each.
    """

    tensors: dict[str, torch.Tensor]
    has_masks: bool
    faults: list[str]


def clean_names(state_dict: Mapping[Any, Any]) -> CleanNames:
    """Takes off wrapper prefixes, in front of the name only, and leaves out mask buffers, by their exact name."""
    tensors: dict[str, torch.Tensor] = {}
    has_masks = False
    faults = []
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            faults.append(f"model: expected names and tensors, got {key!r}: {type(value).__name__}")
            continue
        name = key
        while name.startswith(_WRAPPER_PREFIXES):
            for prefix in _WRAPPER_PREFIXES:
                name = name.removeprefix(prefix)
        if _MASK_BUFFER.fullmatch(name) and value.ndim == 4:
            has_masks = True
        elif name in tensors:
            faults.append(f"model: expected each tensor once, got {name!r} again as {key!r}")
        else:
            tensors[name] = value
    return CleanNames(tensors, has_masks, faults)
