"""Whole conversions: a checkpoint file to a folder that works anywhere, and back. The command line calls these.

A folder is built beside its place and moved there when it is complete, so a failure leaves nothing behind.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .bpe import build_gpt2_tokenizer, build_tiktoken_tokenizer
from .checkpoint import Checkpoint, read_checkpoint
from .conversion import READING_KWARGS, make_model
from .errors import CheckpointError, ConversionError, MissingDependencyError, NanoGPTError, TokenizerError
from .formats.atomic import read_umask
from .formats.check import list_some
from .modeling_nano_gpt import NanoGPTLMHeadModel
from .tokenization import build_character_tokenizer, find_tokenizer, read_meta

Model = TypeVar("Model", bound=PreTrainedModel)

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
    check_place(folder, overwrite)
    checkpoint = read_checkpoint(
        ckpt_path, n_head=n_head, activation_function=activation_function, with_optimizer=False
    )
    model = make_model(NanoGPTLMHeadModel, ckpt_path, checkpoint, **kwargs)
    found, notes = find_tokenizer_or_reason(model, ckpt_path, meta_path=meta_path, tokenizer=tokenizer)
    notes = [*list_assumptions(checkpoint), *notes]
    with open_folder(folder) as temporary:
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
        source: A folder that save_pretrained wrote, or a Hub id.
        **kwargs: What from_pretrained takes; the dtype is that of the files by default.

    Raises:
        CheckpointError: If there is no whole nanoGPT model there, or the Hub cannot be reached.
    """
    return load_whole_model(NanoGPTLMHeadModel, source, **kwargs)


def load_whole_model(
    model_class: type[Model],
    source: str | os.PathLike[str],
    *,
    check: Callable[[PreTrainedConfig], None] | None = None,
    **kwargs: Any,
) -> Model:
    """Loads a model of a class from a folder or the Hub: every tensor of it, from safetensors.

    Args:
        model_class: Class of the model.
        source: Folder or Hub id.
        check: Raises what it has against the configuration, before any tensor is fetched.
        **kwargs: What from_pretrained takes; the dtype is that of the files by default.

    Raises:
        CheckpointError: If there is no whole model of this class there, or the Hub cannot be reached.
    """
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source)
        _check_model_type(model_class, source, fields)
        if check is not None:
            check(model_class.config_class.from_dict(fields))
        _check_numbers(source, fields)
        model, info = model_class.from_pretrained(
            source, **{"dtype": "auto", **kwargs}, use_safetensors=True, output_loading_info=True
        )
    except NanoGPTError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, StrictDataclassError) as error:
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
    check_tokenizer(where, found, vocab_size)
    return found


def find_tokenizer_or_reason(
    model: NanoGPTLMHeadModel,
    source: str | os.PathLike[str],
    *,
    meta_path: str | os.PathLike[str] | None,
    tokenizer: str | None,
) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
    """Loads the tokenizer as load_tokenizer does; where none was asked for and there is none, returns the reason."""
    try:
        return load_tokenizer(model, source, meta_path=meta_path, tokenizer=tokenizer), []
    except (TokenizerError, MissingDependencyError) as error:
        if meta_path is not None or tokenizer is not None:
            raise
        return None, [str(error)]


def check_tokenizer(where: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises TokenizerError where a tokenizer has more tokens than the model has rows."""
    if len(tokenizer) > vocab_size:
        raise TokenizerError(
            f"{where}: expected at most {vocab_size} tokens, as the model has rows, got {len(tokenizer)}; give the "
            f"tokenizer that the model was trained with"
        )


def list_assumptions(checkpoint: Checkpoint) -> list[str]:
    """Lists what was assumed about a checkpoint, for people to read."""
    return [f"assumed: {assumption}" for assumption in checkpoint.assumptions]


def _load_named(name: str, block_size: int) -> PreTrainedTokenizerBase:
    if name == "gpt2":
        return build_gpt2_tokenizer(block_size=block_size)
    if Path(name).is_dir() or "/" in name:
        return _load_saved(name)
    return build_tiktoken_tokenizer(name, block_size=block_size)


def _load_saved(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # or it may ask on the terminal
    except Exception as error:  # whatever a tokenizer's files make Transformers raise
        reason = " ".join(str(error).split())
        raise TokenizerError(f"{name}: has no tokenizer that can be loaded: {reason}; give one by name") from error


def _check_model_type(
    model_class: type[PreTrainedModel], source: str | os.PathLike[str], fields: dict[str, Any]
) -> None:
    """Refuses what from_pretrained would load as another model than the one in the files."""
    expected, model_type = model_class.config_class.model_type, fields.get("model_type")
    if not fields and (Path(source) / "ckpt.pt").is_file():
        raise CheckpointError(
            f"{source}: expected a checkpoint file or a folder with config.json, got a folder without; give the file "
            f"in it, as {Path(source) / 'ckpt.pt'}"
        )
    if model_type != expected:
        kind = "nanoGPT" if model_class is NanoGPTLMHeadModel else "GPT-2"
        raise CheckpointError(
            f"{source}: not a {kind} model: expected model_type {expected!r} in its config.json, got {model_type!r}; "
            f"give a model that {model_class.__name__}.save_pretrained wrote"
        )


def _check_numbers(source: str | os.PathLike[str], fields: dict[str, Any]) -> None:
    """Refuses what from_pretrained would load as other numbers than a model's own."""
    if fields.get("quantization_config"):
        raise CheckpointError(
            f"{source}: quantised: expected the model's own numbers, got a quantization_config; give the model that "
            f"it was made from"
        )


def check_place(folder: Path, overwrite: bool) -> None:
    """Raises ConversionError where a folder is to be written and there is a file, or files and no overwrite."""
    if folder.is_dir() and not overwrite and (files := sorted(path.name for path in folder.iterdir())):
        raise ConversionError(
            f"{folder}: is not empty: expected a new or an empty folder, got {list_some(files)} in it; give another, "
            f"or overwrite it (--force, overwrite=True)"
        )
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConversionError(f"{folder}: expected a folder, got a file; give another path")


@contextmanager
def open_folder(folder: Path) -> Iterator[Path]:
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
    weights = (path for pattern in ("model*.safetensors*", "model.onnx*") for path in folder.glob(pattern))
    stale = [path for path in weights if path.name not in new]  # of another model, or of one in more pieces
    for name in sorted(new, key=lambda name: (name == "config.json", name)):  # without it, a folder is no model
        if name != "README.md" or not (folder / name).exists():  # the card there is the user's
            (temporary / name).replace(folder / name)
    for path in stale:
        path.unlink()


def _explain(folder: Path, reason: object) -> ConversionError:
    return ConversionError(
        f"{folder}: cannot be written: {reason}; nothing was changed, choose a place that is writable and has room"
    )
