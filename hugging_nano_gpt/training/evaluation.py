"""nanoGPT's estimate of the loss (train.py @ 3adf61e, estimate_loss), with the same bits on one process or several.

In train.py the first process draws all batches and computes them alone. Here it draws them, and the processes share
the work: each batch's loss is the same wherever it is computed, and the mean is taken in the order of the batches.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast

from ..checkpoint.contents import TrainingState
from .data import TokenDataset
from .drawing import draw_offsets, load_windows

if TYPE_CHECKING:
    from .trainer import NanoGPTTrainer


def estimate_losses(
    trainer: "NanoGPTTrainer", datasets: Mapping[str, TokenDataset], n_batches: int, batch_size: int
) -> dict[str, float]:
    """Computes the mean loss, in nats per token, of n_batches random batches of each data set, one after the other.

    Every process has to call this; the offsets are those of the first process's generator. The mean of no batches is
    NaN, as in train.py.
    """
    if not n_batches:
        return dict.fromkeys(datasets, math.nan)
    return {
        name: _compute_mean(trainer, dataset, _draw(trainer, dataset, n_batches, batch_size))
        for name, dataset in datasets.items()
    }


def choose_datasets(trainer: "NanoGPTTrainer", eval_dataset: TokenDataset | None, is_own: bool) -> dict[str, Any]:
    """Returns what to evaluate: both of the trainer's own data sets as train.py does, or one data set alone."""
    val = trainer.eval_dataset if eval_dataset is None else eval_dataset
    datasets = {"train": trainer.train_dataset if is_own or val is None else None, "val": val}
    return {split: dataset for split, dataset in datasets.items() if dataset is not None}


def find_best_val_loss(start: TrainingState, history: Sequence[Mapping[str, Any]]) -> float:
    """Returns the validation loss that train.py keeps: the lowest, or the last where it saves at each.

    Args:
        start: Where the run began, with its settings.
        history: What Trainer has logged since.
    """
    is_last_kept = start.config.get("always_save_checkpoint", True)
    best = start.best_val_loss
    for loss in (entry["val/loss"] for entry in history if "val/loss" in entry):
        best = loss if is_last_kept else min(best, loss)  # which passes over NaN
    return best


def _draw(trainer: "NanoGPTTrainer", dataset: TokenDataset, n_batches: int, batch_size: int) -> list[list[int]]:
    if trainer.args.world_size == 1:
        return [draw_offsets(dataset, batch_size) for _ in range(n_batches)]
    offsets = torch.zeros(n_batches, batch_size, dtype=torch.int64)
    if trainer.args.process_index == 0:
        offsets = torch.tensor([draw_offsets(dataset, batch_size) for _ in range(n_batches)])
    return broadcast(offsets.to(trainer.args.device)).tolist()


def _compute_mean(trainer: "NanoGPTTrainer", dataset: TokenDataset, offsets: list[list[int]]) -> float:
    rank, world_size = trainer.args.process_index, trainer.args.world_size
    share = math.ceil(len(offsets) / world_size)  # sharded models ask for as many forward passes of every process
    mine = [offsets[min(rank + world_size * turn, len(offsets) - 1)] for turn in range(share)]
    model = trainer.model_wrapped if trainer.is_fsdp_enabled else trainer.model
    was_training = model.training
    model.eval()
    losses = []
    for batch_offsets in mine:
        batch = load_windows(dataset, batch_offsets, trainer.model.config.vocab_size)
        with trainer.compute_loss_context_manager():
            losses.append(model(**trainer._prepare_inputs(batch), use_cache=False).loss)
    model.train(was_training)
    gathered = trainer.accelerator.gather(torch.stack(losses))  # (world_size * share), process by process
    in_order = gathered.view(world_size, share).T.reshape(-1)[: len(offsets)]
    return float(in_order.float().cpu().mean())  # on the CPU, as train.py takes it
