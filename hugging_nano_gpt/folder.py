"""Whole conversions: a checkpoint or what stands on the Hub to a folder that works anywhere, and back.

The command line calls these. What users name, a file, a folder or a Hub id, becomes a model in load_source.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GPT2Config, PreTrainedTokenizerBase

from .checkpoint import Checkpoint, read_checkpoint
from .conversion import READING_KWARGS, make_model
from .errors import CheckpointError, ConversionError
from .export.gpt2 import import_gpt2
from .formats.atomic import check_file, check_place, open_folder
from .formats.check import list_some
from .loading import find_tokenizer_or_reason, load_whole_model, read_model_type
from .modeling_nano_gpt import NanoGPTLMHeadModel

# By these a checkpoint that is not there is told from a Hub id.
FILE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class Conversion:
    """What convert_to_folder or export_model wrote.

    Args:
        folder: Where; for an export to a single file, that file.
        model: The model.
        tokenizer: Its tokenizer, or None if none was found.
        notes: What was assumed about the checkpoint, why there is no tokenizer, and what an export does not keep, a
            sentence each.
    """

    folder: Path
    model: NanoGPTLMHeadModel
    tokenizer: PreTrainedTokenizerBase | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        tokens = "no tokenizer" if self.tokenizer is None else f"a tokenizer of {len(self.tokenizer):,} tokens"
        lines = [f"Wrote {self.folder}: {self.model.num_parameters():,} parameters, {dtype}, and {tokens}"]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def convert_to_folder(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    meta_path: str | os.PathLike[str] | None = None,
    tokenizer: str | None = None,
    max_shard_size: int | str = "50GB",
    overwrite: bool = False,
    **kwargs: Any,
) -> Conversion:
    """Converts a checkpoint of the nanoGPT family to a folder that Transformers loads without this package.

    Args:
        source: Path of the checkpoint. A saved folder or a Hub id is written anew, and GPT-2 becomes a nanoGPT model.
        folder: Folder to write: a new or an empty one.
        meta_path: Path of the meta.pkl of its characters.
        tokenizer: In place of meta_path: a name that tiktoken knows, "gpt2" among them, or a folder or Hub id of a
            Transformers tokenizer. Without either, the tokenizer is the one that belongs to the source, or none.
        max_shard_size: Largest size of a file of weights, such as "5GB".
        overwrite: Whether files in the folder may be replaced. Files that are not a model's stay, and so does a
            README.md.
        **kwargs: What from_nanogpt_ckpt or from_pretrained takes, such as `dtype`; for a checkpoint also
            `activation_function` in place of the one that its age tells, and `n_head` where it does not record it.

    Raises:
        CheckpointError: If there is no whole model.
        ConversionError: If the folder has files and overwrite is not given, it is the source, or cannot be written.
        TokenizerError: If the tokenizer asked for cannot be had, or does not fit the model.
    """
    folder = Path(folder)
    check_place(folder, overwrite)
    check_other_place(source, folder)
    model, assumptions = load_source(source, **kwargs)
    found, reasons = find_tokenizer_or_reason(model, source, meta_path=meta_path, tokenizer=tokenizer)
    with open_folder(folder) as temporary:
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        if found is not None:
            found.save_pretrained(temporary)
    return Conversion(folder, model, found, (*assumptions, *reasons))


def convert_to_checkpoint(
    source: str | os.PathLike[str], ckpt_path: str | os.PathLike[str], *, overwrite: bool = False
) -> NanoGPTLMHeadModel:
    """Converts a saved folder, or a model of the Hub, to a checkpoint that nanoGPT's train.py resumes.

    Args:
        source: A folder that save_pretrained wrote, or a Hub id; GPT-2's too.
        ckpt_path: Path of the ckpt.pt to write.
        overwrite: Whether a file there may be replaced.

    Returns:
        The model that was written.

    Raises:
        ConversionError: If the model computes what nanoGPT cannot, or a file is there already.
        CheckpointError: If there is no whole model, or the file cannot be written.
    """
    check_file(Path(ckpt_path), overwrite)
    model = load_folder(source)
    model.to_nanogpt_ckpt(ckpt_path)
    return model


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


def check_other_place(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Raises ConversionError where a model is to be written in the place that it is read from."""
    if Path(source).exists() and Path(source).resolve() == Path(out).resolve():
        raise ConversionError(f"{out}: is the source: expected another place, got the model itself; give another path")


def list_assumptions(checkpoint: Checkpoint) -> list[str]:
    """Lists what was assumed about a checkpoint, for people to read."""
    return [f"assumed: {assumption}" for assumption in checkpoint.assumptions]
