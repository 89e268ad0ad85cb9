"""Checks and prepares the arguments of a forward pass: the cache, under either of its names, masks and positions.

Transformers 5.24 renamed the argument `past_key_values` to `cache`. A forward pass that ignores an unknown name sees
only the new token, and its numbers are wrong without an error. So both names are accepted, and keys and values under
any other name are refused. No other file of the model depends on the version of Transformers. This file travels with
saved models as remote code.

Shapes: B batch, T new tokens, S keys (cached + T).
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import transformers
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

# The name of the keys and values in this Transformers, as an argument and in the outputs of a model.
CACHE_NAME = (
    "past_key_values"
    if any(field.name == "past_key_values" for field in dataclasses.fields(BaseModelOutputWithPast))
    else "cache"
)

# The newest minor release of Transformers that the tests have passed with; pyproject.toml admits no newer one.
NEWEST_TESTED = (5, 24)

Forward = TypeVar("Forward", bound=Callable)


def is_untested() -> bool:
    """Returns whether this Transformers is newer than NEWEST_TESTED."""
    major, minor = transformers.__version__.split(".")[:2]
    return (int(major), int(minor)) > NEWEST_TESTED


def describe_untested() -> str:
    """Returns the sentence of an error message that names this Transformers and the newest tested one."""
    return (
        f"Transformers {transformers.__version__} is newer than this model's code was tested with (up to "
        f"{NEWEST_TESTED[0]}.{NEWEST_TESTED[1]})"
    )


def deprecate_old_name(forward: Forward) -> Forward:
    """Decorates the forward of a model, so that `past_key_values` warns as in Transformers' own models since 5.24."""
    if CACHE_NAME == "past_key_values":
        return forward

    @functools.wraps(forward)
    def forward_with_warning(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs and not torch.compiler.is_compiling():
            warnings.warn(
                f"`past_key_values` is deprecated and will be removed in version 5.40.0 for "
                f"`{type(self).__name__}.forward`. Use `cache` instead.",
                FutureWarning,
                stacklevel=2,
            )
        return forward(self, *args, **kwargs)

    return cast("Forward", forward_with_warning)


def take_cache(model: nn.Module, past_key_values: Any, cache: Any, kwargs: dict[str, Any]) -> Any:
    """Returns the cache that a forward pass got, under either name.

    Before Transformers 5.24, `cache` is the paged cache of continuous batching. The attention back ends look for it in
    kwargs, so it is put back there.

    Raises:
        TypeError: If both are given, if one is not a Cache, or if one of kwargs contains keys and values.
    """
    where = f"{type(model).__name__}.forward"
    if CACHE_NAME != "cache" and cache is not None and not hasattr(cache, "get_seq_length"):
        kwargs["cache"], cache = cache, None
    if past_key_values is not None and cache is not None:
        raise TypeError(f"{where}: past_key_values and cache are two names of the same argument; give one")
    found = past_key_values if cache is None else cache
    # isinstance gets tuples of types here, because torch 2.6 cannot trace isinstance(x, A | B)
    if isinstance(found, (tuple, list)):
        raise TypeError(f"{where}: {CACHE_NAME}: expected a Cache, got a {type(found).__name__}; use DynamicCache()")
    for name, value in kwargs.items():
        if name != "cache" and _has_keys_and_values(value):
            raise TypeError(
                f"{where}: the argument {name!r} contains keys and values: expected them as past_key_values or cache; "
                f"{describe_untested()}; install an older one, update the code, or use use_cache=False"
            )
    return found


def _has_keys_and_values(value: Any) -> bool:
    if isinstance(value, Cache):
        return True
    layer = value[0] if isinstance(value, (tuple, list)) and value else None  # ((keys, values) of a layer, ...)
    return isinstance(layer, (tuple, list)) and len(layer) > 0 and isinstance(layer[0], torch.Tensor)


def select_columns(
    model: nn.Module, attention_mask: torch.Tensor | None, past_length: int | torch.Tensor, length: int
) -> torch.Tensor | None:
    """Returns the columns (B, S) of a 2-D mask for the cached and the new tokens, and any other mask unchanged.

    Raises:
        ValueError: If the mask is shorter. It may be longer, because some callers make one mask for a whole text.
    """
    if attention_mask is None or attention_mask.ndim != 2 or isinstance(past_length, torch.Tensor):
        return attention_mask  # a static cache counts its tokens on the device, and its masks have its length
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
        model: The model whose forward pass it is.
        position_ids: The caller's own, or None.
        attention_mask: (B, S) from select_columns, or a 4-D one, or None.
        past_length: The number of cached tokens.
        inputs: (B, T) token ids or (B, T, C) embeddings.

    Raises:
        ValueError: If a position is not below block_size.
    """
    length, device = inputs.shape[1], inputs.device
    if position_ids is not None:
        positions = position_ids
    elif attention_mask is not None and attention_mask.ndim == 2:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0).to(device)  # (B, S)
        if positions.shape[1] != length:
            positions = positions[:, torch.arange(length, device=device) + past_length]  # (B, T)
    else:
        positions = torch.arange(length, device=device)[None] + past_length  # (1, T)
    check_positions(model, positions, past_length + length, is_explicit=position_ids is not None)
    return positions


def check_positions(model: nn.Module, positions: torch.Tensor, end: int | torch.Tensor, is_explicit: bool) -> None:
    """Raises ValueError if one of the positions (B or 1, T) is not below block_size.

    Nearly always the shape is enough to know. The values are read only if the caller gave them, or if padding makes a
    row longer than its tokens; never while a graph is recorded.
    """
    if torch.compiler.is_compiling() or (positions.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    config: Any = model.config
    if isinstance(end, torch.Tensor):  # a static cache counts its tokens on the device; generate has checked its size
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
    """Returns the column of each row's last token among the new ones, (B,) int64, or -1 if it is the last for all.

    Args:
        pad_token_id: The config's.
        input_ids: (B, T), or None if embeddings were given.
        attention_mask: (B, S), or a 4-D mask, which is ignored, or None.
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
    """Raises ValueError if gradient checkpointing gets a cache with tokens, to which it would add twice."""
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"{type(model).__name__}: gradient checkpointing computes each block twice and would add to the cache "
            f"twice: expected no cached tokens while training, got {int(cache.get_seq_length())}; leave the "
            f"cache out, or turn gradient checkpointing off"
        )


def refuse_narrow_flex_heads(model: nn.Module, head_dim: int, device: torch.device) -> None:
    """Raises ValueError where torch's flex_attention computes wrong numbers.

    Seen in torch 2.13 and 2.14 with AVX2: numbers off by 2.6, or NaN, if T is not a multiple of the kernel's block.
    """
    if device.type == "cpu" and head_dim < 32 and torch.backends.cpu.get_cpu_capability() != "AVX512":
        raise ValueError(
            f"{type(model).__name__}: torch's flex_attention computes wrong numbers on this CPU: expected n_embd / "
            f"n_head of at least 32, got {head_dim}; use attn_implementation='sdpa'"
        )
