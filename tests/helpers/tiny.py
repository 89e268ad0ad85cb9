"""Toy models, batches and tokenizers: small enough to be fast, with weights large enough to show faults."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hugging_nano_gpt import (
    NanoGPTConfig,
    NanoGPTForSequenceClassification,
    NanoGPTLMHeadModel,
    NanoGPTModel,
    build_character_tokenizer,
    read_meta,
)
from hugging_nano_gpt.demo import META_PATH

from .reference import ReferenceGPT

# Checkpoints that nanoGPT itself wrote, with the logits that it computed from them. The demo's is in the package.
FIXTURES_DIR = Path(__file__).parents[1] / "fixtures"

# (major, minor), for what the oldest supported release cannot do.
TORCH_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])

MODEL_ARGS: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "block_size": 32,
    "bias": True,
    "vocab_size": 65,
    "dropout": 0.0,
}

PAD = 64  # the last id, which pad_left puts in no row

CLASSES = [NanoGPTModel, NanoGPTLMHeadModel, NanoGPTForSequenceClassification]


def make_pair(seed: int = 0, **model_args: Any) -> tuple[NanoGPTLMHeadModel, ReferenceGPT]:
    """Makes our model and the reference with the same random weights, both in training mode."""
    args = {**MODEL_ARGS, **model_args}
    torch.manual_seed(seed)
    reference = ReferenceGPT(**args)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
            else:  # norms and biases, around their usual values
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model = NanoGPTLMHeadModel(NanoGPTConfig(**args))
    model.load_state_dict(reference.state_dict())
    return model.train(), reference.train()


def make_model(seed: int = 0, **model_args: Any) -> NanoGPTLMHeadModel:
    """Makes our model with random weights, in eval mode."""
    return make_pair(seed, **model_args)[0].eval()


def make_untied() -> NanoGPTLMHeadModel:
    """Makes our model with an output layer of its own, in eval mode."""
    model = NanoGPTLMHeadModel(NanoGPTConfig(**MODEL_ARGS, tie_word_embeddings=False)).eval()
    assert model.lm_head.weight is not model.transformer.wte.weight
    return model


def make_classifier() -> NanoGPTForSequenceClassification:
    """Makes a sequence classifier with random weights, in eval mode."""
    torch.manual_seed(3)
    return NanoGPTForSequenceClassification(NanoGPTConfig(**MODEL_ARGS, num_labels=3)).eval()


def make_batch(batch: int, length: int, vocab_size: int = 65, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes random idx and targets, (batch, length) int64 each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (batch, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:].contiguous()


def make_gpt2(**config: Any) -> GPT2LMHeadModel:
    """Makes a stock GPT-2 with random weights and biases, in eval mode."""
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 32, "vocab_size": 65}
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **config})).eval()
    with torch.no_grad():
        for parameter in gpt2.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return gpt2


def make_tokenizer(**attributes: Any) -> PreTrainedTokenizerFast:
    """Makes the tokenizer of the demo model, with attributes such as eos_token and chat_template."""
    tokenizer = build_character_tokenizer(read_meta(META_PATH), block_size=128)
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@torch.no_grad()
def compute_logits(
    model: Any, idx: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes the logits (B, T, V) of idx (B, T), or of two random rows."""
    if idx is None:
        idx, _ = make_batch(2, min(32, model.config.max_position_embeddings), model.config.vocab_size)
    return model(idx, attention_mask=attention_mask).logits


def pad_left(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns input_ids (B, T) and attention_mask of rows with these lengths, padded on the left."""
    longest = max(lengths)
    ids, mask = torch.full((len(lengths), longest), PAD), torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = make_batch(1, length, vocab_size=PAD, seed=row)[0]
        mask[row, longest - length :] = 1
    return ids, mask


def quantise(model: torch.nn.Module) -> torch.nn.Module:
    """Quantises the Linear layers of a model with torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization moves to torchao
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
