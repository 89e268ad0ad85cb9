"""files.py: when writing fails or is killed, the old file or the complete new one is under its name.

The writers that are killed at random moments have a seed, which is printed when one fails and can be set:
KILL_SEED=7 python -m pytest tests/files/test_files.py
"""

import errno
import functools
import os
import random
import re
import stat
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hugging_nano_gpt import CheckpointError, ConversionError, read_checkpoint, write_checkpoint
from hugging_nano_gpt.checkpoint import nanogpt
from hugging_nano_gpt.files.files import check_folder, open_atomically, open_folder

from ..helpers.children import KILL_SEED, forks, start_child
from ..helpers.comparison import assert_same
from ..helpers.folders import read_files
from ..helpers.limits import limit_file_size, limit_time

OLD, NEW = b"old", b"new" * 1000
KILLS = 20


@pytest.fixture
def old_path(tmp_path) -> Path:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(OLD)
    return path


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def write(path, data=NEW):
    with open_atomically(path) as file:
        file.write(data)


def assert_untouched(path):
    assert path.read_bytes() == OLD
    assert list(path.parent.iterdir()) == [path]


def assert_written(path):
    assert path.read_bytes() == NEW
    assert list(path.parent.iterdir()) == [path]


def get_mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("as_type", [str, Path])
def test_write_over_old_file_replaces_it(old_path, as_type):
    write(as_type(old_path))
    assert_written(old_path)


def test_write_shows_the_new_file_only_when_complete(old_path):
    with open_atomically(old_path) as file:
        file.write(NEW)
        file.flush()
        assert old_path.read_bytes() == OLD
    assert_written(old_path)


@pytest.mark.parametrize("error", [ValueError("fault"), KeyboardInterrupt("fault"), SystemExit("fault")], ids=repr)
def test_write_failing_inside_the_block_keeps_the_old_file(old_path, error):
    def fail():
        with open_atomically(old_path) as file:
            file.write(NEW)
            raise error

    with pytest.raises(type(error), match="fault"):
        fail()
    assert_untouched(old_path)


