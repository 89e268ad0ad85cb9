"""What a checkpoint of the nanoGPT family holds, whatever its file looks like: plain data, no reading, no checking."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .optimizer import OptimizerState

# nanoGPT's best_val_loss before the first evaluation (train.py @ 3adf61e).
NO_VAL_LOSS = 1e9


@dataclass(frozen=True)
class TrainingState:
    """Where a run stood: everything in a checkpoint that is not the model.

    Args:
        iter_num: Number of optimizer updates made.
        best_val_loss: Lowest validation loss seen, in nats per token; 1e9 before the first evaluation.
        config: train.py's settings, by name, in plain Python types.
        optimizer: AdamW's moments by parameter name, or None if there are none or they were not read.
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
        activation_function: Activation the weights were trained with, in NanoGPTConfig's terms.
        n_tokens: Number of real tokens; the rows of the embedding from there to vocab_size are padding. None if all
            are real or the file does not say.
        format: Kind of file it was read from: "nanogpt", "mingpt", "build_nanogpt" or "llmc".
        path: File it was read from, or None.
        era: Which nanoGPT wrote it, as far as the file tells: "since 2023-05-06". Empty for other formats.
        has_optimizer: Whether the file holds an optimizer state, read or not.
        assumptions: What the file does not say and was assumed, a sentence each.
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
