"""Forks of the test process that are killed at random moments.

The moments have a seed, which is printed when a test fails and can be set: KILL_SEED=7 python -m pytest ...
"""

import contextlib
import os
import signal

import pytest
import torch

KILL_SEED = int(os.environ.get("KILL_SEED", "1337"))


def forks(test):
    """Marks a test that forks this process; Python 3.12 and newer warn of that, because torch has threads."""
    test = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")(test)
    return pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")(test)


@contextlib.contextmanager
def start_child(work):
    """Runs work(ready) in a fork of this process, where torch is imported already, and kills it with SIGKILL.

    The block begins when the child calls ready().
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of the parent do not exist in the child
            work(lambda: os.write(writer, b"!"))
        finally:
            os._exit(1)
    try:
        os.close(writer)
        assert os.read(reader, 1) == b"!"
        yield
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