def test_write_failing_without_an_old_file_leaves_nothing(tmp_path):
    def fail():
        with open_atomically(tmp_path / "ckpt.pt"):
            raise ValueError("fault")

    with pytest.raises(ValueError, match="fault"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_write_beyond_the_room_keeps_the_old_file(old_path):
    with (
        limit_file_size(2000),
        pytest.raises(CheckpointError, match=r"cannot be written: File too large; .* has room"),
    ):
        write(old_path)
    assert_untouched(old_path)


@pytest.mark.parametrize("function", ["fsync", "replace", "chmod"])
def test_write_refused_by_the_system_keeps_the_old_file(old_path, monkeypatch, function):
    def refuse(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, refuse)
    message = f"{re.escape(str(old_path))}: cannot be written: No space left on device; .*untouched, choose a place"
    with pytest.raises(CheckpointError, match=message):
        write(old_path)
    assert_untouched(old_path)


def test_write_where_folders_cannot_be_flushed_succeeds(old_path, monkeypatch):
    """Some network file systems refuse to flush a folder; by then the file has its name: the write succeeded."""
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write(old_path)
    assert_written(old_path)


def test_write_flushes_file_and_folder(old_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(stat.S_ISDIR(os.fstat(descriptor).st_mode)))
    write(old_path)
    assert flushed == [False, True]


def test_write_through_a_link_replaces_its_target(old_path):
    folder = old_path.parent / "links"
    folder.mkdir()
    link = folder / "latest.pt"
    link.symlink_to("../ckpt.pt")
    write(link)
    assert link.is_symlink()
    assert old_path.read_bytes() == NEW
    assert list(folder.iterdir()) == [link]


def test_write_through_a_dangling_link_makes_its_target(tmp_path):
    (tmp_path / "link.pt").symlink_to(tmp_path / "folder" / "ckpt.pt")
    write(tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    assert_written(tmp_path / "folder" / "ckpt.pt")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_write_over_old_file_keeps_its_permissions(old_path, umask, mode):
    old_path.chmod(mode)
    write(old_path)
    assert get_mode(old_path) == mode


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_write_new_file_uses_the_umask(tmp_path, umask, mask, mode):
    umask(mask)
    write(tmp_path / "ckpt.pt")
    assert get_mode(tmp_path / "ckpt.pt") == mode
    assert umask(mask) == mask


def test_write_into_missing_folders_makes_them(tmp_path):
    write(tmp_path / "a" / "b" / "ckpt.pt")
    assert_written(tmp_path / "a" / "b" / "ckpt.pt")


def test_write_under_the_longest_name_succeeds(tmp_path):
    write(tmp_path / ("x" * 255))
    assert_written(tmp_path / ("x" * 255))


def test_write_over_a_folder_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(
        CheckpointError, match=r"out: cannot be written: it is a directory.*not a file; .*choose a place"
    ):
        write(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_write_over_a_pipe_is_refused(tmp_path):
    """So that writing to /dev/null as root does not replace the device for the whole machine."""
    path = tmp_path / "pipe"
    if not hasattr(os, "mkfifo"):
        pytest.skip("Windows has no pipes among files")
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="pipe: cannot be written"):
        write(path)
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


def test_write_to_an_impossible_name_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "ckpt\0.pt")
    assert list(tmp_path.iterdir()) == []


def test_write_into_a_file_as_folder_is_refused(old_path):
    with pytest.raises(CheckpointError, match=r"ckpt\.pt/new\.pt: cannot be written: "):
        write(old_path / "new.pt")
    assert_untouched(old_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_write_into_a_locked_folder_is_refused(old_path):
    old_path.parent.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="cannot be written: Permission denied; "):
            write(old_path)
        assert_untouched(old_path)
    finally:
        old_path.parent.chmod(0o700)


# Killing the writer


@forks
def test_write_killed_half_way_keeps_the_old_file(old_path):
    def write_half(ready):
        with open_atomically(old_path) as file:
            file.write(NEW[:1000])
            file.flush()
            ready()
            time.sleep(60)

    with limit_time(20), start_child(write_half):
        pass
    assert old_path.read_bytes() == OLD
    write(old_path)
    assert old_path.read_bytes() == NEW


@pytest.fixture
def both(checkpoint):
    """Two checkpoints that differ in every tensor and in length."""
    state = checkpoint.training_state
    second = replace(
        checkpoint,
        state_dict={name: tensor + 1 for name, tensor in checkpoint.state_dict.items()},
        training_state=replace(state, iter_num=8, config={"notes": "x" * 10_000}),
    )
    return checkpoint, second


def list_contents(checkpoint):
    state = checkpoint.training_state
    optimizer = (state.optimizer.settings, state.optimizer.moments)
    return checkpoint.state_dict, checkpoint.model_args, state.iter_num, state.best_val_loss, state.config, optimizer


def is_same(left, right):
    try:
        assert_same(list_contents(left), list_contents(right))
    except AssertionError:
        return False
    return True


def write_in_place(checkpoint, path):
    """Writes as nanoGPT's train.py does."""
    with path.open("wb") as file:
        nanogpt.write(checkpoint, file)


def kill_writers(write, both, path):
    """Kills writers of two checkpoints over one path; yields after each which of the two is found, or the error."""
    parent, rng = os.getpid(), random.Random(KILL_SEED)
    write(both[0], path)
    start_s = time.monotonic()
    write(both[1], path)
    period_s = time.monotonic() - start_s

    def write_in_turn(ready):
        ready()
        while os.getppid() == parent:  # no child outlives the tests
            for checkpoint in both:
                write(checkpoint, path)

    for _ in range(KILLS):
        with start_child(write_in_turn):
            time.sleep(rng.uniform(0, 4 * period_s))
        try:
            found = read_checkpoint(path)
        except CheckpointError as error:
            yield str(error)
        else:
            yield "first" if is_same(found, both[0]) else "second" if is_same(found, both[1]) else "neither"


@forks
def test_write_checkpoint_killed_at_random_moments_leaves_the_old_or_the_new(both, tmp_path):
    path = tmp_path / "out" / "ckpt.pt"
    with limit_time(60):
        outcomes = list(kill_writers(functools.partial(write_checkpoint, overwrite=True), both, path))
    assert [outcome for outcome in outcomes if outcome not in ("first", "second")] == [], f"KILL_SEED={KILL_SEED}"
    assert len(outcomes) == KILLS
    half_written = list(path.parent.glob(".writing-*"))
    assert half_written, f"no writer was caught at work, with KILL_SEED={KILL_SEED}"
    assert sorted(path.parent.iterdir()) == sorted([path, *half_written])


@forks
def test_write_in_place_killed_at_random_moments_leaves_neither(both, tmp_path):
    """Shows that the test above can find a file that is neither of the two."""
    with limit_time(60):
        outcomes = list(kill_writers(write_in_place, both, tmp_path / "ckpt.pt"))
    assert any(re.search("damaged or cut off|an empty file", outcome) for outcome in outcomes), (
        f"KILL_SEED={KILL_SEED}"
    )


# Folders.


def write_folder(folder, files, overwrite=False):
    with open_folder(Path(folder), overwrite) as temporary:
        for name, text in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text)


