"""What a forward pass is given beside its tokens: masks become columns and positions, and what cannot be is refused.

nanoGPT reads rows without padding, from position 0. This file travels with saved models as remote code.

Shapes: B batch, T new tokens, S keys (cached + T).
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache


def select_columns(
    model: nn.Module, attention_mask: torch.Tensor | None, past_length: int | torch.Tensor, length: int
) -> torch.Tensor | None:
    """Returns the columns (B, S) of a 2-D mask that stand for the cached and the new tokens; other masks as they are.

    A mask may be longer, as those that are made once for a whole text are. A shorter one leaves open which tokens it
    speaks of.

    Raises:
        ValueError: If it is shorter.
    """
    if attention_mask is None or attention_mask.ndim != 2 or isinstance(past_length, torch.Tensor):
        return attention_mask  # a static cache counts on the device, and its masks are as long as it is
    n_columns = past_length + length
    if attention_mask.shape[1] < n_columns:
        raise ValueError(
            f"{type(model).__name__}: attention_mask: expected a column for each of {past_length} cached and {length} "
            f"new tokens, got {tuple(attention_mask.shape)}; give the mask of the whole text"
        )
    return attention_mask[:, :n_columns]


def find_positions(
    model: nn.Module,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    past_length: int | torch.Tensor,
    inputs: torch.Tensor,
) -> torch.Tensor:
    """Returns the positions (B or 1, T) int64 of the new tokens, after checking that the model has learned them.

    Args:
        model: Whose forward pass it is; its config says how many positions there are.
        position_ids: The caller's own, or None.
        attention_mask: (B, S) from select_columns, or a 4-D one, or None.
        past_length: Cached tokens.
        inputs: (B, T) token ids or (B, T, C) embeddings.

    Raises:
        ValueError: If a position lies at block_size or beyond.
    """
    length, device = inputs.shape[1], inputs.device
    if position_ids is not None:
        positions = position_ids
    elif attention_mask is not None and attention_mask.ndim == 2:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0).to(device)  # (B, S)
        if positions.shape[1] != length:
            positions = positions[:, torch.arange(length, device=device) + past_length]
    else:
        positions = torch.arange(length, device=device)[None] + past_length
    check_positions(model, positions, past_length + length, is_explicit=position_ids is not None)
    return positions


def check_positions(model: nn.Module, positions: torch.Tensor, end: int | torch.Tensor, is_explicit: bool) -> None:
    """Raises ValueError if the model has not learned one of the positions (B or 1, T).

    The shape alone settles nearly every call. The values are read where the caller gave them, as a GPU would die of
    one beyond the table, and where padding makes a row longer than its tokens; not while a graph is recorded.
    """
    if torch.compiler.is_compiling() or (positions.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    config: Any = model.config
    if isinstance(end, torch.Tensor):  # a static cache counts on the device; generate has checked its size
        end, is_explicit = config.block_size, is_explicit and not positions.is_cuda
    if end <= config.block_size and not is_explicit:
        return
    if positions.device.type == "meta" or positions.numel() == 0:
        return
    longest = int(positions.max()) + 1
    if longest > config.block_size:
        raise ValueError(
            f"{type(model).__name__}: input too long: expected at most block_size={config.block_size} tokens, "
            f"got {longest}; keep the last {config.block_size} tokens of the input"
        )


def find_last_tokens(
    pad_token_id: int | None,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    start: int,
    outputs: torch.Tensor,
) -> torch.Tensor | int:
    """Returns where each row's last token is among the new ones, (B,) int64, or -1 for the last column of all.

    Args:
        pad_token_id: The config's.
        input_ids: (B, T), or None where embeddings were given.
        attention_mask: (B, S), a 4-D mask, which is not read, or None.
        start: The mask's column of the first new token.
        outputs: (B, T, ...), of the new tokens.
    """
    length, device = outputs.shape[1], outputs.device
    if attention_mask is not None and attention_mask.ndim == 2:
        is_token = attention_mask[:, start : start + length] != 0
    elif input_ids is not None and pad_token_id is not None:
        is_token = input_ids != pad_token_id
    else:
        return -1
    return (is_token.to(device) * torch.arange(length, device=device)).argmax(-1)


def refuse_filled_cache(model: nn.Module, cache: Cache | None) -> None:
    """Raises ValueError if a cache with tokens in it meets gradient checkpointing."""
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"{type(model).__name__}: gradient checkpointing computes each block twice and would add to the cache "
            f"twice; expected no cached tokens while training, got {int(cache.get_seq_length())}; leave the "
            f"cache out, or turn gradient checkpointing off"
        )


def refuse_narrow_flex_heads(model: nn.Module, head_dim: int, device: torch.device) -> None:
    """Raises ValueError where torch's flex_attention computes wrong numbers.

    Seen in torch 2.13 and 2.14 with AVX2: numbers off by 2.6, or NaN, where T is no multiple of the kernel's block.
    """
    if device.type == "cpu" and head_dim < 32 and torch.backends.cpu.get_cpu_capability() != "AVX512":
        raise ValueError(
            f"{type(model).__name__}: torch's flex_attention computes wrong numbers on this CPU for heads narrower "
            f"than 32, and these have n_embd / n_head = {head_dim}; use attn_implementation='sdpa'"
        )


__all__ = [
    "check_positions",
    "find_last_tokens",
    "find_positions",
    "refuse_filled_cache",
    "refuse_narrow_flex_heads",
    "select_columns",
]
