"""What a checkpoint of the nanoGPT family holds, whatever its file looks like: plain data, no reading and no checking.

The tensor table below is the one place that knows nanoGPT's tensor names and shapes; model, readers and writers all
use these names unchanged, so there is no name map to invert.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# The keys of nanoGPT's model_args, in the order in which its train.py writes them (train.py @ 3adf61e).
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")

# nanoGPT's best_val_loss before the first evaluation (train.py @ 3adf61e).
NO_VAL_LOSS = 1e9


@dataclass(frozen=True)
class TrainingState:
    """Where a run stood: everything in a checkpoint that is not the model.

    Args:
        iter_num: Number of optimizer updates made.
        best_val_loss: Lowest validation loss seen, in nats per token; 1e9 before the first evaluation.
        config: train.py's settings, by name, in plain Python types.
        optimizer: torch.optim.AdamW state dict in nanoGPT's parameter order, or None if there is none or it was not
            read.
    """

    iter_num: int = 0
    best_val_loss: float = NO_VAL_LOSS
    config: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, in memory.

    Args:
        model_args: nanoGPT's seven model_args.
        state_dict: Tensors under nanoGPT's names, in nanoGPT's order, on the CPU, in the dtype of the file. Tied
            matrices are one tensor under both names.
        training_state: Everything that is not the model.
        activation_function: Activation the weights were trained with, in NanoGPTConfig's terms.
        path: File it was read from, or None.
        assumptions: What the file does not say and was assumed, a sentence each.
    """

    model_args: dict[str, Any]
    state_dict: dict[str, torch.Tensor]
    training_state: TrainingState = field(default_factory=TrainingState)
    activation_function: str = "gelu"
    path: Path | None = None
    assumptions: tuple[str, ...] = ()

    @property
    def is_tied(self) -> bool:
        """Whether lm_head and the token embedding hold the same numbers."""
        head, embedding = self.state_dict["lm_head.weight"], self.state_dict["transformer.wte.weight"]
        return head is embedding or (head.shape == embedding.shape and torch.equal(head, embedding))


def iterate_shapes(model_args: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the name and shape of every tensor of nanoGPT's state dict, in its order (model.py @ 3adf61e)."""
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
