"""Batches as train.py draws them: from torch's global generator, each one forward pass ahead of its use.

On a CPU dropout draws from the same generator, so a run has nanoGPT's bits only if its batches, its forward passes and
its evaluations take turns as in train.py (@ 3adf61e): one batch before the loop, eval_iters of train and then of val
at each evaluation, one after each forward pass.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ..checkpoint.layout import MODEL_ARGS
from ..errors import CheckpointError
from ..files import open_atomically
from ..model.configuration_nano_gpt import NanoGPTConfig
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from .data import NANOGPT_SEED, TokenDataset, collate_checked

if TYPE_CHECKING:
    from .trainer import NanoGPTTrainer


def make_random_state(config: NanoGPTConfig, rank: int = 0) -> torch.Tensor:
    """Returns the state of torch's CPU generator that train.py has when it draws its first batch.

    train.py seeds it with 1337 and the rank, and makes a new model, whatever weights it then takes. This does too; the
    generator itself stays as it is.

    Args:
        config: The model that train.py makes, before it crops it to another block_size.
        rank: Rank of the process.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(NANOGPT_SEED + rank)
        NanoGPTLMHeadModel(NanoGPTConfig(**{name: getattr(config, name) for name in MODEL_ARGS}))
        return torch.get_rng_state()


def draw_offsets(dataset: TokenDataset, batch_size: int, generator: torch.Generator | None = None) -> list[int]:
    """Draws a batch of offsets as nanoGPT's get_batch does: over all windows, with replacement."""
    return torch.randint(len(dataset), (batch_size,), generator=generator).tolist()


def load_windows(dataset: TokenDataset, offsets: list[int], vocab_size: int) -> dict[str, torch.Tensor]:
    """Reads input_ids and shift_labels, (B, block_size) int64 each, of the windows at some offsets.

    Raises:
        DataError: If there are ids that the model does not have.
    """
    return collate_checked([dataset[offset] for offset in offsets], vocab_size, getattr(dataset, "path", dataset))


class DrawnBatches:
    """The batch that comes next: drawn, read, and on its way to the device while the model is still busy.

    Args:
        dataset: What to draw from.
        batch_size: Windows of a batch, on this process.
        vocab_size: Rows of the model's embedding.
        device: Device of the batches; a GPU gets them from pinned memory, without waiting, as in train.py.
    """

    def __init__(self, dataset: TokenDataset, batch_size: int, vocab_size: int, device: torch.device):
        self.device = device
        self.offsets: list[int] = []
        self._dataset, self._batch_size = dataset, batch_size
        self._draw = partial(draw_offsets, dataset, batch_size)
        self._load = partial(load_windows, dataset, vocab_size=vocab_size)
        self._batch: dict[str, torch.Tensor] = {}

    def draw(self) -> None:
        """Draws the next batch from torch's global generator."""
        self.choose(self._draw())

    def can_choose(self, offsets: list[int]) -> bool:
        """Returns whether a batch at these offsets is one of this data set and of this batch size."""
        return len(offsets) == self._batch_size and max(offsets) < len(self._dataset)

    def choose(self, offsets: list[int]) -> None:
        """Makes the windows at some offsets the next batch."""
        self.offsets, batch = offsets, self._load(offsets)
        if self.device.type == "cuda":
            batch = {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in batch.items()}
        self._batch = batch

    def take(self) -> dict[str, torch.Tensor]:
        """Returns the next batch; draws it if none has been drawn, as after another batch size was resumed from."""
        if not self._batch:
            self.draw()
        return self._batch


class BatchesInTurn:
    """The batches of an update, each given when its turn comes and not before: Trainer asks for a list."""

    def __init__(self, batches: DrawnBatches, count: int):
        self.batches = batches
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self.batches.take() for _ in range(self.count))


class DrawingCallback(TrainerCallback):
    """Begins a run with train.py's random numbers, or goes on with the batch that was drawn when Trainer saved."""

    def __init__(self, trainer: "NanoGPTTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer._resumed_from is not None:  # Trainer itself sets the generators' states
            offsets = read_next_batch(trainer._resumed_from, args.process_index, args.world_size)
            if trainer._train_batch_sampler is None and trainer._batches.can_choose(offsets):
                trainer._batches.choose(offsets)
            return
        torch.manual_seed(NANOGPT_SEED + args.process_index)  # the accelerator's generators, for dropout
        trainer._begin_drawing()


def write_next_batch(folder: Path, offsets: list[int], rank: int, world_size: int) -> None:
    """Writes the batch that a process has drawn and not used next to the rest of a checkpoint of Trainer's.

    And the state of MPS's generator, from which dropout draws there: Trainer keeps those of other devices only.
    """
    kept = {"offsets": offsets, "world_size": world_size}
    if torch.backends.mps.is_available():
        kept["mps_generator"] = torch.mps.get_rng_state().tolist()
    with open_atomically(folder / _name_file(rank)) as file:
        file.write(json.dumps(kept).encode())


def read_next_batch(folder: Path, rank: int, world_size: int) -> list[int]:
    """Returns the offsets that write_next_batch wrote in a whole checkpoint, and sets MPS's generator where it is.

    Raises:
        CheckpointError: If there were more or fewer processes.
    """
    kept = json.loads((folder / _name_file(0)).read_text(encoding="utf-8"))
    if kept["world_size"] != world_size:
        raise CheckpointError(
            f"{folder}: expected as many processes as the run had, {kept['world_size']}, got {world_size}; start as "
            f"many"
        )
    kept = json.loads((folder / _name_file(rank)).read_text(encoding="utf-8"))
    if "mps_generator" in kept and torch.backends.mps.is_available():
        torch.mps.set_rng_state(torch.tensor(kept["mps_generator"], dtype=torch.uint8))
    return kept["offsets"]


def _name_file(rank: int) -> str:
    return f"nanogpt_next_batch_{rank}.json"
