"""The model in a file of torch.save, for all formats: names are cleaned, sizes inferred, tensors checked and read.

Every name, shape and dtype is compared with nanoGPT's model before the first tensor is read, so that a file that is
not whole is refused in one error with all faults.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import CheckpointError
from .contents import Checkpoint
from .faults import find_model_faults, is_tied
from .file import IGNORE_ADVICE, CheckpointFile
from .layout import strip_wrappers

_HEAD, _EMBEDDING = "lm_head.weight", "transformer.wte.weight"

_LAYER = re.compile(r"transformer\.h\.(\d+)\.")

# The causal mask, where attention is written out: minGPT, nanoGPT before SDPA or on torch before 2.0. The name of the
# parameter attn.c_attn.bias looks alike.
_MASK_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.bias")


class StateDict:
    """A state dict in a file, under nanoGPT's own names; its tensors are not read yet.

    Parts of names that wrappers added are removed, and mask buffers, known by their exact name, are left out.
    `tensors` has the parameters by name, `has_masks` whether there were mask buffers, and `assumptions` what was
    assumed, one sentence each.

    Args:
        file: The file.
        contents: The state dict; anything but a dict has no tensors.
        whole: What the file should be, in words, and what to give if it is not, for the error.
        faults: What is wrong with the rest of the file, one sentence each.
        extra: Those of the faults that ignore_extra would avoid.
    """

    def __init__(
        self,
        file: CheckpointFile,
        contents: Any,
        whole: tuple[str, str],
        faults: Sequence[str] = (),
        extra: Sequence[str] = (),
    ):
        self.file, self.whole = file, whole
        self.faults, self.extra = list(faults), extra
        self.tensors: dict[str, torch.Tensor] = {}
        self.has_masks = False
        self.assumptions: list[str] = []
        for key, value in contents.items() if isinstance(contents, dict) else ():
            self._add(key, value)

    def _add(self, key: Any, value: Any) -> None:
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            self.faults.append(f"model: expected names and tensors, got {key!r}: {type(value).__name__}")
            return
        name = strip_wrappers(key)
        if _MASK_BUFFER.fullmatch(name) and value.ndim == 4:
            self.has_masks = True
        elif name in self.tensors:
            self.faults.append(f"model: expected each tensor once, got {name!r} again as {key!r}")
        else:
            self.tensors[name] = value

    def tie_missing_head(self) -> None:
        """Adds the token embedding as lm_head where a file leaves the tied lm_head out."""
        if _HEAD not in self.tensors and _EMBEDDING in self.tensors:
            self.tensors[_HEAD] = self.tensors[_EMBEDDING]
            self.assumptions.append("lm_head tied to the token embedding: the file leaves it out")

    def infer_model_args(self) -> dict[str, Any]:
        """Returns the model_args that the shapes show: all but n_head and dropout, as far as the tensors exist."""
        model_args: dict[str, Any] = {}
        for name, args in (
            ("transformer.wpe.weight", ("block_size", "n_embd")),
            (_EMBEDDING, ("vocab_size", "n_embd")),
        ):
            if name in self.tensors and self.tensors[name].ndim == 2:
                model_args |= zip(args, self.tensors[name].shape, strict=True)
        model_args["n_layer"] = len({match[1] for name in self.tensors if (match := _LAYER.match(name))})
        model_args["bias"] = "transformer.ln_f.bias" in self.tensors
        return model_args

    def read(self, model_args: dict[str, Any]) -> Checkpoint:
        """Compares the tensors with nanoGPT's model of these model_args, and reads them.

        Raises:
            CheckpointError: With all faults, before any tensor is read.
        """
        self.faults += find_model_faults(model_args, self.tensors)
        if self.faults:
            raise self.fail()
        tensors = self.file.read_tensors(self.tensors)
        assumptions = (*self.assumptions, *self.file.assumptions)
        return Checkpoint(model_args, tensors, is_tied(tensors), assumptions=assumptions)

    def fail(self) -> CheckpointError:
        """Makes the error with all faults found so far."""
        what, advice = self.whole
        is_extra = set(self.extra) >= set(self.faults)
        return self.file.fail(f"not a whole {what}: {'; '.join(self.faults)}", advice + IGNORE_ADVICE * is_extra)
