"""Processes for tests, forked from one that has imported torch and the package: that costs seconds, and is done once.

What a process does before it forks must not have computed gradients, which torch refuses to go on with; so the tests'
own process cannot be forked. Two that talk do so through gloo on this machine's CPU, as torchrun starts them.
"""

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from .folders import ROOT

# A busy machine has taken 12 s to import what is imported first.
TIMEOUT_S = 120

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without torch.distributed or gloo",
)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.preloaded"])


def run_forked(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], environments: Sequence[Mapping[str, str]]):
    """Makes each call in a process of its own, with an environment of its own, all at the same time.

    When one fails, the others are ended.

    Returns:
        What each has left as subprocess.run returns it: exit code, or minus the signal; stdout and stderr.
    """
    with (
        mock.patch.object(tempfile, "tempdir", None),  # a test may have set another
        tempfile.TemporaryDirectory(prefix="forked-") as folder,
        contextlib.chdir(ROOT),  # where the first process finds what it imports
    ):
        paths = [[f"{folder}/{number}-{stream}" for stream in (1, 2)] for number in range(len(calls))]
        processes = [
            CONTEXT.Process(target=_call, args=(*call, dict(environment), outputs))
            for call, environment, outputs in zip(calls, environments, paths, strict=True)
        ]
        for process in processes:
            process.start()
        running = list(processes)
        while running:
            ended = multiprocessing.connection.wait([process.sentinel for process in running], TIMEOUT_S)
            running = [process for process in running if process.sentinel not in ended]
            if not ended or any(process.exitcode for process in processes):
                for process in running:
                    process.terminate()
        for process in processes:
            process.join()
        texts = [[Path(path).read_text(errors="replace") for path in outputs] for outputs in paths]
        return [
            subprocess.CompletedProcess(call, process.exitcode, *text)
            for call, process, text in zip(calls, processes, texts, strict=True)
        ]


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], paths: list[str]):
    for stream, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)


def run_two_processes(worker: str, *arguments: object) -> None:
    """Calls main of a module of this folder in two processes, as torchrun does; fails the test if it fails."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    group |= {"GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": "1"}
    environments = [{**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    call = (_run_main, (worker, *map(str, arguments)))
    done = run_forked([call, call], environments)
    assert [process.returncode for process in done] == [0, 0], "\n".join(each.stdout + each.stderr for each in done)


def _run_main(worker: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    importlib.import_module(f"tests.helpers.{worker}").main(*arguments)


def run_script_forked(command: Sequence[str], cwd: Path, env: Mapping[str, str], **_: Any):
    """Stands in for subprocess.run of Python with a script and arguments; `-P` is how it always is."""
    _, flag, script, *arguments = command
    assert flag == "-P"
    return run_forked([(_run_script, (str(cwd), script, arguments))], [env])[0]


def _run_script(folder: str, script: str, arguments: list[str]) -> None:
    os.chdir(folder)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
