"""Where the tokens of a file are: nanoGPT's .bin, llm.c's shards and NumPy's arrays, recognized by their first bytes.

nanoGPT's file is uint16 tokens without a header, so any file could be read as one. Files that look like something else
are refused: text, archives, tokens of more than two bytes. Tokens saved as .npy are never refused, as .npy records
their type.
"""

import codecs
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DataError

# llm.c's shards (karpathy/llm.c dev/data/data_common.py): a header of 256 little-endian int32, beginning with magic,
# version and number of tokens, then the tokens. By magic: the version and the type of the tokens (GPT-2's, Llama 3's).
_SHARDS: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
_HEADER_BYTES = 1024
_MAGIC_DATES = range(2024_01_01, 2040_01_01)  # llm.c's magic numbers are the dates of its formats
_USED_INTS = 16

_NPY_MAGIC = b"\x93NUMPY"

# The first bytes of files that are no tokens.
_OTHERS = {
    b"PK\x03\x04": "an archive (zip, npz or torch.save)",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x1f\x8b\x08": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\x89HDF": "an HDF5 file",
    b"\x80\x04\x95": "a pickle",
}

# Bytes of a file that are examined, and pairs of tokens that are too few to say that they are halves of wider tokens.
_HEAD_BYTES = 65536
_LEAST_PAIRS = 32

# The upper halves of uint32 tokens are below 4 in vocabularies of up to 262,144. But so is every second token of a
# text with a space between any two symbols, if the space is one of the first characters: the other tokens decide.
_UPPER_HALVES = 4
_LARGE_ID = 1024  # lower halves of a large vocabulary's tokens exceed it, ids of an alphabet do not
_LARGEST_ALPHABET = 128  # whose space has id 0, as all upper halves of a vocabulary of up to 65,536 are
_MOST_CHUNKS = 64  # of 1 MiB, which are searched in that case

_SAVE_AS_NPY = "np.save the tokens to a .npy file, which records their type"


class TokenLayout(NamedTuple):
    """Where the tokens of a file are: the byte of the first one, their type and their number."""

    offset: int
    dtype: np.dtype
    n_tokens: int


def measure_token_file(path: Path) -> TokenLayout:
    """Returns where the tokens of a file are.

    Raises:
        DataError: If the file is missing or not whole, or does not look like a token file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be opened: {error.strerror}; check the path, or run the data set's prepare.py"
        ) from error
    if head.startswith(_NPY_MAGIC):
        return _measure_npy(path, size)
    header = np.frombuffer(head[:_HEADER_BYTES].ljust(_HEADER_BYTES, b"\0"), dtype="<i4")
    if header[0] in _SHARDS:
        return _measure_shard(path, size, header)
    if other := _recognize_other(path, head, header):
        raise DataError(f"{path}: expected uint16 tokens, got {other}")
    if size % 2:
        raise DataError(f"{path}: expected uint16 tokens, got an odd number of bytes, {size}; write it again")
    return TokenLayout(0, np.dtype("<u2"), size // 2)


def _measure_shard(path: Path, size: int, header: np.ndarray) -> TokenLayout:
    magic, version, n_tokens = header[:3].tolist()
    known, dtype = _SHARDS[magic]
    expected = _HEADER_BYTES + n_tokens * dtype.itemsize
    if version != known or size != expected:
        raise DataError(
            f"{path}: expected an llm.c shard of version {known} and {expected} bytes, got version {version} "
            f"and {size} bytes; write it again"
        )
    return TokenLayout(_HEADER_BYTES, dtype, n_tokens)


def _measure_npy(path: Path, size: int) -> TokenLayout:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: not a whole .npy file: expected one row of integers, got {error}; write it again"
        ) from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{path}: expected one row of integers, got {array.dtype} of shape {array.shape}; write the token ids in "
            f"one row"
        )
    if size != array.offset + array.nbytes:
        raise DataError(
            f"{path}: expected a .npy file of {array.offset + array.nbytes} bytes, got {size} bytes; write it again"
        )
    return TokenLayout(array.offset, array.dtype, len(array))


def _recognize_other(path: Path, head: bytes, header: np.ndarray) -> str | None:
    """Returns what a file seems to be if it is not uint16 tokens, and what to do about it."""
    for start, name in _OTHERS.items():
        if head.startswith(start):
            return f"{name}; {_SAVE_AS_NPY}"
    if header[0] in _MAGIC_DATES and not header[_USED_INTS:].any():
        return f"a file of llm.c's with magic number {header[0]}; give a shard of tokens"
    if _is_text(head):
        return "text; run the data set's prepare.py, which encodes it"
    halves = np.frombuffer(head[: len(head) // 4 * 4], dtype="<u2")
    if len(halves) >= 2 * _LEAST_PAIRS and _are_halves(path, lower=halves[::2], upper=halves[1::2]):
        return f"every second one below {_UPPER_HALVES}, as in tokens of 4 or 8 bytes; {_SAVE_AS_NPY}"
    return None


def _are_halves(path: Path, lower: np.ndarray, upper: np.ndarray) -> bool:
    """Returns whether the first tokens of a file look like the halves of wider ones."""
    if upper.max() >= _UPPER_HALVES or lower.max() < _USED_INTS:
        return False
    if not lower[1::2].any():  # 8 bytes
        return True
    zeros, *others = np.bincount(upper, minlength=_UPPER_HALVES).tolist()
    if max(others) > 0.75 * len(upper):  # a space, which may have any id; most tokens are below 65,536
        return False
    return not _alternates(path, lower) if zeros == len(upper) else bool(lower.max() >= _LARGE_ID)


def _alternates(path: Path, symbols: np.ndarray) -> bool:
    """Returns whether a file whose every second token is 0 contains symbols of a small alphabet with spaces between.

    An alphabet consists of the characters of its text, and the first of them is the space, which is no symbol. As
    tokens of 4 bytes, the same ids would be a text without its first character; bytes use none of the first ids.
    """
    found = np.unique(symbols)
    if found[0] == 0 or found[-1] >= _LARGEST_ALPHABET or (found <= _USED_INTS).sum() < _USED_INTS // 2:
        return False
    with path.open("rb") as file:
        for _ in range(_MOST_CHUNKS):
            data = file.read(2**20)
            halves = np.frombuffer(data[: len(data) // 4 * 4], dtype="<u2")
            if halves[1::2].any():
                return True
            if not halves[::2].all():
                return False
    return True


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # accepts a character that is cut off at the end
    except UnicodeDecodeError:
        return False
    return bool(text) and re.search(r"[\x00-\x08\x0e-\x1f]", text) is None
