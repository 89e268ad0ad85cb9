"""Text as ids, refused where a tokenizer cannot hold it, and how long a text is in the unit of its tokenizer."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..errors import DataError, TokenizerError, list_some


def read_text(path: Path) -> str:
    """Reads a text in UTF-8 as it is, with the ends of its lines.

    Raises:
        DataError: If the file cannot be read, or is no such text.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected text in UTF-8, got {error}; name a file of tokens *.bin or *.npy"
        ) from error


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, where: object = "prompt") -> list[int]:
    """Returns the ids of a text, without special tokens around it.

    Raises:
        TokenizerError: If the text has what the tokenizer does not know, or nothing; it names the place.
    """
    try:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    except Exception as error:  # `tokenizers` raises nothing narrower, and does not say which character it was
        unknown = sorted(find_unknown(tokenizer, text))
        raise TokenizerError(
            f"{where}: expected characters of the model's {len(tokenizer)}, got {list_some(unknown)}; leave them out"
        ) from error
    if not ids:
        raise TokenizerError(f"{where}: expected at least one token, got none; give some text")
    return ids


def find_unknown(tokenizer: PreTrainedTokenizerBase, text: str) -> set[str]:
    """Returns the characters of a text that are no token of a character tokenizer, and no part of an added one."""
    for token in tokenizer.get_added_vocab():
        text = text.replace(token, "")
    return set(text) - tokenizer.get_vocab().keys()


def count_units(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[str, int]:
    """Counts what ids stand for: characters if every token is one, else bytes of UTF-8. Special tokens count none."""
    vocabulary = tokenizer.get_vocab()
    special = {*tokenizer.all_special_tokens, *(str(token) for token in tokenizer.added_tokens_decoder.values())}
    if all(len(token) == 1 for token in vocabulary.keys() - special):
        characters = {index for token, index in vocabulary.items() if len(token) == 1}
        return "character", sum(index in characters for index in ids)
    return "byte", len(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode())
