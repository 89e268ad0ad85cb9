"""Where the text is: text files, which are one text, or documents of a data set.

A text is read in blocks, so that its size does not matter. nanoGPT reads it with Python's open, which makes every line
end a newline, and gives its first 90% of characters to train. Documents come from the `datasets` library. They are
split as nanoGPT splits OpenWebText.
"""

import codecs
import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, list_some, require

SPLITS = ("train", "val")

_BLOCK_BYTES = 1 << 20
_N_ROWS = 256  # documents that are encoded together
_CODE_POINTS = 0x110000

# Builders of `datasets` by the end of a file's name, which may end in .gz or .zst after that.
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")

# A data set of the Hub: owner/name or name, and after a colon its configuration.
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*(?<!\.txt)|[\w-]+)(:[\w.-]+)?")

# Names of a validation split. Without one, it is split off as in data/openwebtext/prepare.py @ 3adf61e.
_VALIDATION = ("validation", "valid", "val")
_TEST_SIZE, _SEED = 0.0005, 2357


class Alphabet:
    """Counts the characters of texts, and remembers which occur."""

    def __init__(self) -> None:
        self.n_characters = 0
        self._occurs = np.zeros(_CODE_POINTS, dtype=bool)

    def add(self, text: str) -> None:
        """Adds the characters of a text."""
        self.n_characters += len(text)
        self._occurs[to_code_points(text)] = True

    @property
    def characters(self) -> tuple[str, ...]:
        """The characters in the order of their code points, as Python sorts them."""
        return tuple(map(chr, np.flatnonzero(self._occurs)))


def to_code_points(text: str) -> np.ndarray:
    """Returns the code point of each character, (len(text),) uint32."""
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


class Texts:
    """Text files, one after the other, as one text: the first 90% of its characters are train, the others val.

    Args:
        paths: The files, in UTF-8.

    Raises:
        DataError: If a file cannot be read or is not UTF-8, or the text is too short for both splits.
    """

    unit = "characters"
    are_documents = False

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self.alphabet = Alphabet()
        for block in self._read_all():
            self.alphabet.add(block)
        n = self.alphabet.n_characters
        n_train = int(n * 0.9)
        if n_train == 0:
            raise DataError(f"{paths[0]}: expected a text of at least 2 characters, got {n}; give a longer text")
        self._bounds = {"train": (0, n_train), "val": (n_train, n)}

    def count(self, split: str) -> int:
        """Returns the number of characters in a split."""
        first, end = self._bounds[split]
        return end - first

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
            while True:
                offset = file.tell() - len(decoder.getstate()[0])  # of the first byte that is not decoded yet
                data = file.read(_BLOCK_BYTES)
                yield newlines.decode(decoder.decode(data, final=not data), final=not data)
                if not data:
                    return
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected text in UTF-8, got byte {error.object[error.start]:#04x} at offset "
            f"{offset + error.start} ({error.reason}); save the file in UTF-8"
        ) from error


class Documents:
    """The texts in a column of a data set.

    Args:
        where: The data set's name, for messages.
        splits: Its data sets by the names of their splits.
        column: The column.

    Raises:
        DataError: If there is no split to train on, no such column, or too few documents to split off val.
    """

    unit = "documents"
    are_documents = True

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
        self._splits = {"train": train, "val": splits[names[0]]} if names else self._split(train)

    def _split(self, dataset: Any) -> dict[str, Any]:
        if len(dataset) < 2:
            raise DataError(
                f"{self._where}: expected at least 2 documents, one for val, got {len(dataset)}; give more, or a text"
            )
        split = dataset.train_test_split(test_size=_TEST_SIZE, seed=_SEED, shuffle=True)
        return {"train": split["train"], "val": split["test"]}

    @property
    def alphabet(self) -> Alphabet:
        """The characters of all documents, and the newline that follows each document of a character model."""
        alphabet = Alphabet()
        for split in SPLITS:
            for texts in self.read(split):
                alphabet.add("".join(f"{text}\n" for text in texts))
        return alphabet

    def count(self, split: str) -> int:
        """Returns the number of documents in a split."""
        return len(self._splits[split])

    def read(self, split: str) -> Iterator[list[str]]:
        """Yields the documents of a split, some of them each time.

        Raises:
            DataError: If one is not a text, or those of train are all empty.
        """
        dataset, is_empty = self._splits[split].select_columns([self._column]), True
        for first in range(0, len(dataset), _N_ROWS):
            rows = dataset[first : first + _N_ROWS][self._column]
            texts = ["" if row is None else row for row in rows]  # an empty cell of a .csv is None
            for index, text in enumerate(texts, first):
                if not isinstance(text, str):
                    raise DataError(
                        f"{self._where}: expected texts in the column {self._column!r}, got {type(text).__name__} in "
                        f"row {index} of {split}; give another column (--column)"
                    )
            is_empty = is_empty and not any(texts)
            yield texts
        if is_empty and split == "train":
            raise DataError(
                f"{self._where}: expected texts in the column {self._column!r}, got empty ones in all of {split}; "
                f"give another column (--column)"
            )


