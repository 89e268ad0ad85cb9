"""formats/atomic.py: whatever happens while a file is written, the old one or the whole new one is under its name."""

import errno
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hugging_nano_gpt import CheckpointError
from hugging_nano_gpt.formats.atomic import open_atomically

from .conftest import limit_file_size

OLD, NEW = b"old", b"new" * 1000


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
    """Some network file systems refuse to flush a folder; by then the file has its name, so nothing has failed."""
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
def test_write_new_file_honours_the_umask(tmp_path, umask, mask, mode):
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
    with pytest.raises(CheckpointError, match=r"out: cannot be written: it is a directory; give a file name, such as"):
        write(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_write_over_a_pipe_is_refused(tmp_path):
    """So that writing to /dev/null as root does not replace the device for the whole machine."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="pipe: cannot be written"):
        write(path)
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


def test_write_into_a_file_as_folder_is_refused(old_path):
    with pytest.raises(CheckpointError, match=r"ckpt\.pt/new\.pt: cannot be written: "):
        write(old_path / "new.pt")
    assert_untouched(old_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_write_into_a_locked_folder_is_refused(old_path):
    old_path.parent.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="cannot be written: Permission denied; "):
            write(old_path)
        assert_untouched(old_path)
    finally:
        old_path.parent.chmod(0o700)


def test_write_killed_half_way_keeps_the_old_file(old_path):
    program = f"""
import time
from hugging_nano_gpt.formats.atomic import open_atomically
with open_atomically({str(old_path)!r}) as file:
    file.write({NEW!r})
    file.flush()
    print("half way", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "half way\n"
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert old_path.read_bytes() == OLD
    write(old_path)
    assert old_path.read_bytes() == NEW
