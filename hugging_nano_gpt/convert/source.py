"""What a user names becomes a Source: a checkpoint file, a saved folder or a model of the Hub, loaded one way.

Every function and command that takes a model by name calls load_source, so that a revision, a subfolder or a dtype
means the same to all of them. No code of a file, a folder or the Hub is executed.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, PreTrainedTokenizerBase

from ..checkpoint.contents import Checkpoint
from ..checkpoint.formats import FILE_KINDS, read_checkpoint
from ..errors import CheckpointError, ConversionError, DeviceError, list_some
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from ..tokenization.find import find_tokenizer_or_reason, load_tokenizer
from .gpt2 import import_gpt2
from .nanogpt import READING_KWARGS, make_model
from .pretrained import is_hub_id, load_whole_model, read_model_type, select_hub

FOLDER = "folder of Transformers"

# The flags of the command line for the arguments that say how to read a file. Folders have nothing to ignore, so
# ignore_extra is not refused for them.
_FLAGS = {"activation_function": "--activation", "n_head": "--n-head", "tie_word_embeddings": "tie_word_embeddings="}

# A name in the form of a Hub id that ends like this is a missing file, and is not looked for on the Hub.
_FILE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class Source:
    """A model on its device, its tokenizer, and where both are from.

    Args:
        name: What the user named.
        kind: What that is, in words.
        model: The model, in eval mode.
        checkpoint: What the model was made from, without its optimizer; None for a folder and the Hub.
        tokenizer_kwargs: Which tokenizer was asked for, and where on the Hub the source is.
    """

    name: str
    kind: str
    model: NanoGPTLMHeadModel
    checkpoint: Checkpoint | None = None
    tokenizer_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed about a file, a sentence each."""
        assumptions = () if self.checkpoint is None else self.checkpoint.assumptions
        return tuple(f"assumed: {assumption}" for assumption in assumptions)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer asked for, or else the one that belongs to the source, as load_tokenizer finds it."""
        return load_tokenizer(self.model, self.name, **self.tokenizer_kwargs)

    def find_tokenizer(self) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
        """Returns the tokenizer and notes on it, or None and the reason if none was asked for and none is found."""
        return find_tokenizer_or_reason(self.model, self.name, **self.tokenizer_kwargs)


def load_source(
    source: str | os.PathLike[str],
    *,
    device: torch.device | None = None,
    meta_path: str | os.PathLike[str] | None = None,
    tokenizer: str | None = None,
    folder_only: bool = False,
    **kwargs: Any,
) -> Source:
    """Loads a language model from what a user names.

    The functions that take a model by name pass these arguments on; they are documented here for all of them. Where
    such a function has an argument `device`, it is the name of a device of torch, and by default CUDA if there is a
    GPU for it and the CPU otherwise.

    Args:
        source: Checkpoint file of the nanoGPT family, folder that save_pretrained wrote, or Hub id; GPT-2's too.
        device: Device to move the model to; by default it stays where from_pretrained puts it.
        meta_path: meta.pkl of the model's characters, instead of the tokenizer that belongs to the source.
        tokenizer: Instead of meta_path: the name of a tiktoken encoding, or a folder or Hub id of a tokenizer.
        folder_only: Whether to refuse a checkpoint file.
        **kwargs: What from_nanogpt_ckpt takes for a file, such as `n_head` and `activation_function`, or
            from_pretrained for the others, such as `revision` and `subfolder`; `dtype` for both. None counts as not
            given for what says how to read a file.

    Raises:
        CheckpointError: If there is no whole model, or a folder is asked to be read in another way than it records.
        ConversionError: If it is a GPT-2 that nanoGPT cannot express, or output_loading_info is asked for.
    """
    if kwargs.get("output_loading_info"):
        raise ConversionError(
            f"{source}: output_loading_info cannot be set: expected a call that returns a model, got one that goes on "
            f"with it; leave it out, or use from_pretrained, from_nanogpt_ckpt or import_gpt2"
        )
    hub = select_hub(kwargs)
    reading = {name: value for name in READING_KWARGS if (value := kwargs.pop(name, None)) is not None}
    checkpoint = None
    if names_file(source) and not folder_only:
        if hub:
            raise CheckpointError(
                f"{source}: {list_some(hub)} cannot be set: expected none for a file, got {list(hub.values())}; leave "
                f"it out, or give a hub id"
            )
        checkpoint = read_checkpoint(source, with_optimizer=False, **reading)
        kind = ", ".join(filter(None, (FILE_KINDS[checkpoint.format], checkpoint.era)))
        model = make_model(NanoGPTLMHeadModel, source, checkpoint, **kwargs)
    else:
        refuse_reading(source, reading)
        kind = FOLDER if Path(source).is_dir() else "model of the Hub"
        is_gpt2 = read_model_type(source, **hub) == GPT2Config.model_type
        model = import_gpt2(source, **kwargs) if is_gpt2 else load_whole_model(NanoGPTLMHeadModel, source, **kwargs)
    if device is not None:
        model.to(device)
    tokenizer_kwargs = {"meta_path": meta_path, "tokenizer": tokenizer, **hub}
    return Source(os.fspath(source), kind, model, checkpoint, tokenizer_kwargs)


def names_file(source: str | os.PathLike[str]) -> bool:
    """Returns whether a user means a checkpoint file, even a missing one, and not a folder or a Hub id."""
    path = Path(source)
    if path.exists() or not is_hub_id(source) or path.suffix in _FILE_SUFFIXES:
        return not path.is_dir()
    return "/" in os.fspath(source) and any(path.with_name(path.name + end).is_file() for end in _FILE_SUFFIXES)


def refuse_reading(source: str | os.PathLike[str], reading: Mapping[str, Any]) -> None:
    """Raises CheckpointError if arguments say how to read a folder, which records all of that itself."""
    given = {name: value for name, value in reading.items() if name in _FLAGS and value is not None}
    if given:
        raise CheckpointError(
            f"{source}: expected no {list_some(given)} for a folder or a hub id, which records its own, got "
            f"{list(given.values())}; leave out {', '.join(_FLAGS[name] for name in given)}"
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
