"""Opening the file that a user names, and writing a file, or a folder of files, completely or not at all.

New bytes go to a temporary name in the same folder, are flushed to the disk, and are then renamed over the old ones.
That costs an fsync for each file; in return a crash, a full disk or a kill at any moment leaves the old file.
model/folder_nano_gpt.py replaces the model in a folder that exists.
"""

import contextlib
import functools
import os
import shutil
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from ..errors import CheckpointError, ConversionError, list_some
from ..model.folder_nano_gpt import (
    TEMPORARY,
    WrittenInPartError,
    flush_files,
    name_temporary,
    replace_model,
    sync_folder,
)


def open_source(path: Path) -> BinaryIO:
    """Opens a regular file for reading.

    Raises:
        CheckpointError: If it is a directory, a device, missing or not readable.
    """
    try:
        if path.is_dir():
            raise fail(path, "expected a file, got a directory", advise_on_folder(path))
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            raise fail(path, "expected a regular file, got a device, pipe or socket", "give the path of a ckpt.pt")
        return path.open("rb")
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise fail(path, f"cannot be opened: {_explain(error)}", "check the path and its permissions") from error


def advise_on_folder(folder: Path) -> str:
    """Returns what to give instead of a folder that is not a saved model."""
    if (folder / ".metadata").is_file():
        return (
            "it is a checkpoint of torch.distributed: make a file of it with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(folder, file), and give that"
        )
    if (folder / "config.json").is_file():
        return "it is a saved folder: load it with from_pretrained, or make a file of it with `hugging-nano-gpt back`"
    files = sorted(path for path in folder.glob("*") if path.suffix in (".pt", ".pth", ".ckpt") and path.is_file())
    inner = sorted(path.parent for path in folder.glob("*/config.json"))
    for name, found in (("file", [path for path in files if path.name == "ckpt.pt"] or files), ("folder", inner)):
        if found:
            return f"give the {name} in it, as {found[-1]}"
    return "give the path of a checkpoint file or of a saved folder"


def measure_bytes(file: BinaryIO) -> int:
    """Returns the length of an open file."""
    return os.fstat(file.fileno()).st_size


def fail(path: str | os.PathLike[str], problem: str, advice: str) -> CheckpointError:
    """Makes the error that says what is wrong with a file and what to do."""
    return CheckpointError(f"{os.fspath(path)}: {problem}; {advice}")


def fail_to_write(path: str | os.PathLike[str], reason: object) -> CheckpointError:
    """Makes the error for a file that could not be written."""
    advice = "what was there before is untouched, choose a place that is writable and has room"
    return fail(path, f"cannot be written: {_explain(reason)}", advice)


def _explain(reason: object) -> object:
    return getattr(reason, "strerror", None) or reason  # an error of the system, without its number and path


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file for writing that takes its name when the block ends, and never if the block raises.

    A symbolic link is followed: the file it points to is replaced, not the link. Missing parent folders are made. The
    permissions are those of the file replaced, or else those of a new file.

    Raises:
        CheckpointError: If the operating system refuses any step (no space, no permission, a folder in the way).
    """
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise OSError("it is a directory, a device or a pipe, not a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = name_temporary(target.parent, ".tmp")
        binary = getattr(os, "O_BINARY", 0)  # without it, Windows writes "\n" as two bytes
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | binary, 0o666)  # minus the umask
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise fail_to_write(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o777)
        temporary.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise fail_to_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)  # renamed away when all went well


def check_file(path: Path, overwrite: bool | None) -> None:
    """Raises ConversionError if a path is a folder, or a file that may not be overwritten; None warns of the file."""
    if overwrite is None:
        if path.is_file():
            warnings.warn(
                f"{path}: is there already and will be overwritten, which a later release will refuse; pass "
                f"overwrite=True to replace files, or overwrite=False to keep them",
                FutureWarning,
                stacklevel=2,
            )
        return
    if path.is_dir():
        raise ConversionError(f"{path}: expected a file to write, got a folder; give the path of a file in it")
    if os.path.lexists(path) and not overwrite:
        raise ConversionError(
            f"{path}: is there already: expected a new path, got a file; give another, or overwrite it (--force, "
            f"overwrite=True)"
        )


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises ConversionError if a path is a file, or a folder with files in it that may not be overwritten."""
    if folder.is_dir() and not overwrite and (files := sorted(path.name for path in folder.iterdir())):
        raise ConversionError(
            f"{folder}: is not empty: expected a new or an empty folder, got {list_some(files)} in it; give another, "
            f"or overwrite it (--force, overwrite=True)"
        )
    if os.path.lexists(folder) and not folder.is_dir():
        kind = "a file" if folder.exists() else "a link to nothing"
        raise ConversionError(f"{folder}: expected a folder, got {kind}; give another path")


@contextlib.contextmanager
def open_folder(folder: Path, overwrite: bool, stale: Collection[str] = ()) -> Iterator[Path]:
    """Makes a temporary folder, and moves what was written into it to its place when the block ends.

    A new folder appears complete, in one step. In one that exists, which may be a mount point or the target of a link,
    the files of the model are replaced: see replace_model.

    Args:
        folder: The folder to write.
        overwrite: Whether files in it may be replaced; if not, files that another process has written in the meantime
            are an error.
        stale: Patterns of names, whose files are removed from an existing folder when the new ones move in.

    Raises:
        ConversionError: If it cannot be written, or was written by another process; nothing is changed then.
    """
    target = Path(os.path.realpath(folder))
    try:
        if target.is_dir():
            check = functools.partial(_check_meanwhile, folder, overwrite)
            with replace_model(target, all_variants=True, stale=stale, check=check) as temporary:
                yield temporary
        else:
            with _open_new_folder(folder, target) as temporary:
                yield temporary
    except WrittenInPartError as error:
        raise ConversionError(str(error)) from error
    except (OSError, SafetensorError, RuntimeError) as error:  # the last two: a full disk, while tensors are written
        raise _fail_to_write_folder(folder, error) from error


@contextlib.contextmanager
def _open_new_folder(folder: Path, target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = name_temporary(target.parent)
    temporary.mkdir()
    try:
        yield temporary
        flush_files(temporary)
        _take_place(temporary, folder, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, folder: Path, target: Path) -> None:
    try:
        temporary.rename(target)  # replaces an empty folder, and nothing else
    except OSError as error:
        if os.path.lexists(target):
            raise _fail_to_write_folder(folder, "another process has written it in the meantime") from error
        raise


def _check_meanwhile(folder: Path, overwrite: bool) -> None:
    """Raises ConversionError if a folder has files since check_folder was called, and they may not be replaced."""
    others = [path.name for path in folder.iterdir() if not path.name.startswith(TEMPORARY)]
    if others and not overwrite:
        raise _fail_to_write_folder(folder, f"another process has written {list_some(sorted(others))} in the meantime")


def _fail_to_write_folder(folder: Path, reason: object) -> ConversionError:
    advice = "nothing was changed, choose a place that is writable and has room"
    return ConversionError(f"{folder}: cannot be written: {_explain(reason)}; {advice}")
