"""minGPT's model.pt, and any other bare state dict with nanoGPT's names: read only.

There is nothing in it but tensors. Their shapes give the sizes; nothing gives the number of heads, so the user has to
say it. Mask buffers are a sign of minGPT, which computes the tanh GELU; without them it is taken for a state dict that
somebody saved from nanoGPT.
"""

from typing import Any

import torch

from .check import find_model_faults, is_tied
from .contents import Checkpoint
from .tensors import clean_names, infer_model_args, tie_missing_head
from .torch_file import TorchFile

NAME = "mingpt"


def recognise(contents: Any) -> bool:
    """Tells whether an unpickled file is a bare state dict."""
    return isinstance(contents, dict) and bool(contents) and all(map(_is_tensor_entry, contents.items()))


def _is_tensor_entry(entry: tuple[Any, Any]) -> bool:
    return isinstance(entry[0], str) and isinstance(entry[1], torch.Tensor)


def read(file: TorchFile, *, n_head: int | None) -> Checkpoint:
    """Reads a bare state dict, after checking every name, shape and dtype in it.

    Raises:
        CheckpointError: With all faults found, before any tensor is read; also if n_head is not given.
    """
    names = clean_names(file.contents)
    assumptions = [] if names.has_masks else tie_missing_head(names.tensors)  # minGPT's lm_head is not tied
    inferred = infer_model_args(names.tensors)
    if n_head is None and "n_embd" in inferred:
        n_embd = inferred["n_embd"]
        raise file.fail(
            f"a bare state dict does not record the number of heads: expected n_head, a divisor of {n_embd}, got none",
            "give it as n_head=... (--n-head); minGPT's models are listed in its model.py",
        )
    model_args = {**inferred, "n_head": n_head, "dropout": 0.0}
    faults = names.faults + find_model_faults(model_args, names.tensors)
    if faults:
        raise file.fail(
            f"not a whole state dict of minGPT or nanoGPT: {'; '.join(faults)}",
            "give one with nothing added or removed",
        )
    state_dict = file.read_tensors(names.tensors)
    gelu = "tanh GELU, as minGPT computes" if names.has_masks else "exact GELU, as today's nanoGPT computes"
    return Checkpoint(
        model_args=model_args,
        state_dict=state_dict,
        tie_word_embeddings=is_tied(state_dict),
        activation_function="gelu_new" if names.has_masks else "gelu",
        format=NAME,
        assumptions=(
            *assumptions,
            f"{gelu}: a bare state dict does not record it",
            "dropout 0.0: a bare state dict does not record it",
        ),
    )
