"""The pickle in a torch.save file, read without executing anything: plain Python types, and tensors without data.

torch.load(weights_only=True) is not used. Its list of admitted names belongs to the whole process, so that threads
take names from each other, and what it makes of an odd file changes with torch. Here a name becomes something of this
module, or a Foreign. pickles.py reads the rest.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..files.pickles import Unpickler

_MOST_DIMENSIONS = 64  # torch's own limit in most of its functions


class StoredBlock(NamedTuple):
    """Where the numbers of a tensor are stored.

    Args:
        key: Name of the block among the file's records.
        nbytes: Its length according to the pickle.
        dtype: The dtype of its numbers.
    """

    key: str
    nbytes: int
    dtype: torch.dtype


def unpickle(data: bytes, admitted: Mapping[str, type]) -> tuple[Any, list[str]]:
    """Reads a pickle of torch.save.

    Args:
        data: The pickle.
        admitted: See Unpickler; tensors and plain Python types need not be admitted.

    Returns:
        What was pickled, with tensors on the meta device, whose place get_block and get_offset return; and the
        unknown names in it.

    Raises:
        Exception: Of nearly any type, if the pickle is damaged, or takes more than a checkpoint can.
    """
    unpickler = _Unpickler(data, admitted)
    contents = unpickler.load()
    return contents, sorted(unpickler.foreign_names)


def get_block(tensor: torch.Tensor) -> StoredBlock | None:
    """Returns where in the file a tensor's numbers are; None if it was saved without any."""
    return getattr(tensor, "_stored_block", None)


def get_offset(tensor: torch.Tensor) -> int:
    """Returns the index of a tensor's first number in its block."""
    return getattr(tensor, "_stored_offset", 0)


class _StorageType(NamedTuple):
    dtype: torch.dtype


class _NumpyDtype:
    """Replaces numpy.dtype, for plain numbers."""

    def __init__(self, code: str, *_args: Any):
        if not re.fullmatch(r"[fiub][1248]", code):
            raise ValueError(f"a numpy dtype {code!r}")
        self.code, self.byteorder = code, "="


class _Unpickler(Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in _NAMES:
            return _NAMES[full_name]
        if full_name in ("__builtin__.set", "builtins.set"):
            return self._make_set
        if module in ("torch", "torch.storage") and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> StoredBlock:
        kind, storage_type, key, _location, numel = pid
        is_known = kind == "storage" and isinstance(storage_type, _StorageType) and isinstance(key, str)
        if not is_known or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError("a block that is not one of torch's")
        return StoredBlock(key, numel * storage_type.dtype.itemsize, storage_type.dtype)

    def _make_set(self, items: list[Any]) -> set[Any]:
        self.spend(4 * len(items))  # an item of a set takes as much memory as a list
        self.check_keys(items)
        return set(items)

    def fill(self, instance: Any, state: Any) -> None:
        if isinstance(instance, _NumpyDtype):
            instance.byteorder = state[1]
        else:
            super().fill(instance, state)


def _rebuild_tensor(
    block: StoredBlock,
    offset: int,
    size: Any,
    stride: Any,
    _requires_grad: Any = False,
    _hooks: Any = None,
    *rest: Any,
) -> torch.Tensor:
    """Replaces torch._utils._rebuild_tensor_v2, and _v3, which names the dtype too."""
    if not isinstance(block, StoredBlock):
        raise TypeError("a tensor without a block")
    dtype = rest[0] if rest and isinstance(rest[0], torch.dtype) else block.dtype
    if block.nbytes % dtype.itemsize:
        raise ValueError(f"a {dtype} tensor in a block of {block.nbytes} bytes")
    _check_bounds(block.nbytes // dtype.itemsize, offset, size, stride)
    metadata = rest[-1] if rest and isinstance(rest[-1], dict) else {}
    tensor = torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device="meta")
    if metadata.get("conj"):
        return tensor.conj()
    if metadata.get("neg"):
        return torch._neg_view(tensor)
    tensor._stored_block = block._replace(dtype=dtype)  # type: ignore[attr-defined]
    tensor._stored_offset = int(offset)  # type: ignore[attr-defined]
    return tensor


def _check_bounds(numel: int, offset: int, size: Sequence[int], stride: Sequence[int]) -> None:
    """Refuses a view that reaches outside its block, in exact integers: those of torch 2.6 wrap around at 2**63."""
    _check_dimensions(size)
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise ValueError("a tensor with sizes, strides or an offset that are not positive ints")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= numel:
        raise ValueError(f"a tensor that reaches to number {last} of a block of {numel}")


def _check_dimensions(size: Sequence[int]) -> None:
    if len(size) > _MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {len(size)} dimensions")


def _get_layout(name: str) -> torch.layout:
    layout = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(layout, torch.layout):  # or a pickle could ask for torch.save, and then call it
        raise TypeError("a layout that torch does not have")
    return layout


def _rebuild_sparse_tensor(layout: torch.layout, parts: Any) -> torch.Tensor:
    size = next(part for part in parts if isinstance(part, torch.Size))
    _check_dimensions(size)
    return torch.empty(size, layout=layout, device="meta")


def _rebuild_meta_tensor(dtype: torch.dtype, size: Any, stride: Any, _requires_grad: Any) -> torch.Tensor:
    _check_dimensions(size)
    return torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device="meta")


def _rebuild_parameter(tensor: torch.Tensor, *_args: Any) -> torch.Tensor:
    return tensor


def _rebuild_from_type(function: Callable, _type: Any, args: Any, _state: Any) -> torch.Tensor:
    if function not in (_rebuild_tensor, _rebuild_parameter, _rebuild_sparse_tensor, _rebuild_meta_tensor):
        raise TypeError("a tensor of a type that is made in another way")
    return function(*args)


def _encode(text: str, encoding: str) -> bytes:
    return text.encode({"latin1": "latin1"}[encoding])  # how pickle's protocol 2 spells bytes


def _make_number(dtype: _NumpyDtype, data: bytes) -> Any:
    """Makes a plain Python number from a numpy scalar."""
    if not isinstance(dtype, _NumpyDtype) or dtype.byteorder not in ("<", ">", "=", "|"):
        raise TypeError("a number of another kind than numpy's")
    return np.frombuffer(data, np.dtype(dtype.byteorder + dtype.code), count=1)[0].item()


# By the names under which torch.save pickles them.
_STORAGE_TYPES = {
    f"{name}Storage": _StorageType(getattr(torch, dtype))
    for name, dtype in zip(
        "Float Double Half BFloat16 Byte Char Short Int Long Bool ComplexFloat ComplexDouble Untyped".split(),
        "float32 float64 float16 bfloat16 uint8 int8 int16 int32 int64 bool complex64 complex128 uint8".split(),
        strict=True,
    )
}

# By full name. No arguments may make any of these take much memory or time.
_NAMES: dict[str, Any] = {
    "__builtin__.complex": complex,
    "_codecs.encode": _encode,
    "builtins.complex": complex,
    "collections.OrderedDict": lambda: OrderedDict(),  # and no arguments
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
