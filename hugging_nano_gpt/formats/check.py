"""Finding what is wrong with the parts of a checkpoint: returns every fault as a sentence, raises nothing.

Works on shapes and dtypes alone, so a file is refused before its tensors are read.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..configuration_nano_gpt import NanoGPTConfig
from .contents import MODEL_ARGS, iterate_shapes

_MOST_LISTED = 5


def find_key_faults(what: str, found: Collection[str], required: Collection[str], known: Collection[str]) -> list[str]:
    """Compares the keys of a dict with those it must and may have."""
    missing = [key for key in required if key not in found]
    unknown = [key for key in found if key not in known]
    faults = []
    if missing:
        faults.append(f"{what}: missing {list_some(missing)}")
    if unknown:
        faults.append(f"{what}: expected only {list_some(known)}, got unknown {list_some(unknown)}")
    return faults


def find_model_faults(model_args: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Compares tensors, by name, shape and dtype, with what nanoGPT's model of these model_args has."""
    faults = find_key_faults("model_args", model_args, MODEL_ARGS, MODEL_ARGS)
    if faults:
        return faults
    try:
        NanoGPTConfig(**model_args)
    except ValueError as error:
        return [f"model_args: {str(error).removeprefix('NanoGPTConfig: ')}"]
    if model_args["n_layer"] > len(tensors):  # before a table of that many layers is made
        return [f"model: expected {model_args['n_layer']} layers, got only {len(tensors)} tensors in all"]

    shapes = dict(iterate_shapes(dict(model_args)))
    faults = find_key_faults("model", tensors, shapes, shapes)
    wrong_shapes = [
        f"{name}: expected {shapes[name]}, got {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    if wrong_shapes:
        faults.append(f"model: wrong shapes: {list_some(wrong_shapes)}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        faults.append(f"model: expected all tensors of one floating dtype, got {list_some(sorted(map(str, dtypes)))}")
    return faults


def find_optimizer_faults(model_args: Mapping[str, Any], optimizer: Any) -> list[str]:
    """Compares an AdamW state dict with the parameters of nanoGPT's model, in nanoGPT's order.

    That order is: parameters of two or more dimensions, then the others, each in the order of named_parameters, with
    the tied matrix once (model.py @ 3adf61e, configure_optimizers).
    """
    try:
        groups = [list(group["params"]) for group in optimizer["param_groups"]]
        moments = {
            f"{name} of parameter {index}": (index, tuple(state[name].shape))
            for index, state in optimizer["state"].items()
            for name in ("exp_avg", "exp_avg_sq")
        }
    except (KeyError, TypeError, AttributeError):
        return ["optimizer: expected a torch.optim.AdamW state dict, got something else"]
    shapes = list_optimizer_shapes(model_args)
    n_decayed = sum(len(shape) >= 2 for shape in shapes)
    expected_groups = [list(range(n_decayed)), list(range(n_decayed, len(shapes)))]
    faults = []
    if groups != expected_groups:
        faults.append(
            f"optimizer: expected two groups, parameters 0 to {n_decayed - 1} and {n_decayed} to {len(shapes) - 1}, "
            f"got groups of {[len(group) for group in groups]}"
        )
    wrong_moments = [
        f"{what}: expected {shapes[index] if index in range(len(shapes)) else 'none'}, got {found}"
        for what, (index, found) in moments.items()
        if index not in range(len(shapes)) or shapes[index] != found
    ]
    if wrong_moments:
        faults.append(f"optimizer: {list_some(wrong_moments)}")
    return faults


def find_plain_faults(what: str, value: Any) -> list[str]:
    """Finds what a weights_only load would refuse to read back: anything but plain Python types and tensors."""
    if isinstance(value, Mapping):
        return [fault for key, item in value.items() for fault in find_plain_faults(f"{what}[{key!r}]", item)]
    if isinstance(value, list | tuple):
        return [fault for index, item in enumerate(value) for fault in find_plain_faults(f"{what}[{index}]", item)]
    if value is None or type(value) in (bool, int, float, str) or isinstance(value, torch.Tensor | torch.dtype):
        return []
    return [f"{what}: expected plain Python types, got {type(value).__name__}"]


def list_optimizer_shapes(model_args: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Returns the shapes of the parameters in the order in which nanoGPT's optimizer counts them."""
    shapes = [shape for name, shape in iterate_shapes(dict(model_args)) if name != "lm_head.weight"]  # it is wte
    return [shape for shape in shapes if len(shape) >= 2] + [shape for shape in shapes if len(shape) < 2]


def list_some(items: Collection[Any]) -> str:
    """Lists the first five items, and how many there are if there are more."""
    first = list(items)[:_MOST_LISTED]
    listed = ", ".join(item if isinstance(item, str) and " " in item else repr(item) for item in first)
    return listed if len(items) <= _MOST_LISTED else f"{listed}, ... ({len(items)} in all)"
