"""Verifying two models against each other, in this process."""

import os
from typing import Any

from ..convert.source import load_source, names_file
from .compare import compare_models, compare_numbers
from .report import VerifyReport
from .sides import Side, make_batches


def verify_models(
    left: str | os.PathLike[str],
    right: str | os.PathLike[str],
    *,
    gradients: bool = False,
    activation_function: str | None = None,
    n_head: int | None = None,
    ignore_extra: bool = False,
) -> VerifyReport:
    """Compares two models: settings, tensors, and what they compute from the same seeded batches.

    Everything is asked to be equal bit for bit: both sides run the same code in one process, with the same number of
    threads, on weights that are aligned alike. Dropout and the training state are not compared.

    Args:
        left: Checkpoint file of the nanoGPT family, folder that save_pretrained wrote, or hub id.
        right: The same.
        gradients: Whether to compare the gradients of the loss too (in eval mode, so without dropout).
        activation_function: Activation of checkpoint files, in place of the one that their age tells.
        n_head: Number of heads of checkpoint files that do not record it.
        ignore_extra: Whether to leave out of account what a fork has added to a checkpoint file.

    Raises:
        CheckpointError: If one of them cannot be loaded.
    """
    reading: dict[str, Any] = {
        "activation_function": activation_function,
        "n_head": n_head,
        "ignore_extra": ignore_extra,
    }
    has_file = names_file(left) or names_file(right)  # without one, load_source refuses them
    sides = [
        Side(load_source(s, attn_implementation="sdpa", **(reading if names_file(s) or not has_file else {})))
        for s in (left, right)
    ]
    checks = compare_models(*sides)
    configs = [side.model.config for side in sides]
    notes = [note for name, side in zip(("left", "right"), sides, strict=True) for note in list_notes(name, side)]
    if configs[0].dropout != configs[1].dropout:
        notes.append(f"dropout {configs[0].dropout} and {configs[1].dropout}: it acts in training only")
    if configs[0].vocab_size == configs[1].vocab_size:
        batches = make_batches(configs[0].vocab_size, min(config.block_size for config in configs))
        ours, theirs = (side.compute(batches, gradients) for side in sides)
        checks += compare_numbers(ours, theirs)
    else:
        notes.append("logits, loss, gradients and tokens were not compared, because vocab_size differs")
    return VerifyReport(sides[0].label, sides[1].label, tuple(checks), tuple(notes))


def list_notes(name: str, side: Side) -> list[str]:
    """Lists what was assumed about a side."""
    return [f"{name}: {note}" for note in side.source.notes]
