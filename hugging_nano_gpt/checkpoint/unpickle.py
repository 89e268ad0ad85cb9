"""The pickle in a torch.save file, read without executing anything: plain Python types, and tensors without data.

torch.load(weights_only=True) is not used. Its list of admitted names belongs to the whole process, so that threads
take names from each other, and what it makes of an odd file changes with torch. Here a name stands for something of
this module, or for nothing at all: an unknown one becomes a Foreign, which takes whatever the pickle does with it.
pickle's own unpickler in Python does the rest; the one in C can be made to fill the memory by a few bytes.
"""

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch


class StoredBlock(NamedTuple):
    """Where the numbers of a tensor lie.

    Args:
        key: Name of the block among the file's records.
        nbytes: Its length, as the pickle has it.
        dtype: What its numbers are.
    """

    key: str
    nbytes: int
    dtype: torch.dtype


class Foreign:
    """Stands for what an unknown name would have made. It does nothing, whatever it is called or filled with."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *_args: Any) -> "Foreign":
        return self

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass

    def append(self, _item: Any) -> None:
        """Takes an item."""

    def extend(self, _items: Any) -> None:
        """Takes items."""


def unpickle(data: bytes, admitted: Mapping[str, type]) -> tuple[Any, list[str]]:
    """Reads a pickle of torch.save.

    Args:
        data: The pickle.
        admitted: Classes that it may name beside tensors and plain Python types, by their full name. They must be
            harmless to make without arguments, and to fill with attributes.

    Returns:
        What was pickled, with tensors on the meta device that get_block and get_offset tell the place of; and the
        unknown names in it.

    Raises:
        Exception: Of nearly any type, if the pickle is damaged.
    """
    unpickler = _Unpickler(data, admitted)
    contents = unpickler.load()
    return contents, sorted(unpickler.foreign_names)


def get_block(tensor: torch.Tensor) -> StoredBlock | None:
    """Returns where in the file a tensor's numbers lie; None if it was saved without any."""
    return getattr(tensor, "_stored_block", None)


def get_offset(tensor: torch.Tensor) -> int:
    """Returns at which number of its block a tensor begins."""
    return getattr(tensor, "_stored_offset", 0)


def iterate_values(contents: Any) -> Iterator[tuple[str, Any]]:
    """Yields what is in nested dicts, lists, tuples and sets, each object once, with the keys that lead to it."""
    seen, pending = set(), [("", contents)]
    while pending:
        path, item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict | list | tuple | set):
            entries = item.items() if isinstance(item, dict) else enumerate(item)
            pending.extend((f"{path}[{key!r}]", value) for key, value in entries)
        else:
            yield path, item


def find_foreign(contents: Any) -> list[str]:
    """Lists the unknown names that things in `contents` were pickled under."""
    return sorted({item.name for _, item in iterate_values(contents) if isinstance(item, Foreign)})


class _StorageType(NamedTuple):
    dtype: torch.dtype


class _NumpyDtype:
    """Stands in for numpy.dtype, a plain number's."""

    def __init__(self, code: str, *_args: Any):
        if not re.fullmatch(r"[fiub][1248]", code):
            raise ValueError(f"a numpy dtype {code!r}")
        self.code, self.byteorder = code, "="


