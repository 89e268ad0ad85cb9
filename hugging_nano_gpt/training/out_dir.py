"""A run's out_dir: what an earlier run left in it, where a run begins without losing that, and who may train in it.

train.py saves ckpt.pt there, Trainer the folders checkpoint-N. Either can be the newer one, because train.py continues
from ckpt.pt and does not know the folders. nanoGPT's iter_num decides, and a run that would overwrite the newer one is
refused.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import filelock
from transformers.utils import logging

from ..checkpoint.formats import read_iter_num
from ..errors import CheckpointError, ConversionError, list_some
from .trainer_checkpoint import choose_checkpoint, list_checkpoints, read_counts

logger = logging.get_logger(__name__)

_LOCK_NAME = ".train.lock"


class Beginning(NamedTuple):
    """Where a run begins.

    Args:
        folder: The checkpoint of Trainer's that it resumes from, or None.
        init_from: What it begins from if folder is None, in train.py's words.
        superseded: Folders checkpoint-N of an earlier run, to remove when this run first saves.
        is_ckpt_due: Whether the earlier run was killed after it had written the folder and before ckpt.pt.
    """

    folder: Path | None
    init_from: str
    superseded: tuple[Path, ...] = ()
    is_ckpt_due: bool = False


def choose_beginning(settings: Mapping[str, Any], resume: bool, force: bool) -> Beginning:
    """Chooses what a run begins from, given what is in its out_dir.

    Args:
        settings: All of train.py's settings.
        resume: Whether to continue: from the last whole checkpoint of Trainer's, or else from ckpt.pt.
        force: Whether what an earlier run left may be overwritten.

    Raises:
        ConversionError: If an earlier run, or the newer of its two checkpoints, would be overwritten.
        CheckpointError: If a ckpt.pt that has to be compared cannot be read.
    """
    if resume and force:
        raise ConversionError("--resume, --force: expected at most one of the two, got both; give only one")
    out_dir, init_from = Path(settings["out_dir"]), settings["init_from"]
    ckpt_path = out_dir / "ckpt.pt"
    has_ckpt = os.path.lexists(ckpt_path)
    folders, last = tuple(list_checkpoints(out_dir)), None
    with contextlib.suppress(CheckpointError):
        last = choose_checkpoint(True, out_dir)
    if resume and last is not None:
        made, kept = _read_iter_nums(ckpt_path if has_ckpt else None, last)
        if made > kept:
            raise _fail_newer(ckpt_path, made, last, kept, "--init_from=resume without --resume")
        is_ckpt_due = made < kept and (settings["always_save_checkpoint"] or read_counts(last).is_best)
        return Beginning(last, init_from, is_ckpt_due=is_ckpt_due)
    if resume and has_ckpt:
        init_from = "resume"
    elif init_from == "resume" and has_ckpt and last is not None and not force:
        kept, made = _read_iter_nums(ckpt_path, last)
        if made > kept:
            raise _fail_newer(last, made, ckpt_path, kept, "--resume")
    elif not (resume or force or init_from == "resume" or settings["eval_only"]) and (folders or has_ckpt):
        found = [*(folder.name for folder in folders), *(["ckpt.pt"] if has_ckpt else [])]
        raise ConversionError(
            f"{out_dir}: an earlier run is here: expected --resume to go on, another --out_dir, or --force to "
            f"overwrite it at the first save, got none of them and {list_some(found)}; add one"
        )
    return Beginning(None, init_from, folders)


def remove_superseded(folders: tuple[Path, ...]) -> None:
    """Removes checkpoints of Trainer's, renamed first, so that a kill leaves none half removed under its own name."""
    for folder in folders:
        gone = folder.with_name(f".removing-{folder.name}")
        with contextlib.suppress(FileNotFoundError):
            folder.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def lock_out_dir(out_dir: Path) -> Iterator[None]:
    """Keeps other runs out of an out_dir while this one trains there. The lock ends with the process, killed or not.

    Raises:
        ConversionError: If another run trains there, or the folder cannot be written.
    """
    lock = filelock.FileLock(out_dir / _LOCK_NAME)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ConversionError(
            f"{out_dir}: another run trains here: expected an out_dir of its own for each run, got one that is in "
            f"use; wait until the other run ends, or give another --out_dir"
        ) from error
    except NotImplementedError:  # some network drives
        logger.error(f"{out_dir}: cannot be locked on this file system: make sure that no other run trains here")
    except OSError as error:
        raise ConversionError(
            f"{out_dir}: cannot be written: {error.strerror or error}; give another --out_dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _read_iter_nums(ckpt_path: Path | None, folder: Path) -> tuple[int, int]:
    """Returns the updates that a ckpt.pt and a checkpoint of Trainer's have seen; -1 for no ckpt.pt."""
    counts = read_counts(folder)
    kept = counts.global_step if counts.iter_num is None else counts.iter_num
    try:
        return -1 if ckpt_path is None else read_iter_num(ckpt_path), kept
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or move it elsewhere to go on from {folder} alone") from error


def _fail_newer(newer: Path, made: int, older: Path, kept: int, flags: str) -> ConversionError:
    return ConversionError(
        f"{newer}: is newer than {older}: expected at most iteration {kept}, got {made}, which would be overwritten; "
        f"give {flags} to go on from {newer.name}, or move {newer.name} elsewhere to go back to {older.name}"
    )
