"""Tokens computed by several threads, in order, and written as train.bin and val.bin, or as shards of them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], num_proc: int) -> Iterator[Result]:
    """Yields the function's result for each item, in order, with num_proc threads and few items in memory.

    Threads are enough, because NumPy, tiktoken and `tokenizers` release Python's lock while they compute.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_proc) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def write_tokens(arrays: Iterable[np.ndarray], folder: Path, split: str, shard_size: int | None) -> int:
    """Writes the tokens of a split, uint16, and returns their number.

    Args:
        arrays: The tokens, in parts of any length.
        folder: Where to write them.
        split: Name of the file, without .bin.
        shard_size: Tokens of each shard but the last, which is shorter: train_000000.bin and so on; None for one file.
    """
    n_tokens = 0
    for array in arrays:
        while len(array):
            index, n_in_shard = divmod(n_tokens, shard_size) if shard_size else (0, 0)
            part = array[: shard_size - n_in_shard] if shard_size else array
            with (folder / (f"{split}_{index:06d}.bin" if shard_size else f"{split}.bin")).open("ab") as file:
                file.write(part.astype("<u2", copy=False).tobytes())
            n_tokens += len(part)
            array = array[len(part) :]
    return n_tokens
