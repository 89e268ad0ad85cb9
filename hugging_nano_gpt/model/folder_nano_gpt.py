"""Replacing the model in a folder: at every moment there is the old model in it, the new one, or none that loads.

The new files are written into a temporary folder in it, `.writing-*`, and flushed to the disk. Then files are renamed:
the old weights go first (model.safetensors, the index of a model in several files, or model.onnx), config.json next;
the others are replaced; the new config.json comes, and the new weights come last. The weights are first and last, not
config.json, because GPT2LMHeadModel.from_pretrained loads weights without a config.json, under its default
configuration. Nothing outside the folder is needed, so it may be a mount point.

A reader can be late too: old config.json, new weights. `refuse_change` finds that, for our own loaders. This file
travels with saved models as remote code.
"""

import contextlib
import itertools
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

# How the names of what is not complete yet begin.
TEMPORARY = ".writing-"

# What a temporary folder has in it: the new files, those that they replace, and a file locked while the writer lives.
_NEW, _OLD, _LOCK = "new", "old", "lock"

_CONFIGS = ("config.json", "adapter_config.json")
_WEIGHTS = re.compile(
    r"(?P<stem>adapter_model|pytorch_model|model)(?P<variant>\.[^.]+?)?(?P<shard>-\d{5}-of-\d{5})?"
    r"\.(?P<kind>safetensors|bin|onnx|onnx_data)(?P<index>\.index(?P<index_variant>\.[^.]+)?\.json)?"
)
# By kind, and whether it is an index: Transformers takes the first of these that it finds.
_FIRST_CHOICE = [("onnx", False), ("safetensors", False), ("safetensors", True), ("bin", False), ("bin", True)]

# Files of a tokenizer that are read if they are there, so those of an earlier one would be mixed with the new one's.
_TOKENIZER_FILES = (
    "added_tokens.json",
    "additional_chat_templates/*",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
)


class WrittenInPartError(OSError):
    """Files could neither be replaced nor put back; the message says where the old ones are."""


def holds_model(folder: Path) -> bool:
    """Returns whether there is a model in a folder, or what an interrupted write has left of one."""
    return folder.is_dir() and (
        any(_rank(Path(path.name)) for path in folder.iterdir()) or bool(_list_temporary(folder))
    )


@contextlib.contextmanager
def replace_model(
    folder: Path, *, all_variants: bool = False, check: Callable[[], None] | None = None
) -> Iterator[Path]:
    """Makes an empty folder in a folder, and when the block ends the files in it replace those of the model there.

    Weights of the old model that are not replaced are removed, as are the files of its tokenizer if the new model has
    one, and the temporary folders of writers that were killed. A README.md and files that are not a model's stay. If
    a file cannot be moved, those before it are moved back.

    Args:
        folder: The folder, which exists.
        all_variants: Whether old weights of any variant (model.fp16.safetensors) are removed, or only the new one's.
        check: Called before anything is changed, while no other writer can change anything, to raise.

    Raises:
        WrittenInPartError: If a file cannot be moved, and those before it cannot be moved back.
        OSError: If it cannot be written; nothing is changed then.
    """
    with _make_temporary(folder) as temporary:
        yield temporary / _NEW
        flush_files(temporary / _NEW)
        with _lock_folder(folder):
            if check is not None:
                check()
            _move_files(temporary, folder, all_variants)
            _remove_abandoned(folder, temporary)


def describe_interruption(folder: Path) -> str | None:
    """Says that a write into a folder has left no model in it, and what to do; returns None if none has."""
    found = _list_temporary(folder)
    if not found or any(_rank(Path(path.name)) > 1 for path in folder.iterdir()):
        return None
    replaced = [str(temporary / _OLD) for temporary in found if any((temporary / _OLD).glob("*"))]
    where = f"; the files of the model before are in {', '.join(replaced)}" if replaced else ""
    return (
        f"{folder}: a write of this folder is under way or was interrupted: expected a whole model, got "
        f"{', '.join(temporary.name for temporary in found)} and no weights{where}; if no program writes it now, "
        f"save the model again (`hugging-nano-gpt convert` and `export` with --force), which removes what is left"
    )


