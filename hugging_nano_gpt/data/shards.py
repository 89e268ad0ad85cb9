"""The files of a data set: one file, or several shards in the order of their names, and reading tokens from each.

llm.c, build-nanogpt and `prepare --shard-size` write many files of one stream of tokens, and cut it anywhere.
"""

import os
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .token_file import measure_token_file

TOKEN_SUFFIXES = (".bin", ".npy")

# Parts of a data set that are never read as one, as words in the names of files.
_SPLIT = re.compile("(?<![a-z])(train|val|test)(?![a-z])")


def find_split(folder: Path, split: str) -> Path:
    """Returns a folder's train.bin or val.bin; if it is missing, the pattern of its shards.

    The shards are named as by `prepare --shard-size` (train_000000.bin), llm.c (fineweb_train_000001.bin) or
    build-nanogpt (edufineweb_train_000001.npy).
    """
    whole = folder / f"{split}.bin"
    if whole.exists():
        return whole
    patterns = [f"{split}_*.bin", f"*_{split}_*.bin", f"*_{split}_*.npy"]
    return next((folder / pattern for pattern in patterns if any(folder.glob(pattern))), whole)


def list_shards(path: Path) -> list[Path]:
    """Lists the files that a path names: itself; those in it if it is a folder; those that match its last part.

    They are in the order of their names.

    Raises:
        DataError: If a folder or a pattern has no files, or a folder has those of several splits.
    """
    if path.is_dir():
        found = [each for each in path.iterdir() if each.suffix in TOKEN_SUFFIXES]
    elif path.exists() or not set(path.name) & set("*?["):
        return [path]
    else:
        found = list(path.parent.glob(path.name))
    found = [each for each in found if not each.name.startswith(".")]
    splits = sorted({split for each in found for split in _SPLIT.findall(each.name)})
    if len(splits) > 1:
        raise DataError(
            f"{path}: expected shards of one split, got files of {' and '.join(splits)}; give a pattern, as "
            f"'{(path if path.is_dir() else path.parent) / '*train*'}'"
        )
    if not found:
        raise DataError(
            f"{path}: no token files: expected {' or '.join(TOKEN_SUFFIXES)}, got none; check the path, or run the "
            f"data set's prepare.py"
        )
    return sorted(found)


class TokenFile:
    """One file of tokens.

    Args:
        path: The file.
        stays_open: Whether it stays open between reads.

    Raises:
        DataError: If it is missing or not whole, or does not look like a token file.
    """

    def __init__(self, path: Path, stays_open: bool):
        self.path = path
        self._start, self.dtype, self.n_tokens = measure_token_file(path)
        self._stays_open = stays_open
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:  # another process opens the file itself
        return {**self.__dict__, "_descriptor": None}

    def read(self, first: int, count: int) -> np.ndarray:
        """Returns some tokens from one on, (count,) in the file's dtype.

        Raises:
            DataError: If the file has been removed or cut off since it was opened.
        """
        itemsize = self.dtype.itemsize
        try:
            data = self._read_at(self._start + first * itemsize, count * itemsize)
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read any more: {error.strerror}; see what became of it"
            ) from error
        if len(data) != count * itemsize:
            raise DataError(f"{self.path}: expected {self.n_tokens} tokens, as it had, got fewer; write it again")
        return np.frombuffer(data, dtype=self.dtype)

    def _read_at(self, offset: int, n_bytes: int) -> bytes:
        if not self._stays_open or not hasattr(os, "pread"):  # Windows has none
            with self.path.open("rb") as file:
                file.seek(offset)
                return file.read(n_bytes)
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        return os.pread(self._descriptor, n_bytes, offset)  # does not move the position, which forked processes share
