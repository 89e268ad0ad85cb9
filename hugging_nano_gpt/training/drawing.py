"""Batches as train.py draws them: from torch's global generator, each one forward pass ahead of its use.

On a CPU dropout draws from the same generator, so a run has nanoGPT's bits only if its batches, its forward passes and
its evaluations take turns as in train.py (@ 3adf61e): one batch before the loop, eval_iters of train and then of val
at each evaluation, one after each forward pass.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import TrainingArguments

from ..checkpoint.layout import MODEL_ARGS
from ..data.dataset import TokenDataset, load_windows
from ..data.offsets import NANOGPT_SEED, draw_offsets
from ..errors import CheckpointError
from ..files.files import open_atomically
from ..model.configuration_nano_gpt import NanoGPTConfig
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel


def make_random_state(config: NanoGPTConfig, rank: int = 0) -> torch.Tensor:
    """Returns the state of torch's CPU generator in which train.py draws its first batch.

    train.py seeds the generator with 1337 plus the rank and makes a new model, even if it then loads other weights.
    This does the same and restores the generator.

    Args:
        config: The model that train.py makes, before it crops it to another block_size.
        rank: Rank of the process.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(NANOGPT_SEED + rank)
        NanoGPTLMHeadModel(NanoGPTConfig(**{name: getattr(config, name) for name in MODEL_ARGS}))
        return torch.get_rng_state()


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor from the CPU to a GPU as train.py does: from pinned memory, without waiting."""
    return tensor.pin_memory().to(device, non_blocking=True)


class DrawnBatches:
    """The next batch: drawn, read, and on its way to the device while the model still computes.

    Args:
        dataset: The data set to draw from.
        config: The model's.
        args: The trainer's, with batch size, device and rank.
        state: State of torch's CPU generator when the run begins; None for make_random_state's.
    """

    def __init__(
        self, dataset: TokenDataset, config: NanoGPTConfig, args: TrainingArguments, state: torch.Tensor | None = None
    ):
        self.offsets: list[int] = []
        self._batch: dict[str, torch.Tensor] = {}
        self._dataset, self._config, self._args, self._state = dataset, config, args, state

    def begin(self, folder: Path | None) -> None:
        """Draws train.py's first batch, or takes the one that a checkpoint of Trainer's contains."""
        rank = self._args.process_index
        if folder is None:
            torch.manual_seed(NANOGPT_SEED + rank)  # the accelerator's generators, for dropout
            self._rewind_generator()
            self.draw()
            return
        # Trainer itself restores the generators
        offsets = read_next_batch(folder, rank, self._args.world_size)
        if len(offsets) == self._args.per_device_train_batch_size and max(offsets) < len(self._dataset):
            self.choose(offsets)  # else batch size or data set have changed, and take() draws one

    @contextlib.contextmanager
    def rewound(self) -> Iterator[None]:
        """Sets torch's CPU generator to where train.py's first evaluation begins, and restores it."""
        with torch.random.fork_rng(devices=[]):
            self._rewind_generator()
            draw_offsets(self._dataset, self._args.per_device_train_batch_size)  # train.py's first batch
            yield

    def draw(self) -> None:
        """Draws the next batch from torch's global generator."""
        self.choose(draw_offsets(self._dataset, self._args.per_device_train_batch_size))

    def choose(self, offsets: list[int]) -> None:
        """Makes the windows at some offsets the next batch."""
        self.offsets, self._batch = offsets, load_windows(self._dataset, offsets, self._config.vocab_size)
        if self._args.device.type == "cuda":
            self._batch = {name: send(tensor, self._args.device) for name, tensor in self._batch.items()}

    def take(self) -> dict[str, torch.Tensor]:
        """Returns the next batch; draws one if none has been drawn."""
        if not self._batch:
            self.draw()
        return self._batch

    def _rewind_generator(self) -> None:
        if self._state is None:
            self._state = make_random_state(self._config, self._args.process_index)
        torch.set_rng_state(self._state)


class BatchesInTurn:
    """The batches of an update, each taken when it is needed and not before; Trainer needs their number."""

    def __init__(self, batches: DrawnBatches, count: int):
        self.batches = batches
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self.batches.take() for _ in range(self.count))


def write_next_batch(folder: Path, offsets: list[int], rank: int, world_size: int) -> None:
    """Adds to a checkpoint of Trainer's the batch that a process has drawn and not used yet.

    And the state of MPS's generator, which dropout uses there: Trainer saves those of other devices only.
    """
    kept = {"offsets": offsets, "world_size": world_size}
    if torch.backends.mps.is_available():
        kept["mps_generator"] = torch.mps.get_rng_state().tolist()
    with open_atomically(_get_path(folder, rank)) as file:
        file.write(json.dumps(kept).encode())


def read_next_batch(folder: Path, rank: int, world_size: int) -> list[int]:
    """Returns the offsets that write_next_batch wrote, and restores MPS's generator if it was written.

    Raises:
        CheckpointError: If the run had another number of processes.
    """
    kept = json.loads(_get_path(folder, 0).read_text(encoding="utf-8"))
    if kept["world_size"] != world_size:
        raise CheckpointError(
            f"{folder}: expected as many processes as the run had, {kept['world_size']}, got {world_size}; start as "
            f"many"
        )
    kept = json.loads(_get_path(folder, rank).read_text(encoding="utf-8"))
    if "mps_generator" in kept and torch.backends.mps.is_available():
        torch.mps.set_rng_state(torch.tensor(kept["mps_generator"], dtype=torch.uint8))
    return kept["offsets"]


def _get_path(folder: Path, rank: int) -> Path:
    return folder / f"nanogpt_next_batch_{rank}.json"
