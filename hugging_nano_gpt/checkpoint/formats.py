"""The table of formats, and reading and writing checkpoints by it, never leaving a half-written file.

A format is a module with NAME, KIND (in words), recognise(file) and read(file, options); one that is written has
write(checkpoint, file). This module checks what is the same for all of them. It knows files and tensors but no model;
convert/nanogpt.py makes models.
"""

import os
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError, ConversionError
from ..files.files import check_file, fail, fail_to_write, open_atomically, open_source
from ..model.configuration_nano_gpt import ACTIVATION_FUNCTIONS
from . import build_nanogpt, llmc, mingpt, nanogpt
from .contents import Checkpoint, ReadingOptions, TrainingState
from .faults import find_dense_faults, find_model_faults, find_number_faults, find_plain_faults, find_tying_faults
from .file import CheckpointFile
from .moments import OptimizerState

__all__ = ["Checkpoint", "OptimizerState", "TrainingState", "read_checkpoint", "write_checkpoint"]


# Every format that is read, in the order in which they are asked: llm.c's files are no archives of torch.save, and
# build-nanogpt's would pass for nanoGPT's.
FORMATS = (llmc, build_nanogpt, nanogpt, mingpt)

# In words, by Checkpoint.format.
FILE_KINDS = {each.NAME: each.KIND for each in FORMATS}

_WRITERS = {nanogpt.NAME: nanogpt.write, llmc.NAME: llmc.write}


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    n_head: int | None = None,
    activation_function: str | None = None,
    tie_word_embeddings: bool | None = None,
    with_optimizer: bool = True,
    ignore_extra: bool = False,
) -> Checkpoint:
    """Reads a checkpoint of the nanoGPT family into memory: nanoGPT of any age, minGPT, build-nanogpt or llm.c.

    Tensors come bit for bit as they are in the file. Nothing in the file is executed, and its checksums are compared
    (llm.c's files have none). The format is recognised by the file's contents, not by its name.

    Args:
        path: Path of the file.
        n_head: Number of heads, for a file that does not record it: a bare state dict such as minGPT's, or one
            without model_args.
        activation_function: Activation, instead of the one that follows from the file's age
            (docs/checkpoint-format.md).
        tie_word_embeddings: Whether lm_head is the token embedding; by default it is if the two are equal.
        with_optimizer: Whether to read the optimizer state as well, which is two thirds of a nanoGPT file. Without
            it, `training_state.optimizer` is None and neither time nor memory is spent on it.
        ignore_extra: Whether to ignore what a fork of nanoGPT has added to its checkpoints, and parts of the training
            state in a form of its own. The contents of `model` and `model_args` are never ignored.

    Raises:
        CheckpointError: If the file is missing, damaged, unsafe, incomplete or contains NaN; every fault is listed.
    """
    path = Path(path)
    with open_source(path) as raw:
        file = CheckpointFile(path, raw, build_nanogpt.ADMITTED, takes_foreign=ignore_extra)
        found = next((each for each in FORMATS if each.recognise(file)), None)
        if found is None:
            raise _fail_unknown(file)
        checkpoint = found.read(file, ReadingOptions(n_head, with_optimizer, ignore_extra))
    faults = find_number_faults(checkpoint.state_dict)
    if faults:
        raise fail(path, "; ".join(faults), "the run diverged before it was saved: use an earlier checkpoint")
    recorded = checkpoint.model_args["n_head"]
    if n_head is not None and n_head != recorded:
        raise fail(path, f"expected n_head={recorded} as it records, got {n_head!r}", "leave out n_head (--n-head)")
    if activation_function not in (None, *ACTIVATION_FUNCTIONS):
        raise fail(path, f"expected a GELU of {ACTIVATION_FUNCTIONS}, got {activation_function!r}", "give one of them")
    assumptions = checkpoint.assumptions
    if activation_function is not None:
        assumptions = tuple(text for text in assumptions if "GELU" not in text)  # the user has said it
    checkpoint = replace(
        checkpoint,
        format=found.NAME,
        path=path,
        activation_function=activation_function or checkpoint.activation_function,
        assumptions=assumptions,
    )
    return _settle_tying(checkpoint, path, tie_word_embeddings)


def read_iter_num(path: str | os.PathLike[str]) -> int:
    """Reads the number of updates that a nanoGPT checkpoint records, and none of its tensors.

    Raises:
        CheckpointError: If the file is missing, damaged, or records no number of updates.
    """
    path = Path(path)
    with open_source(path) as raw:
        contents = CheckpointFile(path, raw, takes_foreign=True).contents
    iter_num = contents.get("iter_num") if isinstance(contents, dict) else None
    if type(iter_num) is not int:
        raise fail(path, f"expected a checkpoint of train.py's with its iter_num, got {iter_num!r}", "give another")
    return iter_num


