"""Whole conversions: a checkpoint or a model of the Hub to a folder that Transformers loads anywhere, and back.

The commands `convert` and `back` call these; source.py loads what the user names.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..checkpoint.formats import read_checkpoint
from ..checkpoint.moments import OptimizerState
from ..errors import ConversionError
from ..files.files import check_file, check_folder, open_folder
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from ..tokenization.vocabulary import make_generation_config
from .source import load_source
from .tensors import get_model_args


@dataclass(frozen=True)
class Conversion:
    """What convert_to_folder or export_model wrote.

    Args:
        folder: The folder, or for an export to a single file, that file.
        model: The model.
        tokenizer: Its tokenizer, or None if none was found.
        notes: What was assumed about the checkpoint, why there is no tokenizer, and what an export drops, a sentence
            each.
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
    max_shard_size: int | str = "50GB",
    overwrite: bool = False,
    **kwargs: Any,
) -> Conversion:
    """Converts a checkpoint of the nanoGPT family to a folder that Transformers loads without this package.

    Args:
        source: What load_source takes. A saved folder or a Hub id is saved again, and GPT-2 becomes a nanoGPT model.
        folder: Folder to write: a new or an empty one.
        max_shard_size: Largest size of a file of weights, such as "5GB".
        overwrite: Whether files in the folder may be replaced. A README.md and files that do not belong to a model
            stay.
        **kwargs: What load_source takes (convert/source.py), such as `meta_path`, `tokenizer`, `dtype`, `revision`.

    Raises:
        CheckpointError: If there is no whole model.
        ConversionError: If the folder has files and overwrite is not given, it is the source, or cannot be written.
        TokenizerError: If the tokenizer asked for cannot be loaded, or does not fit the model.
    """
    folder = Path(folder)
    check_other_place(source, folder)
    check_folder(folder, overwrite)
    loaded = load_source(source, **kwargs)
    found, reasons = loaded.find_tokenizer()
    loaded.model.generation_config = make_generation_config(loaded.model, found)
    with open_folder(folder, overwrite) as temporary:
        loaded.model.save_pretrained(temporary, max_shard_size=max_shard_size)
        if found is not None:
            found.save_pretrained(temporary)
    return Conversion(folder, loaded.model, found, (*loaded.notes, *reasons))


def convert_to_checkpoint(
    source: str | os.PathLike[str],
    ckpt_path: str | os.PathLike[str],
    *,
    best_val_loss: float | None = None,
    optimizer_from: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **kwargs: Any,
) -> NanoGPTLMHeadModel:
    """Converts a saved folder, or a model of the Hub, to a checkpoint that nanoGPT's train.py resumes.

    Args:
        source: A folder that save_pretrained wrote, or a Hub id; GPT-2's too.
        ckpt_path: Path of the ckpt.pt to write, or of the folder for it: see name_ckpt.
        best_val_loss: Instead of the recorded one. train.py saves only below it, and the loss on new data may be
            higher.
        optimizer_from: Checkpoint of the run that the model came from, to take its AdamW moments; without it, the
            optimizer state is a fresh one.
        overwrite: Whether an existing file may be replaced.
        **kwargs: What load_source takes (convert/source.py), such as `revision` and `subfolder`.

    Returns:
        The model that was written.

    Raises:
        ConversionError: If the model computes what nanoGPT cannot, no moments fit it, or the file already exists.
        CheckpointError: If there is no whole model, or a file cannot be read or written.
    """
    path = name_ckpt(ckpt_path)
    check_other_place(source, ckpt_path)
    check_file(path, overwrite)
    optimizer = None if optimizer_from is None else _read_optimizer(optimizer_from)
    model = load_source(source, folder_only=True, **kwargs).model
    if optimizer is not None and (faults := optimizer.find_faults(get_model_args(model.config))):
        raise ConversionError(
            f"{os.fspath(optimizer_from or '')}: its optimizer state is of another model than {os.fspath(source)}: "
            f"{faults[0]}; give a checkpoint of the run that the model is from (--optimizer-from)"
        )
    model.to_nanogpt_ckpt(path, best_val_loss=best_val_loss, optimizer=optimizer, overwrite=overwrite)
    return model


def name_ckpt(path: str | os.PathLike[str]) -> Path:
    """Returns the checkpoint file to write: a folder's or, for a name without a suffix, a new folder's ckpt.pt.

    Raises:
        ConversionError: If there is a file of that name without a suffix.
    """
    path = Path(path)
    if path.suffix and not path.is_dir():
        return path
    check_folder(path, overwrite=True)
    return path / "ckpt.pt"


def _read_optimizer(path: str | os.PathLike[str]) -> OptimizerState:
    optimizer = read_checkpoint(path).training_state.optimizer
    if optimizer is None or not optimizer.moments:
        raise ConversionError(
            f"{os.fspath(path)}: has no optimizer state: expected AdamW's moments, got none; give a checkpoint that "
            f"train.py wrote, or leave out --optimizer-from for a fresh state"
        )
    return optimizer


def check_other_place(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Raises ConversionError if a model would be written where it is read from."""
    if Path(source).exists() and Path(source).resolve() == Path(out).resolve():
        raise ConversionError(f"{out}: is the source: expected another place, got the model itself; give another path")
