"""Whole conversions: a checkpoint file to a folder that works anywhere, and back. The command line calls these.

A folder is built beside its place and moved there when it is complete, so a failure leaves nothing behind.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .bpe import build_gpt2_tokenizer, build_tiktoken_tokenizer
from .checkpoint import read_checkpoint
from .configuration_nano_gpt import NanoGPTConfig
from .conversion import make_model
from .errors import CheckpointError, ConversionError, MissingDependencyError, TokenizerError
from .formats.atomic import read_umask
from .formats.check import list_some
from .modeling_nano_gpt import NanoGPTLMHeadModel
from .tokenization import build_character_tokenizer, find_tokenizer, read_meta


@dataclass(frozen=True)
class Conversion:
    """What convert_to_folder wrote.

    Args:
        folder: Where.
        model: The model.
        tokenizer: Its tokenizer, or None if none was found.
        notes: What was assumed about the checkpoint, and why there is no tokenizer, a sentence each.
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
    ckpt_path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    meta_path: str | os.PathLike[str] | None = None,
    tokenizer: str | None = None,
    activation_function: str | None = None,
    n_head: int | None = None,
    max_shard_size: int | str = "50GB",
    overwrite: bool = False,
    **kwargs: Any,
) -> Conversion:
    """Converts a checkpoint of the nanoGPT family to a folder that Transformers loads without this package.

    Args:
        ckpt_path: Path of the checkpoint.
        folder: Folder to write: a new or an empty one.
        meta_path: Path of the meta.pkl of its characters.
        tokenizer: In place of meta_path: a name that tiktoken knows, "gpt2" among them, or a folder or Hub id of a
            Transformers tokenizer. Without either, the tokenizer is the one that find_tokenizer finds, or none.
        activation_function: Activation in place of the one that the file's age tells.
        n_head: Number of heads, for a file that does not record it.
        max_shard_size: Largest size of a file of weights, such as "5GB".
        overwrite: Whether files in the folder may be replaced. Files that are not a model's stay, and so does a
            README.md.
        **kwargs: What from_pretrained takes, such as `dtype`.

    Raises:
        CheckpointError: If the checkpoint is not whole.
        ConversionError: If the folder has files and overwrite is not given, or it cannot be written.
        TokenizerError: If the tokenizer asked for cannot be had, or does not fit the model.
    """
    folder = Path(folder)
    _check_place(folder, overwrite)
    checkpoint = read_checkpoint(
        ckpt_path, n_head=n_head, activation_function=activation_function, with_optimizer=False
    )
    model = make_model(NanoGPTLMHeadModel, ckpt_path, checkpoint, **kwargs)
    found, notes = None, [f"assumed: {assumption}" for assumption in checkpoint.assumptions]
    try:
        found = load_tokenizer(model, ckpt_path, meta_path=meta_path, tokenizer=tokenizer)
    except (TokenizerError, MissingDependencyError) as error:
        if meta_path is not None or tokenizer is not None:
            raise
        notes.append(str(error))
    with _open_folder(folder) as temporary:
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        if found is not None:
            found.save_pretrained(temporary)
    return Conversion(folder, model, found, tuple(notes))


def convert_to_checkpoint(
    source: str | os.PathLike[str], ckpt_path: str | os.PathLike[str], *, overwrite: bool = False
) -> NanoGPTLMHeadModel:
    """Converts a saved folder, or a model of the Hub, to a checkpoint that nanoGPT's train.py resumes.

    Args:
        source: A folder that save_pretrained wrote, or a Hub id.
        ckpt_path: Path of the ckpt.pt to write.
        overwrite: Whether a file there may be replaced.

    Returns:
        The model that was written.

    Raises:
        ConversionError: If the model computes what nanoGPT cannot, or a file is there already.
        CheckpointError: If there is no whole model, or the file cannot be written.
    """
    where = os.fspath(ckpt_path)
    if os.path.lexists(ckpt_path) and not overwrite:
        raise ConversionError(
            f"{where}: is there already: expected a new path, got a file; give another, or overwrite it (--force, "
            f"overwrite=True)"
        )
    model = load_folder(source)
    model.to_nanogpt_ckpt(ckpt_path)
    return model