class _Unpickler(pickle._Unpickler):
    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    for _opcode in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.PERSID):
        del dispatch[_opcode[0]]

    def __init__(self, data: bytes, admitted: Mapping[str, type]):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._admitted = admitted
        self.foreign_names: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in self._admitted:
            return self._admitted[full_name]
        if full_name in _NAMES:
            return _NAMES[full_name]
        if module in ("torch", "torch.storage") and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        self.foreign_names.add(full_name)
        return Foreign(full_name)

    def persistent_load(self, pid: Any) -> StoredBlock:
        kind, storage_type, key, _location, numel = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
            raise pickle.UnpicklingError("a block that is not one of torch's")
        return StoredBlock(key, numel * storage_type.dtype.itemsize, storage_type.dtype)

    def _make(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.stack[-1](*args)

    def _fill(self) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        if isinstance(instance, _NumpyDtype):
            instance.byteorder = state[1]
        elif type(instance) in (OrderedDict, *self._admitted.values()):
            vars(instance).update(state)
        elif not isinstance(instance, Foreign):
            raise pickle.UnpicklingError(f"attributes for a {type(instance).__name__}")

    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = _make
    dispatch[pickle.BUILD[0]] = _fill


def _rebuild_tensor(
    block: StoredBlock,
    offset: int,
    size: Any,
    stride: Any,
    _requires_grad: Any = False,
    _hooks: Any = None,
    *rest: Any,
) -> torch.Tensor:
    """Stands in for torch._utils._rebuild_tensor_v2, and _v3, which names the dtype too."""
    if min((offset, *size, *stride)) < 0:
        raise ValueError(f"a tensor of shape {size}, strides {stride} and offset {offset}")
    dtype = rest[0] if rest and isinstance(rest[0], torch.dtype) else block.dtype
    metadata = rest[-1] if rest and isinstance(rest[-1], dict) else {}
    tensor = torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device="meta")
    if metadata.get("conj"):
        return tensor.conj()
    if metadata.get("neg"):
        return torch._neg_view(tensor)
    tensor._stored_block = block._replace(dtype=dtype)  # type: ignore[attr-defined]
    tensor._stored_offset = int(offset)  # type: ignore[attr-defined]
    return tensor


def _get_layout(name: str) -> torch.layout:
    return getattr(torch, name.removeprefix("torch."))


def _rebuild_sparse_tensor(layout: torch.layout, parts: Any) -> torch.Tensor:
    size = next(part for part in parts if isinstance(part, torch.Size))
    return torch.empty(size, layout=layout, device="meta")


def _rebuild_meta_tensor(dtype: torch.dtype, size: Any, stride: Any, _requires_grad: Any) -> torch.Tensor:
    return torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device="meta")


def _rebuild_parameter(tensor: torch.Tensor, *_args: Any) -> torch.Tensor:
    return tensor


def _rebuild_from_type(function: Callable, _type: Any, args: Any, _state: Any) -> torch.Tensor:
    return function(*args)


def _encode(text: str, encoding: str) -> bytes:
    return text.encode({"latin1": "latin1"}[encoding])  # how pickle's protocol 2 spells bytes


def _make_number(dtype: _NumpyDtype, data: bytes) -> Any:
    """Makes a plain Python number of a numpy scalar."""
    return np.frombuffer(data, np.dtype(dtype.byteorder + dtype.code), count=1)[0].item()


# By the names under which torch.save pickles them.
_STORAGE_TYPES = {
    f"{name}Storage": _StorageType(dtype)
    for name, dtype in (
        ("BFloat16", torch.bfloat16),
        ("Bool", torch.bool),
        ("Byte", torch.uint8),
        ("Char", torch.int8),
        ("ComplexDouble", torch.complex128),
        ("ComplexFloat", torch.complex64),
        ("Double", torch.float64),
        ("Float", torch.float32),
        ("Half", torch.float16),
        ("Int", torch.int32),
        ("Long", torch.int64),
        ("Short", torch.int16),
        ("Untyped", torch.uint8),
    )
}

# Nothing here may be made to take memory or time by odd arguments.
_NAMES: dict[str, Any] = {
    "__builtin__.complex": complex,
    "__builtin__.set": set,
    "_codecs.encode": _encode,
    "builtins.complex": complex,
    "builtins.set": set,
    "collections.OrderedDict": OrderedDict,
    "numpy._core.multiarray.scalar": _make_number,
    "numpy.core.multiarray.scalar": _make_number,
    "numpy.dtype": _NumpyDtype,
    "torch.Size": torch.Size,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._utils._rebuild_meta_tensor_no_storage": _rebuild_meta_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._utils._rebuild_sparse_tensor": _rebuild_sparse_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor,
    "torch.device": torch.device,
    "torch.nn.parameter.Parameter": None,  # the type of what _rebuild_from_type makes
    "torch.serialization._get_layout": _get_layout,
}