def _list_temporary(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{TEMPORARY}*") if (path / _NEW).is_dir()) if folder.is_dir() else []


@contextlib.contextmanager
def refuse_change(folder: Path) -> Iterator[None]:
    """Raises OSError if another model was written into a folder during the block: what was read may be of both."""
    before = _identify_config(folder)
    yield
    if _identify_config(folder) != before:
        raise OSError(describe_change(folder))


def describe_change(folder: Path) -> str:
    """Says that what was read of a folder may be of two models."""
    return f"{folder}: another model was written into it while it was read; load it again"


def _identify_config(folder: Path) -> tuple[int, ...] | None:
    try:
        facts = (folder / _CONFIGS[0]).stat()
    except (OSError, ValueError):  # none there, or a name of the Hub
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def name_temporary(folder: Path, suffix: str = "") -> Path:
    """Returns a path in a folder that nobody else uses."""
    return folder / f"{TEMPORARY}{secrets.token_hex(8)}{suffix}"


def flush_files(folder: Path) -> None:
    """Flushes the files in a folder to the disk, and gives them the permissions of new files."""
    mode = folder.stat().st_mode & 0o666  # what the umask leaves; safetensors makes files that only their owner reads
    for path in _list_files(folder):
        (folder / path).chmod(mode)
        with (folder / path).open("r+b") as file:  # Windows flushes no file that was opened for reading
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut, where the system lets a folder be opened."""
    with contextlib.suppress(OSError, AttributeError):  # Windows and some network drives cannot
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _make_temporary(folder: Path) -> Iterator[Path]:
    with _lock_folder(folder):  # so that nobody sees the folder before it is locked
        temporary = name_temporary(folder)
        temporary.mkdir()
        lock = (temporary / _LOCK).open("xb")
        with contextlib.suppress(OSError):  # some network drives have no locks: there, what killed writers leave stays
            _lock_file(lock, "LOCK_EX", "LOCK_NB")
    try:
        (temporary / _NEW).mkdir()
        yield temporary
    finally:
        lock.close()
        if not _list_files(temporary / _OLD):  # else they could not be moved back
            _remove_temporary(temporary)


def _remove_abandoned(folder: Path, own: Path) -> None:
    for temporary in folder.glob(f"{TEMPORARY}*"):
        if temporary != own and temporary.is_dir() and _is_abandoned(temporary / _LOCK):
            _remove_temporary(temporary)


def _remove_temporary(temporary: Path) -> None:
    """Removes the lock after all that it protects, so that a kill leaves it, or an empty folder."""
    for path in (temporary / _NEW, temporary / _OLD, temporary):
        shutil.rmtree(path, ignore_errors=True)  # Windows removes no file that a model has mapped


def _is_abandoned(lock: Path) -> bool:
    """Returns whether the writer who has made a lock has gone; False where that cannot be known."""
    try:
        with lock.open("r+b") as file:
            _lock_file(file, "LOCK_EX", "LOCK_NB")
        lock.rename(lock.with_name("abandoned"))  # which Windows refuses while the writer has it open
    except FileNotFoundError:  # killed before it was made, or after it was removed
        return True
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes and threads that move files in a folder waiting, where the system can."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, AttributeError):  # Windows and some network drives cannot
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            _lock_file(descriptor, "LOCK_EX")
            stack.callback(_lock_file, descriptor, "LOCK_UN")  # a process forked meanwhile has it open too
        yield


def _lock_file(file: BinaryIO | int, *operations: str) -> None:
    """Locks an open file for as long as it is open in a process that lives, or does what else flock knows.

    Raises:
        OSError: If another process or thread has locked it, with LOCK_NB; or if files cannot be locked here.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where a file that is open cannot be removed
        return
    fcntl.flock(file, sum(getattr(fcntl, operation) for operation in operations))


def _list_files(folder: Path) -> list[Path]:
    """Lists the files in a folder and its subfolders, from there."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _move_files(temporary: Path, folder: Path, all_variants: bool) -> None:
    new = [path for path in _list_files(temporary / _NEW) if path != Path("README.md") or not (folder / path).exists()]
    old = {path for path in new if os.path.lexists(folder / path)} | _find_stale(folder, new, all_variants)
    moves = [(path, folder, temporary / _OLD) for path in sorted(sorted(old), key=_rank, reverse=True)]
    moves += [(path, temporary / _NEW, folder) for path in sorted(new, key=_rank)]
    done: list[tuple[Path, Path]] = []  # from where to where
    try:
        for _, step in itertools.groupby(moves, key=lambda move: _rank(move[0]) > 1):
            changed = set()
            for path, source, goal in step:
                (goal / path).parent.mkdir(parents=True, exist_ok=True)
                (source / path).rename(goal / path)
                done.append((source / path, goal / path))
                changed.add((folder / path).parent)
            for changed_folder in changed:  # so that a power cut finds no later step without this one
                sync_folder(changed_folder)
    except BaseException:
        _move_back(done, folder, temporary)
        raise
    shutil.rmtree(temporary / _OLD, ignore_errors=True)


def _move_back(done: list[tuple[Path, Path]], folder: Path, temporary: Path) -> None:
    try:
        for source, goal in reversed(done):
            goal.rename(source)
    except OSError as error:
        raise WrittenInPartError(
            f"{folder}: is written in part: {error.strerror}; move the files in {temporary / _OLD} back into it"
        ) from error


def _find_stale(folder: Path, new: list[Path], all_variants: bool) -> set[Path]:
    """Finds the files of the old model that a reader of the new one would take for its own."""
    families = {_find_family(path, all_variants) for path in new} - {None}
    files = [Path(path.name) for path in folder.iterdir() if path.is_file()]
    stale = {path for path in files if _find_family(path, all_variants) in families}
    if Path("tokenizer_config.json") in new:
        stale |= {path.relative_to(folder) for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}
    return stale - set(new)


def _find_family(path: Path, all_variants: bool) -> tuple[object, ...] | None:
    """Returns what files of weights have in common that replace each other, or None for another file."""
    weights = _WEIGHTS.fullmatch(str(path))
    if weights is None:
        return None
    of_adapter = (weights["stem"] == "adapter_model",)
    variant = weights["variant"] or weights["index_variant"]
    return of_adapter if all_variants else (*of_adapter, variant, weights["kind"].startswith("onnx"))


def _rank(path: Path) -> int:
    """Returns how late a file comes into a folder: 0 for most, 1 for a config.json, more for what opens weights."""
    weights = _WEIGHTS.fullmatch(str(path))
    if weights and not weights["shard"] and weights["kind"] != "onnx_data":
        return 2 + _FIRST_CHOICE.index((weights["kind"], weights["index"] is not None))
    return 1 if str(path) in _CONFIGS else 0
