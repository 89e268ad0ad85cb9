"""Loading what is to be compared: a checkpoint file, a saved folder or a model of the hub becomes a model.

Nothing of it is executed: files go through our own reader, folders and the hub through convert/pretrained.py.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers.activations import ACT2FN

from ..checkpoint.contents import Checkpoint
from ..checkpoint.read_write import read_checkpoint
from ..convert.nanogpt import make_model
from ..convert.source import FILE_SUFFIXES, load_folder
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel, NanoGPTMLP
from .computing import Batches, compute_numbers

# As on the hub; a path of that shape is told from one by its suffix.
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

# Rows of each batch, and its seed.
_N_ROWS = 2
_SEED = 1337


@dataclass(frozen=True)
class Side:
    """One of two models to compare.

    Args:
        label: What it is, in words.
        model: The model, in eval mode, on the CPU.
        checkpoint: What it was made from, without its optimizer; None for a folder and the hub.
    """

    label: str
    model: NanoGPTLMHeadModel
    checkpoint: Checkpoint | None = None

    @property
    def is_tied(self) -> bool:
        """Whether lm_head is the token embedding itself."""
        return self.model.lm_head.weight is self.model.transformer.wte.weight

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What was assumed about the file, a sentence each."""
        return () if self.checkpoint is None else self.checkpoint.assumptions

    def compute(self, batches: Batches, with_gradients: bool) -> dict[str, torch.Tensor]:
        """Computes what compute_numbers does."""

        def forward(idx: torch.Tensor, targets: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
            outputs = self.model(idx, shift_labels=targets, use_cache=False)  # without a cache: nanoGPT's own call
            return outputs.logits, outputs.loss

        named_parameters = self.model.named_parameters()
        return compute_numbers(forward, named_parameters, batches, self.model.config.block_size, with_gradients)

    @contextlib.contextmanager
    def computing_with(self, activation_function: str) -> Iterator[None]:
        """Lets the model compute another GELU while the block lasts; its config goes on naming its own."""
        layers = [cast(NanoGPTMLP, block.mlp) for block in self.model.transformer.h]
        for layer in layers:
            layer.act = ACT2FN[activation_function]
        try:
            yield
        finally:
            for layer in layers:
                layer.act = ACT2FN[self.model.config.activation_function]


def load_side(
    source: str | os.PathLike[str], activation_function: str | None = None, n_head: int | None = None
) -> Side:
    """Loads a checkpoint file, a saved folder or, if there is no such path, a model of the hub.

    Args:
        source: Path or hub id.
        activation_function: Activation in place of the one that a file's age tells; a folder records its own.
        n_head: Number of heads, for a file that does not record it.

    Raises:
        CheckpointError: If there is no whole nanoGPT model there, or the hub cannot be reached.
    """
    path = Path(source)
    if path.is_dir():
        side = Side(f"{path} (saved folder)", load_folder(path, attn_implementation="sdpa"))
    elif not path.exists() and _HUB_ID.fullmatch(os.fspath(source)) and path.suffix not in FILE_SUFFIXES:
        model = load_folder(os.fspath(source), attn_implementation="sdpa")
        side = Side(f"{source} (from the hub)", model)
    else:
        checkpoint = read_checkpoint(
            path, n_head=n_head, activation_function=activation_function, with_optimizer=False
        )
        model = make_model(NanoGPTLMHeadModel, path, checkpoint, attn_implementation="sdpa")
        side = Side(f"{path} ({checkpoint.format} checkpoint, iter_num {_count(checkpoint)})", model, checkpoint)
    with torch.no_grad():
        for parameter in side.model.parameters():
            # To where torch allocates: safetensors maps tensors at any address, and a matrix library may order its
            # sums by the alignment. It also makes the model independent of the file.
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return side


def make_batches(vocab_size: int, block_size: int) -> Batches:
    """Makes random idx and targets, (B, T) int64 each, of one token, about half the block and all of it."""
    generator = torch.Generator().manual_seed(_SEED)
    lengths = sorted({1, block_size // 2 + 1, block_size})
    rows = [torch.randint(vocab_size, (_N_ROWS, length + 1), generator=generator) for length in lengths]
    return [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) for tokens in rows]


def _count(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.training_state.iter_num:,}"
