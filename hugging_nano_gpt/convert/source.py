"""What a user names becomes a model: a checkpoint file, a saved folder, or a model of the Hub. Nothing is executed."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config

from ..checkpoint.contents import Checkpoint
from ..checkpoint.formats import FILE_KINDS, read_checkpoint
from ..errors import CheckpointError, ConversionError, DeviceError, list_some
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from .gpt2 import import_gpt2
from .nanogpt import READING_KWARGS, make_model
from .pretrained import is_hub_id, load_whole_model, read_model_type, select_hub

FOLDER = "folder of Transformers"

# How the command line names what says how a file is read. ignore_extra is none: a folder has nothing of the kind.
_FLAGS = {"activation_function": "--activation", "n_head": "--n-head", "tie_word_embeddings": "tie_word_embeddings="}

# A name in the form of a Hub id that ends like this is a file that is missing, and is not looked for on the Hub.
_FILE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class Source:
    """A model, and where it is from.

    Args:
        model: The model.
        kind: What the user named, in words.
        checkpoint: What the model was made from, without its optimizer; None for a folder and the Hub.
        hub: Where on the Hub it is and how it was fetched, for load_tokenizer.
    """

    model: NanoGPTLMHeadModel
    kind: str
    checkpoint: Checkpoint | None = None
    hub: dict[str, Any] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed about a file, a sentence each."""
        assumptions = () if self.checkpoint is None else self.checkpoint.assumptions
        return tuple(f"assumed: {assumption}" for assumption in assumptions)


def names_file(source: str | os.PathLike[str]) -> bool:
    """Returns whether a user means a checkpoint file, one that is missing too, and no folder or Hub id."""
    path = Path(source)
    if path.exists() or not is_hub_id(source) or path.suffix in _FILE_SUFFIXES:
        return not path.is_dir()
    return "/" in os.fspath(source) and any(path.with_name(path.name + end).is_file() for end in _FILE_SUFFIXES)


def load_source(source: str | os.PathLike[str], **kwargs: Any) -> Source:
    """Loads a language model from what a user names.

    Args:
        source: Path of a checkpoint file or a saved folder, or Hub id.
        **kwargs: What from_nanogpt_ckpt takes, for a file, or from_pretrained, for the others. Values of None count as
            not given.

    Raises:
        CheckpointError: If there is no whole model, or a folder is asked to be read in another way than it records.
        ConversionError: If it is a GPT-2 that nanoGPT cannot express, or output_loading_info is asked for.
    """
    _refuse_info(source, kwargs)
    hub = select_hub(kwargs)
    reading = {name: value for name in READING_KWARGS if (value := kwargs.pop(name, None)) is not None}
    if names_file(source):
        if hub:
            raise CheckpointError(
                f"{source}: {list_some(hub)} cannot be set: expected none for a file, got {list(hub.values())}; leave "
                f"it out, or give a hub id"
            )
        checkpoint = read_checkpoint(source, with_optimizer=False, **reading)
        kind = ", ".join(filter(None, (FILE_KINDS[checkpoint.format], checkpoint.era)))
        return Source(make_model(NanoGPTLMHeadModel, source, checkpoint, **kwargs), kind, checkpoint)
    refuse_reading(source, reading)
    kind = FOLDER if Path(source).is_dir() else "model of the Hub"
    return Source(load_folder(source, **kwargs), kind, hub=hub)


def refuse_reading(source: str | os.PathLike[str], reading: Mapping[str, Any]) -> None:
    """Raises CheckpointError where it is said how to read a folder, which records all of it."""
    given = {name: value for name, value in reading.items() if name in _FLAGS and value is not None}
    if given:
        raise CheckpointError(
            f"{source}: expected no {list_some(given)} for a folder or a hub id, which records its own, got "
            f"{list(given.values())}; leave out {', '.join(_FLAGS[name] for name in given)}"
        )


def load_folder(source: str | os.PathLike[str], **kwargs: Any) -> NanoGPTLMHeadModel:
    """Loads a whole language model in safetensors from a saved folder or the Hub.

    Args:
        source: A folder that save_pretrained wrote, or a Hub id; import_gpt2 takes GPT-2 in.
        **kwargs: What from_pretrained takes; the dtype is that of the files by default.

    Raises:
        CheckpointError: If there is no whole model there, or the Hub cannot be reached.
        ConversionError: If it is a GPT-2 that nanoGPT cannot express.
    """
    _refuse_info(source, kwargs)
    if read_model_type(source, **select_hub(kwargs)) == GPT2Config.model_type:
        return import_gpt2(source, **kwargs)
    return load_whole_model(NanoGPTLMHeadModel, source, **kwargs)


def _refuse_info(source: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("output_loading_info"):
        raise ConversionError(
            f"{source}: output_loading_info cannot be set: expected a call that returns a model, got one that goes on "
            f"with it; leave it out, or use from_pretrained, from_nanogpt_ckpt or import_gpt2"
        )


def choose_device(name: str | None) -> torch.device:
    """Returns the device that a user names, or CUDA where there is a GPU for it, else the CPU; MPS only by name.

    Raises:
        DeviceError: If torch cannot compute there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # what torch raises depends on the kind of device
        gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        here = (
            ["cpu"] if gpu is None else ["cpu", *(f"{gpu.type}:{i}" for i in range(torch.accelerator.device_count()))]
        )
        raise DeviceError(
            f"device: expected one on which torch {torch.__version__} computes here, {', '.join(here)}, got {name!r}; "
            f"give one of these, or none (--device)"
        ) from error
    return device
