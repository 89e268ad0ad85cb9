"""What Windows does differently, simulated: files that it does not move or flush, no locks, code page 1252."""

import ast
import errno
import gc
import io
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import hugging_nano_gpt_cli
from hugging_nano_gpt import (
    NanoGPTLMHeadModel,
    convert_to_checkpoint,
    convert_to_folder,
    read_checkpoint,
    read_meta,
    write_meta,
)
from hugging_nano_gpt.convert.source import load_source
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH
from hugging_nano_gpt.export.exporting import export_model
from hugging_nano_gpt.files.files import open_atomically, open_folder

from .helpers.folders import ROOT, list_files
from .helpers.tiny import make_batch, make_model

SOURCES = [
    *(ROOT / "hugging_nano_gpt_cli").glob("*.py"),
    *(ROOT / "hugging_nano_gpt").rglob("*.py"),
    *(ROOT / "examples").glob("*.py"),
]
O_BINARY = 1 << 40  # not a flag of this system
IDX = make_batch(1, 16)[0]


def is_open(path):
    """Returns whether this process has a file open, as /proc shows it."""
    with os.scandir("/proc/self/fd") as descriptors:
        return any(os.path.realpath(descriptor.path) == os.path.realpath(path) for descriptor in descriptors)


def is_mapped(path):
    lines = Path("/proc/self/maps").read_text().splitlines()
    return any(line.endswith(f" {os.path.realpath(path)}") for line in lines)


def refuse_if(refused, path):
    if refused:
        raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))


@pytest.fixture
def windows(monkeypatch):
    """A Linux that refuses what Windows refuses, and lacks what Windows lacks."""
    fcntl = pytest.importorskip("fcntl", reason="this is Windows")
    fsync, rename, replace, unlink, open_file = os.fsync, os.rename, os.replace, os.unlink, os.open

    def fsync_writable(descriptor):
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        fsync(descriptor)

    def rename_free(source, goal, **kwargs):
        if os.path.lexists(goal):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(source), None, str(goal))
        refuse_if(is_open(source), source)
        rename(source, goal, **kwargs)

    def replace_free(source, goal, **kwargs):
        refuse_if(is_open(source) or is_open(goal) or is_mapped(goal) or Path(goal).is_dir(), goal)
        replace(source, goal, **kwargs)

    def unlink_free(path, **kwargs):
        refuse_if(is_open(path) or is_mapped(path), path)
        unlink(path, **kwargs)

    def open_binary(path, flags, *args, **kwargs):
        refuse_if(Path(path).is_dir(), path)
        assert flags & O_BINARY or ".writing-" not in str(path), "each newline would be two bytes"
        return open_file(path, flags & ~O_BINARY, *args, **kwargs)

    for name, function in {
        "fsync": fsync_writable,
        "rename": rename_free,
        "replace": replace_free,
        "unlink": unlink_free,
        "remove": unlink_free,
        "open": open_binary,
    }.items():
        monkeypatch.setattr(os, name, function)
    monkeypatch.setattr(os, "O_BINARY", O_BINARY, raising=False)
    for name in ("O_DIRECTORY", "preadv"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    monkeypatch.setitem(sys.modules, "fcntl", None)


@pytest.mark.parametrize(
    "call",
    [
        lambda path, file: os.fsync(file.fileno()),
        lambda path, file: path.unlink(),
        lambda path, file: path.rename(f"{path}.old"),
        lambda path, file: path.with_name("other").rename(path),
        lambda path, file: path.with_name("other").replace(path),
        lambda path, file: os.open(path.parent, os.O_RDONLY),
    ],
)
def test_simulation_refuses_what_windows_refuses(windows, tmp_path, call):
    for name in ("file", "other"):
        (tmp_path / name).write_bytes(b"")
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError):  # noqa: PT011  # of several kinds
        call(tmp_path / "file", file)


def test_conversions_over_what_is_there_pass(windows, tmp_path):
    folder, ckpt_path = tmp_path / "folder", tmp_path / "ckpt.pt"
    for _ in range(2):
        convert_to_folder(CKPT_PATH, folder, meta_path=META_PATH, overwrite=True)
        convert_to_checkpoint(folder, ckpt_path, overwrite=True)
        export_model(ckpt_path, tmp_path / "gpt2", to="gpt2", meta_path=META_PATH, overwrite=True)
        write_meta(read_meta(META_PATH), tmp_path / "meta.pkl", overwrite=True)
        gc.collect()
    expected = read_checkpoint(CKPT_PATH, with_optimizer=False).state_dict
    found = read_checkpoint(ckpt_path, with_optimizer=False).state_dict
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert read_meta(tmp_path / "meta.pkl") == read_meta(META_PATH)
    assert torch.equal(
        load_source(folder).model(IDX).logits, NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)(IDX).logits
    )
    assert not [name for name in list_files(tmp_path) if ".writing-" in name]


