"""Kills one of two workers of `hugging-nano-gpt train` under two torchrun agents, and compares where the run ends.

The agents simulate two machines: they meet by c10d rendezvous on 127.0.0.1, and each starts one worker, with
`--max-restarts=1` and `--resume`. After some updates, a worker is killed with SIGKILL. Both agents then restart their
workers, which continue from the last complete checkpoint. Their final ckpt.pt is compared with that of a run that
nobody stopped. The run has dropout, so each process's random state has to continue too.

Run: python benchmarks/kill_worker.py [--fsdp] [--updates 40] [--after 22]
The last line is one JSON object; the exit code is 1 if the two differ by more than the tolerance.
"""

import argparse
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from kill_and_resume import list_flags, read_numbers, write_data

# For the sums of two processes; random numbers and the order of the sums are the same.
TOLERANCE = 1e-6
LIMIT_S = 200


def main() -> None:
    """Makes both runs, and exits with 1 if their ends differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--after", type=int, default=22, help="updates after which a worker is killed")
    options = parser.parse_args()
    flags = ["--fsdp"] if options.fsdp else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        run(folder, "whole", options.updates, flags)
        starts = run(folder, "killed", options.updates, flags, killed_after=options.after)
        whole, killed = (read_numbers(folder / name / "ckpt.pt") for name in ("whole", "killed"))
    apart = max((whole[name] - killed[name]).abs().max().item() for name in whole)
    print(f"killed after update {options.after}; the run began at {starts}, and ended {apart:g} from the other")
    result = {"fsdp": options.fsdp, "updates": options.updates, "began_at": starts, "largest_difference": apart}
    print(json.dumps({**result, "torch": torch.__version__}))
    sys.exit(apart > TOLERANCE or len(starts) != 2)


def run(folder: Path, out_dir: str, n_updates: int, flags: list[str], killed_after: int | None = None) -> list[int]:
    """Runs two agents to their end, kills the second one's worker on the way, and returns where the run started."""
    log_path = folder / f"{out_dir}.log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    with log_path.open("wb") as log:
        agents = [start_agent(folder, endpoint, log, [*list_flags(out_dir, n_updates), *flags]) for _ in range(2)]
        try:
            if killed_after is not None:
                wait_for_update(log_path, killed_after)
                os.kill(find_worker(agents[1]), signal.SIGKILL)
            codes = [agent.wait(LIMIT_S) for agent in agents]
        finally:
            for agent in agents:
                agent.terminate()  # ends its worker too
    if any(codes):
        sys.exit(f"the agents ended with {codes}:\n{log_path.read_text()}")
    updates = list_updates(log_path)
    return [number for before, number in itertools.pairwise([math.inf, *updates]) if number <= before]


def start_agent(folder: Path, endpoint: str, log: Any, flags: list[str]) -> subprocess.Popen[bytes]:
    """Starts the torchrun of one machine."""
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    launch = [sys.executable, "-m", "torch.distributed.run", *meeting, "--local-addr=127.0.0.1", "--max-restarts=1"]
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    # The workers need a new store after each restart: the old one has entries of their dead peer.
    settings = {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "GLOO_SOCKET_IFNAME": loopback,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    environment = {**os.environ, **settings}
    command = [*launch, "-m", "hugging_nano_gpt", "train", *flags, "--resume"]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def list_updates(log_path: Path) -> list[int]:
    """Lists the updates in a log in order."""
    return [int(number) for number in re.findall(r"^iter (\d+):", log_path.read_text(), flags=re.MULTILINE)]


def wait_for_update(log_path: Path, number: int) -> None:
    """Waits until an update is in a log."""
    end = time.monotonic() + LIMIT_S
    while max(list_updates(log_path), default=-1) < number:
        if time.monotonic() > end:
            sys.exit(f"no update {number} in {LIMIT_S} s:\n{log_path.read_text()}")
        time.sleep(0.01)


def find_worker(agent: subprocess.Popen[bytes]) -> int:
    """Returns the id of the process that an agent has started."""
    listed = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True, check=True)
    return int(listed.stdout.split()[0])


if __name__ == "__main__":
    main()
