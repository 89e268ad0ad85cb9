"""What goes with Trainer's own checkpoints: a ckpt.pt at the same moments, and what is said when the disk is full."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import TrainerCallback

from ..errors import CheckpointError

if TYPE_CHECKING:
    from .trainer import NanoGPTTrainer

# No space, a quota, a limit of the size of files; and Windows' disk full.
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG, 112)


class NanoGPTCheckpointCallback(TrainerCallback):
    """Writes a nanoGPT checkpoint whenever Trainer saves one of its own.

    Args:
        trainer: The trainer to which it is added.
        path: The ckpt.pt to write; it is replaced each time, as train.py replaces its own.
    """

    def __init__(self, trainer: "NanoGPTTrainer", path: str | os.PathLike[str]):
        self.trainer = trainer
        self.path = path

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_nanogpt_ckpt(self.path)


@contextlib.contextmanager
def explain_full_disk(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Says what is wrong when a folder of Trainer's cannot be written whole, which torch and safetensors do not.

    Raises:
        CheckpointError: If the disk is full, or a quota or a limit is reached.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full(error):
            raise
        raise CheckpointError(
            f"{os.fspath(folder)}: cannot be written whole: the disk is full, or a quota or a limit of the size of "
            f"files is reached; what was saved before is untouched: make room, then go on from the last whole "
            f"checkpoint (--resume, resume_from_checkpoint=True)"
        ) from error


def _is_full(error: Exception) -> bool:
    if getattr(error, "errno", None) in _FULL:
        return True
    code = re.search(r"os error (\d+)", str(error))  # in a SafetensorError
    # torch.save does not keep the reason of a write that fails
    return (code is not None and int(code[1]) in _FULL) or "inline_container" in str(error)
