"""How a run ends before its last update: Ctrl-C and SIGTERM are noted at once and acted on after the update.

Several processes agree on it, so that all of them stop after the same update.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

import torch

# A second signal within this time is the first one again: torchrun passes on what the terminal has already sent.
_REPEAT_S = 1.0

# gloo's threads release a gathered tensor after every process has it, and a process that ends before that aborts:
# without this wait, 5 of 60 runs of two processes did on a busy machine (torch 2.13).
_RELEASE_S = 0.3


@contextlib.contextmanager
def leave_processes() -> Iterator[None]:
    """Destroys the process group after a run has ended or stopped, as train.py does; after an error it could hang."""
    try:
        yield
    except SystemExit:
        _destroy_group()
        raise
    _destroy_group()


def _destroy_group() -> None:
    if _is_distributed():
        torch.distributed.barrier()
        if "gloo" in torch.distributed.get_backend():
            time.sleep(_RELEASE_S)
        torch.distributed.destroy_process_group()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Interruption:
    """The signal that asks a run to stop, if one has come.

    Args:
        device: A device for the tensor by which several processes tell each other of the signal.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._noted: int | None = None
        self._noted_at = 0.0

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Notes the first signal instead of ending the process; a second one ends it at once."""
        before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(ValueError):  # only the main thread receives signals
                    before[number] = signal.signal(number, self._note)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agree(self) -> int | None:
        """Returns the signal that any process has noted, the same in each; all have to call it after every update."""
        if not _is_distributed():
            return self._noted
        highest = torch.tensor(self._noted or 0, device=self.device)
        torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
        return int(highest.item()) or None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._noted is None:
            self._noted, self._noted_at = number, now
            name = signal.Signals(number).name
            text = f"{name}: stopping after this update; a second {name} stops at once\n"
            os.write(2, text.encode())  # print would fail if the signal has interrupted a print
        elif now - self._noted_at > _REPEAT_S:
            raise SystemExit(128 + number)
