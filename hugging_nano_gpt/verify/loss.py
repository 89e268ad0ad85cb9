"""Measuring a checkpoint's loss as nanoGPT's estimate_loss does, and comparing it with its best_val_loss.

best_val_loss is a mean over random windows, and so is ours, over others: the two are compared by how far such means
spread. It finds weights, data or settings that do not belong together; it cannot tell bits.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.contents import NO_VAL_LOSS, TrainingState
from ..model.configuration_nano_gpt import NanoGPTConfig
from .models import list_notes
from .report import Check, VerifyReport
from .sides import Side, load_side

# train.py's own (@ 3adf61e), where a checkpoint has no config.
_EVAL_ITERS = 200
_BATCH_SIZE = 12

# Two means of the same numbers are further apart once in 370 times. Beside it, what rounding alone may make of a loss.
_STANDARD_ERRORS = 3
_ROUNDING = 1e-6

# Logits in memory at once: 2 ** 26 float32 are 256 MiB.
_MOST_LOGITS = 2**26

# The two that nanoGPT has computed.
_CANDIDATES = ("gelu", "gelu_new")


@dataclass(frozen=True)
class _Estimate:
    """Mean and spread of the losses of n windows, in nats per token."""

    mean: float
    deviation: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} +- {self.deviation / math.sqrt(self.n):.4f}"


def verify_loss(
    path: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    *,
    activation_function: str | None = None,
    n_head: int | None = None,
    eval_iters: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> VerifyReport:
    """Estimates a model's losses on train.bin and val.bin, and compares the second with its best_val_loss.

    Batches are drawn as in nanoGPT, from a seed, in the checkpoint's batch_size and eval_iters. The two estimates
    agree if they are within three standard errors of their difference, which the spread of the windows tells. Where
    the file's age leaves the GELU open, both are tried; they are usually too close for the loss to tell them apart,
    and the report says so. It runs on the GPU if there is one, in the checkpoint's dtype.

    Args:
        path: Checkpoint file of the nanoGPT family, folder that save_pretrained wrote, or hub id. Without a recorded
            best_val_loss, the loss is measured and the report is not equal.
        data_dir: Folder with train.bin and val.bin, uint16 tokens as nanoGPT's prepare.py writes them.
        activation_function: Activation in place of the one that the file's age tells; the other is not tried then.
        n_head: Number of heads, for a file that does not record it.
        eval_iters: Number of batches in place of the checkpoint's: fewer take less time and tell less.
        progress: Called with a line of text before each part of the work.

    Raises:
        CheckpointError: If the model cannot be loaded.
        DataError: If the data cannot be read, or has tokens that the model does not.
    """
    side = load_side(path, activation_function=activation_function, n_head=n_head)
    side.model.to("cuda" if torch.cuda.is_available() else "cpu")
    state: TrainingState = side.model.nanogpt_training_state
    recorded_iters = _get_count(state, "eval_iters", _EVAL_ITERS)
    batch_size = _get_count(state, "batch_size", _BATCH_SIZE)
    iters = eval_iters or recorded_iters
    current = side.model.config.activation_function
    is_open = side.source.checkpoint is not None and activation_function is None and current == "gelu"

    def estimate(split: str, name: str) -> _Estimate:
        progress(f"{split}.bin, {name}: {iters} batches of {batch_size} windows")
        with side.computing_with(name):
            return _estimate_loss(side, Path(data_dir) / f"{split}.bin", batch_size, iters)

    losses = {name: estimate("val", name) for name in (_CANDIDATES if is_open else (current,))}
    notes = [
        f"train loss {estimate('train', current)} with {current}, nothing is recorded to compare it with",
        *list_notes("left", side),
    ]
    best = state.best_val_loss
    if not best < NO_VAL_LOSS:
        notes.insert(0, f"val loss {losses[current]} with {current}, but no best_val_loss is recorded")
        return VerifyReport(side.label, "its best_val_loss: none", (), tuple(notes))
    tolerance = _compute_tolerance(losses[current], recorded_iters * batch_size)
    if is_open:
        notes.insert(0, _judge_activations(losses, best, tolerance))
    check = _compare(losses[current], best, tolerance, current)
    return VerifyReport(side.label, f"its best_val_loss, measured on {data_dir}", (check,), tuple(notes))


@torch.no_grad()
def _estimate_loss(side: Side, path: Path, batch_size: int, n_batches: int) -> _Estimate:
    model, config = side.model, side.model.config
    n_rows = max(1, _MOST_LOGITS // (config.block_size * config.vocab_size))
    losses = []
    for batch in _iterate_batches(path, config, batch_size, n_batches):
        pieces = (batch[name].to(model.device).split(n_rows) for name in ("input_ids", "shift_labels"))
        for idx, targets in zip(*pieces, strict=True):
            logits = model(idx, use_cache=False).logits.float()  # (B, T, V)
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # (B, T)
            losses.append(loss.mean(dim=1).double().cpu())
    windows = torch.cat(losses)
    return _Estimate(windows.mean().item(), windows.std(correction=0).item(), len(windows))


def _iterate_batches(
    path: Path, config: NanoGPTConfig, batch_size: int, n_batches: int
) -> Iterator[dict[str, torch.Tensor]]:
    # Here, because that package imports Trainer, for which every import of this one would wait.
    from ..training.data import NANOGPT_SEED, RandomOffsetSampler, TokenDataset, check_ids, collate_windows

    dataset = TokenDataset(path, config.block_size)
    for offsets in RandomOffsetSampler(dataset, batch_size, n_batches, NANOGPT_SEED):
        batch = collate_windows([dataset[offset] for offset in offsets])
        check_ids(batch, config.vocab_size, path)
        yield batch


def _get_count(state: TrainingState, name: str, default: int) -> int:
    value = state.config.get(name)
    return value if type(value) is int and value > 0 else default


def _compute_tolerance(loss: _Estimate, n_recorded: int) -> float:
    """Returns how far apart the two means may be; of the recorded one's windows the spread is taken to be the same."""
    return _STANDARD_ERRORS * loss.deviation * math.sqrt(1 / loss.n + 1 / n_recorded) + _ROUNDING * loss.mean


def _compare(loss: _Estimate, best: float, tolerance: float, activation_function: str) -> Check:
    difference = abs(loss.mean - best)
    is_equal = difference <= tolerance
    verdict = "agrees" if is_equal else "does not agree"
    detail = (
        f"{loss} over {loss.n:,} windows with {activation_function}; best_val_loss {best:.4f} {verdict}: "
        f"{difference:.4f} apart, at most {tolerance:.4f} accepted ({_STANDARD_ERRORS} standard errors of both)"
    )
    return Check("val loss", is_equal, detail, difference, tolerance)


def _judge_activations(losses: dict[str, _Estimate], best: float, tolerance: float) -> str:
    """Says which GELU fits the recorded loss better, and whether that means anything."""
    distances = {name: abs(loss.mean - best) for name, loss in losses.items()}
    nearest, furthest = sorted(distances, key=lambda name: distances[name])
    values = " and ".join(f"{loss.mean:.6f} with {name}" for name, loss in losses.items())
    if distances[nearest] <= tolerance < distances[furthest]:
        return f"val loss {values}: only {nearest} fits, so activation_function={nearest!r} is right"
    gap = abs(losses[nearest].mean - losses[furthest].mean)
    fit = "both fit" if distances[furthest] <= tolerance else "neither fits"
    return (
        f"val loss {values}: {fit}; {nearest} is nearer to best_val_loss, but {gap:.1g} between them is too little to "
        f"tell which the model was trained with"
    )