def open_source(sources: Sequence[str], column: str | None, has_bar: bool) -> Texts | Documents:
    """Opens what a user names: text files, a folder of them, files with a column of documents, or a data set.

    Raises:
        DataError: If it cannot be read, or is not of one kind.
        MissingDependencyError: If it has documents, and `datasets` is not installed.
    """
    if not sources:
        raise DataError("source: expected a text, documents or a data set, got none; name one")
    where, paths = sources[0], [Path(source) for source in sources]
    if column is None and (files := _find_texts(paths)):
        return Texts(files)
    builders = {_BUILDERS.get(_get_end(path)) for path in paths}
    missing = [path for path in paths if not path.exists()]
    if missing and (len(paths) > 1 or None not in builders or not _HUB_ID.fullmatch(where)):
        raise DataError(f"{missing[0]}: no such file or folder; check the path")
    if len(builders) > 1 or (None in builders and len(paths) > 1):
        raise DataError(
            f"{where}: expected files of one kind, got {list_some(sources)}; give text files, or files of one of "
            f"{', '.join(_BUILDERS)} with a --column"
        )
    if column is not None and paths[0].is_file() and None in builders:
        raise DataError(f"{where}: expected no column for a text, got {column!r}; leave out --column")
    require("documents", "datasets>=4.7")
    return Documents(where, _load_splits(sources, builders.pop(), has_bar), column or "text")


def _find_texts(paths: Sequence[Path]) -> list[Path]:
    """Lists the text files that paths name, if they name no others; a folder's are its .txt files, sorted."""
    if all(path.is_file() and _get_end(path) not in _BUILDERS for path in paths):
        return list(paths)
    return sorted(paths[0].rglob("*.txt")) if len(paths) == 1 and paths[0].is_dir() else []


def _get_end(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _load_splits(sources: Sequence[str], builder: str | None, has_bar: bool) -> dict[str, Any]:
    import datasets

    name, _, config = sources[0].partition(":")
    try:
        with _set_up_datasets(has_bar):
            if builder is not None:
                return datasets.load_dataset(builder, data_files={"train": list(sources)})
            if any((Path(sources[0]) / file).is_file() for file in ("state.json", "dataset_dict.json")):
                saved = datasets.load_from_disk(sources[0])
                return saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            return datasets.load_dataset(*([sources[0]] if Path(sources[0]).exists() else [name, config or None]))
    except Exception as error:  # a file, the network or the Hub can make `datasets` raise any type
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{sources[0]}: cannot be read as a data set: {reason}; check it, and its name") from error


@contextlib.contextmanager
def _set_up_datasets(has_bar: bool) -> Iterator[None]:
    """Shows or hides the bars of `datasets` while the block lasts, and logs none of its errors, which are raised."""
    import datasets

    were_hidden, verbosity = datasets.utils.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    (datasets.enable_progress_bars if has_bar else datasets.disable_progress_bars)()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        (datasets.disable_progress_bars if were_hidden else datasets.enable_progress_bars)()
