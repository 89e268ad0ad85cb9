"""nanoGPT's character tables: meta.pkl, read without executing anything in it, as Transformers tokenizers, and back.

A tokenizer made here is one tokenizer.json that needs nothing of this package.
bpe.py makes those of GPT-2's kind, and find.py chooses.
"""

import os
import pickle
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import CheckpointError, TokenizerError, list_some
from ..files import open_atomically
from ..pickles import LARGEST_PICKLE_BYTES, unpickle_plain
from .bpe import wrap_backend

# `tokenizers` raises "Unk token `...` not found in the vocabulary". Only the words in the middle can be chosen.
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
            TokenizerError: If a character is not in the alphabet, as nanoGPT raises KeyError.
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
        TokenizerError: If the file is missing, is not a pickle of plain Python types, or does not hold the two
            matching tables stoi and itos.
    """
    path = Path(path)
    return CharacterTable(_check_tables(path, _load_meta(path)))


def read_vocab_size(path: str | os.PathLike[str]) -> int:
    """Reads the vocab_size of a meta.pkl, all that train.py takes from it.

    Raises:
        TokenizerError: If the file is missing, is not a pickle of plain Python types, or names no size.
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
    except Exception as error:  # damage makes pickle raise nearly any type
        raise TokenizerError(
            f"{path}: expected a pickle of plain Python types, got {type(error).__name__}: {error}; "
            f"give the meta.pkl that prepare.py wrote"
        ) from error


def write_meta(
    source: CharacterTable | PreTrainedTokenizerBase, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Writes the meta.pkl that nanoGPT's train.py and sample.py read: vocab_size, itos and stoi.

    The file appears under its name only when it is complete.

    Args:
        source: A character table, or a tokenizer of one character an id, however it was made.
        path: Path of the file to write. Missing folders are made.
        overwrite: Whether to replace a file that is there.

    Raises:
        TokenizerError: If the tokenizer is not a character table, a file is there, or the file cannot be written.
    """
    where = os.fspath(path)
    table = source if isinstance(source, CharacterTable) else _extract_table(where, source)
    _check_characters(where, table)
    if os.path.lexists(path) and not overwrite:
        raise TokenizerError(f"{where}: is there already: expected a new path; give another or overwrite=True")
    itos = dict(enumerate(table.characters))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {character: index for index, character in itos.items()}}
    try:
        with open_atomically(path) as file:
            pickle.dump(meta, file)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error


def build_character_tokenizer(
    table: CharacterTable, *, unknown_id: int | None = None, block_size: int | None = None
) -> PreTrainedTokenizerFast:
    """Makes a Transformers tokenizer of a character table.

    Ids equal the table's, and decoding gives the text back as it was, with skip_special_tokens=True too. Encoding adds
    no token. A character outside the table makes the tokenizer raise an Exception, as nanoGPT raises KeyError, also
    where this package is not installed, unless unknown_id is given. Decoding leaves out an id outside the table.

    It has no bos, eos or pad: every id is a character, and Transformers marks what it loads under these names as
    special, so that skip_special_tokens=True would drop that character and Trainer's collators would not train on it.
    docs/tokenizers.md shows what to do where one is needed.

    Args:
        table: The alphabet.
        unknown_id: Id that each unknown character gets, instead of the error.
        block_size: Longest sequence of the model, as model_max_length.

    Raises:
        TokenizerError: If the table does not hold different single characters that UTF-8 can encode, or unknown_id
            is not one of its ids.
    """
    characters = table.characters
    _check_characters("table", table)
    if unknown_id is not None and not 0 <= unknown_id < len(characters):
        raise TokenizerError(f"unknown_id: expected an id of 0 to {len(characters) - 1}, got {unknown_id!r}; give one")
    unknown = _NO_UNKNOWN if unknown_id is None else characters[unknown_id]
    # Byte-pair encoding without merges: without an unknown token it would drop unknown characters in silence.
    vocabulary = {character: index for index, character in enumerate(characters)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown, fuse_unk=False))
    backend.decoder = decoders.Fuse()  # without a decoder, tokens are joined by spaces
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
    """Returns the character table of a tokenizer, which is judged by what it does and not by how it was made."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    characters = tuple(by_id.get(index, "") for index in range(len(by_id)))
    odd = [token for token in characters if len(token) != 1]
    texts = ["".join(characters), "".join(reversed(characters)), *characters]
    wanted = [[*range(len(characters))], [*reversed(range(len(characters)))], *([i] for i in range(len(characters)))]
    if odd or tokenizer(texts).input_ids != wanted or tokenizer.batch_decode(wanted) != texts:
        reason = f"tokens such as {list_some(odd)}" if odd else "one that treats text in another way"
        raise TokenizerError(
            f"{where}: not a character table: expected a tokenizer that gives each character the id of its own, got "
            f"{reason}; nanoGPT's meta.pkl cannot hold it, nothing was written"
        )
    return CharacterTable(characters)


def _are_inverse(characters: tuple[str, ...], stoi: dict) -> bool:
    return len(stoi) == len(characters) and all(stoi.get(c) == index for index, c in enumerate(characters))


def _check_tables(path: Path, meta: Any) -> tuple[str, ...]:
    itos = meta.get("itos") if isinstance(meta, dict) else None
    stoi = meta.get("stoi") if isinstance(meta, dict) else None
    if isinstance(itos, dict) and isinstance(stoi, dict) and itos.keys() == set(range(len(itos))):
        characters = tuple(itos[index] for index in range(len(itos)))
        are_characters = all(isinstance(character, str) and len(character) == 1 for character in characters)
        if are_characters and _are_inverse(characters, stoi):
            return characters
    raise TokenizerError(
        f"{path}: expected 'itos' and 'stoi' to be inverse tables of characters and ids 0 to n - 1, got others; "
        f"make it again with the data set's prepare.py"
    )
