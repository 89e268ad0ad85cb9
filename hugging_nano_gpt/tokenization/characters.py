"""nanoGPT's character tables (meta.pkl) as Transformers tokenizers, and back. Reading a meta.pkl executes no code.

Each tokenizer is a single tokenizer.json that does not need this package.
"""

import os
import pickle
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import CheckpointError, TokenizerError, list_some
from ..files.files import open_atomically
from ..files.pickles import LARGEST_PICKLE_BYTES, unpickle_plain
from .bpe import wrap_backend

# `tokenizers` raises "Unk token `...` not found in the vocabulary". This is the text in the middle.
_NO_UNKNOWN = "(for a character that is not in the model's alphabet)"


@dataclass(frozen=True)
class CharacterTable:
    """The alphabet of a character-level model.

    Args:
        characters: The character of each id, in the order of the ids.
    """

    characters: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """Returns the id of each character.

        Raises:
            TokenizerError: If a character is not in the alphabet (nanoGPT raises KeyError).
        """
        ids = {character: index for index, character in enumerate(self.characters)}
        unknown = sorted(set(text) - ids.keys())
        if unknown:
            raise TokenizerError(
                f"text: expected characters of the model's {len(ids)}, got {list_some(unknown)}; leave them out"
            )
        return [ids[character] for character in text]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of the ids.

        Raises:
            TokenizerError: If an id has no character.
        """
        unknown = sorted({index for index in ids if not 0 <= index < len(self.characters)})
        if unknown:
            raise TokenizerError(
                f"ids: expected 0 to {len(self.characters) - 1}, got {list_some(unknown)}; leave them out"
            )
        return "".join(self.characters[index] for index in ids)


def read_meta(path: str | os.PathLike[str]) -> CharacterTable:
    """Reads the meta.pkl that nanoGPT's data/*_char/prepare.py writes.

    Raises:
        TokenizerError: If the file is missing, is not a pickle of plain Python types, or does not contain stoi and
            itos, each the inverse of the other.
    """
    path = Path(path)
    return CharacterTable(_check_tables(path, _load_meta(path)))


def read_vocab_size(path: str | os.PathLike[str]) -> int:
    """Reads the vocab_size of a meta.pkl, the only entry that train.py uses.

    Raises:
        TokenizerError: If the file is missing, is not a pickle of plain Python types, or has no vocab_size.
    """
    meta = _load_meta(Path(path))
    vocab_size = meta.get("vocab_size") if isinstance(meta, dict) else None
    if type(vocab_size) is not int or vocab_size < 1:
        raise TokenizerError(
            f"{path}: expected a positive vocab_size, got {reprlib.repr(vocab_size)}; give the meta.pkl that "
            f"prepare.py wrote"
        )
    return vocab_size


def _load_meta(path: Path) -> Any:
    try:
        if path.stat().st_size > LARGEST_PICKLE_BYTES or not path.is_file():
            raise TokenizerError(
                f"{path}: expected a meta.pkl, got a directory, a device or too large a file; check the path"
            )
        return unpickle_plain(path.read_bytes())
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be opened: {error.strerror}; check the path") from error
    except TokenizerError:
        raise
    except Exception as error:  # a damaged pickle raises nearly any type
        raise TokenizerError(
            f"{path}: expected a pickle of plain Python types, got {type(error).__name__}: {error}; "
            f"give the meta.pkl that prepare.py wrote"
        ) from error


def write_meta(
    source: CharacterTable | PreTrainedTokenizerBase, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Writes the meta.pkl that nanoGPT's train.py and sample.py read: vocab_size, itos and stoi.

    The file has its name only once it is complete.

    Args:
        source: A character table, or any tokenizer whose tokens are single characters.
        path: Path of the file to write. Missing folders are created.
        overwrite: Whether to replace an existing file.

    Raises:
        TokenizerError: If the tokenizer is not a character table, the file exists, or it cannot be written.
    """
    where = os.fspath(path)
    table = source if isinstance(source, CharacterTable) else _extract_table(where, source)
    _check_characters(where, table)
    if os.path.lexists(path) and not overwrite:
        raise TokenizerError(f"{where}: is there already: expected a new path; give another or overwrite=True")
    _dump_meta(path, table.characters, {character: index for index, character in enumerate(table.characters)})


