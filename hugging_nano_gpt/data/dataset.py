"""Every window of a token file as a data set, and windows stacked into batches.

The file is opened once in each process and read window by window. It is not memory-mapped: the pages of a map count as
the process's memory while the map is open, which is why nanoGPT makes a new one for every batch.
"""

import os
import weakref
from collections import UserDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import DataError
from .token_file import measure_token_file


class Window(UserDict[str, torch.Tensor]):
    """input_ids and shift_labels. Plain Trainer would remove shift_labels from a dict, which this is not."""


class TokenDataset(Dataset):
    """Every window of a token file: item i is tokens i to i + block_size, and their targets one token further.

    Reads nanoGPT's train.bin and val.bin (uint16, no header), llm.c's .bin shards, of Llama 3's tokens too, and .npy
    files of one row of integers; the first bytes say which.

    Args:
        path: The file.
        block_size: Tokens in a window.

    Raises:
        DataError: If the file is missing, is not whole, does not look like a token file, or is too short for a window
            and its last target; when a window is read, if the file has been removed or cut off since.
    """

    def __init__(self, path: str | os.PathLike[str], block_size: int):
        self.path = Path(path)
        self.block_size = block_size
        self._layout = measure_token_file(self.path)
        self.n_tokens = self._layout.n_tokens
        if self.n_tokens <= block_size:
            raise DataError(
                f"{self.path}: too short: expected more than block_size={block_size} tokens, got {self.n_tokens}; "
                f"give a longer file or a smaller block_size"
            )
        self._descriptor: int | None = None

    def __len__(self) -> int:
        """Returns the number of windows: nanoGPT samples its offsets below it."""
        return self.n_tokens - self.block_size

    def __getitem__(self, offset: int) -> Window:
        """Returns input_ids and shift_labels, (block_size,) int64 each, of the window that begins at an offset."""
        if not 0 <= offset < len(self):
            raise IndexError(f"{self.path}: expected an offset from 0 to {len(self) - 1}, got {offset}")
        window = torch.from_numpy(self._read(offset, self.block_size + 1).astype(np.int64))
        return Window(input_ids=window[:-1], shift_labels=window[1:])

    def __getstate__(self) -> dict[str, Any]:  # another process opens the file itself
        return {**self.__dict__, "_descriptor": None}

    def _read(self, first: int, count: int) -> np.ndarray:
        start, dtype, _ = self._layout
        try:
            data = self._read_at(start + first * dtype.itemsize, count * dtype.itemsize)
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read any more: {error.strerror}; see what became of it"
            ) from error
        if len(data) != count * dtype.itemsize:
            raise DataError(f"{self.path}: expected {self.n_tokens} tokens, as it had, got fewer; write it again")
        return np.frombuffer(data, dtype=dtype)

    def _read_at(self, offset: int, n_bytes: int) -> bytes:
        if not hasattr(os, "pread"):  # Windows
            with self.path.open("rb") as file:
                file.seek(offset)
                return file.read(n_bytes)
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        return os.pread(self._descriptor, n_bytes, offset)  # does not move the position, which forked processes share


def collate_windows(windows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stacks windows into input_ids and shift_labels, (B, block_size) int64 each."""
    return {name: torch.stack([window[name] for window in windows]) for name in ("input_ids", "shift_labels")}


def collate_checked(
    windows: Sequence[Mapping[str, torch.Tensor]], vocab_size: int, where: object
) -> dict[str, torch.Tensor]:
    """Stacks windows as collate_windows does, and checks their ids: see check_ids."""
    batch = collate_windows(windows)
    check_ids(batch, vocab_size, where)
    return batch


def load_windows(dataset: Dataset, offsets: Sequence[int], vocab_size: int) -> dict[str, torch.Tensor]:
    """Reads the windows at some offsets as collate_checked stacks them."""
    return collate_checked([dataset[offset] for offset in offsets], vocab_size, getattr(dataset, "path", dataset))


def check_ids(batch: Mapping[str, torch.Tensor], vocab_size: int, where: object) -> None:
    """Checks the ids of a batch of windows on the CPU, because a GPU reports no error for an id that is too large.

    Raises:
        DataError: If an id is not below vocab_size; it names where the windows are from.
    """
    lowest, highest = (int(id_) for id_ in batch["input_ids"].aminmax())
    highest = max(highest, int(batch["shift_labels"].max()))
    if lowest < 0 or highest >= vocab_size:
        raise DataError(
            f"{where}: does not fit the model: expected token ids below vocab_size={vocab_size}, got "
            f"{lowest if lowest < 0 else highest}; give the data that the model was trained on"
        )
