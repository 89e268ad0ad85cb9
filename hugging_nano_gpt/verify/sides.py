"""One of two models to compare: loading it, computing with it, and the batches that both models compute on."""

import contextlib
import logging
from collections.abc import Iterator
from typing import cast

import torch
from transformers import GenerationConfig
from transformers.activations import ACT2FN

from ..convert.source import Source
from ..model.modeling_nano_gpt import NanoGPTMLP
from .computing import N_GREEDY, Batches, compute_numbers

# Number of rows of each batch, and the seed of the batches.
_N_ROWS = 2
_SEED = 1337


class Side:
    """One of two models to compare.

    Args:
        source: The model, loaded with attention "sdpa" to the CPU. It is made independent of its file.
    """

    def __init__(self, source: Source):
        self.source, self.model = source, source.model
        self.model.config.loss_chunk_size = None  # a folder's own would leave no logits to compare
        with torch.no_grad():
            for parameter in self.model.parameters():
                # To where torch allocates: safetensors maps tensors at any address, and a matrix library may order
                # its sums by the alignment.
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    @property
    def label(self) -> str:
        """Describes the side in words."""
        iter_num = self.model.nanogpt_training_state.iter_num
        return f"{self.source.name} ({self.source.kind}{f', iteration {iter_num:,}' if iter_num else ''})"

    def list_notes(self, name: str) -> list[str]:
        """Lists what was assumed about the model, after the name of the side."""
        return [f"{name}: {note}" for note in self.source.notes]

    @property
    def is_tied(self) -> bool:
        """Whether lm_head is the token embedding itself."""
        return self.model.lm_head.weight is self.model.transformer.wte.weight

    def compute(self, batches: Batches, with_gradients: bool) -> dict[str, torch.Tensor]:
        """Computes what compute_numbers does, and "cached tokens" (B, N_GREEDY) int64, which generate returns."""

        def forward(idx: torch.Tensor, targets: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
            outputs = self.model(idx, shift_labels=targets, use_cache=False)
            return outputs.logits, outputs.loss

        named_parameters = self.model.named_parameters()
        numbers = compute_numbers(forward, named_parameters, batches, self.model.config.block_size, with_gradients)
        return {**numbers, "cached tokens": self._generate(batches[0][0][:, :1])}

    def _generate(self, idx: torch.Tensor) -> torch.Tensor:
        # Not with the folder's own generation config, which may suppress tokens or stop early.
        generation_config, self.model.generation_config = self.model.generation_config, GenerationConfig()
        logging.disable(logging.WARNING)  # the sequence may go past a small block_size
        try:
            return self.model.generate(idx, max_new_tokens=N_GREEDY, do_sample=False)[:, 1:]
        finally:
            logging.disable(logging.NOTSET)
            self.model.generation_config = generation_config

    @contextlib.contextmanager
    def computing_with(self, activation_function: str) -> Iterator[None]:
        """Makes the model compute another GELU inside the `with` block, without changing its config."""
        layers = [cast(NanoGPTMLP, block.mlp) for block in self.model.transformer.h]
        for layer in layers:
            layer.act = ACT2FN[activation_function]
        try:
            yield
        finally:
            for layer in layers:
                layer.act = ACT2FN[self.model.config.activation_function]


def make_batches(vocab_size: int, block_size: int) -> Batches:
    """Makes batches of random idx and targets, (B, T) int64 each: T is 1, about half of block_size, and block_size."""
    generator = torch.Generator().manual_seed(_SEED)
    lengths = sorted({1, block_size // 2 + 1, block_size})
    rows = [torch.randint(vocab_size, (_N_ROWS, length + 1), generator=generator) for length in lengths]
    return [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) for tokens in rows]
