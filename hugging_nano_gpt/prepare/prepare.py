"""The token files of a data set, with its tokenizer, written all together or not at all."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import ConversionError, DataError, list_some
from ..files.files import open_folder
from .sources import SPLITS, Documents, Texts, open_source
from .tokens import CharacterTokens, Tokens, cut_text, load_tokens
from .writing import map_in_order, write_tokens

_MOST_THREADS = 8  # as many as data/openwebtext/prepare.py has processes

# What an earlier call may have written, and a later one replaces.
_WRITTEN = (
    *(f"{split}{end}" for split in SPLITS for end in (".bin", "_??????.bin")),
    *("meta.pkl", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
)


def prepare_data(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    *,
    tokenizer: str = "gpt2",
    column: str | None = None,
    num_proc: int | None = None,
    shard_size: int | None = None,
    overwrite: bool = False,
    has_bar: bool = False,
    has_notes: bool = True,
) -> dict[str, int]:
    """Makes train.bin and val.bin of a text or of documents, as nanoGPT's prepare.py files do, and prints their lines.

    A text is split after 90% of its characters, as data/shakespeare_char and data/shakespeare are; documents are
    shuffled and split, and get <|endoftext|> after each, as data/openwebtext does (all @ 3adf61e). The bytes are the
    same. The tokenizer is written next to them: meta.pkl for characters, and otherwise tokenizer.json, where train,
    find_tokenizer and all commands find it. A tokenizer that is not GPT-2's gets a meta.pkl too, for nanoGPT itself.

    Args:
        source: A text file in UTF-8, several, which become one text in the order given, or a folder of .txt files;
            .jsonl, .csv or .parquet files; or a data set of `datasets`: its folder, or its Hub id, `name` or
            `name:config`. Its splits train and validation are used; without the latter, val is split off.
        out_dir: Folder to write. Other files in it stay.
        tokenizer: "char"; "gpt2" or another tiktoken encoding; a folder or Hub id of a Transformers tokenizer; or
            "bpe:N", which trains a byte-level BPE of N tokens on the train split.
        column: The column with the texts of documents; by default "text".
        num_proc: Number of threads that encode; by default one for each core, at most 8. The bytes are the same for
            any number.
        shard_size: Tokens of a shard: train_000000.bin and so on are written, in nanoGPT's layout; None for one file.
        overwrite: Whether to replace the token files and the tokenizer of an earlier call.
        has_bar: Show progress bars on standard error.
        has_notes: Print there what a tokenizer loses of the text.

    Returns:
        The number of tokens in train and in val.

    Raises:
        DataError: If the source cannot be read, has no such column, is empty, or is too short.
        TokenizerError: If the tokenizer cannot be loaded or trained, or has more than 65,536 tokens.
        ConversionError: If out_dir has such files already, or cannot be written; nothing is changed then.
        MissingDependencyError: If `datasets` or tiktoken is needed and not installed.
    """
    folder = Path(out_dir)
    num_proc = num_proc or min(os.cpu_count() or 1, _MOST_THREADS)
    sources = [os.fspath(each) for each in ([source] if isinstance(source, str | os.PathLike) else source)]
    _check_out_dir(folder, overwrite)
    opened = open_source(sources, column, has_bar)
    tokens = load_tokens(tokenizer, opened, has_bar)
    _print_lines(opened, tokens, has_notes)
    n_tokens = {}
    with open_folder(folder, overwrite=True, stale=_WRITTEN) as temporary:
        tokens.save(temporary)
        for split in SPLITS:
            arrays = _encode_split(opened, tokens, split, num_proc, has_bar)
            n_tokens[split] = write_tokens(arrays, temporary, split, shard_size)
            if n_tokens[split] == 0:
                raise DataError(f"{sources[0]}: expected tokens in {split}, got none; give a longer text")
            tqdm.write(f"{split} has {n_tokens[split]:,} tokens")
    return n_tokens


def _check_out_dir(folder: Path, overwrite: bool) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConversionError(f"{folder}: expected a folder, got a file; give another path")
    found = sorted({path.name for pattern in _WRITTEN for path in folder.glob(pattern)})
    if found and not overwrite:
        raise ConversionError(
            f"{folder}: has been prepared already: expected none of the files that are written, got "
            f"{list_some(found)}; give another folder, or overwrite them (--force, overwrite=True)"
        )


def _print_lines(source: Texts | Documents, tokens: Tokens, has_notes: bool) -> None:
    """Prints what nanoGPT's prepare.py prints before it encodes, and what is to be noted."""
    if source.are_documents:
        tqdm.write(f"number of documents: {source.counts['train']:,} in train, {source.counts['val']:,} in val")
    else:
        tqdm.write(f"length of dataset in characters: {sum(source.counts.values()):,}")
    if isinstance(tokens, CharacterTokens):
        tqdm.write(f"all the unique characters: {''.join(tokens.table.characters)}")
    tqdm.write(f"vocab size: {tokens.n_ids:,}")
    for note in tokens.describe(next(source.read("train")), source.are_documents) if has_notes else ():
        tqdm.write(f"note: {note}", file=sys.stderr)


def _encode_split(
    source: Texts | Documents, tokens: Tokens, split: str, num_proc: int, has_bar: bool
) -> Iterator[np.ndarray]:
    """Yields the tokens of a split in parts, and shows how far it is."""
    are_documents = source.are_documents
    batches = source.read(split) if are_documents else cut_text(source.read(split), tokens)

    def encode(texts: list[str]) -> tuple[np.ndarray, int]:
        ids = tokens.encode_each(texts)
        if are_documents:
            return np.concatenate([part for each in ids for part in (each, tokens.end)]), len(texts)
        return np.concatenate(ids), sum(map(len, texts))

    with tqdm(total=source.counts[split], unit=source.unit, unit_scale=True, disable=not has_bar, desc=split) as bar:
        for array, count in map_in_order(encode, batches, num_proc):
            bar.update(count)
            yield array
