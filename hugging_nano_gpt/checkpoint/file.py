"""A checkpoint file that is open for reading: safely, only the tensors asked for, each once, and checked.

torch_pickle.py reads the pickle that torch.save wrote, without any tensor's data. The tensors wanted are then read
straight into fresh memory, and their checksums compared with those that torch.save stored. Copying them out of
torch.load's memory map counts every page twice and ran at 0.4 GB/s against 2.1 (torch 2.13, 2 cores); a model that
uses the map itself would change with a file that train.py overwrites.
"""

import functools
import os
import re
import struct
import sys
import threading
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from ..errors import CheckpointError, list_some
from ..files.files import fail, measure_bytes
from ..files.pickles import LARGEST_PICKLE_BYTES, find_foreign, iterate_values
from .faults import find_oddity
from .torch_pickle import StoredBlock, get_block, get_offset, unpickle

_ZIP_MAGIC = b"PK\x03\x04"

# How other files with a model in them begin, what they are, and what to do with them.
_LONGEST_SIGN = 32
_OTHER_KINDS = (
    (
        rb"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19",
        "one in the format of torch before 1.6",
        "save it again: torch.save(torch.load(path, map_location='cpu'), new_path)",
    ),
    (
        rb".{6}\0\0\{\s*\"",
        "a .safetensors file",
        "give the folder that save_pretrained wrote, with its config.json, or what nanoGPT's train.py wrote",
    ),
    (rb"GGUF", "a GGUF file of llama.cpp", "give the checkpoint or the folder that it was made of"),
)

# Advice where a fork of nanoGPT has added something to a checkpoint.
IGNORE_ADVICE = "; or read it without what else is in it, with ignore_extra=True (--ignore-extra)"

# Assumed of a file that torch.save wrote under torch.serialization.set_crc32_options(False).
_NO_CHECKSUMS = "every number as it was written: the file has no checksums, as torch.save was told to write none"

_LOCAL_HEADER = struct.Struct("<26xHH")  # of a record's 30-byte header only the lengths of its name and extra field
_READ_BYTES = 4 << 20
_N_READERS = 2  # against one: 0.20 s for 0.33 s of a 124M checkpoint on 2 cores; four were no faster


