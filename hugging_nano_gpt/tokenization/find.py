"""Finds and loads the tokenizer of a model: from a meta.pkl, a saved folder or the Hub, or by name."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import MissingDependencyError, TokenizerError, list_some
from ..model.configuration_nano_gpt import GPT2_VOCAB_SIZES
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from .bpe import build_gpt2_tokenizer, build_tiktoken_tokenizer, read_gpt2_files
from .characters import build_character_tokenizer, read_meta, read_vocab_size
from .vocabulary import check_tokenizer, describe_spare_rows, is_rounded_up

_META, _TOKENIZER = "meta.pkl", "tokenizer.json"

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
) -> PreTrainedTokenizerBase:
    """Finds the tokenizer that a checkpoint was trained with, as nanoGPT's sample.py does.

    It is data/<dataset>/tokenizer.json, which `hugging-nano-gpt prepare` writes, or else made from
    data/<dataset>/meta.pkl, if it has as many tokens as the model has rows. `data` is looked for next to the
    checkpoint's folder, then in the working directory. Without either, a model with GPT-2's vocabulary, which nanoGPT
    pads to 50304, has GPT-2's tokenizer.

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
    found = []
    for folder in [root / "data" / str(dataset) for root in roots]:
        path = folder / _TOKENIZER
        if path.is_file():
            tokenizer = _load_saved(str(folder), block_size, {})
            if _fits(tokenizer, vocab_size):
                tokenizer.model_max_length = block_size or tokenizer.model_max_length
                return tokenizer
            found.append(f"{path} of {count_ids(tokenizer)} tokens")
        elif (path := folder / _META).is_file():
            table = read_meta(path)
            if len(table.characters) == vocab_size:
                return build_character_tokenizer(table, block_size=block_size)
            found.append(f"{path} of {len(table.characters)} characters")
    if vocab_size in GPT2_VOCAB_SIZES and not found:
        return build_gpt2_tokenizer(block_size=block_size)
    raise TokenizerError(
        f"{os.fspath(checkpoint_path)}: no tokenizer found: expected a meta.pkl of {vocab_size} characters, or a "
        f"tokenizer.json of as many tokens, of the data set {dataset!r}, got {list_some(found) if found else 'none'}; "
        f"{_ADVICE}"
    )


def read_data_vocab_size(data_dir: Path) -> tuple[int, Path] | None:
    """Reads the vocabulary size of a data set, and says from where; None if nothing records it.

    It is in the meta.pkl, where train.py reads it, or else it is one more than the largest id in the tokenizer.json.

    Raises:
        TokenizerError: If the file cannot be read.
    """
    if (path := data_dir / _META).exists():
        return read_vocab_size(path), path
    if (path := data_dir / _TOKENIZER).exists():
        return count_ids(_load_saved(str(data_dir), None, {})), path
    return None


def count_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns how many rows a model needs for the ids of a tokenizer, which may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _fits(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> bool:
    """Returns whether a model has as many rows as a tokenizer has ids, or that number rounded up for speed."""
    n_ids = count_ids(tokenizer)
    return n_ids == vocab_size or (n_ids < vocab_size and is_rounded_up(n_ids, vocab_size))


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
        where, found = tokenizer, load_named(tokenizer, block_size, **hub)
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


def load_named(name: str, block_size: int | None, **hub: Any) -> PreTrainedTokenizerBase:
    """Loads a tokenizer by name: "gpt2", another tiktoken encoding, a folder or a Hub id.

    Raises:
        TokenizerError: If none has this name, or it cannot be loaded.
        MissingDependencyError: If it needs tiktoken, which is not installed.
    """
    if name == "gpt2":
        return build_gpt2_tokenizer(block_size=block_size)
    if Path(name).is_dir() or "/" in name:
        return _load_saved(name, block_size, {key: value for key, value in hub.items() if key not in _PLACE})
    return build_tiktoken_tokenizer(name, block_size=block_size)


def _load_saved(name: str, block_size: int | None, hub: Mapping[str, Any]) -> PreTrainedTokenizerBase:
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
