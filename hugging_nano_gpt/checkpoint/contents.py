"""What a checkpoint of the nanoGPT family contains: plain data, the same for every format."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .moments import OptimizerState

# nanoGPT's best_val_loss before the first evaluation (train.py @ 3adf61e).
NO_VAL_LOSS = 1e9


@dataclass(frozen=True)
class ReadingOptions:
    """What a user says about a file that a format reads; read_checkpoint describes each option."""

    n_head: int | None = None
    with_optimizer: bool = True
    ignore_extra: bool = False


@dataclass(frozen=True)
class TrainingState:
    """The state of a run: everything in a checkpoint that is not the model.

    Args:
        iter_num: Number of optimizer updates made.
        best_val_loss: Lowest validation loss seen, in nats per token; 1e9 before the first evaluation.
        config: train.py's settings by name, in plain Python types.
        optimizer: AdamW's moments by parameter name, or None if the file has none or they were not read.
    """

    iter_num: int = 0
    best_val_loss: float = NO_VAL_LOSS
    config: dict[str, Any] = field(default_factory=dict)
    optimizer: OptimizerState | None = None


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, in memory.

    Args:
        model_args: nanoGPT's seven model_args.
        state_dict: Tensors under nanoGPT's names, in nanoGPT's order, on the CPU, in the dtype of the file. Tied
            matrices are one tensor under both names.
        tie_word_embeddings: Whether lm_head is the token embedding.
        training_state: Everything that is not the model.
        activation_function: Activation the weights were trained with, as NanoGPTConfig names it.
        n_tokens: Number of real tokens; embedding rows from there to vocab_size are padding. None if all rows are
            real or the file does not say.
        format: Name of the file's format: "nanogpt", "mingpt", "build_nanogpt" or "llmc".
        path: File it was read from, or None.
        era: Which nanoGPT wrote it, as far as the file shows: "since 2023-05-06". Empty for other formats.
        has_optimizer: Whether the file contains an optimizer state, read or not.
        assumptions: What the file does not record and was assumed, one sentence each.
    """

    model_args: dict[str, Any]
    state_dict: dict[str, torch.Tensor]
    tie_word_embeddings: bool = True
    training_state: TrainingState = field(default_factory=TrainingState)
    activation_function: str = "gelu"
    n_tokens: int | None = None
    format: str = "nanogpt"
    path: Path | None = None
    era: str = ""
    has_optimizer: bool = False
    assumptions: tuple[str, ...] = ()