class CheckpointFile:
    """A checkpoint file, opened without executing anything in it and without reading its tensors.

    Args:
        path: The file.
        raw: The same, opened by open_source; it has to stay open while tensors are read.
        admitted: Classes that its pickle may name in addition to tensors and plain Python types; see Unpickler.
        takes_foreign: Whether its pickle may name anything else; refuse_foreign then has to be called for what is
            used of `contents`.
    """

    def __init__(
        self, path: Path, raw: BinaryIO, admitted: Mapping[str, type] | None = None, takes_foreign: bool = False
    ):
        self.path, self.raw = path, raw
        self._admitted, self._takes_foreign = admitted or {}, takes_foreign
        self._lock = threading.Lock()

    @functools.cached_property
    def contents(self) -> Any:
        """What torch.save pickled into the file; its tensors have a shape and a dtype, and read_tensors their data.

        Raises:
            CheckpointError: If the file is not a torch.save archive, is cut off or damaged, or its pickle names
                anything but tensors and plain Python types.
        """
        name, pickled = self._read_small_record("/data.pkl")
        self._folder = name[: -len("data.pkl")]
        _, byteorder = self._read_small_record("/byteorder", default=b"little")
        if (order := byteorder.decode("ascii", "replace")) != sys.byteorder:
            raise self.fail(
                f"expected numbers in {sys.byteorder}-endian order, got {order}-endian",
                "load and save it on a machine of that order first",
            )
        try:
            contents, names = unpickle(pickled, self._admitted)
        except Exception as error:  # damage makes pickle raise nearly any type
            raise self.fail_damaged(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
        if names and not self._takes_foreign:
            is_whole = isinstance(contents, dict) and "model" in contents
            is_extra = is_whole and not find_foreign([contents["model"], contents.get("model_args")])
            raise self._fail_foreign(names, is_extra)
        return contents

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What cannot be checked about a file of torch.save, one sentence each."""
        return () if self._has_checksums else (_NO_CHECKSUMS,)

    def read_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Reads tensors of `contents` into memory of their own, each stored block once.

        Tensors that are the same in the file, as tied weights are, are the same in memory.

        Raises:
            CheckpointError: If a block is missing, is shorter than its tensor says, or does not match its checksum.
        """
        stored = {name: self._find_block(name, tensor) for name, tensor in tensors.items()}
        first_names: dict[StoredBlock, str] = {}
        for name, block in stored.items():
            first_names.setdefault(block, name)
        with ThreadPoolExecutor(_N_READERS) as readers:  # reads and checksums run outside Python's lock
            read = readers.map(self._read_block, first_names.values(), first_names)
            blocks = dict(zip(first_names, read, strict=True))

        views: dict[tuple, torch.Tensor] = {}
        result = {}
        for name, tensor in tensors.items():
            view_key = (stored[name], tensor.shape, tensor.stride(), get_offset(tensor))
            if view_key not in views:
                views[view_key] = _view_block(blocks[stored[name]].view(tensor.dtype), tensor)
            result[name] = views[view_key]
        return result

    def read_tree(self, tree: Any) -> Any:
        """Copies nested dicts, lists, tuples and sets of `contents`, with the tensors in them read."""
        tensors = {path: item for path, item in iterate_values(tree) if isinstance(item, torch.Tensor)}
        loaded = self.read_tensors(tensors)
        copies: dict[int, Any] = {id(tensors[name]): loaded[name] for name in tensors}  # what is shared stays shared

        def copy(item: Any) -> Any:
            if id(item) not in copies:
                if isinstance(item, dict):
                    copies[id(item)] = {key: copy(value) for key, value in item.items()}
                elif isinstance(item, list | tuple | set):
                    copies[id(item)] = type(item)(copy(value) for value in item)
                else:
                    return item
            return copies[id(item)]

        return copy(tree)

    def refuse_foreign(self, tree: Any) -> None:
        """Raises CheckpointError if a part of `contents` contains what was pickled under an unknown name."""
        if names := find_foreign(tree):
            raise self._fail_foreign(names, is_extra=False)

    def fail(self, problem: str, advice: str) -> CheckpointError:
        """Makes the error that says what is wrong with this file and what to do."""
        return fail(self.path, problem, advice)

    def fail_damaged(self, reason: object) -> CheckpointError:
        """Makes the error for a file that is not as it was written."""
        return self.fail(
            f"damaged or cut off: expected a whole file as it was written, got {reason}",
            "copy it again from where it was written, or use an earlier checkpoint",
        )

    def _fail_foreign(self, names: list[str], is_extra: bool) -> CheckpointError:
        return self.fail(
            f"refused, as its pickle could run code: expected only tensors and plain Python types, got "
            f"{f'the name {names[0]}' if len(names) == 1 else f'the names {list_some(names)}'}",
            f"nothing in it was executed; if you trust whoever made it, have them save it again with only those"
            f"{IGNORE_ADVICE if is_extra else ''}",
        )

    def _find_block(self, name: str, tensor: torch.Tensor) -> StoredBlock:
        if oddity := find_oddity(tensor):
            raise self.fail(f"{name}: expected a dense tensor, got {oddity}", "save a plain state dict")
        if (block := get_block(tensor)) is None:
            raise self.fail_damaged(f"{name} without data")
        return block

    def _check_kind(self) -> None:
        self.raw.seek(0)
        start = self.raw.read(_LONGEST_SIGN)
        if start.startswith(_ZIP_MAGIC):
            return
        for sign, kind, advice in _OTHER_KINDS:
            if re.match(sign, start, re.DOTALL):
                raise self.fail(f"not a checkpoint: expected a zip archive written by torch.save, got {kind}", advice)
        size = measure_bytes(self.raw)
        raise self.fail(
            f"not a checkpoint: expected a zip archive written by torch.save, or an llm.c .bin, got "
            f"{f'{size} bytes of something else' if size else 'an empty file'}",
            "give the file that the training script wrote, and copy it again if the copy was cut off",
        )

    @functools.cached_property
    def _records(self) -> dict[str, tuple[int, zipfile.ZipInfo]]:
        """Where the data of each record begins, and what the archive says about it, by its name."""
        self._check_kind()
        records = {}
        end = 0
        try:
            for info in sorted(zipfile.ZipFile(self.raw).infolist(), key=lambda info: info.header_offset):
                self.raw.seek(info.header_offset)
                offset = info.header_offset + 30 + sum(_LOCAL_HEADER.unpack(self.raw.read(30)))
                if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                    raise self.fail_damaged(f"a compressed record {info.filename!r}")
                if info.header_offset < end:
                    raise self.fail_damaged(f"overlapping records at {info.filename!r}")
                end = offset + info.file_size
                records[info.filename] = (offset, info)
        except CheckpointError:
            raise
        except Exception as error:  # zipfile meets damage with many types: BadZipFile, UnicodeDecodeError, ...
            raise self.fail_damaged(error) from error
        if end > measure_bytes(self.raw):
            raise self.fail_damaged("records longer than the file")
        return records

    @functools.cached_property
    def _has_checksums(self) -> bool:
        """Whether any checksum differs from 0. "version" has one that does, so damage cannot make all of them 0."""
        return any(info.CRC for _, info in self._records.values())

    def _read_small_record(self, suffix: str, default: bytes | None = None) -> tuple[str, bytes]:
        """Returns the name and the contents of the one record with this suffix, after comparing its checksum."""
        found = [info for name, (_, info) in self._records.items() if name.lower().endswith(suffix)]
        if not found and default is not None:
            return "", default
        if len(found) != 1 or found[0].file_size > LARGEST_PICKLE_BYTES:
            raise self.fail_damaged(f"{len(found)} records named *{suffix} of up to {LARGEST_PICKLE_BYTES} bytes")
        data = bytearray(found[0].file_size)
        self._read_record(memoryview(data), found[0].filename, found[0].filename)
        return found[0].filename, bytes(data)

    def _read_block(self, name: str, stored: StoredBlock) -> torch.Tensor:
        """Reads one stored block into a fresh uint8 tensor and compares its checksum."""
        record = f"{self._folder}data/{stored.key}"
        _, info = self._records.get(record, (0, None))
        if info is None or info.file_size != stored.nbytes:
            found = f"no record data/{stored.key}" if info is None else f"{info.file_size} bytes"
            raise self.fail_damaged(f"{found} where {name} of {stored.nbytes} bytes should be")
        block = torch.empty(stored.nbytes, dtype=torch.uint8)
        self._read_record(memoryview(cast(Any, block.numpy())), record, name)
        return block

    def _read_record(self, buffer: memoryview, record: str, name: str) -> None:
        """Fills the buffer and compares its CRC-32, computed while each piece is still in the cache."""
        offset, info = self._records[record]
        checksum = 0
        for start in range(0, len(buffer), _READ_BYTES):
            piece = buffer[start : start + _READ_BYTES]
            try:
                n_read = self._read_at(piece, offset + start)
            except OSError as error:
                raise self.fail(f"cannot be read: {error.strerror}", "check the disk, or copy it again") from error
            if n_read != len(piece):
                raise self.fail_damaged("an early end of the file")
            checksum = zlib.crc32(piece, checksum)
        if len(buffer) and self._has_checksums and checksum != info.CRC:
            raise self.fail_damaged(f"a wrong checksum of {name}")

    def _read_at(self, piece: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.raw.fileno(), [piece], offset)
        with self._lock:  # Windows cannot read without moving the file's position
            self.raw.seek(offset)
            return self.raw.readinto(piece)  # type: ignore[attr-defined]


def _view_block(block: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_contiguous() and tensor.numel() == block.numel() and get_offset(tensor) == 0:
        return block.view(tensor.shape)
    # A view of a part of a block, such as a cropped position table, is copied so that the rest can be freed.
    return block.as_strided(tensor.shape, tensor.stride(), get_offset(tensor)).clone(
        memory_format=torch.contiguous_format
    )
