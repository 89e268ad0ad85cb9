"""nanoGPT's estimate of the loss (train.py @ 3adf61e, estimate_loss), with the same bits on one process or several.

In train.py the first process draws all batches and computes their losses alone. Here it draws them, and the processes
share the work: a batch has the same loss wherever it is computed, and the mean is taken in the order of the batches.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer

from ..data.dataset import TokenDataset, load_windows
from ..data.offsets import draw_offsets


def estimate_losses(trainer: Trainer, datasets: Mapping[str, TokenDataset], n_batches: int) -> dict[str, float]:
    """Computes the mean loss, in nats per token, of n_batches random batches of each data set, one after the other.

    Every process has to call this. The offsets are drawn from the first process's torch generator. The mean of no
    batches is NaN, as in train.py.
    """
    if not n_batches:
        return dict.fromkeys(datasets, math.nan)
    batch_size, is_first = trainer.args.per_device_train_batch_size, trainer.args.process_index == 0
    means = {}
    for name, dataset in datasets.items():
        offsets = [draw_offsets(dataset, batch_size) if is_first else [] for _ in range(n_batches)]
        means[name] = _compute_mean(trainer, dataset, broadcast_object_list(offsets))
    return means


def _compute_mean(trainer: Any, dataset: TokenDataset, offsets: list[list[int]]) -> float:
    rank, world_size = trainer.args.process_index, trainer.args.world_size
    share = math.ceil(len(offsets) / world_size)  # the same in every process, as sharded models need
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
    gathered = trainer.accelerator.gather(torch.stack(losses))  # (world_size * share,), process by process
    in_order = gathered.view(world_size, share).T.reshape(-1)[: len(offsets)]
    return float(in_order.float().cpu().mean())  # on the CPU, as in train.py
