"""Reading a pickle without executing anything, in memory and time that its length bounds.

Python's own unpickler in pure Python does the work; a few bytes can make the one in C fill the memory. A name in a
pickle becomes what a subclass gives for it, and otherwise a Foreign, which ignores all that the pickle does with it.
What takes memory or time is counted: a hostile pickle of 32 MB, the largest that is read, takes at most 0.6 GB and
under a minute (30 kinds were tried), and usually is refused sooner.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch

# A meta.pkl of every character of Unicode has 24 MB and takes 4 s; gpt2-xl with its optimizer has 0.3 MB of pickle.
LARGEST_PICKLE_BYTES = 32 << 20

_MOST_OBJECTS = 4_000_000  # lists, dicts, tuples, calls and places in the memo; all of Unicode takes 1.1 million
_DEEPEST = 100  # levels of lists within lists
_LONGEST_WRITTEN = 128 << 20  # characters of all values, each with the keys to it; all of Unicode has 36 million

# A dict takes quadratic time if many keys have one hash, which can be arranged for large ints, complex numbers and
# tuples, or if long keys have to be compared.
_LONGEST_KEY = 10_000
_LARGEST_KEY = 1 << 60
_ODD_KEY_PRICE = 1000
_KEY_TYPES = (type(None), bool, float, torch.dtype, torch.device, torch.Tensor)

_REFUSED = (
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.PERSID),
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),  # they make room before they read
    pickle.LONG4,  # ints of more than 255 bytes, which take time at each use
)


class Foreign:
    """Replaces what an unknown name would have made. It does nothing when it is called or filled."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *_args: Any) -> "Foreign":
        return self

    def update(self, _items: Any) -> None:
        """Ignores an item, or items."""

    append = extend = update


def iterate_values(contents: Any) -> Iterator[tuple[str, Any]]:
    """Yields the values in nested dicts, lists, tuples and sets, each object once, with the keys that lead to it."""
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
    """Lists the unknown names under which objects in `contents` were pickled."""
    return sorted({item.name for _, item in iterate_values(contents) if isinstance(item, Foreign)})


