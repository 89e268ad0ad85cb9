"""Where the text is: text files, which are one text, or documents of a data set.

A text is read in blocks, so that its size does not matter. nanoGPT reads it with Python's open, which makes every line
end a newline, and gives its first 90% of characters to train. Documents come from the `datasets` library. They are
split as nanoGPT splits OpenWebText.
"""

import codecs
import contextlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, list_some, require

SPLITS = ("train", "val")

_BLOCK_BYTES = 1 << 19
_N_ROWS = 256  # documents that are encoded together
_CODE_POINTS = 0x110000

# Builders of `datasets` by the ends of files' names, which may have .gz or the like after them.
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

# A data set of the Hub: owner/name or name, and after a colon its configuration.
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*(?<!\.txt)|[\w-]+)(:[\w.-]+)?")

# Names of a validation split. Without one, it is split off as in data/openwebtext/prepare.py @ 3adf61e.
_VALIDATION = ("validation", "valid", "val")
_TEST_SIZE, _SEED = 0.0005, 2357


def to_code_points(text: str) -> np.ndarray:
    """Returns the code point of each character, (len(text),) uint32."""
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def find_characters(texts: Iterable[str]) -> tuple[str, ...]:
    """Returns the different characters of some texts, sorted."""
    occurs = np.zeros(_CODE_POINTS, dtype=bool)
    for text in texts:
        occurs[to_code_points(text)] = True
    return tuple(map(chr, np.flatnonzero(occurs)))


class Texts:
    """Text files, one after the other, as one text: the first 90% of its characters are train, the others val."""

    unit, are_documents = "characters", False

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        n = sum(map(len, self._read_all()))
        if n < 2:
            raise DataError(f"{paths[0]}: expected a text of at least 2 characters, got {n}; give a longer text")
        self._bounds = {"train": (0, int(n * 0.9)), "val": (int(n * 0.9), n)}
        self.counts = {split: end - first for split, (first, end) in self._bounds.items()}

    @property
    def characters(self) -> tuple[str, ...]:
        """The characters of the text, of both splits."""
        return find_characters(self._read_all())

    def read(self, split: str) -> Iterator[list[str]]:
        """Yields the text of a split, a block each time."""
        (first, end), position = self._bounds[split], 0
        for block in self._read_all():
            if part := block[max(first - position, 0) : end - position]:
                yield [part]
            position += len(block)
            if position >= end:
                return

    def _read_all(self) -> Iterator[str]:
        for path in self._paths:
            yield from _read_blocks(path)


def _read_blocks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    try:
        with path.open("rb") as file:
            data = None
            while data != b"":
                offset = file.tell() - len(decoder.getstate()[0])  # of the first byte that is not decoded yet
                data = file.read(_BLOCK_BYTES)
                yield newlines.decode(decoder.decode(data, final=not data), final=not data)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected text in UTF-8, got byte {error.object[error.start]:#04x} at offset "
            f"{offset + error.start} ({error.reason}); save the file in UTF-8"
        ) from error


