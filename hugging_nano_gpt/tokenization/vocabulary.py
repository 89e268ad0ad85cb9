"""Finds out which rows of a model's vocabulary are tokens, and which of them are bos, eos and pad.

The tokenizer decides. A checkpoint does not record it, so without a tokenizer it is guessed from the number of rows.
The result is in the model's generation config, which is saved in every folder and export, and which a resize updates
(generation_nano_gpt.py).
"""

from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import TokenizerError
from ..model.configuration_nano_gpt import GPT2_TOKENS, GPT2_VOCAB_SIZES
from ..model.generation_nano_gpt import suppress_rows

# The id of <|endoftext|>, which separates documents in nanoGPT's data (data/openwebtext/prepare.py @ 3adf61e).
_GPT2_END_OF_TEXT = GPT2_TOKENS - 1
_END_OF_TEXT = "<|endoftext|>"

_ADVICE = "give the tokenizer that the model was trained with (--meta, --tokenizer)"

# nanoGPT rounds the rows of GPT-2's vocabulary up to a multiple of 64 (train.py @ 3adf61e). Spare rows are taken for
# such a rounding if the number of rows is a multiple of 8.
_USUAL_MULTIPLE, _LEAST_MULTIPLE = 64, 8


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes generate use the tokenizer's bos, eos and pad, and never sample ids that have no token.

    Call it after adding tokens to the tokenizer for spare rows of the model. model.resize_token_embeddings updates the
    rows in the same way. The model's generation_config is replaced.

    Raises:
        TokenizerError: If the tokenizer has ids that the model does not have.
    """
    check_tokenizer(tokenizer.name_or_path or "tokenizer", tokenizer, model.config.vocab_size)
    model.generation_config = make_generation_config(model, tokenizer)


def make_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> GenerationConfig:
    """Returns a copy of the model's generation config, with the special tokens and ids of the tokenizer if given."""
    settings: GenerationConfig = GenerationConfig.from_dict(model.generation_config.to_dict())
    if tokenizer is None:
        return settings
    tokens, n_rows = {index: token for token, index in tokenizer.get_vocab().items()}, model.config.vocab_size
    suppress_rows(settings, n_rows, (index for index in range(n_rows) if index not in tokens))
    end = tokenizer.eos_token_id
    _set_token(settings, "bos_token_id", end if tokenizer.bos_token_id is None else tokenizer.bos_token_id, tokens, 0)
    _set_token(settings, "eos_token_id", end, tokens, None)
    _set_token(settings, "pad_token_id", tokenizer.pad_token_id, tokens, None)
    return settings


def guess_generation_config(settings: GenerationConfig, n_rows: int, n_tokens: int | None) -> None:
    """Sets the special tokens and the suppressed ids of a model without a tokenizer, where they are not set.

    Args:
        settings: The model's generation config.
        n_rows: Number of rows of the vocabulary.
        n_tokens: Number of rows, from the first on, that are tokens; None if it is not known.
    """
    if n_rows in GPT2_VOCAB_SIZES:
        guesses = {"bos_token_id": _GPT2_END_OF_TEXT, "eos_token_id": _GPT2_END_OF_TEXT}
        if n_tokens is None and n_rows % _USUAL_MULTIPLE == 0:  # so no tokens were added
            n_tokens = GPT2_TOKENS
    else:  # token 0 is the newline in nanoGPT's character data, sample.py's default prompt
        guesses = {"bos_token_id": 0}
    for name, value in guesses.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    suppress_rows(settings, n_rows, range(n_rows if n_tokens is None else n_tokens, n_rows))


def check_tokenizer(where: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises TokenizerError if a tokenizer has ids beyond the rows of a model."""
    ids = tokenizer.get_vocab().values()
    if max(ids, default=0) >= vocab_size:
        raise TokenizerError(
            f"{where}: expected at most {vocab_size} tokens, as the model has rows, got {len(ids)} with ids up to "
            f"{max(ids)}; {_ADVICE}"
        )


def describe_spare_rows(where: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[str]:
    """Returns a sentence if a model has more rows than its tokenizer has tokens, unless they come from rounding up.

    Raises:
        TokenizerError: If it has more than twice as many, so this cannot be its tokenizer.
    """
    n_tokens = len(tokenizer.get_vocab())
    n_spare = vocab_size - n_tokens
    if n_spare == 0 or is_rounded_up(n_tokens, vocab_size):
        return []
    if n_spare > n_tokens:
        raise TokenizerError(
            f"{where}: expected about {vocab_size} tokens, as the model has rows, got {n_tokens}; {_ADVICE}"
        )
    return [f"{where}: {n_tokens:,} tokens for {vocab_size:,} rows: the other {n_spare:,} are never generated"]


def is_rounded_up(n_tokens: int, vocab_size: int) -> bool:
    """Returns whether a model has so few spare rows that its number of tokens was rounded up for speed."""
    multiple = vocab_size & -vocab_size
    return vocab_size - n_tokens < multiple >= _LEAST_MULTIPLE


def _set_token(settings: GenerationConfig, name: str, value: int | None, tokens: dict[int, str], default: Any) -> None:
    """Sets a special token to the tokenizer's; if it has none, keeps the known one, unless that was a wrong guess."""
    known = getattr(settings, name)
    if value is None:
        is_wrong = isinstance(known, int) and (
            known not in tokens or (known == _GPT2_END_OF_TEXT and tokens[known] != _END_OF_TEXT)
        )
        setattr(settings, name, default if is_wrong else known)
    elif not (isinstance(known, list) and value in known):
        setattr(settings, name, value)
