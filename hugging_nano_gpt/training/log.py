"""out_dir/log.jsonl: the losses of a run, a line of JSON for each iteration that train.py prints and each evaluation.

A line of an update has iter, loss, lr, time_ms and tokens. A line of an evaluation has iter, train/loss, val/loss, lr
and tokens. The names are those that train.py gives wandb; infinity and NaN are the strings "inf" and "nan". A line is
written as soon as it is known, so a kill loses at most the last one.
"""

import json
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..convert.inspect import to_json
from ..files.files import open_atomically, open_source

logger = logging.get_logger(__name__)

LOG_NAME = "log.jsonl"


def parse_line(line: str | bytes) -> dict[str, Any] | None:
    """Returns the entry of a line; None for a line that was cut off or is not of a log."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("iter"), int) else None


class RunLog:
    """The log of a run that trains.

    Args:
        path: The log.jsonl.
        tokens_per_iter: Tokens that an update trains on, in all processes.
        is_writing: Whether this process writes the log; with several, only the first one does.
    """

    def __init__(self, path: Path, tokens_per_iter: int, is_writing: bool = True):
        self.path = path
        self._tokens_per_iter = tokens_per_iter
        self._is_writing = is_writing

    def cut(self, iter_num: int, is_evaluated_again: bool) -> None:
        """Removes what a run that begins at an iteration will log again, and a line that a kill has cut off.

        Args:
            iter_num: Number of updates that the run begins with.
            is_evaluated_again: Whether the run begins with an evaluation.

        Raises:
            CheckpointError: If the log cannot be read or written.
        """
        if not (self._is_writing and self.path.exists()):
            return
        with open_source(self.path) as file:
            lines = file.readlines()
        kept = []
        for line in lines:
            entry = parse_line(line) if line.endswith(b"\n") else None
            if entry is None:
                continue
            is_of_last_evaluation = entry["iter"] == iter_num and "val/loss" in entry and not is_evaluated_again
            if entry["iter"] < iter_num or is_of_last_evaluation:
                kept.append(line)
        if kept != lines:
            with open_atomically(self.path) as file:
                file.writelines(kept)

    def add_update(self, iter_num: int, *, loss: float, lr: float, seconds: float) -> None:
        """Adds the line of an update; tokens includes its own."""
        tokens = (iter_num + 1) * self._tokens_per_iter
        self._add({"iter": iter_num, "loss": loss, "lr": lr, "time_ms": round(1000 * seconds, 2), "tokens": tokens})

    def add_evaluation(self, iter_num: int, *, train_loss: float, val_loss: float, lr: float) -> None:
        """Adds the line of an evaluation, before the update of the same number."""
        losses = {"train/loss": train_loss, "val/loss": val_loss}
        self._add({"iter": iter_num, **losses, "lr": lr, "tokens": iter_num * self._tokens_per_iter})

    def _add(self, entry: dict[str, float]) -> None:
        if not self._is_writing:
            return
        line = json.dumps(to_json(entry), allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(f"{line}\n")
        except OSError as error:  # the run is worth more than its log
            self._is_writing = False
            logger.error(f"{self.path}: cannot be written: {error.strerror or error}; the run goes on without it")