class Documents:
    """The texts in a column of a data set, whose splits are given by name."""

    unit, are_documents = "documents", True

    def __init__(self, where: str, splits: dict[str, Any], column: str):
        self._where, self._column = where, column
        if "train" not in splits:
            raise DataError(f"{where}: expected a split 'train', got {list_some(splits)}; give another data set")
        train = splits["train"]
        if column not in train.column_names:
            raise DataError(
                f"{where}: expected a column {column!r}, got {list_some(train.column_names)}; give one of these "
                f"(--column)"
            )
        names = [name for name in _VALIDATION if name in splits]
        if not names and len(train) < 2:
            raise DataError(
                f"{where}: expected at least 2 documents, one for val, got {len(train)}; give more, or a text"
            )
        parts = splits if names else train.train_test_split(test_size=_TEST_SIZE, seed=_SEED, shuffle=True)
        chosen = {"train": parts["train"], "val": parts[names[0] if names else "test"]}
        self._splits = {split: dataset.select_columns([column]) for split, dataset in chosen.items()}
        self.counts = {split: len(dataset) for split, dataset in chosen.items()}

    @property
    def characters(self) -> tuple[str, ...]:
        """The characters of all documents, and the newline that follows each document of a character model."""
        batches = (texts for split in SPLITS for texts in self.read(split))
        return find_characters("\n".join([*texts, ""]) for texts in batches)

    def read(self, split: str) -> Iterator[list[str]]:
        """Yields the documents of a split, some of them each time."""
        dataset, is_empty = self._splits[split], True
        for first in range(0, len(dataset), _N_ROWS):
            rows = dataset[first : first + _N_ROWS][self._column]
            texts = ["" if row is None else row for row in rows]  # an empty cell of a .csv is None
            for index, text in enumerate(texts, first):
                if not isinstance(text, str):
                    raise self._fail(f"got {type(text).__name__} in row {index} of {split}")
            is_empty = is_empty and not any(texts)
            yield texts
        if is_empty and split == "train":
            raise self._fail("got empty ones in all of train")

    def _fail(self, found: str) -> DataError:
        return DataError(
            f"{self._where}: expected texts in the column {self._column!r}, {found}; give another column (--column)"
        )


def open_source(sources: Sequence[str], column: str | None, has_bar: bool) -> Texts | Documents:
    """Opens what a user names: text files, a folder of them, files with a column of documents, or a data set."""
    if not sources:
        raise DataError("source: expected a text, documents or a data set, got none; name one")
    where, paths = sources[0], [Path(source) for source in sources]
    builders = {next((_BUILDERS[end] for end in path.suffixes[-2:] if end in _BUILDERS), None) for path in paths}
    missing = [path for path in paths if not path.exists()]
    if missing and (len(paths) > 1 or builders != {None} or not _HUB_ID.fullmatch(where)):
        raise DataError(f"{missing[0]}: no such file or folder; check the path")
    are_texts = builders == {None} and all(path.is_file() for path in paths)
    if not are_texts and len(paths) > 1 and (len(builders) > 1 or builders == {None}):
        raise DataError(
            f"{where}: expected files of one kind, got {list_some(sources)}; give text files, or files of one of "
            f"{', '.join(_BUILDERS)} with a --column"
        )
    if are_texts and column is not None:
        raise DataError(f"{where}: expected no column for a text, got {column!r}; leave out --column")
    if not are_texts and column is None and (files := sorted(paths[0].rglob("*.txt"))):
        are_texts, paths = True, files
    if are_texts:
        return Texts(paths)
    require("documents", "datasets>=4.7")
    return Documents(where, _load_splits(sources, builders.pop(), has_bar), column or "text")


def _load_splits(sources: Sequence[str], builder: str | None, has_bar: bool) -> dict[str, Any]:
    import datasets

    place, (name, _, config) = Path(sources[0]), sources[0].partition(":")
    try:
        with _set_up_datasets(has_bar):
            if builder is not None:
                return datasets.load_dataset(builder, data_files={"train": list(sources)})
            if not place.exists():
                return datasets.load_dataset(name, config or None)
            if not any((place / file).is_file() for file in ("state.json", "dataset_dict.json")):
                return datasets.load_dataset(str(place))
            saved = datasets.load_from_disk(place)
            return saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    except Exception as error:  # a file, the network or the Hub can make `datasets` raise any type
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{place}: cannot be read as a data set: {reason}; check it, and its name") from error


@contextlib.contextmanager
def _set_up_datasets(has_bar: bool) -> Iterator[None]:
    """Hides the bars of `datasets` unless wanted while the block lasts, and its log of errors, which are raised."""
    from datasets import logging, utils

    were_hidden, verbosity = utils.are_progress_bars_disabled(), logging.get_verbosity()
    (utils.enable_progress_bars if has_bar else utils.disable_progress_bars)()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        (utils.disable_progress_bars if were_hidden else utils.enable_progress_bars)()
