"""Verifies two models against each other, in this process."""

import os

from ..convert.source import names_file
from .compare import compare_models, compare_numbers
from .report import VerifyReport
from .sides import load_side, make_batches


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

    Everything has to be equal bit for bit: both sides run the same code in one process, with the same number of
    threads, on weights of the same alignment. Dropout and the training state are not compared.

    Args:
        left, right: Checkpoint file of the nanoGPT family, folder that save_pretrained wrote, or hub id.
        gradients: Whether to compare the gradients of the loss too (in eval mode, so without dropout).
        activation_function, n_head, ignore_extra: How to read the checkpoint files, as in read_checkpoint.

    Raises:
        CheckpointError: If one of them cannot be loaded.
    """
    reading = {"activation_function": activation_function, "n_head": n_head, "ignore_extra": ignore_extra}
    has_file = names_file(left) or names_file(right)  # without one, load_source refuses these arguments
    sides = [load_side(side, **(reading if names_file(side) or not has_file else {})) for side in (left, right)]
    checks = compare_models(*sides)
    configs = [side.model.config for side in sides]
    notes = sides[0].list_notes("left") + sides[1].list_notes("right")
    if configs[0].dropout != configs[1].dropout:
        notes.append(f"dropout {configs[0].dropout} and {configs[1].dropout}: it acts in training only")
    if configs[0].vocab_size == configs[1].vocab_size:
        batches = make_batches(configs[0].vocab_size, min(config.block_size for config in configs))
        ours, theirs = (side.compute(batches, gradients) for side in sides)
        checks += compare_numbers(ours, theirs)
    else:
        notes.append("logits, loss, gradients and tokens were not compared, because vocab_size differs")
    return VerifyReport(sides[0].label, sides[1].label, tuple(checks), tuple(notes))
