"""What a user names, a checkpoint file, a saved folder or a model of the Hub, becomes a model. Nothing is executed."""

import os
from pathlib import Path
from typing import Any

from transformers import GPT2Config

from ..checkpoint.read_write import Checkpoint, read_checkpoint
from ..errors import CheckpointError, list_some
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from .gpt2 import import_gpt2
from .nanogpt import READING_KWARGS, make_model
from .pretrained import load_whole_model, read_model_type

# By these a checkpoint that is not there is told from a Hub id.
FILE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")


def load_source(source: str | os.PathLike[str], **kwargs: Any) -> tuple[NanoGPTLMHeadModel, list[str]]:
    """Loads a language model from what a user names: a checkpoint file, a saved folder or a model of the Hub.

    Args:
        source: Path or Hub id. A name that is no path is a Hub id, unless it ends as checkpoint files do.
        **kwargs: What from_nanogpt_ckpt takes, for a file, or from_pretrained, for the others.

    Returns:
        The model, and what was assumed about it, a sentence each.

    Raises:
        CheckpointError: If there is no whole model, or a folder is asked to be read in another way than it records.
    """
    path = Path(source)
    reading = {name: value for name in READING_KWARGS if (value := kwargs.pop(name, None)) is not None}
    if not path.is_dir() and (path.exists() or path.suffix in FILE_SUFFIXES):
        checkpoint = read_checkpoint(path, with_optimizer=False, **reading)
        return make_model(NanoGPTLMHeadModel, path, checkpoint, **kwargs), list_assumptions(checkpoint)
    if reading:
        raise CheckpointError(
            f"{source}: {list_some(reading)} cannot be set: expected none for a folder, which records its own, got "
            f"{list(reading.values())}; leave it out"
        )
    return load_folder(source, **kwargs), []


def load_folder(source: str | os.PathLike[str], **kwargs: Any) -> NanoGPTLMHeadModel:
    """Loads a saved folder or a model of the Hub: a whole language model in safetensors, and nothing is executed.

    Args:
        source: A folder that save_pretrained wrote, or a Hub id; GPT-2 is taken in by import_gpt2.
        **kwargs: What from_pretrained takes; the dtype is that of the files by default.

    Raises:
        CheckpointError: If there is no whole model there, or the Hub cannot be reached.
        ConversionError: If it is a GPT-2 that nanoGPT cannot express.
    """
    if read_model_type(source) == GPT2Config.model_type:
        return import_gpt2(source, **kwargs)
    return load_whole_model(NanoGPTLMHeadModel, source, **kwargs)


def list_assumptions(checkpoint: Checkpoint) -> list[str]:
    """Lists what was assumed about a checkpoint, for people to read."""
    return [f"assumed: {assumption}" for assumption in checkpoint.assumptions]
