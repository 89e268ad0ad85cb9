"""Reading files that torch.save wrote: safely, only the tensors asked for, each once, and checked.

torch.load(weights_only=True) parses the pickle; with map_location="meta" it reads no tensor data but notes where in
the file each tensor lies. The tensors wanted are then read straight into fresh memory, and their checksums compared
with those that torch.save stored. Copying out of torch.load's memory map instead counts every page twice and ran at
0.4 GB/s against 2.1 (torch 2.13, 2 cores); using the map in place leaves the model at the mercy of a train.py that
overwrites the file. Older torch does not note the offsets, and there the map is copied.
"""

import os
import pickle
import re
import struct
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from ..errors import CheckpointError
from ..files import fail, fail_damaged, measure_bytes
from .check import find_oddity

_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a record's 30-byte header only the lengths of its name and extra field
_LARGEST_PICKLE_BYTES = 64 << 20  # gpt2-xl with its optimizer has 0.3 MB of pickle
_READ_BYTES = 4 << 20
_N_READERS = 2  # against one: 0.20 s for 0.33 s of a 124M checkpoint on 2 cores; four were no faster


class TorchFile:
    """A file written by torch.save, opened without executing anything in it and without reading its tensors.

    `contents` is the pickled object; its tensors have a shape and a dtype, and read_tensors fetches their data.

    Args:
        path: The file.
        file: The same, opened by open_source; it has to stay open while tensors are read.
        admitted: Classes that its pickle may name beside tensors and plain Python types, each with the name under
            which it is pickled. They must be harmless to make and to fill with anything.

    Raises:
        CheckpointError: If the file is not a torch.save archive, is cut off or damaged, or its pickle names anything
            but tensors and plain Python types.
    """

    def __init__(self, path: Path, file: BinaryIO, admitted: Sequence[tuple[Callable, str]] = ()):
        self.path = path
        self._file = file
        self._lock = threading.Lock()
        self._check_kind()
        self._records = self._list_records()  # by the offset of their data in the file
        self.contents: Any = self._unpickle(list(admitted))

    def read_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Reads tensors of `contents` into memory of their own, each stored block once.

        Tensors that are the same in the file, as tied weights are, are the same in memory.

        Raises:
            CheckpointError: If a block is missing, is shorter than its tensor says, or does not match its checksum.
        """
        first_names: dict[tuple, str] = {}  # of each stored block
        for name, tensor in tensors.items():
            if oddity := find_oddity(tensor):
                raise self.fail(f"{name}: expected a dense tensor, got {oddity}", "save a plain state dict")
            first_names.setdefault(_get_block_key(tensor), name)
        with ThreadPoolExecutor(_N_READERS) as readers:  # reads and checksums run outside Python's lock
            storages = [tensors[name].untyped_storage() for name in first_names.values()]
            blocks = dict(zip(first_names, readers.map(self._read_block, first_names.values(), storages), strict=True))

        views: dict[tuple, torch.Tensor] = {}
        result = {}
        for name, tensor in tensors.items():
            block_key = _get_block_key(tensor)
            view_key = (*block_key, tensor.shape, tensor.stride(), tensor.storage_offset())
            try:
                if view_key not in views:
                    views[view_key] = _view_block(blocks[block_key].view(tensor.dtype), tensor)
            except RuntimeError as error:  # torch: the tensor reaches outside its block
                raise self._fail_damaged(f"{name} not fitting its record: {error}") from error
            result[name] = views[view_key]
        return result

    def read_tree(self, tree: Any) -> Any:
        """Copies nested dicts, lists, tuples and sets of `contents`, with the tensors in them read."""
        tensors = dict(_iterate_tensors(tree))
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

        try:
            return copy(tree)
        except RecursionError as error:
            raise self._fail_damaged("lists within lists without end") from error

    def fail(self, problem: str, advice: str) -> CheckpointError:
        """Makes the error that says what is wrong with this file and what to do."""
        return fail(self.path, problem, advice)

    def _fail_damaged(self, reason: object) -> CheckpointError:
        return fail_damaged(self.path, reason)

    def _check_kind(self) -> None:
        self._file.seek(0)
        if self._file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            size = measure_bytes(self._file)
            raise self.fail(
                f"not a checkpoint: expected a zip archive written by torch.save, or an llm.c .bin, got "
                f"{f'{size} bytes of something else' if size else 'an empty file'}",
                "give the file that the training script wrote, and copy it again if the copy was cut off",
            )

    def _list_records(self) -> dict[int, zipfile.ZipInfo]:
        records = {}
        end = 0
        try:
            self._archive = zipfile.ZipFile(self._file)
            for info in sorted(self._archive.infolist(), key=lambda info: info.header_offset):
                self._file.seek(info.header_offset)
                offset = info.header_offset + 30 + sum(_LOCAL_HEADER.unpack(self._file.read(30)))
                if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                    raise self._fail_damaged(f"a compressed record {info.filename!r}")
                if info.header_offset < end:
                    raise self._fail_damaged(f"overlapping records at {info.filename!r}")
                end = offset + info.file_size
                records[offset] = info
        except CheckpointError:
            raise
        except Exception as error:  # zipfile meets damage with many types: BadZipFile, UnicodeDecodeError, ...
            raise self._fail_damaged(error) from error
        if end > measure_bytes(self._file):
            raise self._fail_damaged("records longer than the file")
        return records

    def _unpickle(self, admitted: list[Callable | tuple[Callable, str]]) -> Any:
        # Checked here because torch.load does not compare checksums: a flipped bit in the pickle could change a shape.
        self._read_small_record("/data.pkl")
        byteorder = self._read_small_record("/byteorder", default=b"little").decode("ascii", "replace")
        if byteorder != sys.byteorder:
            raise self.fail(
                f"expected numbers in {sys.byteorder}-endian order, got {byteorder}-endian",
                "load and save it on a machine of that order first",
            )
        try:
            self._file.seek(0)
            with torch.serialization.safe_globals(admitted):
                contents = torch.load(self._file, map_location="meta", weights_only=True)
                if any(_get_offset(tensor) is None for _, tensor in _iterate_tensors(contents)):
                    contents = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL (\S+)", str(error))
            found = f"the name {name[1]}" if name else "something that torch.load(weights_only=True) does not admit"
            raise self.fail(
                f"refused, as its pickle could run code: expected only tensors and plain Python types, got {found}",
                "nothing in it was executed; if you trust whoever made it, have them save it again with only those",
            ) from error
        except Exception as error:  # torch.load meets damage with many types: RuntimeError, EOFError, KeyError, ...
            raise self._fail_damaged(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
        return contents

    def _read_small_record(self, suffix: str, default: bytes | None = None) -> bytes:
        # torch finds records whatever their case
        found = [info for info in self._records.values() if info.filename.lower().endswith(suffix)]
        if not found and default is not None:
            return default
        if len(found) != 1 or found[0].file_size > _LARGEST_PICKLE_BYTES:
            raise self._fail_damaged(f"{len(found)} records named *{suffix} of up to {_LARGEST_PICKLE_BYTES} bytes")
        try:
            return self._archive.read(found[0])
        except Exception as error:  # as above
            raise self._fail_damaged(error) from error

    def _read_block(self, name: str, storage: torch.UntypedStorage) -> torch.Tensor:
        """Reads one stored block into a fresh uint8 tensor and compares its checksum."""
        size = storage.nbytes()
        offset = getattr(storage, "_checkpoint_offset", None)
        if offset is None:  # mapped by an older torch, where only size and checksum tell the record
            checksums = {info.CRC for info in self._records.values() if info.file_size == size}
            try:
                block = torch.empty(0, dtype=torch.uint8).set_(storage).clone()
            except RuntimeError as error:  # torch: the storage has no data
                raise self._fail_damaged(f"{name} without data: {error}") from error
            checksum = zlib.crc32(_view_bytes(block))
        else:
            info = self._records.get(offset)
            if info is None or info.file_size != size:
                found = "no record" if info is None else f"{info.file_size} bytes"
                raise self._fail_damaged(f"{found} where {name} of {size} bytes should be")
            checksums = {info.CRC}
            block = torch.empty(size, dtype=torch.uint8)
            checksum = self._read_into(_view_bytes(block), offset)
        if size and checksum not in checksums:
            raise self._fail_damaged(f"a wrong checksum of {name}")
        return block

    def _read_into(self, buffer: memoryview, offset: int) -> int:
        """Fills the buffer from the file and returns its CRC-32, computed while each piece is still in the cache."""
        checksum = 0
        for start in range(0, len(buffer), _READ_BYTES):
            piece = buffer[start : start + _READ_BYTES]
            try:
                n_read = self._read_at(piece, offset + start)
            except OSError as error:
                raise self.fail(f"cannot be read: {error.strerror}", "check the disk, or copy it again") from error
            if n_read != len(piece):
                raise self._fail_damaged("an early end of the file")
            checksum = zlib.crc32(piece, checksum)
        return checksum

    def _read_at(self, piece: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [piece], offset)
        with self._lock:  # Windows has no reading that leaves the file's position alone
            self._file.seek(offset)
            return self._file.readinto(piece)  # type: ignore[attr-defined]


def _view_bytes(block: torch.Tensor) -> memoryview:
    return memoryview(cast(Any, block.numpy()))


def _get_offset(tensor: torch.Tensor) -> int | None:
    """Returns where in the file the tensor's block begins, if this torch notes it."""
    if tensor.layout != torch.strided:
        return 0
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _get_block_key(tensor: torch.Tensor) -> tuple:
    return (_get_offset(tensor) or tensor.untyped_storage().data_ptr(), tensor.dtype)


def _iterate_tensors(contents: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors in nested dicts, lists, tuples and sets, each with the keys that lead to it."""
    seen, pending = set(), [("", contents)]
    while pending:
        path, item = pending.pop()
        if id(item) in seen:
            continue
        if isinstance(item, torch.Tensor):
            seen.add(id(item))
            yield path, item
        elif isinstance(item, dict | list | tuple | set):
            seen.add(id(item))
            entries = item.items() if isinstance(item, dict) else enumerate(item)
            pending.extend((f"{path}[{key!r}]", value) for key, value in entries)


def _view_block(block: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_contiguous() and tensor.numel() == block.numel():
        return block.view(tensor.shape)
    # A view of part of a block, such as a cropped position table: copied, so that the rest can be freed.
    return block.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).clone(
        memory_format=torch.contiguous_format
    )
