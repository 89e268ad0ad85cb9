"""Serving the page only on this machine, until Ctrl-C. No other machine is contacted."""

import os
import time
from typing import TYPE_CHECKING, Any

from ..convert.source import choose_device, load_source
from ..demo import CKPT_PATH, META_PATH
from ..errors import require
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
        source: What load_source takes; by default the bundled character model of Shakespeare.
        port: Port to listen on.
        device: Device of torch; by default CUDA if there is a GPU for it, else the CPU.
        **kwargs: What load_source takes (convert/source.py), such as `meta_path`, `tokenizer`, `dtype`, `revision`.

    Raises:
        MissingDependencyError: If Gradio is not installed.
        ServerError: If the port is taken.
        CheckpointError: If there is no whole model.
        TokenizerError: If there is no tokenizer.
    """
    require("playground", "gradio>=6.24")
    check_port(HOST, port)
    if source is None:
        source = CKPT_PATH
        if kwargs.get("tokenizer") is None and kwargs.get("meta_path") is None:
            kwargs["meta_path"] = META_PATH
    loaded = load_source(source, device=choose_device(device), **kwargs)
    sampler = make_sampler(loaded, is_autocast=kwargs.get("dtype") is None)
    _serve(build_page(sampler, list_facts(loaded)), port)


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
    """Starts serving a page in threads, with everything off by which Gradio would contact other machines."""
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