def test_model_is_saved_over_the_folder_and_the_checkpoint_that_it_is_from(windows, tmp_path):
    make_model(0).save_pretrained(tmp_path)
    model = NanoGPTLMHeadModel.from_pretrained(tmp_path)
    assert is_mapped(tmp_path / "model.safetensors")
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
    model.save_pretrained(tmp_path)
    (kept,) = tmp_path.glob(".writing-*/old/model.safetensors")  # while a model has it mapped
    assert is_mapped(kept)
    expected = model(IDX).logits.detach()  # without detach it would keep the weights
    del model
    gc.collect()
    model = NanoGPTLMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(model(IDX).logits, expected)
    for _ in range(2):
        model.to_nanogpt_ckpt(tmp_path / "ckpt.pt", overwrite=True)
        model = NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt")
    gc.collect()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob(".writing-*"))


def test_bytes_are_written_as_they_are_and_folders_keep_their_writers_apart(windows, tmp_path):
    for _ in range(2):
        with open_atomically(tmp_path / "file") as file:
            file.write(b"1\n2\r\n\x1a")
    assert (tmp_path / "file").read_bytes() == b"1\n2\r\n\x1a"
    folder = tmp_path / "folder"
    folder.mkdir()
    with open_folder(folder, overwrite=True) as temporary:
        (temporary / "config.json").write_text("last")
        with open_folder(folder, overwrite=True) as other:
            (other / "config.json").write_text("first")
        assert (temporary / "config.json").exists()
    abandoned = folder / ".writing-0"
    (abandoned / "new").mkdir(parents=True)
    (abandoned / "lock").write_bytes(b"")
    with open_folder(folder, overwrite=True) as temporary:
        (temporary / "config.json").write_text("very last")
    assert list_files(folder) == ["config.json"]
    assert (folder / "config.json").read_text() == "very last"


def test_failed_move_is_moved_back_while_a_reader_has_a_file_open(windows, tmp_path):
    make_model(0).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with (tmp_path / "config.json").open("rb"), pytest.raises(PermissionError):
        make_model(1).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_pipes_of_the_command_are_in_utf8(monkeypatch):
    pipes = {
        name: io.TextIOWrapper(io.BytesIO(b"\xd0\x96"), encoding="cp1252") for name in ("stdin", "stdout", "stderr")
    }
    for name, pipe in pipes.items():
        monkeypatch.setattr(sys, name, pipe)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(hugging_nano_gpt_cli.program, "app", lambda: print(sys.stdin.read() == "\u0416", "\u0416"))
    hugging_nano_gpt_cli.main()
    pipes["stdout"].flush()
    assert pipes["stdout"].buffer.getvalue() == b"True \xd0\x96\n"


def find_calls_without_encoding(source):
    """Finds the calls that open a text, or a program's, in the system's encoding; returns their lines."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and lacks_encoding(node)]


def lacks_encoding(call):
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    is_method = isinstance(call.func, ast.Attribute)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if "encoding" in given or (name == "open" and is_method and ast.unparse(call.func.value) in ("os", "webbrowser")):
        return False
    if name in ("read_text", "write_text"):
        return is_method
    if name in ("run", "Popen", "check_output"):
        return "True" in (given.get("text"), given.get("universal_newlines"))
    constants = [str(argument.value) for argument in call.args if isinstance(argument, ast.Constant)]
    return name in ("open", "fdopen", "NamedTemporaryFile") and not any("b" in mode for mode in constants[-1:])


def test_every_text_is_opened_in_utf8():
    found = {str(path): lines for path in SOURCES if (lines := find_calls_without_encoding(path.read_text("utf-8")))}
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "path.read_text()",
        "path.write_text(text)",
        "path.open()",
        'open(path, "w")',
        'os.fdopen(1, "w")',
        "run(c, text=True)",
    ],
)
def test_text_that_is_not_opened_in_utf8_is_found(source):
    assert find_calls_without_encoding(source) == [1]
    assert not find_calls_without_encoding(f'{source[:-1]}, encoding="utf-8")'.replace("(, ", "("))


@pytest.mark.parametrize(
    "source", ['path.open("rb")', 'os.fdopen(1, "wb")', "os.open(path, 0)", "read_text(path)", "run(c)"]
)
def test_bytes_need_no_encoding(source):
    assert not find_calls_without_encoding(source)