MODEL = {"config.json": "{}", "model.safetensors": "new", "templates/tool.jinja": "x"}


@pytest.fixture
def elsewhere():
    """A folder on another file system, if one exists."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        yield Path(name)


@pytest.mark.parametrize("name", ["new", "new/deeper/still", "empty", "."])
def test_folder_is_written_wherever_save_pretrained_writes(tmp_path, monkeypatch, name):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if name == "." else tmp_path)
    write_folder(name, MODEL)
    assert read_files(Path(name)) == MODEL
    assert Path.cwd().exists()  # it is the same folder as before


@pytest.mark.parametrize("is_empty", [True, False])
def test_folder_behind_a_link_to_another_file_system_is_written_there(tmp_path, elsewhere, is_empty):
    if not is_empty:
        (elsewhere / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(elsewhere)
    write_folder(tmp_path / "link", MODEL, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert read_files(elsewhere) == MODEL | ({} if is_empty else {"notes.txt": "mine"})


def test_folder_that_is_there_needs_nothing_of_its_parent(tmp_path, monkeypatch):
    """A mount point, or a writable folder in a read-only one: nothing is created next to it, and it stays."""
    folder = tmp_path / "out"
    folder.mkdir()
    number, made, mkdir = folder.stat().st_ino, [], Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda path, *args, **kwargs: made.append(path) or mkdir(path, *args, **kwargs))
    write_folder(folder, MODEL)
    assert all(path.is_relative_to(folder) for path in made)
    assert folder.stat().st_ino == number
    assert read_files(folder) == MODEL
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_link_to_nothing_is_refused_as_one(tmp_path, overwrite):
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(ConversionError, match="expected a folder, got a link to nothing"):
        check_folder(tmp_path / "out", overwrite)


@pytest.mark.parametrize("is_there", [True, False], ids=["an empty folder", "a new folder"])
def test_of_two_writers_of_one_place_one_wins_and_the_other_says_so(tmp_path, is_there):
    folder = tmp_path / "out"
    if is_there:
        folder.mkdir()

    def write_late():
        with open_folder(folder, False) as temporary:
            (temporary / "config.json").write_text("late")
            write_folder(folder, MODEL)

    with pytest.raises(ConversionError, match=r"another process has written .*in the meantime; nothing was changed"):
        write_late()
    assert read_files(folder) == MODEL
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_writers_that_overwrite_do_not_mix(tmp_path):
    """In threads instead of processes, because the lock is the folder's."""
    folder = tmp_path / "out"
    write_folder(folder, {})
    whole = [{name: str(number) for name in ("config.json", "model.safetensors", "b", "c")} for number in range(20)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda files: write_folder(folder, files, overwrite=True), whole))
    assert read_files(folder) in whole


@pytest.mark.parametrize("failing", range(1, 8))
def test_folder_is_as_before_when_a_move_fails(tmp_path, monkeypatch, failing):
    before = {
        "config.json": "old",
        "model-00001-of-00002.safetensors": "old",
        "templates/tool.jinja": "old",
        "mine": "",
    }
    write_folder(tmp_path / "out", before)
    rename, calls = Path.rename, []

    def refuse(path, goal):
        calls.append(path)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(path, goal)

    monkeypatch.setattr(Path, "rename", refuse)
    if failing > 6:
        write_folder(tmp_path / "out", MODEL, overwrite=True)
        assert read_files(tmp_path / "out") == MODEL | {"mine": ""}
        return
    with pytest.raises(ConversionError, match="cannot be written: No space left on device; nothing was changed"):
        write_folder(tmp_path / "out", MODEL, overwrite=True)
    assert read_files(tmp_path / "out") == before


def test_folder_that_cannot_be_put_back_keeps_the_old_files_and_says_where(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", {"config.json": "old", "model.safetensors": "old"})
    rename, calls = Path.rename, []

    def refuse(path, goal):
        calls.append(path)
        if len(calls) >= 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, goal)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(
        ConversionError, match=r"is written in part: Input/output error; move the files in .*\.writing-"
    ):
        write_folder(tmp_path / "out", MODEL, overwrite=True)
    assert sorted(read_files(tmp_path / "out").values()).count("old") == 2


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_folder_honours_the_umask_and_nobody_changes_it(tmp_path, umask, monkeypatch, mask, mode):
    umask(mask)
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("other threads would write with it"))
    write(tmp_path / "file")
    write_folder(tmp_path / "out", MODEL)
    assert {get_mode(path) for path in (tmp_path / "out").rglob("*") if path.is_file()} == {mode}
    assert get_mode(tmp_path / "file") == mode
    assert get_mode(tmp_path / "out") == get_mode(tmp_path / "out" / "templates") == 0o777 & ~mask
