"""Opening the file that a user names, and saying what is wrong with it."""

import os
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError


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
