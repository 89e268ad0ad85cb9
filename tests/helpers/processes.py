"""Processes for tests, forked from one that has imported torch and the package, because the imports take seconds.

A process that has computed gradients cannot be forked: torch refuses to compute gradients in the child. So the process
of the tests is not forked. Two processes that communicate use gloo on this machine's CPU, as with torchrun.
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

# On a busy machine the imports have taken 12 s.
TIMEOUT_S = 120

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without torch.distributed or gloo",
)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.preloaded"])


def run_forked(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], environments: Sequence[Mapping[str, str]]):
    """Makes all calls at the same time, each in its own process with its own environment.

    If one fails, the others are terminated.

    Returns:
        The result of each call like subprocess.run's: exit code, or minus the signal; stdout and stderr.
    """
    with (
        mock.patch.object(tempfile, "tempdir", None),  # a test may have changed it
        tempfile.TemporaryDirectory(prefix="forked-") as folder,
        contextlib.chdir(ROOT),  # so that the first process finds the modules
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
    """Calls main of a module of this folder in two processes, as torchrun does; fails the test if one fails."""
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
    """Replaces subprocess.run of Python with `-P`, a script and arguments."""
    _, flag, script, *arguments = command
    assert flag == "-P"
    return run_forked([(_run_script, (str(cwd), script, arguments))], [env])[0]


def _run_script(folder: str, script: str, arguments: list[str]) -> None:
    os.chdir(folder)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
