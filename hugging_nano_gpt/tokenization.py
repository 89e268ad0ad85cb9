"""nanoGPT's character tables: the meta.pkl of a character-level data set, read without executing anything in it."""

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import TokenizerError
from .formats.check import list_some

_LARGEST_BYTES = 64 << 20  # every character of Unicode, both ways, takes 18 MB


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
    try:
        if path.stat().st_size > _LARGEST_BYTES or not path.is_file():
            raise TokenizerError(
                f"{path}: expected a meta.pkl, got a directory, a device or too large a file; check the path"
            )
        with path.open("rb") as file:
            meta = _PlainUnpickler(file).load()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be opened: {error.strerror}; check the path") from error
    except TokenizerError:
        raise
    except Exception as error:  # damage makes pickle raise nearly any type
        raise TokenizerError(
            f"{path}: expected a pickle of plain Python types, got {type(error).__name__}: {error}; "
            f"give the meta.pkl that prepare.py wrote"
        ) from error
    return CharacterTable(_check_tables(path, meta))


class _PlainUnpickler(pickle.Unpickler):
    """Admits no names at all, so that no class is made and no function is called."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"refused the name {module}.{name}, nothing was executed")


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