def write_checkpoint(
    checkpoint: Checkpoint, path: str | os.PathLike[str], *, to: str = nanogpt.NAME, overwrite: bool | None = None
) -> None:
    """Writes a checkpoint: in today's nanoGPT format, for its train.py to resume, or as an llm.c .bin.

    The file appears under its name only when it is complete, and replaces what was there before in one step.

    Args:
        checkpoint: What to write. Without an optimizer state, nanoGPT's format gets a fresh one.
        path: Path of the file to write. Missing folders are made.
        to: "nanogpt" or "llmc"; llm.c's .bin is float32 or bfloat16 as the tensors are.
        overwrite: Whether an existing file may be replaced. Without it, it is, with a FutureWarning: a later release
            will refuse that.

    Raises:
        ConversionError: If the format cannot express what the checkpoint contains (every reason is listed), or the
            file exists and overwrite is False.
        CheckpointError: If the file cannot be written.
    """
    where = os.fspath(path)
    check_file(Path(path), overwrite)
    if to not in _WRITERS:
        raise ConversionError(f"{where}: expected a format of {list(_WRITERS)}, got {to!r}; give one of them")
    faults = find_dense_faults(checkpoint.state_dict)
    faults = faults or find_model_faults(checkpoint.model_args, checkpoint.state_dict)
    faults = faults or find_number_faults(checkpoint.state_dict) + find_tying_faults(checkpoint.state_dict)
    faults += _find_state_faults(checkpoint.training_state)
    if checkpoint.training_state.optimizer is not None and not faults:
        faults = checkpoint.training_state.optimizer.find_faults(checkpoint.model_args)
    if to == llmc.NAME and not faults:
        faults = llmc.find_faults(checkpoint)
    if faults:
        raise ConversionError(f"{where}: cannot be a {to} checkpoint: {'; '.join(faults)}; nothing was written")
    try:
        with open_atomically(path) as file:
            _WRITERS[to](checkpoint, file)
    except RuntimeError as error:  # how torch.save reports a full disk, in words about its internals
        raise fail_to_write(path, "the disk is full or failed") from error


def _fail_unknown(file: CheckpointFile) -> CheckpointError:
    contents, advice = file.contents, "give the file that the training script wrote"
    found = f"a dict of {len(contents)} other keys" if isinstance(contents, dict) else type(contents).__name__
    if isinstance(contents, dict) and isinstance(contents.get("state_dict"), dict):
        kind = "Lightning" if "pytorch-lightning_version" in contents else "a trainer"
        advice = (
            f"this is a checkpoint of {kind}: save its 'state_dict' alone, under nanoGPT's names (such as "
            f"transformer.wte.weight, with nothing before them), and give that, with n_head="
        )
    problem = "not a checkpoint of the nanoGPT family: expected a dict with 'model' and 'model_args', or a state dict"
    return file.fail(f"{problem}, got {found}", advice)


def _settle_tying(checkpoint: Checkpoint, path: Path, wanted: bool | None) -> Checkpoint:
    """Makes lm_head and the embedding one tensor if they are tied, and two if they are not."""
    state_dict, is_equal = dict(checkpoint.state_dict), checkpoint.tie_word_embeddings
    head, embedding = state_dict["lm_head.weight"], state_dict["transformer.wte.weight"]
    if wanted and not is_equal:
        raise fail(
            path,
            "lm_head and the token embedding cannot be tied: expected equal matrices, got different ones",
            "leave tie_word_embeddings out to load them untied",
        )
    is_wanted = is_equal if wanted is None else wanted
    if is_wanted:
        state_dict["lm_head.weight"] = embedding
    elif head is embedding:
        state_dict["lm_head.weight"] = embedding.clone()
    return replace(checkpoint, state_dict=state_dict, tie_word_embeddings=is_wanted)


def _find_state_faults(state: TrainingState) -> list[str]:
    """Finds the parts of a training state that would not be read back unchanged."""
    expected = {"iter_num": int, "best_val_loss": float, "config": dict}
    faults = [
        f"{name}: expected {kind.__name__}, got {type(getattr(state, name)).__name__}"
        for name, kind in expected.items()
        if type(getattr(state, name)) is not kind
    ]
    if not isinstance(state.optimizer, OptimizerState | None):
        return [*faults, f"optimizer: expected OptimizerState or None, got {type(state.optimizer).__name__}"]
    try:
        faults = faults or find_plain_faults("config", state.config)
        if state.optimizer is not None:
            faults += find_plain_faults("optimizer", [*state.optimizer.settings, state.optimizer.moments])
    except RecursionError:
        faults.append("config: expected an end to lists within lists, got none")
    return faults
