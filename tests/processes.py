"""Running a worker module of the tests in two processes that talk through gloo on this machine's CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY_DIR = Path(__file__).parents[1]

# Three processes import torch and transformers; a busy machine has taken 12 s.
TIMEOUT_S = 120

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without torch.distributed or gloo",
)


def run_two_processes(worker: str, *arguments: object) -> None:
    """Runs a module of this folder in two processes, as torchrun does; fails the test if it fails."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": "1"}
    launch = "-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc-per-node=2".split()
    command = [sys.executable, *launch, "-m", f"tests.{worker}", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=REPOSITORY_DIR, env=environment, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its processes; killed, it would leave them behind
            output, _ = process.communicate()
    assert process.returncode == 0, output
