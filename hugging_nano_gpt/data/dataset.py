"""Every window of a token file, or of several files as one, as a data set; and windows stacked into batches."""

import os
from bisect import bisect_right
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import DataError, require
from .shards import list_token_files, open_token_files


class Window(UserDict[str, torch.Tensor]):
    """input_ids and shift_labels. Plain Trainer would remove shift_labels from a dict, which this is not."""


class TokenDataset(Dataset):
    """Every window of a text in tokens: item i is tokens i to i + block_size, and their targets one token further.

    Reads nanoGPT's train.bin and val.bin (uint16, no header), llm.c's .bin shards, of Llama 3's tokens too, and .npy
    files of one row of integers; the first bytes say which. Several files, in the order of their names, are read as
    one file with their tokens would be, so a window may begin in one file and end in the next. llm.c and build-nanogpt
    go through such files one by one instead, and their windows never cross from one to the next.

    Args:
        path: A file; a folder with .bin and .npy files; or a glob, such as "data/fineweb/*_train_*.bin".
        block_size: Tokens in a window.

    Raises:
        DataError: If there are no files, if one is not whole or does not look like a token file, or if all of them are
            too short for a window and its last target; if several files have tokens of different types, or are of
            train and of val. When a window is read, if a file has been removed or cut off since.
    """

    def __init__(self, path: str | os.PathLike[str], block_size: int):
        self.path = Path(path)
        self.block_size = block_size
        self._files = open_token_files(list_token_files(self.path))
        self._ends = list(accumulate(file.n_tokens for file in self._files))
        self.n_tokens = self._ends[-1]
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
        window = torch.from_numpy(self._read(offset, self.block_size + 1).astype(np.int64))
        return Window(input_ids=window[:-1], shift_labels=window[1:])

    def to_datasets(self, **kwargs: Any) -> Any:
        """Returns a datasets.Dataset for plain Trainer and TRL: rows of block_size tokens as input_ids and labels.

        The labels are the tokens themselves, because the model shifts labels. Each row begins with the last token of
        the row before, so every token but the first is the target of exactly one position; a last row that would be
        shorter is left out. The rows are written to the cache of datasets, once for these files, and read from there.

        Args:
            **kwargs: Arguments of datasets.Dataset.from_generator, such as cache_dir.

        Raises:
            MissingDependencyError: If datasets is not installed.
            DataError: If block_size is 1, which leaves no target in a row.
        """
        require("TokenDataset.to_datasets", "datasets")
        import datasets
        from datasets.fingerprint import Hasher

        if self.block_size < 2:
            raise DataError(f"{self.path}: expected a block_size of 2 or more, got {self.block_size}; change it")
        row = datasets.List(datasets.Value(self._files[0].dtype.name), length=self.block_size)
        versions = [(file.path.resolve(), *file.stat()) for file in self._files]  # new files get new rows
        return datasets.Dataset.from_generator(
            self._iterate_rows,
            features=datasets.Features({"input_ids": row, "labels": row}),
            fingerprint=Hasher.hash((versions, self.block_size)),
            **kwargs,
        )

    def _iterate_rows(self) -> Iterator[dict[str, np.ndarray]]:
        for offset in range(0, len(self) + 1, self.block_size - 1):
            tokens = self._read(offset, self.block_size)
            yield {"input_ids": tokens, "labels": tokens}

    def _read(self, first: int, count: int) -> np.ndarray:
        """Reads tokens from the file that has the first one, and from those after it."""
        number = bisect_right(self._ends, first)
        start = self._ends[number] - self._files[number].n_tokens
        tokens = self._files[number].read(first - start, min(count, self._ends[number] - first))
        if len(tokens) == count:
            return tokens
        return np.concatenate([tokens, self._read(self._ends[number], count - len(tokens))])


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
