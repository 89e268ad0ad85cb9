"""Which rows of a vocabulary generate may draw: all but those that stand for no token, which are at its end.

GPT-2's 50257 tokens stand in 50304 rows, and generation_config.suppress_tokens lists the rest. This file travels with
saved models as remote code.
"""

from collections.abc import Iterable

from transformers import GenerationConfig


def count_tokens(settings: GenerationConfig, n_rows: int) -> int:
    """Returns how many rows of a vocabulary are tokens, as far as is known: from there on all are suppressed."""
    suppressed, n_tokens = set(settings.suppress_tokens or ()), n_rows
    while n_tokens - 1 in suppressed:
        n_tokens -= 1
    return n_tokens


def suppress_rows(settings: GenerationConfig, n_rows: int, spare: Iterable[int]) -> None:
    """Lets generate never draw the rows without a token, in place of those known of the n_rows there were."""
    n_tokens = count_tokens(settings, n_rows)
    banned = {index for index in settings.suppress_tokens or () if index < n_tokens}  # by the user: it stays so
    settings.suppress_tokens = sorted(banned.union(spare)) or None


def follow_resize(settings: GenerationConfig, n_before: int, n_rows: int, n_tokens: int | None) -> None:
    """Revises generation settings after a resize of the vocabulary from n_before to n_rows rows.

    Args:
        settings: The model's.
        n_before: Rows before.
        n_rows: Rows now.
        n_tokens: Rows that were asked for, before any rounding up; None if only a rounding was.
    """
    n_tokens = min(n_rows, count_tokens(settings, n_before) if n_tokens is None else n_tokens)
    suppress_rows(settings, n_before, range(n_tokens, n_rows))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(settings, name)
        if isinstance(value, int) and value >= n_rows:  # cut off
            setattr(settings, name, None)


__all__ = ["count_tokens", "follow_resize", "suppress_rows"]
