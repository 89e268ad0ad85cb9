"""Reading and encoding a text, with an error for unknown characters, and counting its characters or bytes."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..errors import DataError, TokenizerError, list_some


def read_text(path: Path) -> str:
    """Reads a text in UTF-8, with its line ends unchanged.

    Raises:
        DataError: If the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected text in UTF-8, got {error}; a file of tokens has to be called *.bin or *.npy"
        ) from error


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, where: object = "prompt") -> list[int]:
    """Returns the ids of a text, without special tokens around it.

    Raises:
        TokenizerError: If the text is empty, or has characters that the tokenizer does not know.
    """
    try:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    except Exception as error:  # `tokenizers` raises no narrower type, and does not say which character it was
        unknown = sorted(find_unknown(tokenizer, text))
        raise TokenizerError(
            f"{where}: expected characters of the model's {len(tokenizer)}, got {list_some(unknown)}; leave them out"
        ) from error
    if not ids:
        raise TokenizerError(f"{where}: expected at least one token, got none; give some text")
    return ids


def find_unknown(tokenizer: PreTrainedTokenizerBase, text: str) -> set[str]:
    """Returns the characters of a text that a character tokenizer does not know, ignoring its added tokens."""
    for token in tokenizer.get_added_vocab():
        text = text.replace(token, "")
    return set(text) - tokenizer.get_vocab().keys()


def count_units(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[str, int]:
    """Counts the characters in ids if all tokens are single characters, else the bytes, without special tokens."""
    vocabulary = tokenizer.get_vocab()
    special = {*tokenizer.all_special_tokens, *(str(token) for token in tokenizer.added_tokens_decoder.values())}
    if all(len(token) == 1 for token in vocabulary.keys() - special):
        characters = {index for token, index in vocabulary.items() if len(token) == 1}
        return "character", sum(index in characters for index in ids)
    return "byte", len(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode())
