"""Reading and writing checkpoints: picks the format, checks, and never leaves a half-written file.

Plain data in, plain data out: this module knows files and tensors but no model. conversion.py makes models of it.
"""

import os

from .errors import CheckpointError, ConversionError
from .formats import nanogpt
from .formats.atomic import open_atomically
from .formats.check import find_model_faults, find_optimizer_faults, find_plain_faults
from .formats.contents import Checkpoint, TrainingState
from .formats.torch_file import TorchFile

__all__ = ["Checkpoint", "TrainingState", "read_checkpoint", "write_checkpoint"]


def read_checkpoint(path: str | os.PathLike[str], *, with_optimizer: bool = True) -> Checkpoint:
    """Reads a checkpoint that nanoGPT's train.py wrote into memory.

    Tensors come bit for bit as they are in the file. Nothing in the file is executed, and its checksums are compared.

    Args:
        path: Path of the ckpt.pt.
        with_optimizer: Whether to read the optimizer state too, which is two thirds of the file. Without it,
            `training_state.optimizer` is None and neither time nor memory is spent on it.

    Raises:
        CheckpointError: If the file is missing, damaged, unsafe or incomplete; every fault is listed.
    """
    with TorchFile(path) as file:
        if not nanogpt.recognise(file.contents):
            raise file.fail(
                f"not a nanoGPT checkpoint: expected a dict with 'model' and 'model_args', got "
                f"{type(file.contents).__name__}"
                + (f" of {len(file.contents)} other keys" if isinstance(file.contents, dict) else ""),
                "give the ckpt.pt that nanoGPT's train.py wrote",
            )
        return nanogpt.read(file, with_optimizer)


def write_checkpoint(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Writes a checkpoint in today's nanoGPT format, for its train.py to resume and its sample.py to read.

    The file appears under its name only when it is complete, and replaces what was there before in one step.

    Raises:
        ConversionError: If nanoGPT could not hold what the checkpoint holds; every reason is listed.
        CheckpointError: If the file cannot be written.
    """
    faults = find_model_faults(checkpoint.model_args, checkpoint.state_dict)
    if not faults and not checkpoint.is_tied:
        faults.append(
            "lm_head.weight: expected the numbers of transformer.wte.weight, because nanoGPT ties the two and would "
            "lose one of them, got others"
        )
    if checkpoint.training_state.optimizer is not None and not faults:
        faults = find_optimizer_faults(checkpoint.model_args, checkpoint.training_state.optimizer)
    faults += find_plain_faults("config", checkpoint.training_state.config)
    if faults:
        raise ConversionError(f"{os.fspath(path)}: cannot be a nanoGPT checkpoint: {'; '.join(faults)}; not written")
    try:
        with open_atomically(path) as file:
            nanogpt.write(checkpoint, file)
    except RuntimeError as error:  # torch.save reports a full disk so
        raise CheckpointError(f"{os.fspath(path)}: cannot be written: {error}; what was there is untouched") from error
