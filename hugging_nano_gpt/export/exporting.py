"""The table of exports, and exporting by it: loads what a user names, finds its tokenizer, calls the exporter.

A new export is a module of its own and a row of EXPORTS. The command `export` calls this. The command line names the
exports a second time, because its --help must not import torch; a test compares the two, and docs/exporting.md.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..convert.folder import Conversion, check_other_place
from ..convert.gpt2 import export_gpt2
from ..convert.source import load_source
from ..errors import ConversionError
from .gguf import export_gguf
from .onnx import export_onnx


@dataclass(frozen=True)
class Export:
    """A row of the table.

    Args:
        write: The exporter, called as write(model, out, tokenizer=, overwrite=). It writes all or nothing and returns
            what the export does not keep, one sentence each.
        makes: What it makes, in words, as the command line says.
        column: Its column in docs/exporting.md.
    """

    write: Callable[..., tuple[str, ...]]
    makes: str
    column: str


EXPORTS = {
    "gpt2": Export(export_gpt2, "a folder for GPT2LMHeadModel", "GPT-2"),
    "gguf": Export(export_gguf, "a file for llama.cpp", "GGUF (llama.cpp)"),
    "onnx": Export(export_onnx, "a folder for ONNX Runtime", "ONNX"),
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
        out: Folder or file to write, depending on the format.
        to: "gpt2", a folder for stock GPT2LMHeadModel; "gguf", a file for llama.cpp; "onnx", a folder for ONNX
            Runtime.
        file_type: For "gguf" alone: "f32" (the default), "f16" or "q8_0".
        overwrite: Whether existing files may be replaced.
        **kwargs: What load_source takes (convert/source.py), such as `meta_path`, `tokenizer`, `dtype`, `revision`.

    Raises:
        ConversionError: If the format cannot express the model, or `out` exists and overwrite is not given.
        CheckpointError: If the source is not a whole model.
        TokenizerError: If the tokenizer asked for cannot be loaded, or does not fit the model.
        MissingDependencyError: If the format needs a package that is not installed.
    """
    if to not in EXPORTS:
        raise ConversionError(f"{out}: expected a format of {list(EXPORTS)}, got {to!r}; give one of them")
    if file_type is not None and to != "gguf":
        raise ConversionError(
            f"{out}: expected a file type for 'gguf' alone, got {file_type!r} for {to!r}; leave out --file-type"
        )
    check_other_place(source, out)
    loaded = load_source(source, **kwargs)
    found, reasons = loaded.find_tokenizer()
    options = {} if file_type is None else {"file_type": file_type}
    lost = EXPORTS[to].write(loaded.model, out, tokenizer=found, overwrite=overwrite, **options)
    return Conversion(Path(out), loaded.model, found, (*loaded.notes, *reasons, *lost))
