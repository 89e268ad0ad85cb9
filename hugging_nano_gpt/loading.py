"""Loading what stands in folders and on the Hub: whole models in safetensors, and tokenizers. Nothing is executed."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .bpe import build_gpt2_tokenizer, build_tiktoken_tokenizer
from .errors import CheckpointError, MissingDependencyError, NanoGPTError, TokenizerError
from .formats.check import list_some
from .modeling_nano_gpt import NanoGPTLMHeadModel
from .tokenization import build_character_tokenizer, find_tokenizer, read_meta

Model = TypeVar("Model", bound=PreTrainedModel)


def read_model_type(source: str | os.PathLike[str]) -> str | None:
    """Reads the model_type of a folder or a model of the Hub.

    Raises:
        CheckpointError: If its config.json cannot be read, or the Hub cannot be reached.
    """
    return _read_fields(source).get("model_type")


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
    fields = _read_fields(source)
    _check_model_type(model_class, source, fields)
    with _explaining(source):
        if check is not None:
            check(model_class.config_class.from_dict(fields))
        _check_numbers(source, fields)
        model, info = model_class.from_pretrained(
            source, **{"dtype": "auto", **kwargs}, use_safetensors=True, output_loading_info=True
        )
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


def _read_fields(source: str | os.PathLike[str]) -> dict[str, Any]:
    with _explaining(source):
        fields, _ = PreTrainedConfig.get_config_dict(source)
    return fields


@contextmanager
def _explaining(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what Transformers and the Hub raise into a CheckpointError."""
    try:
        yield
    except NanoGPTError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, StrictDataclassError) as error:
        first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(
            f"{source}: cannot be loaded: expected a folder that save_pretrained wrote, or a hub id that can be "
            f"fetched, got: {first_line.rstrip('.')}; check the path, the files in it, or the network"
        ) from error


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
