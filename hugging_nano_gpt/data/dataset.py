"""Every window of a token file, or of shards, as a data set, and windows stacked into batches.

A file is opened once in each process and read window by window. It is not memory-mapped: the pages of a map count as
the process's memory while the map is open, which is why nanoGPT makes a new one for every batch.
"""

import os
from bisect import bisect_right
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import DataError, require
from .shards import TokenFile, list_shards

if TYPE_CHECKING:
    import datasets

# More files than this are opened for each read: an operating system may allow a process no more than 256.
_MOST_OPEN = 128


class Window(UserDict[str, torch.Tensor]):
    """input_ids and shift_labels. Plain Trainer would remove shift_labels from a dict, which this is not."""


class TokenDataset(Dataset):
    """Every window of a token file: item i is tokens i to i + block_size, and their targets one token further.

    Reads nanoGPT's train.bin and val.bin (uint16, no header), llm.c's .bin shards, of Llama 3's tokens too, and .npy
    files of one row of integers; the first bytes say which. Several files are read as one file of all their tokens, in
    the order of their names: the windows, and the offsets that are drawn, are the same however the tokens are cut.

    Args:
        path: The file, or a folder of shards of one split, or a pattern such as "fineweb10B/*train*.bin".
        block_size: Tokens in a window.

    Raises:
        DataError: If a file is missing, is not whole, does not look like a token file, or is empty while others are
            not; if files have tokens of different types; if all tokens are too few for a window and its last target;
            if a folder has files of several splits. When a window is read, if a file has been removed or cut off.
    """

    def __init__(self, path: str | os.PathLike[str], block_size: int):
        self.path = Path(path)
        self.block_size = block_size
        paths = list_shards(self.path)
        self._files = [TokenFile(each, stays_open=len(paths) <= _MOST_OPEN) for each in paths]
        self._ends = list(accumulate(file.n_tokens for file in self._files))
        self.n_tokens = self._ends[-1]
        for file in self._files:
            if file.dtype != self._files[0].dtype:
                raise DataError(
                    f"{file.path}: expected {self._files[0].dtype} tokens, as in {paths[0].name}, got {file.dtype}; "
                    f"give shards of one type"
                )
        empty = [file.path for file in self._files if not file.n_tokens]
        if empty and self.n_tokens:
            raise DataError(f"{empty[0]}: expected tokens, got an empty file; write it again, or remove it")
        if self.n_tokens <= block_size:
            raise DataError(
                f"{self.path}: too short: expected more than block_size={block_size} tokens, got {self.n_tokens}; "
                f"give a longer file or a smaller block_size"
            )

    def __len__(self) -> int:
        """Returns the number of windows: nanoGPT samples its offsets below it."""
        return self.n_tokens - self.block_size

    def __getitem__(self, offset: int) -> Window:
        """Returns input_ids and shift_labels, (block_size,) int64 each, of the window that begins at an offset."""
        if not 0 <= offset < len(self):
            raise IndexError(f"{self.path}: expected an offset from 0 to {len(self) - 1}, got {offset}")
        window = torch.from_numpy(self._read(offset, self.block_size + 1))
        return Window(input_ids=window[:-1], shift_labels=window[1:])

    def to_datasets(self) -> "datasets.Dataset":
        """Returns all tokens as a data set of the `datasets` library, for plain Trainer and TRL's SFTTrainer.

        The model shifts labels itself, so a row of block_size tokens has one target fewer. Each row therefore begins
        with the last token of the row before: every token but the first is a target once. Tokens at the end that fill
        no row are left out. The rows are written to the cache of `datasets`, 8 bytes for each token, and read from
        there; a file that has changed is read again.

        Returns:
            Rows of input_ids and labels, block_size int32 each, which are equal.

        Raises:
            MissingDependencyError: If `datasets` is not installed.
            DataError: If block_size is 1, which leaves no target in a row.
        """
        require("to_datasets", "datasets")
        import datasets

        if self.block_size < 2:
            raise DataError(
                f"{self.path}: expected a block_size of 2 or more, got {self.block_size}; give a larger one"
            )
        row = datasets.List(datasets.Value("int32"), length=self.block_size)
        versions = tuple((os.path.realpath(file.path), file.path.stat().st_mtime_ns) for file in self._files)
        return datasets.Dataset.from_generator(
            _iterate_rows,
            features=datasets.Features({"input_ids": row, "labels": row}),
            gen_kwargs={"dataset": self, "versions": versions},
        )

    def _read(self, first: int, count: int) -> np.ndarray:
        """Returns some tokens from one on, (count,) int64, from as many files as they are in."""
        number, parts = bisect_right(self._ends, first), []
        while count:
            file, end = self._files[number], self._ends[number]
            n_read = min(count, end - first)
            parts.append(file.read(first - (end - file.n_tokens), n_read).astype(np.int64))
            number, first, count = number + 1, first + n_read, count - n_read
        return np.concatenate(parts)


def _iterate_rows(dataset: TokenDataset, versions: object) -> Iterator[dict[str, np.ndarray]]:
    """Yields the rows of to_datasets, which knows by versions whether it has written them before."""
    for first in range(0, dataset.n_tokens - dataset.block_size + 1, dataset.block_size - 1):
        ids = dataset._read(first, dataset.block_size)
        yield {"input_ids": ids, "labels": ids}


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