class Unpickler(pickle._Unpickler):
    """Reads one pickle: load() returns its contents, and `foreign_names` then has the unknown names in it.

    Args:
        data: The pickle, of at most LARGEST_PICKLE_BYTES.
        admitted: Classes that it may name, by the full name under which they are pickled. They must be harmless to
            make without arguments and to fill with attributes.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, data: bytes, admitted: Mapping[str, type] | None = None):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.admitted = admitted or {}
        self.foreign_names: set[str] = set()
        self._n_left = _MOST_OBJECTS
        self._measured: dict[int, tuple[int, int, int]] = {}

    def load(self) -> Any:
        """Returns what was pickled: at most _DEEPEST levels, and at most _LONGEST_WRITTEN characters in a message.

        Raises:
            Exception: Of nearly any type, if the pickle is damaged, or takes more than a checkpoint can.
        """
        contents = super().load()
        self._measure(contents, 0)
        return contents

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in self.admitted:
            return self.admitted[full_name]
        self.foreign_names.add(full_name)
        return Foreign(full_name)

    def fill(self, instance: Any, state: Any) -> None:
        """Sets the attributes of an instance that the pickle has for it."""
        if type(instance) in self.admitted.values():
            self.spend(len(state))
            vars(instance).update(state)
        elif not isinstance(instance, Foreign | OrderedDict):  # of a state dict: its _metadata, which nothing needs
            raise pickle.UnpicklingError(f"attributes for a {type(instance).__name__}")

    def spend(self, n_objects: int) -> None:
        """Counts what was made, or is about to be."""
        self._n_left -= n_objects
        if self._n_left < 0:
            raise pickle.UnpicklingError(f"more than {_MOST_OBJECTS} objects")

    def check_keys(self, keys: Iterable[Any]) -> None:
        """Raises UnpicklingError for keys that could make a dict or a set slow."""
        for key in keys:
            kind = type(key)
            if kind is str or kind is bytes:
                is_quick = len(key) <= _LONGEST_KEY
            elif kind is int:
                is_quick = -_LARGEST_KEY < key < _LARGEST_KEY
            elif kind is complex or (kind is tuple and not any(isinstance(part, tuple) for part in key)):
                parts = key if kind is tuple else ()
                self.spend(_ODD_KEY_PRICE + len(parts))
                self.check_keys(parts)
                is_quick = True
            else:
                is_quick = isinstance(key, (*_KEY_TYPES, Foreign))
            if not is_quick:
                raise pickle.UnpicklingError(f"a key of type {kind.__name__}, or too large a one")

    def _measure(self, item: Any, depth: int) -> tuple[int, int, int]:
        """Returns the length of a value if each part is written out with the keys to it, its parts, and its levels."""
        if isinstance(item, str | bytes):
            return 1 + len(item), 1, 0
        is_admitted = type(item) in self.admitted.values()
        if not is_admitted and not isinstance(item, dict | list | tuple | set | frozenset):
            return 1, 1, 0
        if id(item) not in self._measured:
            length, n_parts, height = 1, 1, 0
            for key, part in _list_entries(vars(item) if is_admitted else item):
                if depth >= _DEEPEST:
                    break
                part_length, part_n_parts, part_height = self._measure(part, depth + 1)
                length += part_length + part_n_parts * (4 + self._measure(key, depth + 1)[0])
                n_parts, height = n_parts + part_n_parts, max(height, part_height)
            if depth >= _DEEPEST or height >= _DEEPEST or length > _LONGEST_WRITTEN:
                raise pickle.UnpicklingError("lists within lists without end")
            self._measured[id(item)] = length, n_parts, height + 1
        return self._measured[id(item)]

    def _make(self) -> None:
        args = self.stack.pop()
        self.spend(len(args) + sum(len(arg) for arg in args if isinstance(arg, dict | list | tuple | set)))
        self.spend(sum(len(arg) // 8 for arg in args if isinstance(arg, str | bytes)))
        self.stack[-1] = self.stack[-1](*args)

    def _fill(self) -> None:
        state = self.stack.pop()
        self.fill(self.stack[-1], state)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set_items(self) -> None:
        self._set(self.pop_mark())

    def _make_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        """Puts keys and values, in turn, into what is on top of the stack."""
        target, keys = self.stack[-1], items[::2]
        self.check_keys(keys)
        if not isinstance(target, dict | Foreign):
            raise pickle.UnpicklingError(f"keys for a {type(target).__name__}")
        target.update(zip(keys, items[1::2], strict=True))

    def _add_items(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        self.check_keys(items)
        if not isinstance(target, set | Foreign):
            raise pickle.UnpicklingError(f"items for a {type(target).__name__}")
        target.update(items)

    def _freeze(self) -> None:
        items = self.pop_mark()
        self.check_keys(items)
        self.append(frozenset(items))

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("an opcode that no checkpoint needs")

    dispatch |= {
        pickle.REDUCE[0]: _make,
        pickle.NEWOBJ[0]: _make,
        pickle.BUILD[0]: _fill,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _make_dict,
        pickle.ADDITEMS[0]: _add_items,
        pickle.FROZENSET[0]: _freeze,
        **dict.fromkeys((opcode[0] for opcode in _REFUSED), _refuse),
    }


def _list_entries(item: Collection[Any]) -> Iterable[tuple[Any, Any]]:
    return item.items() if isinstance(item, dict) else ((None, part) for part in item)


def _count(load: Callable[[Any], None], n_objects: int) -> Callable[[Any], None]:
    def load_counted(unpickler: Unpickler) -> None:
        unpickler.spend(n_objects)
        load(unpickler)

    return load_counted


# What one byte of a pickle, or a few, can make repeatedly. An empty set is as large as four lists.
_COUNTED = (
    *(pickle.MARK, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.LIST, pickle.DICT, pickle.FROZENSET),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_SET),
    *(pickle.MEMOIZE, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BINPERSID),
)
Unpickler.dispatch |= {
    opcode[0]: _count(Unpickler.dispatch[opcode[0]], 4 if opcode in (pickle.EMPTY_SET, pickle.FROZENSET) else 1)
    for opcode in _COUNTED
}


def unpickle_plain(data: bytes) -> Any:
    """Reads a pickle of plain Python types alone, such as nanoGPT's meta.pkl.

    Raises:
        Exception: Of nearly any type, if the pickle is damaged, takes too much, or names anything.
    """
    unpickler = Unpickler(data)
    contents = unpickler.load()
    if unpickler.foreign_names:
        raise pickle.UnpicklingError(f"refused the name {min(unpickler.foreign_names)}, nothing was executed")
    return contents
