"""Servers in a thread of this process, requests to them, and what generate alone returns, to compare with."""

import contextlib
import socket
import threading
import time

import torch

from .programs import run_command

PROMPT = "ROMEO:"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ message.role }}: {% generation %}{{ message.content }}{% endgeneration %}{{ '\n' }}{% endfor %}"
    "{{ mood or '' }}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Address(str):
    """The address of a server, and its app."""

    __slots__ = ("app",)

    def __new__(cls, address, app):
        self = super().__new__(cls, address)
        self.app = app
        return self

    def wait_for_jobs(self, n_jobs):
        """Waits until n_jobs requests are being answered or are waiting."""
        for _ in range(1000):
            if len(self.app.state.desk.drawer._jobs) == n_jobs:
                return
            time.sleep(0.01)
        raise AssertionError(f"expected {n_jobs} jobs, got {len(self.app.state.desk.drawer._jobs)}")


@contextlib.contextmanager
def serve_app(model, tokenizer, name="demo", **settings):
    """Serves during the block; yields the address."""
    from hugging_nano_gpt.serve.app import Server, build_app

    app = build_app(model, tokenizer, name, **{"quiet": True, **settings})
    server = Server(app, "127.0.0.1", 0)
    with run_in_thread(server):
        yield Address("http://127.0.0.1:{1}".format(*server.servers[0].sockets[0].getsockname()), app)


@contextlib.contextmanager
def run_in_thread(server, run=None):
    """Runs a server of uvicorn during the block; run is its original method if a test has replaced it."""
    thread = threading.Thread(target=run or type(server).run, args=(server,))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def run_serve(words, monkeypatch):
    """Runs a command line of hugging-nano-gpt serve in this process during the block."""
    import uvicorn

    servers, run = [], uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: servers.append(server))
    result = run_command(*words[1:])
    assert result.returncode == 0, result.stderr
    (server,) = servers
    with run_in_thread(server, run):
        yield


def connect(address, **settings):
    """Connects OpenAI's own client."""
    import openai

    return openai.OpenAI(base_url=f"{address}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60, **settings})


def draw(model, tokenizer, prompt, seed=None, **settings):
    """Generates with generate alone; returns the text and the ids."""
    idx = tokenizer(prompt, return_tensors="pt").input_ids if isinstance(prompt, str) else torch.tensor([prompt])
    if seed is not None:
        torch.manual_seed(seed)
    ids = model.generate(idx, **settings)[0, idx.shape[1] :]
    return tokenizer.decode(ids), ids.tolist()


def complete(client, prompt=PROMPT, **settings):
    """Asks for a completion."""
    return client.completions.create(model="demo", prompt=prompt, **settings)


def chat(client, content="Speak", **settings):
    """Asks for the next message of a chat."""
    return client.chat.completions.create(model="demo", messages=[{"role": "user", "content": content}], **settings)


def find_port():
    """Finds a free port of 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def ask_app(app, **body):
    """Asks an app without a server."""
    from starlette.testclient import TestClient

    return TestClient(app).post("/v1/completions", json=body).json()
