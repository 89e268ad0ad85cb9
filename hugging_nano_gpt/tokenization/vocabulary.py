"""Which rows of a model's vocabulary are tokens, and which of them start, end and pad a text.

The tokenizer decides, where there is one. A checkpoint says nothing of it, so that without one it is guessed from the
number of rows. What is known is in the model's generation settings, which go into every folder and export; a resize
revises them (vocabulary_nano_gpt.py).
"""

from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import TokenizerError
from ..model.configuration_nano_gpt import GPT2_TOKENS, GPT2_VOCAB_SIZES
from ..model.vocabulary_nano_gpt import suppress_rows

# <|endoftext|>, which stands between the documents of nanoGPT's data (data/openwebtext/prepare.py @ 3adf61e).
_GPT2_END_OF_TEXT = GPT2_TOKENS - 1
_END_OF_TEXT = "<|endoftext|>"

_ADVICE = "give the tokenizer that the model was trained with (--meta, --tokenizer)"

# What nanoGPT rounds the rows of GPT-2's vocabulary up to (train.py @ 3adf61e); and the least that is a rounding.
_USUAL_MULTIPLE, _LEAST_MULTIPLE = 64, 8


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Lets generate follow a tokenizer: rows without a token are never drawn, and its bos, eos and pad hold.

    Needed after tokens were added to the tokenizer for rows that the model had to spare.
    model.resize_token_embeddings(len(tokenizer)) does the same for the rows.

    Args:
        model: The model. Its generation_config is replaced.
        tokenizer: Its tokenizer.

    Raises:
        TokenizerError: If the tokenizer does not fit the model.
    """
    check_tokenizer(tokenizer.name_or_path or "tokenizer", tokenizer, model.config.vocab_size)
    model.generation_config = make_generation_config(model, tokenizer)


def make_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> GenerationConfig:
    """Copies what generate starts, stops and chooses with, and lets it follow the tokenizer if there is one."""
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
    """Sets what is not set of a model whose tokenizer nobody has named.

    Args:
        settings: The model's.
        n_rows: Rows of the vocabulary.
        n_tokens: How many of them, from the first, are tokens; None if that is not known.
    """
    if n_rows in GPT2_VOCAB_SIZES:
        guesses = {"bos_token_id": _GPT2_END_OF_TEXT, "eos_token_id": _GPT2_END_OF_TEXT}
        if n_tokens is None and n_rows % _USUAL_MULTIPLE == 0:  # and no tokens were added
            n_tokens = GPT2_TOKENS
    else:  # token 0 is the newline of nanoGPT's character data, with which sample.py starts by default
        guesses = {"bos_token_id": 0}
    for name, value in guesses.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    suppress_rows(settings, n_rows, range(n_rows if n_tokens is None else n_tokens, n_rows))


def check_tokenizer(where: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises TokenizerError where a tokenizer has ids beyond the rows of a model."""
    ids = tokenizer.get_vocab().values()
    if max(ids, default=0) >= vocab_size:
        raise TokenizerError(
            f"{where}: expected at most {vocab_size} tokens, as the model has rows, got {len(ids)} with ids up to "
            f"{max(ids)}; {_ADVICE}"
        )


def describe_spare_rows(where: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[str]:
    """Says, in a sentence, that a model has more rows than its tokenizer has tokens, unless they are a rounding up.

    Raises:
        TokenizerError: If it has so many more that this cannot be its tokenizer.
    """
    n_tokens, multiple = len(tokenizer.get_vocab()), vocab_size & -vocab_size
    n_spare = vocab_size - n_tokens
    if n_spare == 0 or n_spare < multiple >= _LEAST_MULTIPLE:  # rounded up, as models are to be fast
        return []
    if n_spare > n_tokens:
        raise TokenizerError(
            f"{where}: expected about {vocab_size} tokens, as the model has rows, got {n_tokens}; {_ADVICE}"
        )
    return [f"{where}: {n_tokens:,} tokens for {vocab_size:,} rows: the other {n_spare:,} are never drawn"]


def _set_token(settings: GenerationConfig, name: str, value: int | None, tokens: dict[int, str], default: Any) -> None:
    """Sets a special token: the tokenizer's; without one what the settings have, unless it was guessed wrong."""
    known = getattr(settings, name)
    if value is None:
        is_wrong = isinstance(known, int) and (
            known not in tokens or (known == _GPT2_END_OF_TEXT and tokens[known] != _END_OF_TEXT)
        )
        setattr(settings, name, default if is_wrong else known)
    elif not (isinstance(known, list) and value in known):
        setattr(settings, name, value)
