"""The layout of nanoGPT's state dict: one table of the names, shapes and order of its tensors (model.py @ 3adf61e).

Model, readers and writers all use these names unchanged, so no name map has to be inverted. Wrappers such as
torch.compile put parts of their own into the names; strip_wrappers removes them.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

# The keys of nanoGPT's model_args, in the order in which its train.py writes them (train.py @ 3adf61e).
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")

# What torch.compile, activation checkpointing, FSDP and Lightning Fabric put into a name, around the model or a part
# of it, as a whole part between dots; DistributedDataParallel puts "module" before the name.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")


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


def list_parameter_shapes(model_args: Mapping[str, Any], is_tied: bool) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters in the order of named_parameters, with a tied matrix once."""
    return {name: shape for name, shape in iterate_shapes(model_args) if name != "lm_head.weight" or not is_tied}


def count_parameters(model_args: Mapping[str, Any], is_tied: bool) -> tuple[int, int]:
    """Returns the number of parameters as nanoGPT counts them, without the position embedding, and in total."""
    sizes = {name: math.prod(shape) for name, shape in list_parameter_shapes(model_args, is_tied).items()}
    total = sum(sizes.values())
    return total - sizes["transformer.wpe.weight"], total


def strip_wrappers(name: str) -> str:
    """Removes what wrappers put into a name, at its start or between its parts."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
