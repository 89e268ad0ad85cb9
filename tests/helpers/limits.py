"""Limits of time and of file size for a block of a test, and the memory that the process has used."""

import contextlib
import signal
import sys

import pytest


@contextlib.contextmanager
def limit_time(seconds: float):
    """Fails the test if the block takes longer, also while it waits for the system; not on Windows."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_):
        pytest.fail(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def limit_file_size(size_bytes: int):
    """Makes the system refuse to let a file grow past a size, like a full disk."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def measure_peak_bytes() -> int:
    """Returns the largest amount of memory that this process has used."""
    resource = pytest.importorskip("resource", reason="Windows does not count it")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
