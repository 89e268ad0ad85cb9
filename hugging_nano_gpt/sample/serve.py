"""Serving a model as OpenAI's API, by Transformers' own handlers: completions, chats, streaming. Until Ctrl-C.

One text is drawn at a time, and the others wait. For many users at once there is vLLM (docs/serving.md).
"""

import os
from pathlib import Path
from typing import Any

from transformers.utils.import_utils import is_serve_available

from ..errors import MissingDependencyError
from ..tokenization.vocabulary import make_settings
from .address import HOST, check_port
from .sampling import load_model_and_tokenizer


def run_server(
    source: str | os.PathLike[str],
    *,
    host: str = HOST,
    port: int = 8000,
    device: str | None = None,
    meta_path: str | os.PathLike[str] | None = None,
    tokenizer: str | None = None,
    **kwargs: Any,
) -> None:
    """Serves a model at /v1/completions and /v1/chat/completions until it is interrupted (Ctrl-C).

    Texts go on past block_size as generate's do. What a request leaves open is what generation_config.json says.

    Args:
        source: Checkpoint file of the nanoGPT family, folder that save_pretrained wrote, or Hub id. The name of the
            file's folder, of the folder or of the id's repository is what requests call the model.
        host: Address to listen on; "0.0.0.0" lets other machines in, without any password.
        port: Port to listen on.
        device: Device of torch; by default CUDA where there is a GPU for it, else the CPU.
        meta_path: meta.pkl of the model's characters, in place of the tokenizer that belongs to the source.
        tokenizer: Name, folder or Hub id of a tokenizer, in place of meta_path.
        **kwargs: What from_nanogpt_ckpt or from_pretrained takes, such as `dtype`, `n_head`, `activation_function`.

    Raises:
        MissingDependencyError: If the extra `serve` is not installed.
        ServerError: If the port is taken.
        CheckpointError: If there is no whole model.
        TokenizerError: If there is no tokenizer.
    """
    if not is_serve_available():
        raise MissingDependencyError(
            "serve: FastAPI, uvicorn or openai is missing; pip install 'transformers[serving]'"
        )
    check_port(host, port)
    import uvicorn

    from .server import build_app

    model, text_tokenizer, _ = load_model_and_tokenizer(
        source, device=device, meta_path=meta_path, tokenizer=tokenizer, **kwargs
    )
    model.generation_config = make_settings(model, text_tokenizer)
    name = name_model(source)
    app = build_app(model, text_tokenizer, name)
    print(f"{name} is served at http://{host}:{port}/v1; Ctrl-C ends it", flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning")


def name_model(source: str | os.PathLike[str]) -> str:
    """Returns what requests call a model: the name of its folder, also of a file's, or of its repository."""
    path = Path(source)
    return (path.resolve().parent if path.is_file() else path.resolve() if path.exists() else path).name
