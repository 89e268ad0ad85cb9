"""Finds and loads the tokenizer of a model: from a meta.pkl, a saved folder or the Hub, or by name."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import MissingDependencyError, TokenizerError, list_some
from ..model.configuration_nano_gpt import GPT2_VOCAB_SIZES
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from .bpe import build_gpt2_tokenizer, build_tiktoken_tokenizer, read_gpt2_files
from .characters import build_character_tokenizer, read_meta
from .vocabulary import check_tokenizer, describe_spare_rows

# For the command line and for Python.
_ADVICE = "give its meta.pkl (--meta FILE, read_meta), or another by name (--tokenizer NAME, build_tiktoken_tokenizer)"

# Arguments of from_pretrained that apply to a model and its tokenizer alike. Those of _PLACE say where both are in a
# repository or folder, so they do not apply to a tokenizer from another repository.
_PLACE = ("revision", "subfolder")
HUB_KWARGS = (*_PLACE, "cache_dir", "force_download", "local_files_only", "proxies", "token")


def find_tokenizer(
    checkpoint_path: str | os.PathLike[str],
    config: Mapping[str, Any],
    vocab_size: int,
    *,
    block_size: int | None = None,
) -> PreTrainedTokenizerFast:
    """Finds the tokenizer that a checkpoint was trained with, as nanoGPT's sample.py does.

    It is made from data/<dataset>/meta.pkl, if this file has as many characters as the model has rows. `data` is
    looked for next to the checkpoint's folder, then in the working directory. Without a meta.pkl, a model with GPT-2's
    vocabulary, which nanoGPT pads to 50304, has GPT-2's tokenizer.

    Args:
        checkpoint_path: Path of the checkpoint, such as out/ckpt.pt.
        config: train.py's settings, as in TrainingState.config. The dataset has to be a plain folder name.
        vocab_size: Number of rows of the model's embedding.
        block_size: Longest sequence of the model; becomes model_max_length.

    Raises:
        TokenizerError: If no tokenizer of that size is found, or the meta.pkl or GPT-2's files cannot be read.
        MissingDependencyError: If GPT-2's is needed, is not in the Hub's cache, and tiktoken is not installed.
    """
    dataset = config.get("dataset")
    roots = [Path(checkpoint_path).absolute().parent.parent, Path.cwd()] if _is_folder_name(dataset) else []
    paths = [root / "data" / str(dataset) / "meta.pkl" for root in roots]
    tables = {path: read_meta(path) for path in paths if path.is_file()}
    for table in tables.values():
        if len(table.characters) == vocab_size:
            return build_character_tokenizer(table, block_size=block_size)
    if vocab_size in GPT2_VOCAB_SIZES and not tables:
        return build_gpt2_tokenizer(block_size=block_size)
    found = [f"{path} of {len(table.characters)} characters" for path, table in tables.items()]
    raise TokenizerError(
        f"{os.fspath(checkpoint_path)}: no tokenizer found: expected a meta.pkl of {vocab_size} characters of the "
        f"data set {dataset!r}, got {list_some(found) if found else 'none'}; {_ADVICE}"
    )


def _is_folder_name(name: Any) -> bool:
    """Returns whether a name from an untrusted file is a plain folder name, and not a path to another folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def load_tokenizer(
    model: NanoGPTLMHeadModel,
    source: str | os.PathLike[str],
    *,
    meta_path: str | os.PathLike[str] | None = None,
    tokenizer: str | None = None,
    **hub: Any,
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that the user gives, or the one that belongs to a checkpoint or a folder.

    Args:
        model: The model.
        source: What the model was loaded from.
        meta_path: A meta.pkl, instead of the tokenizer that belongs to the source.
        tokenizer: Name, folder or Hub id of a tokenizer, instead of meta_path.
        **hub: Those of HUB_KWARGS that the model was loaded with.

    Raises:
        TokenizerError: If no tokenizer is found, meta_path and tokenizer are both given, or it does not fit the model.
        MissingDependencyError: If it needs tiktoken, which is not installed.
    """
    vocab_size, block_size = model.config.vocab_size, model.config.block_size
    if meta_path is not None and tokenizer is not None:
        raise TokenizerError(
            f"{meta_path}: expected a meta.pkl or a tokenizer, got both; leave out one, --meta or --tokenizer"
        )
    if meta_path is not None:
        where, found = os.fspath(meta_path), build_character_tokenizer(read_meta(meta_path), block_size=block_size)
    elif tokenizer is not None:
        where, found = tokenizer, _load_named(tokenizer, block_size, hub)
    elif Path(source).is_file():
        config = model.nanogpt_training_state.config
        return find_tokenizer(source, config, vocab_size, block_size=block_size)
    else:
        where, found = os.fspath(source), _load_saved(os.fspath(source), block_size, hub)
    check_tokenizer(where, found, vocab_size)
    describe_spare_rows(where, found, vocab_size)
    return found


def find_tokenizer_or_reason(
    model: NanoGPTLMHeadModel,
    source: str | os.PathLike[str],
    *,
    meta_path: str | os.PathLike[str] | None,
    tokenizer: str | None,
    **hub: Any,
) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
    """Loads the tokenizer as load_tokenizer does, or returns the reason if none was given and none is found."""
    try:
        found = load_tokenizer(model, source, meta_path=meta_path, tokenizer=tokenizer, **hub)
        return found, describe_spare_rows(os.fspath(meta_path or tokenizer or source), found, model.config.vocab_size)
    except (TokenizerError, MissingDependencyError) as error:
        if meta_path is not None or tokenizer is not None:
            raise
        return None, [str(error)]


def _load_named(name: str, block_size: int, hub: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    if name == "gpt2":
        return build_gpt2_tokenizer(block_size=block_size)
    if Path(name).is_dir() or "/" in name:
        return _load_saved(name, block_size, {key: value for key, value in hub.items() if key not in _PLACE})
    return build_tiktoken_tokenizer(name, block_size=block_size)


def _load_saved(name: str, block_size: int, hub: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    folder = Path(name) / hub.get("subfolder", "")
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        found = read_gpt2_files(folder, block_size=block_size)
        if found is not None:
            return found
        if folder.is_dir():
            files = sorted(path.name for path in folder.iterdir())
            raise TokenizerError(
                f"{name}: no tokenizer in it: expected tokenizer.json, or vocab.json and merges.txt, got "
                f"{list_some(files) or 'nothing'}; {_ADVICE}"
            )
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub)  # so it never prompts
    except Exception as error:  # a tokenizer's files can make Transformers raise any type
        reason = " ".join(str(error).split())
        raise TokenizerError(f"{name}: has no tokenizer that can be loaded: {reason}; {_ADVICE}") from error
