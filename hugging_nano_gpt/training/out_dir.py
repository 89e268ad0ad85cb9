"""A run's out_dir: what an earlier run left there, where a run may begin without losing it, and who may train there.

train.py keeps ckpt.pt in it, Trainer the folders checkpoint-N. Either can be the newer one, because train.py goes on
from ckpt.pt and knows nothing of the folders. nanoGPT's iter_num says which one it is, and a run that would overwrite
the newer one is refused.
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
        init_from: What it begins from without one, in train.py's words.
        superseded: Folders checkpoint-N of an earlier run, which go when this run saves for the first time.
        is_ckpt_due: Whether a kill came when the folder was written and ckpt.pt was not.
    """

    folder: Path | None
    init_from: str
    superseded: tuple[Path, ...] = ()
    is_ckpt_due: bool = False

    @property
    def is_going_on(self) -> bool:
        """Whether the run continues one that has trained in out_dir."""
        return self.folder is not None or self.init_from == "resume"


def choose_beginning(settings: Mapping[str, Any], resume: bool, force: bool) -> Beginning:
    """Chooses what a run begins from, given what is in its out_dir.

    Args:
        settings: All of train.py's settings.
        resume: Whether to go on: from the last whole checkpoint of Trainer's, or else from ckpt.pt.
        force: Whether what an earlier run left may be overwritten.

    Raises:
        ConversionError: If an earlier run would be overwritten, or the newer of its two checkpoints.
        CheckpointError: If a ckpt.pt that has to be compared cannot be read.
    """
    if resume and force:
        raise ConversionError("--resume, --force: expected at most one of the two, got both; give only one")
    out_dir, init_from = Path(settings["out_dir"]), settings["init_from"]
    ckpt_path = out_dir / "ckpt.pt"
    has_ckpt = os.path.lexists(ckpt_path)
    last, folders = find_last_checkpoint(out_dir), tuple(list_checkpoints(out_dir))
    if resume and last is not None:
        if has_ckpt:
            _refuse_newer_ckpt(ckpt_path, last)
        return Beginning(
            last, init_from, is_ckpt_due=_is_ckpt_due(ckpt_path, last, settings["always_save_checkpoint"])
        )
    if resume and has_ckpt:
        init_from = "resume"
    elif init_from == "resume" and has_ckpt and last is not None and not force:
        _refuse_newer_folder(ckpt_path, last)
    elif not (resume or force or init_from == "resume" or settings["eval_only"]):
        _refuse_earlier_run(out_dir, [*folders, *([ckpt_path] if has_ckpt else [])])
    return Beginning(None, init_from, folders)


def find_last_checkpoint(out_dir: Path) -> Path | None:
    """Returns the last whole checkpoint of Trainer's, or None if none is whole."""
    try:
        return choose_checkpoint(True, os.fspath(out_dir))
    except CheckpointError:
        return None


def remove_superseded(folders: tuple[Path, ...]) -> None:
    """Removes checkpoints of Trainer's; one that a kill leaves half removed no longer has its own name."""
    for folder in folders:
        gone = folder.with_name(f".removing-{folder.name}")
        with contextlib.suppress(FileNotFoundError):
            folder.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def hold_out_dir(out_dir: Path) -> Iterator[None]:
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


def _refuse_newer_ckpt(ckpt_path: Path, folder: Path) -> None:
    made, kept = _read_ckpt_iter_num(ckpt_path, folder), _read_folder_iter_num(folder)
    if made > kept:
        raise ConversionError(
            f"{ckpt_path}: is newer than {folder}: expected at most iteration {kept}, got {made}, which --resume "
            f"would overwrite; give --init_from=resume without --resume to go on from {ckpt_path.name}, or move "
            f"{ckpt_path.name} elsewhere to go back to {folder.name}"
        )


def _refuse_newer_folder(ckpt_path: Path, folder: Path) -> None:
    made, kept = _read_folder_iter_num(folder), _read_ckpt_iter_num(ckpt_path, folder)
    if made > kept:
        raise ConversionError(
            f"{folder}: is newer than {ckpt_path}: expected at most iteration {kept}, got {made}; give --resume to go "
            f"on from {folder.name}, or move {folder.name} elsewhere to go back to {ckpt_path.name}"
        )


def _is_ckpt_due(ckpt_path: Path, folder: Path, keeps_all: bool) -> bool:
    """Returns whether ckpt.pt should hold what a checkpoint of Trainer's holds, and is missing or older."""
    if ckpt_path.exists() and read_iter_num(ckpt_path) >= _read_folder_iter_num(folder):
        return False
    return keeps_all or read_counts(folder).is_best


def _refuse_earlier_run(out_dir: Path, found: list[Path]) -> None:
    if found:
        raise ConversionError(
            f"{out_dir}: an earlier run is here: expected --resume to go on, another --out_dir, or --force to "
            f"overwrite it at the first save, got none of them and {list_some([path.name for path in found])}; add one"
        )


def _read_ckpt_iter_num(ckpt_path: Path, folder: Path) -> int:
    try:
        return read_iter_num(ckpt_path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or move it elsewhere to go on from {folder} alone") from error


def _read_folder_iter_num(folder: Path) -> int:
    counts = read_counts(folder)
    return counts.global_step if counts.iter_num is None else counts.iter_num
