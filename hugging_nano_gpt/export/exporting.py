"""Exports by name: loads what a user names, finds its tokenizer, and calls the exporter of the format.

A new format is a function in a file of its own and a row of the table here. The command `export` calls this.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..convert.folder import Conversion, check_other_place
from ..convert.gpt2 import export_gpt2
from ..convert.source import load_source
from ..errors import ConversionError
from .gguf import export_gguf
from .onnx import export_onnx

# Each is called as f(model, out, tokenizer=, overwrite=), writes all or nothing, and returns what it does not keep.
_EXPORTERS: dict[str, Callable[..., tuple[str, ...]]] = {
    "gpt2": export_gpt2,
    "gguf": export_gguf,
    "onnx": export_onnx,
}


def export_model(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str,
    file_type: str | None = None,
    overwrite: bool = False,
    **kwargs: Any,
) -> Conversion:
    """Exports a model, with its tokenizer if it has one, to the layout of another program.

    Args:
        source: What load_source takes: a checkpoint file, a saved folder or a Hub id. It is only read.
        out: Folder or file to write, as the format has it.
        to: "gpt2", a folder for stock GPT2LMHeadModel; "gguf", a file for llama.cpp; "onnx", a folder for ONNX
            Runtime.
        file_type: For "gguf" alone: "f32" (the default), "f16" or "q8_0".
        overwrite: Whether what is there may be replaced.
        **kwargs: What load_source takes (convert/source.py), such as `meta_path`, `tokenizer`, `dtype`, `revision`.

    Raises:
        ConversionError: If the format cannot express the model, or something is there and overwrite is not given.
        CheckpointError: If there is no whole model.
        TokenizerError: If the tokenizer asked for cannot be had, or does not fit the model.
        MissingDependencyError: If the format needs a package that is not installed.
    """
    if to not in _EXPORTERS:
        raise ConversionError(f"{out}: expected a format of {list(_EXPORTERS)}, got {to!r}; give one of them")
    if file_type is not None and to != "gguf":
        raise ConversionError(
            f"{out}: expected a file type for 'gguf' alone, got {file_type!r} for {to!r}; leave out --file-type"
        )
    check_other_place(source, out)
    loaded = load_source(source, **kwargs)
    found, reasons = loaded.find_tokenizer()
    options = {} if file_type is None else {"file_type": file_type}
    lost = _EXPORTERS[to](loaded.model, out, tokenizer=found, overwrite=overwrite, **options)
    return Conversion(Path(out), loaded.model, found, (*loaded.notes, *reasons, *lost))
