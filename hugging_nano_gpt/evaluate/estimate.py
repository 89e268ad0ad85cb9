"""The loss of each token in a batch, and nanoGPT's estimate of a model's loss: a mean over random windows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..checkpoint.contents import TrainingState
from ..data.dataset import TokenDataset, check_ids, collate_windows
from ..data.offsets import RandomOffsetSampler
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel

# train.py's defaults (@ 3adf61e), for checkpoints without a config.
_EVAL_ITERS = 200
_BATCH_SIZE = 12

# Two estimates of one loss are further apart than this once in 370 times. Rounding alone may add the second number,
# as a fraction of the loss.
_STANDARD_ERRORS = 3
_ROUNDING = 1e-6

# Number of logits in memory at once: 2 ** 26 in float32 take 256 MiB.
_MOST_LOGITS = 2**26


@dataclass(frozen=True)
class Estimate:
    """Mean and spread of the losses of n windows, in nats per token."""

    mean: float
    deviation: float
    n: int

    @property
    def standard_error(self) -> float:
        """The standard error of the mean."""
        return self.deviation / math.sqrt(self.n)

    def __str__(self) -> str:
        return f"{self.mean:.4f} +- {self.standard_error:.4f}"

    def compute_tolerance(self, recorded: TrainingState) -> float:
        """Returns the largest difference to a run's best_val_loss that is accepted, if its windows spread as much."""
        iters, batch_size = get_estimate_settings(recorded)
        spread = self.deviation * math.sqrt(1 / self.n + 1 / (iters * batch_size))
        return _STANDARD_ERRORS * spread + _ROUNDING * self.mean

    def agrees(self, recorded: TrainingState) -> bool:
        """Returns whether the best_val_loss of a run is within the tolerance."""
        return abs(self.mean - recorded.best_val_loss) <= self.compute_tolerance(recorded)

    def compare(self, recorded: TrainingState) -> str:
        """Describes the same in words."""
        best = recorded.best_val_loss
        return (
            f"best_val_loss {best:.4f} {'agrees' if self.agrees(recorded) else 'does not agree'}: "
            f"{abs(self.mean - best):.4f} apart, at most {self.compute_tolerance(recorded):.4f} accepted "
            f"({_STANDARD_ERRORS} standard errors of both)"
        )

    def to_json(self, recorded: TrainingState | None) -> dict[str, Any]:
        """Returns the numbers as a dict, and how they compare with the best_val_loss of a run."""
        return {
            "loss": self.mean,
            "standard_error": self.standard_error,
            "n_windows": self.n,
            "best_val_loss": None if recorded is None else recorded.best_val_loss,
            "tolerance": None if recorded is None else self.compute_tolerance(recorded),
            "agrees": None if recorded is None else self.agrees(recorded),
        }


def get_estimate_settings(state: TrainingState) -> tuple[int, int]:
    """Returns the eval_iters and the batch_size of a run, or train.py's defaults where none are recorded."""
    return _get_count(state, "eval_iters", _EVAL_ITERS), _get_count(state, "batch_size", _BATCH_SIZE)


def estimate_loss(model: NanoGPTLMHeadModel, path: Path, *, n_batches: int, batch_size: int) -> Estimate:
    """Estimates a model's loss on a token file as nanoGPT's estimate_loss does, from a fixed seed.

    Raises:
        DataError: If the file cannot be read, is shorter than a window, or has tokens that the model does not have.
    """
    batches = _iterate_batches(path, model.config.block_size, batch_size, n_batches)
    bar = logging.tqdm(batches, total=n_batches, unit="batch")
    windows = torch.cat([compute_losses(model, batch, path).mean(dim=1) for batch in bar])
    return Estimate(windows.mean().item(), windows.std(correction=0).item(), len(windows))


@torch.no_grad()
def compute_losses(model: NanoGPTLMHeadModel, batch: dict[str, torch.Tensor], where: object) -> torch.Tensor:
    """Computes the loss of each token, a few rows at once, so that the logits fit in memory.

    Args:
        model: The model, in eval mode, on its device.
        batch: input_ids and shift_labels, (B, T) int64 each.
        where: What the batch was read from, for the error.

    Returns:
        (B, T) float64 on the CPU, computed from float32 logits.

    Raises:
        DataError: If the batch has ids that the model does not have.
    """
    check_ids(batch, model.config.vocab_size, where)
    n_rows = max(1, _MOST_LOGITS // (batch["input_ids"].shape[1] * model.config.vocab_size))
    pieces = (batch[name].to(model.device).split(n_rows) for name in ("input_ids", "shift_labels"))
    losses = []
    for idx, targets in zip(*pieces, strict=True):
        logits = model(idx, use_cache=False).logits.float()  # (B, T, V)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # (B, T)
        losses.append(loss.cpu().double())  # MPS has no float64
    return torch.cat(losses)


def _iterate_batches(
    path: Path, block_size: int, batch_size: int, n_batches: int
) -> Iterator[dict[str, torch.Tensor]]:
    dataset = TokenDataset(path, block_size)
    for offsets in RandomOffsetSampler(dataset, batch_size, n_batches):
        yield collate_windows([dataset[offset] for offset in offsets])


def _get_count(state: TrainingState, name: str, default: int) -> int:
    value = state.config.get(name)
    return value if type(value) is int and value > 0 else default
