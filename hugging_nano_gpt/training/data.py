"""Windows of a token file, sampled as nanoGPT does and served to Trainer.

A data set is every window of block_size tokens in a file, by its offset; samplers choose the offsets. The file is
opened in each process and read window by window. It is not mapped: the pages of a memory map count as the process's
memory while the map is open, which is why nanoGPT makes a new one for every batch.
"""

import itertools
import math
import os
import threading
import weakref
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..errors import DataError
from .token_file import measure_token_file

# nanoGPT seeds each process with 1337 + its rank (train.py @ 3adf61e).
NANOGPT_SEED = 1337

_ONE_READER = threading.Lock()


class Window(UserDict[str, torch.Tensor]):
    """input_ids and shift_labels. It is no dict, because plain Trainer would remove shift_labels from a dict."""


class TokenDataset(Dataset):
    """Every window of a token file: item i is tokens i to i + block_size and the same one further.

    Takes nanoGPT's train.bin and val.bin (uint16, no header), llm.c's .bin shards, of Llama 3's tokens too, and .npy
    files of one row of integers, told apart by their first bytes.

    Args:
        path: The file.
        block_size: Tokens of a window.

    Raises:
        DataError: If the file is missing, is not whole, looks like no token file, or is shorter than one window and
            its last target; and of a window, if the file has been removed or cut off since.
    """

    def __init__(self, path: str | os.PathLike[str], block_size: int):
        self.path = Path(path)
        self.block_size = block_size
        self._layout = measure_token_file(self.path)
        if self.n_tokens <= block_size:
            raise DataError(
                f"{self.path}: too short: expected more than block_size={block_size} tokens, got {self.n_tokens}; "
                f"give a longer file or a smaller block_size"
            )
        self._descriptor: int | None = None

    @property
    def n_tokens(self) -> int:
        """Number of tokens in the file."""
        return self._layout.n_tokens

    def __len__(self) -> int:
        """Returns the number of windows: nanoGPT draws its offsets below it."""
        return self.n_tokens - self.block_size

    def __getitem__(self, offset: int) -> Window:
        """Returns input_ids and shift_labels, (block_size,) int64 each, of the window that begins at an offset."""
        if not 0 <= offset < len(self):
            raise IndexError(f"{self.path}: expected an offset from 0 to {len(self) - 1}, got {offset}")
        window = torch.from_numpy(self._read(offset, self.block_size + 1).astype(np.int64))
        return Window(input_ids=window[:-1], shift_labels=window[1:])

    def __getstate__(self) -> dict[str, Any]:  # an open file does not travel to another process, the path does
        return {**self.__dict__, "_descriptor": None}

    def _read(self, first: int, count: int) -> np.ndarray:
        start, dtype, _ = self._layout
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                weakref.finalize(self, os.close, self._descriptor)
            data = _read_at(self._descriptor, count * dtype.itemsize, start + first * dtype.itemsize)
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read any more: {error.strerror}; see what became of it"
            ) from error
        if len(data) != count * dtype.itemsize:
            raise DataError(f"{self.path}: expected {self.n_tokens} tokens, as it had, got fewer; write it again")
        return np.frombuffer(data, dtype=dtype)


def _read_at(descriptor: int, n_bytes: int, offset: int) -> bytes:
    """Reads bytes without moving the place in the file, which forked processes share."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, n_bytes, offset)
    with _ONE_READER:  # Windows, where threads share it
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, n_bytes)


class RandomOffsetSampler(Sampler[list[int]]):
    """Draws batches of offsets as nanoGPT's get_batch does: torch.randint over all windows, with replacement.

    A batch sampler: it yields lists of offsets, one list a micro-step, without end unless n_batches is given. The same
    seed gives the offsets that get_batch gives after torch.manual_seed(seed).

    Args:
        dataset: What to draw from.
        batch_size: Windows of a batch, on this process.
        n_batches: How many batches to yield; None for no end.
        seed: Seed of this sampler's own generator.
        rank: Added to the seed, so that each process draws others, as in nanoGPT.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        n_batches: int | None = None,
        seed: int = NANOGPT_SEED,
        rank: int = 0,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.n_batches = n_batches
        self.generator = torch.Generator().manual_seed(seed + rank)

    def __iter__(self) -> Iterator[list[int]]:
        drawn = 0
        while self.n_batches is None or drawn < self.n_batches:
            yield torch.randint(len(self.dataset), (self.batch_size,), generator=self.generator).tolist()
            drawn += 1

    def __len__(self) -> int:
        if self.n_batches is None:
            raise TypeError("RandomOffsetSampler without n_batches has no length")
        return self.n_batches


class FixedOffsetSampler(Sampler[list[int]]):
    """Yields given batches of offsets: a recorded run, or every window once.

    Args:
        batches: One sequence of offsets a micro-step.
    """

    def __init__(self, batches: Sequence[Sequence[int]]):
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class SharedBatches(Sampler[list[int]]):
    """One process's share of a batch sampler's batches: they go to the processes in turn, as in plain Trainer.

    Where they do not come out even, the first ones are taken again: every process makes as many steps.

    Args:
        batches: A batch sampler, the same in every process.
        rank: Rank of the process.
        world_size: Number of processes.
    """

    def __init__(self, batches: Any, rank: int, world_size: int):
        self.batches, self.rank, self.world_size = batches, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        first: list[list[int]] = []
        batches = iter(self.batches)
        while turn := list(itertools.islice(batches, self.world_size)):
            first = first or turn
            yield (turn + first * self.world_size)[self.rank]

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.world_size)


def collate_windows(windows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stacks windows into input_ids and shift_labels, (B, block_size) int64 each."""
    return {name: torch.stack([window[name] for window in windows]) for name in ("input_ids", "shift_labels")}


def collate_checked(
    windows: Sequence[Mapping[str, torch.Tensor]], vocab_size: int, where: object
) -> dict[str, torch.Tensor]:
    """Stacks windows, and refuses ids that the model does not have.

    Raises:
        DataError: If there are any; it names the place that the windows are from.
    """
    batch = collate_windows(windows)
    check_ids(batch, vocab_size, where)
    return batch


def check_ids(batch: Mapping[str, torch.Tensor], vocab_size: int, where: object) -> None:
    """Refuses a batch of windows, still on the CPU, with ids that the model does not have: on a GPU they are no error.

    Raises:
        DataError: If there are any; it names the place that the batch is from.
    """
    lowest, highest = (int(id_) for id_ in batch["input_ids"].aminmax())
    highest = max(highest, int(batch["shift_labels"].max()))
    if lowest < 0 or highest >= vocab_size:
        raise DataError(
            f"{where}: does not fit the model: expected token ids below vocab_size={vocab_size}, got "
            f"{lowest if lowest < 0 else highest}; give the data that the model was trained on"
        )