def write_token_meta(texts: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Writes a meta.pkl of a tokenizer's tokens, as well as nanoGPT's train.py and sample.py can use it.

    train.py reads vocab_size. sample.py decodes each token on its own, so a character that is split between tokens
    becomes U+FFFD, and encodes each character on its own, so only single-character tokens have an entry.

    Args:
        texts: The text of each id, in the order of the ids.
        path: Path of the file to write.

    Raises:
        TokenizerError: If it cannot be written.
    """
    _dump_meta(path, texts, {text: index for index, text in enumerate(texts) if len(text) == 1 and text != "\ufffd"})


def _dump_meta(path: str | os.PathLike[str], texts: Sequence[str], stoi: dict[str, int]) -> None:
    meta = {"vocab_size": len(texts), "itos": dict(enumerate(texts)), "stoi": stoi}
    try:
        with open_atomically(path) as file:
            pickle.dump(meta, file)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error


def build_character_tokenizer(
    table: CharacterTable, *, unknown_id: int | None = None, block_size: int | None = None
) -> PreTrainedTokenizerFast:
    """Builds a Transformers tokenizer from a character table.

    Its ids equal the table's, and decoding restores the text exactly, also with skip_special_tokens=True. Encoding
    adds no tokens. For a character outside the table the tokenizer raises an Exception, even where this package is not
    installed (nanoGPT raises KeyError), unless unknown_id is given. Decoding skips ids outside the table.

    It has no bos, eos or pad: Transformers treats these as special tokens, so skip_special_tokens=True would drop the
    character, and Trainer's collators would not train on it. docs/tokenizers.md shows what to do if you need one.

    Args:
        table: The alphabet.
        unknown_id: Id of all unknown characters, instead of the error.
        block_size: Longest sequence of the model; becomes model_max_length.

    Raises:
        TokenizerError: If the table has entries that are not single characters, that UTF-8 cannot encode, or that are
            repeated, or if unknown_id is not one of its ids.
    """
    characters = table.characters
    _check_characters("table", table)
    if unknown_id is not None and not 0 <= unknown_id < len(characters):
        raise TokenizerError(f"unknown_id: expected an id of 0 to {len(characters) - 1}, got {unknown_id!r}; give one")
    unknown = _NO_UNKNOWN if unknown_id is None else characters[unknown_id]
    # Byte-pair encoding without merges. Without an unknown token, it would drop unknown characters silently.
    vocabulary = {character: index for index, character in enumerate(characters)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown, fuse_unk=False))
    backend.decoder = decoders.Fuse()  # without a decoder, tokens are joined with spaces
    return wrap_backend(backend, block_size, None)


def _check_characters(where: str, table: CharacterTable) -> None:
    characters = table.characters
    wrong = [c for c in characters if not isinstance(c, str) or len(c) != 1 or "\ud800" <= c <= "\udfff"]
    repeated = len(set(characters)) < len(characters)
    if wrong or repeated or not characters:
        reason = list_some(wrong) if wrong else "a character twice" if repeated else "none"
        raise TokenizerError(
            f"{where}: expected a table of different single characters that UTF-8 can encode, got {reason}; "
            f"change them"
        )


def _extract_table(where: str, tokenizer: PreTrainedTokenizerBase) -> CharacterTable:
    """Returns the character table of a tokenizer, after a test that it encodes and decodes as the table does."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    characters = tuple(by_id.get(index, "") for index in range(len(by_id)))
    odd = [token for token in characters if len(token) != 1]
    texts = ["".join(characters), "".join(reversed(characters)), *characters]
    wanted = [[*range(len(characters))], [*reversed(range(len(characters)))], *([i] for i in range(len(characters)))]
    if odd or tokenizer(texts).input_ids != wanted or tokenizer.batch_decode(wanted) != texts:
        reason = f"tokens such as {list_some(odd)}" if odd else "one that treats text in another way"
        raise TokenizerError(
            f"{where}: not a character table: expected a tokenizer with one id for each character, got {reason}; "
            f"nanoGPT's meta.pkl cannot express it, nothing was written"
        )
    return CharacterTable(characters)


def _check_tables(path: Path, meta: Any) -> tuple[str, ...]:
    itos, stoi = (meta.get(name) if isinstance(meta, dict) else None for name in ("itos", "stoi"))
    if isinstance(itos, dict) and isinstance(stoi, dict) and itos.keys() == set(range(len(itos))):
        characters = tuple(itos[index] for index in range(len(itos)))
        are_characters = all(isinstance(character, str) and len(character) == 1 for character in characters)
        if are_characters and len(stoi) == len(itos) and stoi == {c: index for index, c in itos.items()}:
            return characters
    has_tokenizer = (path.parent / "tokenizer.json").is_file()  # as `hugging-nano-gpt prepare` writes both
    advice = f"give --tokenizer {path.parent}" if has_tokenizer else "make it again with the data set's prepare.py"
    raise TokenizerError(
        f"{path}: expected 'itos' and 'stoi' to be inverse tables of characters and ids 0 to n - 1, got others; "
        f"{advice}"
    )
