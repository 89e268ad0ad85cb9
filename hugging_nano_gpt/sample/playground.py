"""Serving the page on this machine alone, until Ctrl-C: no other machine is asked for anything, or told anything."""

import os
import time
from typing import TYPE_CHECKING, Any

from ..convert.source import choose_device, load_source
from ..demo import CKPT_PATH, META_PATH
from ..errors import MissingDependencyError
from .address import HOST, check_port
from .markup import CSS, list_facts
from .page import build_page
from .sampling import make_sampler

if TYPE_CHECKING:
    import gradio


def run_playground(
    source: str | os.PathLike[str] | None = None,
    *,
    port: int = 7860,
    device: str | None = None,
    **kwargs: Any,
) -> None:
    """Serves a page to try a model in, on 127.0.0.1, until it is interrupted (Ctrl-C).

    Args:
        source: Checkpoint file of the nanoGPT family, folder that save_pretrained wrote, or Hub id; the bundled
            character model of Shakespeare by default.
        port: Port to listen on.
        device: Device of torch; by default CUDA where there is a GPU for it, else the CPU.
        meta_path: meta.pkl of the model's characters, in place of the tokenizer that belongs to the source.
        tokenizer: Name, folder or Hub id of a tokenizer, in place of meta_path.
        **kwargs: What from_nanogpt_ckpt or from_pretrained takes, such as `dtype`, `n_head`, `activation_function`.

    Raises:
        MissingDependencyError: If Gradio is not installed.
        ServerError: If the port is taken.
        CheckpointError: If there is no whole model.
        TokenizerError: If there is no tokenizer.
    """
    _check_gradio()
    check_port(HOST, port)
    if source is None:
        source = CKPT_PATH
        if kwargs.get("tokenizer") is None and kwargs.get("meta_path") is None:
            kwargs["meta_path"] = META_PATH
    loaded = load_source(source, device=choose_device(device), **kwargs)
    sampler = make_sampler(loaded, is_autocast=kwargs.get("dtype") is None)
    _serve(build_page(sampler, list_facts(loaded)), port)


def _check_gradio() -> None:
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("playground: Gradio is not installed; pip install 'gradio>=6.24'") from error


def _serve(page: "gradio.Blocks", port: int) -> None:
    """Serves a page until it is interrupted."""
    try:
        _launch(page, port)
        print(f"The playground is at http://{HOST}:{port}; Ctrl-C ends it", flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)


def _launch(page: "gradio.Blocks", port: int) -> None:
    """Starts serving a page in threads, without anything that Gradio would tell or ask other machines."""
    import gradio as gr

    # Gradio asks its own server whether it is up; a proxy would not find it.
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST)))
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )
