"""Verifies two models against each other, in this process."""

import os
from typing import Any

from ..convert.nanogpt import READING_KWARGS
from ..convert.pretrained import HUB_KWARGS
from ..convert.source import load_source, names_file
from .compare import compare_models, compare_numbers
from .report import VerifyReport
from .sides import Side, make_batches


def verify_models(
    left: str | os.PathLike[str],
    right: str | os.PathLike[str],
    *,
    gradients: bool = False,
    **kwargs: Any,
) -> VerifyReport:
    """Compares two models: settings, tensors, and what they compute from the same seeded batches.

    Everything has to be equal bit for bit: both sides run the same code in one process, with the same number of
    threads, on weights of the same alignment. Dropout and the training state are not compared.

    Args:
        left, right: Checkpoint file of the nanoGPT family, folder that save_pretrained wrote, or hub id.
        gradients: Whether to compare the gradients of the loss too (in eval mode, so without dropout).
        **kwargs: What load_source takes (convert/source.py), such as `n_head` for a file or `revision` for the Hub.

    Raises:
        CheckpointError: If one of them cannot be loaded.
    """
    are_files = [names_file(left), names_file(right)]
    if are_files[0] != are_files[1]:  # a file and a folder take different arguments
        others = {True: HUB_KWARGS, False: READING_KWARGS}
        each = [{name: kwargs[name] for name in kwargs.keys() - others[is_file]} for is_file in are_files]
    else:
        each = [kwargs, kwargs]
    sides = [
        Side(load_source(side, attn_implementation="sdpa", **own))
        for side, own in zip((left, right), each, strict=True)
    ]
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
