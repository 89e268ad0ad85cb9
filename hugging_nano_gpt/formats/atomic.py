"""Writing a file so that it is either wholly there or not there at all.

The new bytes go to a temporary name beside the target, are flushed to the disk, and are then renamed over it. It costs
an fsync a file; it buys that a crash, a full disk or a kill at any moment leaves the file that was there before.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError


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
    """Returns the permissions that new files of this process do not get."""
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
