"""Which windows make a batch: offsets sampled as nanoGPT's get_batch does (train.py @ 3adf61e), and shared out."""

import itertools
import math
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Sampler

# nanoGPT seeds each process with 1337 + its rank.
NANOGPT_SEED = 1337


def draw_offsets(dataset: Sized, batch_size: int, generator: torch.Generator | None = None) -> list[int]:
    """Draws the offsets of a batch: torch.randint over all windows, with replacement.

    Args:
        dataset: Its length is the number of windows.
        batch_size: Windows of a batch, on this process.
        generator: By default torch's global generator, as in nanoGPT.
    """
    return torch.randint(len(dataset), (batch_size,), generator=generator).tolist()


class RandomOffsetSampler(Sampler[list[int]]):
    """A batch sampler over draw_offsets: yields what get_batch draws after torch.manual_seed(seed + rank).

    Args:
        dataset: See draw_offsets.
        batch_size: See draw_offsets.
        n_batches: Number of batches; None for batches without end.
        seed: Seed of the sampler's own generator.
        rank: Added to the seed, so that each process draws other offsets, as in nanoGPT.
    """

    def __init__(
        self, dataset: Sized, batch_size: int, n_batches: int | None = None, seed: int = NANOGPT_SEED, rank: int = 0
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.n_batches = n_batches
        self.generator = torch.Generator().manual_seed(seed + rank)

    def __iter__(self) -> Iterator[list[int]]:
        for _ in itertools.count() if self.n_batches is None else range(self.n_batches):
            yield draw_offsets(self.dataset, self.batch_size, self.generator)

    def __len__(self) -> int:
        if self.n_batches is None:
            raise TypeError("RandomOffsetSampler without n_batches has no length")
        return self.n_batches


class SharedBatches(Sampler[list[int]]):
    """One process's share of a batch sampler's batches: process r takes every world_size-th one, as in plain Trainer.

    If their number is not a multiple of world_size, the first batches are used again, so that every process makes the
    same number of steps. The batches have to be the same in every process.
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
