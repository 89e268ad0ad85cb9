"""Serving a model with OpenAI's API until Ctrl-C or SIGTERM. One answer is generated at a time, the others wait.

For many users at once, use vLLM (docs/vllm.md).
"""

import contextlib
import ipaddress
import os
import sys
from pathlib import Path
from typing import Any

from ..convert.source import choose_device, load_source
from ..errors import ServerError, require
from ..sample.address import HOST, check_port, format_address
from ..tokenization.vocabulary import make_generation_config


def run_server(
    source: str | os.PathLike[str],
    *,
    host: str = HOST,
    port: int = 8000,
    queue: int = 32,
    max_tokens: int = 4096,
    api_key: str | None = None,
    allow_origin: str | None = None,
    quiet: bool = False,
    device: str | None = None,
    **kwargs: Any,
) -> None:
    """Serves a model at /v1/completions and /v1/chat/completions until it is interrupted (Ctrl-C, SIGTERM).

    Texts continue past block_size as in generate. Of generation_config.json, only the end-of-text tokens and
    suppress_tokens are used.

    Args:
        source: What load_source takes. Requests call the model by the name of its folder or repository.
        host: Address to listen on; "0.0.0.0" or "::" lets other machines in.
        port: Port to listen on.
        queue: Requests that may wait while one is answered; others get the status 503.
        max_tokens: Most tokens of all answers to a request together, and of a prompt unless block_size is more.
        api_key: Key that requests have to send; without one, everyone who reaches the port is let in.
        allow_origin: Origin of a web page that may ask, such as "http://localhost:3000"; none by default.
        quiet: Whether to log no line for each request to stderr.
        device: Device of torch; by default CUDA if there is a GPU for it, else the CPU.
        **kwargs: What load_source takes (convert/source.py), such as `meta_path`, `tokenizer`, `dtype`, `revision`.

    Raises:
        MissingDependencyError: If the extra `serve` is not installed.
        ServerError: If the port is taken, or the key is empty.
        CheckpointError: If there is no whole model.
        TokenizerError: If there is no tokenizer.
    """
    require("serve", "fastapi", "uvicorn")
    if api_key is not None and not api_key.strip():
        raise ServerError("--api-key: expected some text, got none; give a key, or leave it out to let everyone in")
    check_port(host, port)
    from .app import Server, build_app

    loaded = load_source(source, device=choose_device(device), **kwargs)
    loaded.model.generation_config = make_generation_config(loaded.model, loaded.tokenizer)
    name, address = name_model(source), format_address(host, port)
    limits: dict[str, Any] = {"queue": queue, "max_tokens": max_tokens, "quiet": quiet}
    app = build_app(loaded.model, loaded.tokenizer, name, api_key=api_key, allow_origin=allow_origin, **limits)
    if api_key is None and not _is_this_machine(host):
        print(f"warning: everyone who reaches {address} can use it; --api-key asks for a key", file=sys.stderr)
    print(f"{name} is served at http://{address}/v1; Ctrl-C ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        Server(app, host, port).run()


def name_model(source: str | os.PathLike[str]) -> str:
    """Returns what requests call a model: the name of its folder or repository, for a file of its parent folder."""
    path = Path(source)
    return (path.resolve().parent if path.is_file() else path.resolve() if path.exists() else path).name


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
