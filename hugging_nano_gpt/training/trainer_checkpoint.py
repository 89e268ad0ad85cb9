"""Trainer's own checkpoints, the folders checkpoint-N in output_dir: only a whole one is resumed from.

Trainer goes on from whatever files it finds: without the optimizer's it takes other moments, without the scheduler's
another learning rate, and says nothing. A kill while it saves leaves such a folder. Here every file is looked at, by
its name and by its frame; the numbers in it are not.
"""

import json
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from ..errors import CheckpointError, list_some

logger = logging.get_logger(__name__)

_STATE = "trainer_state.json"

# What a checkpoint holds, and the files of which one is enough; the folders are FSDP's and DeepSpeed's.
_PARTS = {
    "weights": (
        "model.safetensors",
        "model.safetensors.index.json",
        "adapter_model.safetensors",
        "pytorch_model*",
        "global_step*",
    ),
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "schedule": ("scheduler.pt",),
    "random state": ("rng_state*.pth",),
    "state": (_STATE,),
    "next batch": ("nanogpt_next_batch_*.json",),  # one of each process
}


class TrainerCounts(NamedTuple):
    """Updates that a checkpoint's weights have seen: by Trainer's count, and by nanoGPT's where that is recorded.

    is_best says whether the checkpoint was made at an evaluation, and that one's loss is the lowest.
    """

    global_step: int
    iter_num: int | None
    is_best: bool


def choose_checkpoint(resume_from_checkpoint: object, output_dir: str) -> Path | None:
    """Returns the checkpoint that Trainer.train's argument names, or None for none; True is the last whole one.

    Raises:
        CheckpointError: If it is not whole, or none is.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint is False:
        return None
    if resume_from_checkpoint is not True:
        folder = Path(str(resume_from_checkpoint))
        faults = find_faults(folder)
        if faults:
            raise _fail(folder, faults)
        return folder
    broken: list[str] = []
    for folder in list_checkpoints(Path(output_dir)):
        faults = find_faults(folder)
        if not faults:
            if broken:
                logger.warning(f"{folder}: resuming from here: not whole are {list_some(broken)}, which came later")
            return folder
        broken.append(folder.name)
    raise CheckpointError(
        f"{output_dir}: expected a whole checkpoint of Trainer's, got {list_some(broken) or 'none'}; begin without "
        f"resume_from_checkpoint"
    )


def find_faults(folder: Path) -> list[str]:
    """Lists what a checkpoint of Trainer's lacks, or has cut off."""
    if not folder.is_dir():
        return ["no such folder"]
    faults = []
    for part, patterns in _PARTS.items():
        found = [path for pattern in patterns for path in folder.glob(pattern)]
        if not found:
            faults.append(f"no {part} ({patterns[0]})")
        faults += [f"a damaged {path.name}" for path in found if not _is_whole(path)]
    return faults or _find_absent_processes(folder)


def read_counts(folder: Path) -> TrainerCounts:
    """Reads how many updates a whole checkpoint's weights have seen."""
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
    kept = config.get("nanogpt_training_state") or {}
    step = state["global_step"]
    losses = [entry["val/loss"] for entry in state["log_history"] if "val/loss" in entry and entry["step"] == step]
    return TrainerCounts(step, kept.get("iter_num"), losses[-1:] == [kept.get("best_val_loss")])


def _find_absent_processes(folder: Path) -> list[str]:
    """Lists the next batches that the run's processes did not get to write."""
    world_size = json.loads(next(folder.glob("nanogpt_next_batch_*.json")).read_text(encoding="utf-8"))["world_size"]
    names = [f"nanogpt_next_batch_{rank}.json" for rank in range(world_size)]
    return [f"no {name}" for name in names if not (folder / name).exists()]


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Lists the checkpoints of a folder, whole or not, the last first."""
    matches = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*"))
    numbers = sorted((int(match[1]) for match in matches if match), reverse=True)
    return [output_dir / f"checkpoint-{number}" for number in numbers]


def _is_whole(path: Path) -> bool:
    """Tells whether a file ends where it says: what was cut off while it was written does not."""
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


def _fail(folder: Path, faults: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder}: not a whole checkpoint of Trainer's: expected {', '.join(_PARTS)}, got {', '.join(faults)}; give "
        f"another, or resume_from_checkpoint=True for the last whole one"
    )
