"""The command line, run in this process, which saves the import of torch, or as the installed program.

In this process it gets what the program gets: arguments, standard input, and its own streams, to which Transformers
and the package log. Python's warnings are errors here, as in every test.
"""

import contextlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO
from unittest import mock

from transformers.utils import logging as transformers_logging

import hugging_nano_gpt_cli

PROGRAM = Path(sys.executable).with_name("hugging-nano-gpt")

# A process with torch takes 4 s, and has taken 12 s on a busy machine.
TIMEOUT_S = 120

ENVIRONMENT = {"COLUMNS": "200", "TERM": "dumb"}


class Result(NamedTuple):
    """The exit code and the output of a program."""

    returncode: int
    stdout: str
    stderr: str


def run_program(*command: object, text: str = "") -> Result:
    """Runs a command in a new process."""
    settings = {"capture_output": True, "text": True, "timeout": TIMEOUT_S, "env": {**os.environ, **ENVIRONMENT}}
    done = subprocess.run([*map(str, command)], input=text, check=False, **settings)
    return Result(done.returncode, done.stdout, done.stderr)


def run_command(*arguments: object, text: str = "", cwd: Path | None = None, closed: str = "") -> Result:
    """Runs the command line in this process and undoes its changes to it; a stream can be closed, as by `<&-`."""
    argv, stdin = ["hugging-nano-gpt", *map(str, arguments)], io.StringIO(text)
    stdout, stderr = io.StringIO(), io.StringIO()
    none = {closed: None} if closed else {}  # a closed stream is None in Python
    with (
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        mock.patch.multiple(sys, **{"argv": argv, "stdin": stdin, **none}),
        mock.patch.dict(os.environ, ENVIRONMENT),
        _log_to(stderr),
    ):
        try:
            hugging_nano_gpt_cli.main()
        except SystemExit as end:
            return Result(end.code or 0, stdout.getvalue(), stderr.getvalue())
    raise AssertionError("the command line did not exit")


@contextlib.contextmanager
def _log_to(stream: TextIO) -> Iterator[None]:
    """Sends to a stream what a new process logs to stderr, and undoes a command's changes to logging."""
    loggers = [logging.getLogger(name) for name in (None, "transformers", "hugging_nano_gpt")]
    levels = [logger.level for logger in loggers]
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.WARNING)
    transformers_logging.warning_once.cache_clear()
    for logger in loggers[:2]:  # the logger of Transformers does not propagate to the root
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        transformers_logging.enable_progress_bar()
