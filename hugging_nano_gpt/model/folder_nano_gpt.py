"""Replaces the model in a folder: at every moment, the folder has the old model, the new one, or none that loads.

The new files are written into a temporary subfolder, `.writing-*`, and flushed to disk. Then files are renamed in this
order: the old weights move out (model.safetensors, the index of sharded weights, or model.onnx), then config.json; the
other files are replaced; the new config.json moves in, and the new weights last. Weights come first and last because
GPT2LMHeadModel.from_pretrained loads them without a config.json, with its default configuration. Nothing outside the
folder is changed, so it may be a mount point. A reader that gets the old config.json and the new weights is found by
`refuse_change`. This file travels with saved models as remote code.
"""

import contextlib
import itertools
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

# The prefix of files and folders that are not complete yet.
TEMPORARY = ".writing-"

# In a temporary folder: the new files, those that they replace, and a file that is locked while its writer runs.
_NEW, _OLD, _LOCK = "new", "old", "lock"

_CONFIGS = ("config.json", "adapter_config.json")
_WEIGHTS = re.compile(
    r"(?P<stem>adapter_model|pytorch_model|model)(?P<variant>\.[^.]+?)?(?P<shard>-\d{5}-of-\d{5})?"
    r"\.(?P<kind>safetensors|bin|onnx|onnx_data)(?P<index>\.index(?P<index_variant>\.[^.]+)?\.json)?"
)
# Kind of file, and whether it is an index: Transformers loads the first of these that it finds.
_FIRST_CHOICE = [("onnx", False), ("safetensors", False), ("safetensors", True), ("bin", False), ("bin", True)]

# Optional files of a tokenizer: if those of an earlier one stayed, they would be read with the new one's.
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

# Code that earlier versions saved with a model, and that the modeling file does not import any more.
_FORMER_CODE = ("block_nano_gpt.py", "cache_nano_gpt.py", "kernels_nano_gpt.py", "vocabulary_nano_gpt.py")


class WrittenInPartError(OSError):
    """Some files were replaced, and could not be moved back; the message says where the old ones are."""


def contains_model(folder: Path) -> bool:
    """Returns whether a folder contains a model, or the rest of an interrupted write."""
    return folder.is_dir() and (
        any(_rank(Path(path.name)) for path in folder.iterdir()) or bool(_list_temporary(folder))
    )


@contextlib.contextmanager
def replace_model(
    folder: Path,
    *,
    all_variants: bool = False,
    stale: Collection[str] = (),
    check: Callable[[], None] | None = None,
) -> Iterator[Path]:
    """Yields an empty temporary folder, whose files replace those of the model in the folder when the block ends.

    The old weights are removed, and the old tokenizer's files if the new model has one, the old remote code if it has
    that, and the temporary folders of writers that were killed. The README.md and other files stay. If a file cannot
    be moved, those that were moved before it are moved back.

    Args:
        folder: An existing folder.
        all_variants: Whether to remove old weights of all variants (model.fp16.safetensors) or only of the new one.
        stale: Patterns of the names of other files to remove.
        check: Called just before files are moved, while no other writer can move any; it may raise.

    Raises:
        WrittenInPartError: If a file cannot be moved, and another one cannot be moved back.
        OSError: If the folder cannot be written; nothing was changed.
    """
    with _make_temporary(folder) as temporary:
        yield temporary / _NEW
        flush_files(temporary / _NEW)
        with _lock_folder(folder):
            if check is not None:
                check()
            _move_files(temporary, folder, all_variants, stale)
            _remove_abandoned(folder, temporary)


def describe_interruption(folder: Path) -> str | None:
    """Returns the error message for a folder that has no model because of an interrupted write, else None."""
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
    """Raises OSError if another model was written into a folder during the block, which may have read both."""
    before = _identify_config(folder)
    yield
    if _identify_config(folder) != before:
        raise OSError(describe_change(folder))


def describe_change(folder: Path) -> str:
    """Returns the error message for a folder that was read while another model was written into it."""
    return f"{folder}: another model was written into it while it was read; load it again"


def _identify_config(folder: Path) -> tuple[int, ...] | None:
    try:
        facts = (folder / _CONFIGS[0]).stat()
    except (OSError, ValueError):  # no such file, or the name of a model on the Hub
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def name_temporary(folder: Path, suffix: str = "") -> Path:
    """Returns a path in a folder that no other writer uses."""
    return folder / f"{TEMPORARY}{secrets.token_hex(8)}{suffix}"