def load_folder(source: str | os.PathLike[str], **kwargs: Any) -> NanoGPTLMHeadModel:
    """Loads a saved folder or a model of the Hub: a whole language model in safetensors, and nothing is executed.

    Args:
        source: A folder that save_pretrained wrote, or a Hub id.
        **kwargs: What from_pretrained takes; the dtype is that of the files by default.

    Raises:
        CheckpointError: If there is no whole nanoGPT model there, or the Hub cannot be reached.
    """
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source)
        _check_config(source, fields)
        model, info = NanoGPTLMHeadModel.from_pretrained(
            source, **{"dtype": "auto", **kwargs}, use_safetensors=True, output_loading_info=True
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(
            f"{source}: cannot be loaded: expected a folder that save_pretrained wrote, or a hub id that can be "
            f"fetched, got: {first_line.rstrip('.')}; check the path, the files in it, or the network"
        ) from error
    faults = [f"{kind} {list_some(sorted(map(str, info[kind])))}" for kind in info if info[kind]]
    if faults:
        raise CheckpointError(
            f"{source}: not a whole model: expected every tensor once in its shape, got {'; '.join(faults)}; save it "
            f"again with save_pretrained"
        )
    return model


def load_tokenizer(
    model: NanoGPTLMHeadModel,
    source: str | os.PathLike[str],
    *,
    meta_path: str | os.PathLike[str] | None = None,
    tokenizer: str | None = None,
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer asked for, or the one that belongs to a checkpoint or a folder.

    Raises:
        TokenizerError: If there is none, both are asked for, or it has more tokens than the model has rows.
        MissingDependencyError: If it needs tiktoken, which is not installed.
    """
    vocab_size, block_size = model.config.vocab_size, model.config.block_size
    if meta_path is not None and tokenizer is not None:
        raise TokenizerError(f"{meta_path}: expected a meta.pkl or a tokenizer, got both; leave one out")
    if meta_path is not None:
        where, found = os.fspath(meta_path), build_character_tokenizer(read_meta(meta_path), block_size=block_size)
    elif tokenizer is not None:
        where, found = tokenizer, _load_named(tokenizer, block_size)
    elif Path(source).is_file():
        config = model.nanogpt_training_state.config
        return find_tokenizer(source, config, vocab_size, block_size=block_size)
    else:
        where, found = os.fspath(source), _load_saved(os.fspath(source))
    if len(found) > vocab_size:
        raise TokenizerError(
            f"{where}: expected at most {vocab_size} tokens, as the model has rows, got {len(found)}; give the "
            f"tokenizer that the model was trained with"
        )
    return found


def _load_named(name: str, block_size: int) -> PreTrainedTokenizerBase:
    if name == "gpt2":
        return build_gpt2_tokenizer(block_size=block_size)
    if Path(name).is_dir() or "/" in name:
        return _load_saved(name)
    return build_tiktoken_tokenizer(name, block_size=block_size)


def _load_saved(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever a tokenizer's files make Transformers raise
        reason = " ".join(str(error).split())
        raise TokenizerError(f"{name}: has no tokenizer that can be loaded: {reason}; give one by name") from error


def _check_config(source: str | os.PathLike[str], fields: dict[str, Any]) -> None:
    """Refuses what from_pretrained would load as something else than the numbers in the files."""
    model_type = fields.get("model_type")
    if not fields and (Path(source) / "ckpt.pt").is_file():
        raise CheckpointError(
            f"{source}: expected a checkpoint file or a folder with config.json, got a folder without; give the file "
            f"in it, as {Path(source) / 'ckpt.pt'}"
        )
    if model_type != NanoGPTConfig.model_type:
        raise CheckpointError(
            f"{source}: not a nanoGPT model: expected model_type {NanoGPTConfig.model_type!r} in its config.json, got "
            f"{model_type!r}; give a model that NanoGPTLMHeadModel.save_pretrained wrote"
        )
    if fields.get("quantization_config"):
        raise CheckpointError(
            f"{source}: quantised: expected the model's own numbers, got a quantization_config; verify the model that "
            f"it was made from"
        )


def _check_place(folder: Path, overwrite: bool) -> None:
    if folder.is_dir() and not overwrite and (files := sorted(path.name for path in folder.iterdir())):
        raise ConversionError(
            f"{folder}: is not empty: expected a new or an empty folder, got {list_some(files)} in it; give another, "
            f"or overwrite it (--force, overwrite=True)"
        )
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConversionError(f"{folder}: expected a folder, got a file; give another path")


@contextmanager
def _open_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder beside the place of another, and moves what is in it there when the block ends."""
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.absolute().parent))
    except OSError as error:
        raise _explain(folder, error.strerror) from error
    try:
        temporary.chmod(0o777 & ~read_umask())
        yield temporary
        for path in temporary.iterdir():
            path.chmod(0o666 & ~read_umask())  # safetensors makes files that only their owner reads
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.is_dir() and any(folder.iterdir()):
            _move_files(temporary, folder)
        else:
            temporary.replace(folder)
    except OSError as error:
        raise _explain(folder, error.strerror or error) from error
    except (SafetensorError, RuntimeError) as error:  # how the writers of tensors report a full disk
        raise _explain(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_files(temporary: Path, folder: Path) -> None:
    new = {path.name for path in temporary.iterdir()}
    stale = [path for path in folder.glob("model*.safetensors*") if path.name not in new]  # of a model in more pieces
    for name in sorted(new, key=lambda name: (name == "config.json", name)):  # without it, a folder is no model
        if name != "README.md" or not (folder / name).exists():  # the card there is the user's
            (temporary / name).replace(folder / name)
    for path in stale:
        path.unlink()


def _explain(folder: Path, reason: object) -> ConversionError:
    return ConversionError(
        f"{folder}: cannot be written: {reason}; nothing was changed, choose a place that is writable and has room"
    )
