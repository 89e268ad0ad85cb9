"""Measuring a checkpoint's loss as nanoGPT's estimate_loss does, and comparing it with its best_val_loss.

best_val_loss is a mean over random windows, and so is ours, over others: the two are compared by how far such means
spread. It finds weights, data or settings that do not belong together; it cannot tell bits.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint.contents import NO_VAL_LOSS, TrainingState
from ..convert.source import choose_device, load_source
from .estimate import Estimate, estimate_loss, get_estimate_settings
from .models import list_notes
from .report import Check, VerifyReport
from .sides import Side

# The two that nanoGPT has computed.
_CANDIDATES = ("gelu", "gelu_new")


def verify_loss(
    path: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    *,
    activation_function: str | None = None,
    n_head: int | None = None,
    ignore_extra: bool = False,
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
        data_dir: Folder with val.bin and, if it is there, train.bin, as nanoGPT's prepare.py writes them.
        activation_function: Activation in place of the one that the file's age tells; the other is not tried then.
        n_head: Number of heads, for a file that does not record it.
        ignore_extra: Whether to leave out of account what a fork has added to a checkpoint file.
        eval_iters: Number of batches in place of the checkpoint's: fewer take less time and tell less.
        progress: Called with a line of text before each part of the work.

    Raises:
        CheckpointError: If the model cannot be loaded.
        DataError: If the data cannot be read, or has tokens that the model does not.
    """
    reading: dict[str, Any] = {
        "activation_function": activation_function,
        "n_head": n_head,
        "ignore_extra": ignore_extra,
    }
    side = Side(load_source(path, attn_implementation="sdpa", **reading))
    side.model.to(choose_device(None))
    state: TrainingState = side.model.nanogpt_training_state
    recorded_iters, batch_size = get_estimate_settings(state)
    iters = eval_iters or recorded_iters
    current = side.model.config.activation_function
    is_open = side.source.checkpoint is not None and activation_function is None and current == "gelu"

    def estimate(split: str, name: str) -> Estimate:
        progress(f"{split}.bin, {name}: {iters} batches of {batch_size} windows")
        with side.computing_with(name):
            path = Path(data_dir) / f"{split}.bin"
            return estimate_loss(side.model, path, n_batches=iters, batch_size=batch_size)

    losses = {name: estimate("val", name) for name in (_CANDIDATES if is_open else (current,))}
    train = f"there is no {Path(data_dir) / 'train.bin'}, which is not compared"
    if (Path(data_dir) / "train.bin").exists():
        train = f"train loss {estimate('train', current)} with {current}, nothing is recorded to compare it with"
    notes = [train, *list_notes("left", side)]
    best = state.best_val_loss
    if not best < NO_VAL_LOSS:
        notes.insert(0, f"val loss {losses[current]} with {current}, but no best_val_loss is recorded")
        return VerifyReport(side.label, "its best_val_loss: none", (), tuple(notes))
    tolerance = losses[current].compute_tolerance(state)
    if is_open:
        notes.insert(0, _judge_activations(losses, best, tolerance))
    difference = abs(losses[current].mean - best)
    found = f"{losses[current]} over {losses[current].n:,} windows with {current}"
    detail = f"{found}; {losses[current].compare(state)}"
    check = Check("val loss", losses[current].agrees(state), detail, difference, tolerance)
    return VerifyReport(side.label, f"its best_val_loss, measured on {data_dir}", (check,), tuple(notes))


def _judge_activations(losses: dict[str, Estimate], best: float, tolerance: float) -> str:
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
