"""What is wrong with the parts of a checkpoint: each function returns every fault as a sentence and raises nothing.

Most work on names, shapes and dtypes alone, so a file is refused before its tensors are read.
"""

import math
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..errors import join_some, list_some
from ..model.configuration_nano_gpt import NanoGPTConfig
from .layout import MODEL_ARGS, iterate_shapes

# The dtypes that models compute with; float8 is not one of them.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# What torch.load(weights_only=True) reads back, in addition to containers and tensors.
_PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def find_key_faults(what: str, found: Collection[str], required: Collection[str], known: Collection[str]) -> list[str]:
    """Finds required keys that are missing from a dict, and keys that are not known."""
    missing = [key for key in required if key not in found]
    unknown = [key for key in found if key not in known]
    faults = []
    if missing:
        faults.append(f"{what}: missing {list_some(missing)}")
    if unknown:
        faults.append(f"{what}: expected only {list_some(known)}, got unknown {list_some(unknown)}")
    return faults


def find_args_faults(model_args: Mapping[str, Any]) -> list[str]:
    """Finds model_args that are missing, unknown, or have a value that no model can have."""
    faults = find_key_faults("model_args", model_args, MODEL_ARGS, MODEL_ARGS)
    if not faults:
        try:
            NanoGPTConfig(**model_args)
        except ValueError as error:
            faults.append(f"model_args: {str(error).removeprefix('NanoGPTConfig: ')}")
    return faults


def find_model_faults(model_args: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Finds names, shapes and dtypes that differ from those of nanoGPT's model of these model_args."""
    faults = find_args_faults(model_args)
    if faults:
        return faults
    if model_args["n_layer"] > len(tensors):  # before a table of that many layers is made
        return [f"model: expected {model_args['n_layer']} layers, got only {len(tensors)} tensors in all"]
    shapes = dict(iterate_shapes(model_args))
    faults = find_key_faults("model", tensors, shapes, shapes)
    wrong_shapes = [
        f"{name}: expected {shapes[name]}, got {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    if wrong_shapes:
        faults.append(f"model: wrong shapes: {join_some(wrong_shapes)}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        found = list_some(sorted(map(str, dtypes)))
        faults.append(f"model: expected all tensors of one floating dtype ({known}), got {found}")
    return faults


def find_number_faults(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Finds tensors that contain NaN or infinity."""
    # One NaN or infinity makes the sum so, and a sum reads each number only once. As a sum can also overflow, tensors
    # with such a sum are then tested number by number.
    sums = {name: tensor.sum(dtype=torch.float32).item() for name, tensor in tensors.items()}
    found = [name for name in sums if not math.isfinite(sums[name]) and not tensors[name].isfinite().all()]
    return [f"model: expected finite numbers, got NaN or infinity in {list_some(found)}"] if found else []


def is_tied(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Returns whether lm_head and the token embedding are one tensor, or two with the same numbers."""
    head, embedding = tensors["lm_head.weight"], tensors["transformer.wte.weight"]
    return head is embedding or torch.equal(head, embedding)


def find_tying_faults(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Finds an lm_head that differs from the token embedding, for formats that keep only one of the two."""
    fault = "expected the numbers of transformer.wte.weight, as they are tied and one is lost, got others"
    return [] if is_tied(tensors) else [f"lm_head.weight: {fault}"]


def find_dense_faults(tensors: Mapping[str, Any]) -> list[str]:
    """Finds tensors that are not dense, or not on the CPU."""
    odd = [name for name, tensor in tensors.items() if not _is_dense(tensor) or tensor.device.type != "cpu"]
    return [f"model: expected dense tensors on the CPU, got others as {list_some(odd)}"] if odd else []


def _is_dense(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and not tensor.is_meta and find_oddity(tensor) is None


def find_oddity(tensor: torch.Tensor) -> str | None:
    """Returns why a tensor cannot be read as a plain block of numbers, or None if it can."""
    if tensor.layout != torch.strided:
        return str(tensor.layout)
    if tensor.is_neg() or tensor.is_conj():
        return "a negated or conjugated view"
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < reach:
            return "one whose numbers share memory"  # as after expand()
        reach = stride * size
    return None


def find_plain_faults(what: str, value: Any) -> list[str]:
    """Finds what a weights_only load would refuse to read back: anything but plain Python types and tensors."""
    if type(value) in (dict, OrderedDict):
        keys = [fault for key in value for fault in find_plain_faults(f"{what}: key {key!r}", key)]
        return keys + [fault for key, item in value.items() for fault in find_plain_faults(f"{what}[{key!r}]", item)]
    if type(value) in (list, tuple, set, torch.Size):
        return [fault for index, item in enumerate(value) for fault in find_plain_faults(f"{what}[{index}]", item)]
    if type(value) in _PLAIN_TYPES or _is_dense(value):
        return []
    kind = "a tensor that is not dense" if isinstance(value, torch.Tensor) else type(value).__name__
    return [f"{what}: expected plain Python types, got {kind}"]
