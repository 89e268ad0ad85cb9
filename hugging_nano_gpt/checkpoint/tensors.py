"""nanoGPT's tensors: the one table of their names, shapes and order (model.py @ 3adf61e).

Model, readers and writers all use these names unchanged, so there is no name map to invert. When a file is read,
prefixes that torch puts before the names are removed, and buffers that are no parameters are left out.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# The keys of nanoGPT's model_args, in the order in which its train.py writes them (train.py @ 3adf61e).
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")

_LAYER = re.compile(r"transformer\.h\.(\d+)\.")


def iterate_shapes(model_args: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the name and shape of every tensor of nanoGPT's state dict, in its order."""
    n_embd = model_args["n_embd"]

    def iterate_layer(name: str, *weight_shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", weight_shape
        if model_args["bias"]:
            yield f"{name}.bias", weight_shape[:1]

    yield "transformer.wte.weight", (model_args["vocab_size"], n_embd)
    yield "transformer.wpe.weight", (model_args["block_size"], n_embd)
    for layer in range(model_args["n_layer"]):
        block = f"transformer.h.{layer}"
        yield from iterate_layer(f"{block}.ln_1", n_embd)
        yield from iterate_layer(f"{block}.attn.c_attn", 3 * n_embd, n_embd)
        yield from iterate_layer(f"{block}.attn.c_proj", n_embd, n_embd)
        yield from iterate_layer(f"{block}.ln_2", n_embd)
        yield from iterate_layer(f"{block}.mlp.c_fc", 4 * n_embd, n_embd)
        yield from iterate_layer(f"{block}.mlp.c_proj", n_embd, 4 * n_embd)
    yield from iterate_layer("transformer.ln_f", n_embd)
    yield "lm_head.weight", (model_args["vocab_size"], n_embd)


def infer_model_args(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Returns the model_args that can be read off the tensors that are there: all but n_head and dropout."""
    model_args: dict[str, Any] = {}
    for arg, name, dimension in (
        ("vocab_size", "transformer.wte.weight", 0),
        ("block_size", "transformer.wpe.weight", 0),
        ("n_embd", "transformer.wte.weight", 1),
    ):
        if name in tensors and tensors[name].ndim == 2:
            model_args[arg] = tensors[name].shape[dimension]
    model_args["n_layer"] = len({match[1] for name in tensors if (match := _LAYER.match(name))})
    model_args["bias"] = "transformer.ln_f.bias" in tensors
    return model_args


def count_parameters(model_args: Mapping[str, Any], is_tied: bool) -> tuple[int, int]:
    """Returns the number of parameters as nanoGPT counts them, without the position embedding, and in total."""
    sizes = {name: math.prod(shape) for name, shape in iterate_shapes(model_args)}
    total = sum(sizes.values()) - (sizes["lm_head.weight"] if is_tied else 0)
    return total - sizes["transformer.wpe.weight"], total


# What torch.compile, activation checkpointing, FSDP and Lightning Fabric put into a name, around the model or a part,
# whole between dots; DistributedDataParallel puts "module" before it.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")

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


def strip_wrappers(name: str) -> str:
    """Removes what wrappers put into a name, at its start or between its parts."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def clean_names(state_dict: Mapping[Any, Any]) -> CleanNames:
    """Removes wrappers' parts of the names, and leaves out mask buffers, by their exact name."""
    tensors: dict[str, torch.Tensor] = {}
    has_masks = False
    faults = []
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            faults.append(f"model: expected names and tensors, got {key!r}: {type(value).__name__}")
            continue
        name = strip_wrappers(key)
        if _MASK_BUFFER.fullmatch(name) and value.ndim == 4:
            has_masks = True
        elif name in tensors:
            faults.append(f"model: expected each tensor once, got {name!r} again as {key!r}")
        else:
            tensors[name] = value
    return CleanNames(tensors, has_masks, faults)


def tie_missing_head(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Adds the token embedding as the lm_head that a file leaves out, as it is tied; says so in a sentence."""
    if "lm_head.weight" in tensors or "transformer.wte.weight" not in tensors:
        return []
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    return ["lm_head tied to the token embedding: the file leaves it out"]
