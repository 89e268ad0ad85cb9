"""Keys and values of earlier tokens: the names that Transformers gives them, and the layers that hold them on a CPU.

Transformers 5.24 renamed `past_key_values` to `cache` in forward, generate, masks and outputs. A forward pass that
does not know the name sees one token at a time and gives other numbers without a word. So both names are taken here,
and keys and values under any other name are refused. No other file that travels with saved models asks for a version.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import transformers
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# What this Transformers calls keys and values, in the outputs of a model and in what it hands to one.
CACHE_NAME = (
    "past_key_values"
    if any(field.name == "past_key_values" for field in dataclasses.fields(BaseModelOutputWithPast))
    else "cache"
)

# The newest minor release of Transformers that the tests have run with; pyproject.toml admits no newer one.
NEWEST_TESTED = (5, 24)

Forward = TypeVar("Forward", bound=Callable)


def deprecate_old_name(forward: Forward) -> Forward:
    """Decorates the forward pass of a model: the FutureWarning that Transformers' own models raise for the old name.

    They raise it since 5.24, which renamed the argument; before that, nothing changes here.
    """
    if CACHE_NAME == "past_key_values":
        return forward

    @functools.wraps(forward)
    def forward_with_warning(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs and not torch.compiler.is_compiling():
            warnings.warn(
                f"`past_key_values` is deprecated and will be removed in version 5.40.0 for "
                f"`{type(self).__name__}.forward`. Use `cache` instead.",
                FutureWarning,
                stacklevel=2,
            )
        return forward(self, *args, **kwargs)

    return cast("Forward", forward_with_warning)


def take_cache(model: torch.nn.Module, past_key_values: Any, cache: Any, kwargs: dict[str, Any]) -> Any:
    """Returns the keys and values that a forward pass was given, under whichever name.

    Args:
        model: Whose forward it is, for the messages.
        past_key_values: The argument of that name.
        cache: The argument of that name. Before Transformers 5.24 it held the paged cache of continuous batching,
            which the attention back ends take out of kwargs: it is put back there.
        kwargs: The other arguments.

    Raises:
        TypeError: If both are given, if one is no Cache, or if another argument holds keys and values.
    """
    where = f"{type(model).__name__}.forward"
    if CACHE_NAME != "cache" and cache is not None and not hasattr(cache, "get_seq_length"):
        kwargs["cache"], cache = cache, None
    if past_key_values is not None and cache is not None:
        raise TypeError(f"{where}: past_key_values and cache are two names of the same argument; give one")
    found = past_key_values if cache is None else cache
    # Tuples of types from here on: torch 2.6 cannot trace isinstance(x, A | B).
    if isinstance(found, (tuple, list)):
        raise TypeError(f"{where}: {CACHE_NAME}: expected a Cache, got a {type(found).__name__}; use DynamicCache()")
    for name, value in kwargs.items():
        if name != "cache" and _holds_keys_and_values(value):
            raise TypeError(
                f"{where}: the argument {name!r} holds keys and values, which this code knows as past_key_values or "
                f"cache; read without them, tokens would be wrong. Transformers {transformers.__version__} is newer "
                f"than this model's code was tested with ({describe_newest()}); install an older one, update the "
                f"code, or use use_cache=False"
            )
    return found


def describe_newest() -> str:
    """Returns the newest tested Transformers as messages name it."""
    return f"up to {NEWEST_TESTED[0]}.{NEWEST_TESTED[1]}"


def is_untested() -> bool:
    """Tells whether this Transformers is newer than the newest one that the tests have run with."""
    major, minor = transformers.__version__.split(".")[:2]
    return (int(major), int(minor)) > NEWEST_TESTED


def _holds_keys_and_values(value: Any) -> bool:
    if isinstance(value, Cache):
        return True
    layer = value[0] if isinstance(value, (tuple, list)) and value else None  # ((keys, values) of a layer, ...)
    return isinstance(layer, (tuple, list)) and len(layer) > 0 and isinstance(layer[0], torch.Tensor)


class RoomyLayer(DynamicLayer):
    """A cache layer whose tensors have room to grow, so that a new token does not copy the ones before it.

    On a CPU it keeps half-precision keys and values in float32, to which CPUs attend several times faster. What it
    once handed out never changes: new tokens are written behind it, and a layer that was cropped, reordered or copied
    writes to a new place.

    Args:
        max_length: Tokens that the layer is expected to hold in the end.
    """

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length
        self._own: tuple[torch.Tensor, ...] = ()  # keys and values as this layer left them
        self._room: list[Any] = [None, 0]  # (B, 2, H, room, D), and how much of it is written; shallow copies share it

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values (B, H, T, D), and returns all of them (B, H, S, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if not self._can_write_behind(start, end):
            self._move(key_states, start, end)
        buffer = self._room[0]
        buffer[:, 0, :, start:end] = key_states
        buffer[:, 1, :, start:end] = value_states
        return self._take(end)

    def append(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends one token's keys and values (B, 2, H, 1, D), and returns all of them; update() for decoding."""
        start = self.get_seq_length()
        if not self._can_write_behind(start, start + 1):
            self._move(states[:, 0], start, start + 1)
        self._room[0].narrow(3, start, 1).copy_(states)
        return self._take(start + 1)

    def _can_write_behind(self, start: int, end: int) -> bool:
        buffer, written = self._room
        is_own = len(self._own) == 2 and self.keys is self._own[0] and self.values is self._own[1]
        return is_own and written == start and buffer.shape[3] >= end

    def _move(self, states: torch.Tensor, start: int, end: int) -> None:
        room = max(end, min(2 * end, self.max_length))
        dtype = torch.promote_types(states.dtype, torch.float32) if states.device.type == "cpu" else states.dtype
        batch, n_head, _, head_dim = states.shape
        buffer = states.new_empty((batch, 2, n_head, room, head_dim), dtype=dtype)
        if start > 0:
            buffer[:, 0, :, :start], buffer[:, 1, :, :start] = self.keys, self.values
        self._room = [buffer, start]

    def _take(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._room[1] = end
        self.keys, self.values = self._own = self._room[0].narrow(3, 0, end).unbind(1)
        return self.keys, self.values


__all__ = [
    "CACHE_NAME",
    "NEWEST_TESTED",
    "RoomyLayer",
    "deprecate_old_name",
    "describe_newest",
    "is_untested",
    "take_cache",
]
