"""Trainer's own checkpoints, the folders checkpoint-N in output_dir: only a whole one is resumed from.

Trainer resumes from any files that it finds: without the optimizer's it begins with other moments, without the
scheduler's with another learning rate, and it says nothing. A process killed while it saves leaves such a folder. Here
every file is checked by its name and for having been cut off; the numbers in it are not.
"""

import contextlib
import errno
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from ..errors import CheckpointError, list_some

logger = logging.get_logger(__name__)

STATE_NAME = "trainer_state.json"

# The parts of a checkpoint, and their files. One file of each part is enough; the folders are FSDP's and DeepSpeed's.
_PARTS = {
    "weights": (
        *("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
        *("pytorch_model*", "global_step*"),
    ),
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "schedule": ("scheduler.pt",),
    "random state": ("rng_state*.pth",),
    "state": (STATE_NAME,),
    "next batch": ("nanogpt_next_batch_*.json",),  # one of each process
}

# No space, a quota, a limit on the size of files; and Windows' code for a full disk.
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG, 112)


class TrainerCounts(NamedTuple):
    """Updates that a checkpoint's weights have seen, and whether the loss of its evaluation was the lowest."""

    global_step: int  # Trainer's
    iter_num: int | None  # nanoGPT's, if it is recorded
    is_best: bool


def choose_checkpoint(resume_from_checkpoint: object, output_dir: str | os.PathLike[str]) -> Path | None:
    """Returns the checkpoint that Trainer.train's argument asks for: None for None or False, the last whole for True.

    Raises:
        CheckpointError: If it is not whole, or none is.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint is False:
        return None
    if resume_from_checkpoint is not True:
        if faults := find_faults(folder := Path(str(resume_from_checkpoint))):
            raise CheckpointError(
                f"{folder}: not a whole checkpoint of Trainer's: expected {', '.join(_PARTS)}, got "
                f"{', '.join(faults)}; give another, or resume_from_checkpoint=True for the last whole one"
            )
        return folder
    broken: list[str] = []
    for folder in list_checkpoints(Path(output_dir)):
        if not find_faults(folder):
            if broken:
                logger.warning(f"{folder}: resuming from here: not whole are {list_some(broken)}, which came later")
            return folder
        broken.append(folder.name)
    raise CheckpointError(
        f"{output_dir}: expected a whole checkpoint of Trainer's, got {list_some(broken) or 'none'}; begin without "
        f"resume_from_checkpoint"
    )


def find_faults(folder: Path) -> list[str]:
    """Lists what is missing from a checkpoint of Trainer's, and what is cut off."""
    if not folder.is_dir():
        return ["no such folder"]
    faults = []
    for part, patterns in _PARTS.items():
        found = [path for pattern in patterns for path in folder.glob(pattern)]
        if not found:
            faults.append(f"no {part} ({patterns[0]})")
        faults += [f"a damaged {path.name}" for path in found if not _is_whole(path)]
    if faults:
        return faults
    world_size = json.loads(next(folder.glob("nanogpt_next_batch_*.json")).read_text(encoding="utf-8"))["world_size"]
    names = [f"nanogpt_next_batch_{rank}.json" for rank in range(world_size)]
    return [f"no {name}" for name in names if not (folder / name).exists()]


def read_counts(folder: Path) -> TrainerCounts:
    """Reads how many updates the weights of a whole checkpoint have seen."""
    state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
    kept = config.get("nanogpt_training_state") or {}
    step = state["global_step"]
    losses = [entry["val/loss"] for entry in state["log_history"] if "val/loss" in entry and entry["step"] == step]
    return TrainerCounts(step, kept.get("iter_num"), losses[-1:] == [kept.get("best_val_loss")])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Lists the checkpoints in a folder, whole or not, the last one first."""
    matches = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*"))
    numbers = sorted((int(match[1]) for match in matches if match), reverse=True)
    return [output_dir / f"checkpoint-{number}" for number in numbers]


@contextlib.contextmanager
def explain_full_disk(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Names the full disk when a folder of Trainer's cannot be written whole; torch and safetensors do not.

    Raises:
        CheckpointError: If the disk is full, or a quota or a limit is reached.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        code = re.search(r"os error (\d+)", str(error))  # in a SafetensorError
        is_full = getattr(error, "errno", None) in _FULL or (code is not None and int(code[1]) in _FULL)
        if not is_full and "inline_container" not in str(error):  # torch.save gives no reason
            raise
        raise CheckpointError(
            f"{os.fspath(folder)}: cannot be written whole: the disk is full, or a quota or a limit of the size of "
            f"files is reached; what was saved before is untouched: make room, then go on from the last whole "
            f"checkpoint (--resume, resume_from_checkpoint=True)"
        ) from error


def _is_whole(path: Path) -> bool:
    """Returns whether a file ends where it should; one that was cut off while it was written does not."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return True
        if path.name.endswith(".index.json"):
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            return all((path.parent / shard).exists() and _is_whole(path.parent / shard) for shard in shards)
        if path.suffix == ".json":
            return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (SafetensorError, OSError, ValueError, KeyError):
        return False
    return path.is_dir() or zipfile.is_zipfile(path)
