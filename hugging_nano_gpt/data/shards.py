"""The files of a data set, one or several: which they are, and reading tokens from each.

A file is opened once in each process and read window by window. It is not memory-mapped: the pages of a map count as
the process's memory while the map is open, which is why nanoGPT makes a new one for every batch.
"""

import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, list_some
from .token_file import measure_token_file

# Files that are kept open; of more files, each is opened for each window, as systems allow about a thousand.
_MOST_OPEN = 256

_SPLIT = re.compile("(?<![a-z])(?:train|val)(?![a-z])")  # as a word in a name


class TokenFile:
    """The tokens of one file.

    Args:
        path: The file.
        is_kept_open: Whether to open it once only. A file that is replaced meanwhile is then still read as it was.

    Raises:
        DataError: See measure_token_file.
    """

    def __init__(self, path: Path, is_kept_open: bool = True):
        self.path = path
        self._start, self.dtype, self.n_tokens = measure_token_file(path)
        self._is_kept_open = is_kept_open
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:  # another process opens the file itself
        return {**self.__dict__, "_descriptor": None}

    def stat(self) -> tuple[int, int]:
        """Returns the size of the file in bytes, and when it was last written in ns."""
        stat = self.path.stat()
        return stat.st_size, stat.st_mtime_ns

    def read(self, first: int, count: int) -> np.ndarray:
        """Returns `count` tokens from the first one on, in the file's own dtype.

        Raises:
            DataError: If the file has been removed or cut off.
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
        if not self._is_kept_open or not hasattr(os, "pread"):  # Windows
            with self.path.open("rb") as file:
                file.seek(offset)
                return file.read(n_bytes)
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        return os.pread(self._descriptor, n_bytes, offset)  # does not move the position, which forked processes share


def find_split(data_dir: Path, split: str) -> Path:
    """Returns the path of a split for TokenDataset: data_dir/train.bin, or where that is missing a glob of shards.

    The names are those of `prepare --shard-size`, llm.c and build-nanogpt: train_000000.bin, fineweb_train_000001.bin,
    edufineweb_train_000001.npy.
    """
    whole = data_dir / f"{split}.bin"
    patterns = [f"{split}_*.bin", f"*_{split}_*.bin", f"*_{split}_*.npy"]
    found = (pattern for pattern in patterns if next(data_dir.glob(pattern), None))
    return whole if whole.exists() else data_dir / next(found, whole.name)


def list_token_files(path: Path) -> list[Path]:
    """Lists the files that a path names: itself, the .bin and .npy files of a folder, or what a glob matches.

    Raises:
        DataError: If a folder or a glob names no file, or files of train and of val.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".bin", ".npy"))
    elif path.exists() or not set("*?[") & set(str(path)):
        return [path]
    else:
        files = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    if not files:
        raise DataError(
            f"{path}: expected files of tokens (.bin, .npy), got none; check the path, or run the data set's "
            f"prepare.py"
        )
    splits = {split: file.name for file in files for split in re.findall(_SPLIT, file.name)}
    if len(splits) > 1:
        raise DataError(
            f"{path}: expected the files of one split, got {list_some(sorted(splits.values()))}; give a glob, such as "
            f"'{(path if path.is_dir() else path.parent) / '*train*'}'"
        )
    return files


def open_token_files(paths: Sequence[Path]) -> list[TokenFile]:
    """Opens files whose tokens are read as one text.

    Raises:
        DataError: If a file is not a token file, is empty, or has tokens of another type than the first one.
    """
    files = [TokenFile(path, is_kept_open=len(paths) <= _MOST_OPEN) for path in paths]
    if len(files) == 1:
        return files
    for file in files:
        if file.dtype != files[0].dtype:
            raise DataError(
                f"{file.path}: expected {files[0].dtype} tokens as in {files[0].path.name}, got {file.dtype}; give "
                f"files of one type"
            )
        if file.n_tokens == 0:
            raise DataError(f"{file.path}: expected tokens, got an empty file; write it again, or remove it")
    return files
