"""vLLM's offline engine and its OpenAI server, each in its own process, which ends when its context manager exits.

vLLM needs its own environment (vllm_requirements.txt). This package is not installed there. It is in a separate
folder, which is added to the path only if vLLM should find the plugin.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WORKER_PATH = Path(__file__).with_name("vllm_worker.py")
START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 30

# Ignores any proxy in the environment.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Place:
    """Where vLLM runs.

    Args:
        venv_dir: vLLM's environment, without this package.
        plugin_dir: This package, installed with `pip install --target`.
        work_dir: Folder for logs and for the remote code that Transformers copies.
    """

    venv_dir: Path
    plugin_dir: Path
    work_dir: Path

    @contextlib.contextmanager
    def start(
        self, *arguments: str, with_plugin: bool, binding: str = "nobind", **pipes: Any
    ) -> Iterator[subprocess.Popen]:
        """Runs vLLM's Python, and stops it and its processes when the block ends."""
        command = [str(self.venv_dir / "bin" / "python"), *arguments]
        environment = self._make_environment(with_plugin, binding)
        with self.log_path.open("w") as log:
            options = {"stdout": log, "stderr": log, **pipes}
            process = subprocess.Popen(command, cwd=self.work_dir, env=environment, start_new_session=True, **options)
        try:
            yield process
            process.terminate()
            process.wait(STOP_TIMEOUT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the group, with the processes that it started
            process.wait()

    @property
    def log_path(self) -> Path:
        """The log of the current or last process."""
        return self.work_dir / "vllm.log"

    def explain(self, what: str) -> RuntimeError:
        """Makes an error with the end of the log."""
        return RuntimeError(f"vLLM: {what}\n" + "\n".join(self.log_path.read_text().splitlines()[-60:]))

    def _make_environment(self, with_plugin: bool, binding: str) -> dict[str, str]:
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        defaults = {
            "DO_NOT_TRACK": "1",
            "GLOO_SOCKET_IFNAME": loopback,  # otherwise its processes talk over the network
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        settings = {
            "HF_MODULES_CACHE": str(self.work_dir / "modules"),
            "PYTHONPATH": str(self.plugin_dir) if with_plugin else "",
            "TMPDIR": str(self.work_dir),
            "VLLM_CACHE_ROOT": str(self.work_dir / "cache"),
            "VLLM_CPU_OMP_THREADS_BIND": binding,
        }
        return {**defaults, **os.environ, **settings}


@dataclass(frozen=True)
class Engine:
    """The offline engine that vllm_worker.py makes."""

    place: Place
    process: subprocess.Popen

    def ask(self, action: str, **arguments: Any) -> Any:
        """Sends a request to the worker and returns its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"action": action, **arguments}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise self.place.explain(f"the engine ended before it answered {action}")
        return json.loads(line)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Pauses vLLM's processes, which spin for a second or more after each answer."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGCONT)


@contextlib.contextmanager
def open_engine(place: Place, folder: Path, *, with_plugin: bool, binding: str = "nobind") -> Iterator[Engine]:
    """Starts the offline engine in float32, with remote code, or with the plugin and without trust_remote_code.

    Args:
        place: Where vLLM runs.
        folder: Folder of the model.
        with_plugin: Whether this package can be imported there.
        binding: "nobind" for as many threads as we have, or "auto" for vLLM's own choice.
    """
    trust = {} if with_plugin else {"trust_remote_code": True, "model_impl": "transformers"}
    options = {
        "model": str(folder),
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,  # the same prompts are sent again
        "max_num_seqs": 16,
        "skip_tokenizer_init": True,
        **trust,
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [str(WORKER_PATH), json.dumps(options)]
    with place.start(*command, with_plugin=with_plugin, binding=binding, **pipes) as process:
        yield Engine(place, process)
        process.stdin.close()  # then it exits
        process.wait(STOP_TIMEOUT_S)


@dataclass(frozen=True)
class Server:
    """The OpenAI server."""

    url: str
    model: str

    def complete(self, prompt: str, max_tokens: int) -> str:
        """Asks /v1/completions for greedy text."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with OPENER.open(request, timeout=START_TIMEOUT_S) as response:
            return json.load(response)["choices"][0]["text"]


@contextlib.contextmanager
def open_server(place: Place, folder: Path, *, with_plugin: bool) -> Iterator[Server]:
    """Starts the server on a free port of 127.0.0.1, in float32, and waits until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = f"-m vllm.entrypoints.openai.api_server --host 127.0.0.1 --port {port} --dtype float32 --enforce-eager"
    trust = [] if with_plugin else ["--trust-remote-code", "--model-impl", "transformers"]
    command = [*arguments.split(), *trust, "--model", str(folder)]
    with place.start(*command, with_plugin=with_plugin) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(place, process, url)
        yield Server(url, str(folder))


def wait_until_healthy(place: Place, process: subprocess.Popen, url: str) -> None:
    """Waits until the server answers; raises RuntimeError if it ends or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), OPENER.open(f"{url}/health", timeout=10):
            return
        time.sleep(0.5)
    raise place.explain("the server did not start")
