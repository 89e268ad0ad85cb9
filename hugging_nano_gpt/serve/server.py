"""Serving a model as OpenAI's API, until Ctrl-C or SIGTERM. One text is drawn at a time, and the others wait.

For many users at once there is vLLM (docs/vllm.md).
"""

import contextlib
import ipaddress
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..convert.source import choose_device, load_source
from ..errors import MissingDependencyError, ServerError
from ..sample.address import HOST, check_port
from ..tokenization.vocabulary import make_generation_config

_PACKAGES = ("fastapi", "openai", "uvicorn")


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

    Texts go on past block_size as generate's do. Of generation_config.json, the tokens that end a text and those that
    are never drawn count.

    Args:
        source: Checkpoint file of the nanoGPT family, folder that save_pretrained wrote, or Hub id. The name of the
            file's folder, of the folder or of the id's repository is what requests call the model.
        host: Address to listen on; "0.0.0.0" lets other machines in.
        port: Port to listen on.
        queue: Requests that may wait while one is answered; others get the status 503.
        max_tokens: Most tokens of all answers to a request together, and of a prompt unless block_size is more.
        api_key: What requests have to send as their key; without one, everyone who reaches the port is let in.
        allow_origin: Origin of a web page that may ask, such as "http://localhost:3000"; none by default.
        quiet: Whether no line is logged to stderr for each request.
        device: Device of torch; by default CUDA where there is a GPU for it, else the CPU.
        meta_path: meta.pkl of the model's characters, instead of the tokenizer that belongs to the source.
        tokenizer: Name, folder or Hub id of a tokenizer, instead of meta_path.
        **kwargs: What from_nanogpt_ckpt or from_pretrained takes, such as `dtype`, `n_head`, `activation_function`.

    Raises:
        MissingDependencyError: If the extra `serve` is not installed.
        ServerError: If the port is taken, or the key is empty.
        CheckpointError: If there is no whole model.
        TokenizerError: If there is no tokenizer.
    """
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(f"serve: {', '.join(missing)} is not installed; pip install {' '.join(missing)}")
    if api_key is not None and not api_key.strip():
        raise ServerError("--api-key: expected some text, got none; give a key, or leave it out to let everyone in")
    check_port(host, port)
    from .app import Server, build_app

    loaded = load_source(source, device=choose_device(device), **kwargs)
    model, text_tokenizer = loaded.model, loaded.tokenizer
    model.generation_config = make_generation_config(model, text_tokenizer)
    name = name_model(source)
    limits: dict[str, Any] = {"queue": queue, "max_tokens": max_tokens, "quiet": quiet}
    app = build_app(model, text_tokenizer, name, api_key=api_key, allow_origin=allow_origin, **limits)
    if api_key is None and not _is_this_machine(host):
        print(f"warning: everyone who reaches {host}:{port} can draw; --api-key asks for a key", file=sys.stderr)
    print(f"{name} is served at http://{host}:{port}/v1; Ctrl-C ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        Server(app, host, port).run()


def name_model(source: str | os.PathLike[str]) -> str:
    """Returns what requests call a model: the name of its folder, also of a file's, or of its repository."""
    path = Path(source)
    return (path.resolve().parent if path.is_file() else path.resolve() if path.exists() else path).name


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