def flush_files(folder: Path) -> None:
    """Flushes the files in a folder to disk, and gives them the permissions of new files."""
    mode = folder.stat().st_mode & 0o666  # by the umask; safetensors makes files that only their owner can read
    for path in _list_files(folder):
        (folder / path).chmod(mode)
        with (folder / path).open("r+b") as file:  # Windows does not flush a file that was opened for reading
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flushes renames in a folder to disk, on systems that can open a folder."""
    with contextlib.suppress(OSError, AttributeError):  # Windows and some network drives cannot
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _make_temporary(folder: Path) -> Iterator[Path]:
    with _lock_folder(folder):  # so that no other writer sees the new folder without its lock
        temporary = name_temporary(folder)
        temporary.mkdir()
        lock = (temporary / _LOCK).open("xb")
        with contextlib.suppress(OSError):  # some network drives have no locks; there nothing is ever abandoned
            _lock_file(lock, "LOCK_EX", "LOCK_NB")
    try:
        (temporary / _NEW).mkdir()
        yield temporary
    finally:
        lock.close()
        if not _list_files(temporary / _OLD):  # else these could not be moved back
            _remove_temporary(temporary)


def _remove_abandoned(folder: Path, own: Path) -> None:
    for temporary in folder.glob(f"{TEMPORARY}*"):
        if temporary != own and temporary.is_dir() and _is_abandoned(temporary / _LOCK):
            _remove_temporary(temporary)


def _remove_temporary(temporary: Path) -> None:
    """Removes the lock last, so that a kill leaves the lock or an empty folder."""
    for path in (temporary / _NEW, temporary / _OLD, temporary):
        shutil.rmtree(path, ignore_errors=True)  # Windows does not remove a file that a model has mapped


def _is_abandoned(lock: Path) -> bool:
    """Returns whether the writer of a lock has ended; False if that is not known."""
    try:
        with lock.open("r+b") as file:
            _lock_file(file, "LOCK_EX", "LOCK_NB")
        lock.rename(lock.with_name("abandoned"))  # Windows refuses this while the writer has it open
    except FileNotFoundError:  # the writer was killed before it made the lock, or after it removed it
        return True
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Makes other processes and threads wait that want to move files in a folder, if the system can lock folders."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, AttributeError):  # Windows and some network drives cannot
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            _lock_file(descriptor, "LOCK_EX")
            stack.callback(_lock_file, descriptor, "LOCK_UN")  # a process that was forked meanwhile has it open too
        yield


def _lock_file(file: BinaryIO | int, *operations: str) -> None:
    """Calls flock; raises OSError if files cannot be locked here, or with LOCK_NB if another process has the lock."""
    try:
        import fcntl
    except ImportError:  # Windows, where an open file cannot be removed anyway
        return
    fcntl.flock(file, sum(getattr(fcntl, operation) for operation in operations))


def _list_files(folder: Path) -> list[Path]:
    """Lists the files in a folder and its subfolders, relative to the folder."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _move_files(temporary: Path, folder: Path, all_variants: bool, stale: Collection[str]) -> None:
    new = [path for path in _list_files(temporary / _NEW) if path != Path("README.md") or not (folder / path).exists()]
    old = {path for path in new if os.path.lexists(folder / path)} | _find_stale(folder, new, all_variants, stale)
    moves = [(path, folder, temporary / _OLD) for path in sorted(sorted(old), key=_rank, reverse=True)]
    moves += [(path, temporary / _NEW, folder) for path in sorted(new, key=_rank)]
    done: list[tuple[Path, Path]] = []  # old path, new path
    try:
        for _, step in itertools.groupby(moves, key=lambda move: _rank(move[0]) > 1):
            changed = set()
            for path, source, goal in step:
                (goal / path).parent.mkdir(parents=True, exist_ok=True)
                (source / path).rename(goal / path)
                done.append((source / path, goal / path))
                changed.add((folder / path).parent)
            for changed_folder in changed:  # so that after a power cut no later step is on disk without this one
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


def _find_stale(folder: Path, new: list[Path], all_variants: bool, patterns: Collection[str]) -> set[Path]:
    """Finds the files of the old model that would be read as the new model's."""
    families = {_find_family(path, all_variants) for path in new} - {None}
    files = [Path(path.name) for path in folder.iterdir() if path.is_file()]
    stale = {path for path in files if _find_family(path, all_variants) in families}
    patterns = [*patterns, *(_TOKENIZER_FILES if Path("tokenizer_config.json") in new else ())]
    stale |= {path.relative_to(folder) for pattern in patterns for path in folder.glob(pattern)}
    if Path("modeling_nano_gpt.py") in new:
        stale |= {path for path in files if path.name in _FORMER_CODE}
    return stale - set(new)


def _find_family(path: Path, all_variants: bool) -> tuple[object, ...] | None:
    """Returns the same key for files of weights that replace each other, and None for other files."""
    weights = _WEIGHTS.fullmatch(str(path))
    if weights is None:
        return None
    of_adapter = (weights["stem"] == "adapter_model",)
    variant = weights["variant"] or weights["index_variant"]
    return of_adapter if all_variants else (*of_adapter, variant, weights["kind"].startswith("onnx"))


def _rank(path: Path) -> int:
    """Returns how late a file moves in: 0 for most, 1 for config.json and tokens, more for what opens the weights."""
    weights = _WEIGHTS.fullmatch(str(path))
    if weights and not weights["shard"] and weights["kind"] != "onnx_data":
        return 2 + _FIRST_CHOICE.index((weights["kind"], weights["index"] is not None))
    return 1 if str(path) in _CONFIGS or path.suffix == ".bin" else 0
