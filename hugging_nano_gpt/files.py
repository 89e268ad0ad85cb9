"""Opening the file that a user names, and writing a file, or a folder of files, wholly or not at all.

New bytes go to a temporary name beside the target, are flushed to the disk, and are then renamed over it. It costs an
fsync a file; it buys that a crash, a full disk or a kill at any moment leaves the file that was there before.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from .errors import CheckpointError, ConversionError, list_some


def open_source(path: Path) -> BinaryIO:
    """Opens a regular file for reading.

    Raises:
        CheckpointError: If it is a directory, a device, missing or not readable.
    """
    try:
        if path.is_dir():
            raise fail(path, "expected a file, got a directory", f"give the file in it, as {path / 'ckpt.pt'}")
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            raise fail(path, "expected a regular file, got a device, pipe or socket", "give the path of a ckpt.pt")
        return path.open("rb")
    except OSError as error:
        raise fail(path, f"cannot be opened: {error.strerror}", "check the path and its permissions") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise fail(path, f"cannot be opened: {error}", "check the path") from error


def measure_bytes(file: BinaryIO) -> int:
    """Returns the length of an open file."""
    return os.fstat(file.fileno()).st_size


def fail(path: Path, problem: str, advice: str) -> CheckpointError:
    """Makes the error that says what is wrong with a file and what to do."""
    return CheckpointError(f"{path}: {problem}; {advice}")


def fail_damaged(path: Path, reason: object) -> CheckpointError:
    """Makes the error for a file that is not what was once written."""
    return fail(
        path,
        f"damaged or cut off: expected a whole file as it was written, got {reason}",
        "copy it again from where it was written, or use an earlier checkpoint",
    )


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file for writing that takes its name when the block ends, and never if the block raises.

    A symbolic link is followed, so that the file it points to is replaced and not the link. Missing parent folders are
    made. The permissions are those of the file replaced, or else the usual ones of a new file.

    Raises:
        CheckpointError: If the operating system refuses any step (no space, no permission, a folder in the way).
    """
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise OSError("it is a directory, a device or a pipe, not a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".writing-", suffix=".tmp", dir=target.parent)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise _explain(path, error) from error
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(_choose_mode(target))
        temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise _explain(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)  # renamed away when all went well


def _choose_mode(target: Path) -> int:
    if target.exists():
        return target.stat().st_mode & 0o777
    return 0o666 & ~read_umask()


def read_umask() -> int:
    """Returns the umask of this process: the permissions that its new files do not get."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut, where the system lets a folder be opened."""
    with contextlib.suppress(OSError, AttributeError):  # some systems and network drives cannot; the file is there
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _explain(path: str | os.PathLike[str], error: OSError | ValueError) -> CheckpointError:
    return explain_failed_write(path, getattr(error, "strerror", None) or error)


def explain_failed_write(path: str | os.PathLike[str], reason: object) -> CheckpointError:
    """Makes the error for a file that could not be written."""
    return CheckpointError(
        f"{os.fspath(path)}: cannot be written: {reason}; what was there before is untouched, choose a place that is "
        f"writable and has room"
    )


def check_file(path: Path, overwrite: bool) -> None:
    """Raises ConversionError if there is something at a path, and overwrite is not given."""
    if os.path.lexists(path) and not overwrite:
        raise ConversionError(
            f"{path}: is there already: expected a new path, got a file; give another, or overwrite it (--force, "
            f"overwrite=True)"
        )


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises ConversionError if a folder has files in it, and overwrite is not given; or if it is a file."""
    if folder.is_dir() and not overwrite and (files := sorted(path.name for path in folder.iterdir())):
        raise ConversionError(
            f"{folder}: is not empty: expected a new or an empty folder, got {list_some(files)} in it; give another, "
            f"or overwrite it (--force, overwrite=True)"
        )
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConversionError(f"{folder}: expected a folder, got a file; give another path")


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[Path]:
    """Makes a temporary folder, and puts what was written into it in its place when the block ends.

    Raises:
        ConversionError: If it cannot be written; nothing is changed then.
    """
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.absolute().parent))
    except OSError as error:
        raise _explain_folder(folder, error.strerror) from error
    try:
        temporary.chmod(0o777 & ~read_umask())
        yield temporary
        for path in temporary.iterdir():
            path.chmod(0o666 & ~read_umask())  # safetensors makes files that only their owner reads
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.is_dir() and any(folder.iterdir()):
            _move_files(temporary, folder)
        else:
            temporary.replace(folder)
    except OSError as error:
        raise _explain_folder(folder, error.strerror or error) from error
    except (SafetensorError, RuntimeError) as error:  # how the writers of tensors report a full disk
        raise _explain_folder(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_files(temporary: Path, folder: Path) -> None:
    new = {path.name for path in temporary.iterdir()}
    weights = (path for pattern in ("model*.safetensors*", "model.onnx*") for path in folder.glob(pattern))
    stale = [path for path in weights if path.name not in new]  # of an earlier model, or of one in more files
    for name in sorted(new, key=lambda name: (name == "config.json", name)):  # without it, a folder is no model
        if name != "README.md" or not (folder / name).exists():  # the card there is the user's
            (temporary / name).replace(folder / name)
    for path in stale:
        path.unlink()


def _explain_folder(folder: Path, reason: object) -> ConversionError:
    return ConversionError(
        f"{folder}: cannot be written: {reason}; nothing was changed, choose a place that is writable and has room"
    )
