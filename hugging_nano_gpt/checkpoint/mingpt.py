"""minGPT's model.pt, and any other bare state dict with nanoGPT's names: read only.

The file contains only tensors. Their shapes give the sizes, but nothing gives the number of heads, so the user has to
say it. Mask buffers are a sign of minGPT, which computes the tanh GELU; without them the file is taken for a state
dict that somebody saved from nanoGPT.
"""

from dataclasses import replace
from typing import Any

import torch

from .contents import Checkpoint, ReadingOptions
from .file import CheckpointFile
from .state_dict import StateDict

NAME, KIND = "mingpt", "minGPT checkpoint"


def recognise(file: CheckpointFile) -> bool:
    """Returns whether a file is a bare state dict."""
    contents = file.contents
    return isinstance(contents, dict) and bool(contents) and all(map(_is_tensor_entry, contents.items()))


def _is_tensor_entry(entry: tuple[Any, Any]) -> bool:
    return isinstance(entry[0], str) and isinstance(entry[1], torch.Tensor)


def read(file: CheckpointFile, options: ReadingOptions) -> Checkpoint:
    """Reads a bare state dict; see StateDict.read.

    Raises:
        CheckpointError: With all faults, before any tensor is read; also if n_head is not given.
    """
    whole = ("state dict of minGPT or nanoGPT", "give one with nothing added or removed")
    found = StateDict(file, file.contents, whole)
    if not found.has_masks:  # minGPT's lm_head is not tied
        found.tie_missing_head()
    inferred = found.infer_model_args()
    if options.n_head is None and "n_embd" in inferred:
        n_embd = inferred["n_embd"]
        raise file.fail(
            f"a bare state dict does not record the number of heads: expected n_head, a divisor of {n_embd}, got none",
            "give it as n_head=... (--n-head); minGPT's models are listed in its model.py",
        )
    checkpoint = found.read({**inferred, "n_head": options.n_head, "dropout": 0.0})
    gelu = "tanh GELU, as minGPT computes" if found.has_masks else "exact GELU, as today's nanoGPT computes"
    return replace(
        checkpoint,
        activation_function="gelu_new" if found.has_masks else "gelu",
        assumptions=(
            *checkpoint.assumptions,
            f"{gelu}: a bare state dict does not record it",
            "dropout 0.0: a bare state dict does not record it",
        ),
    )
