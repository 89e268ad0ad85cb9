"""checkpoint/file.py: every tensor is read bit for bit; every damaged, crafted or odd file is refused."""

import os
import pickle
import re
import sys
import zipfile
from collections import Counter, OrderedDict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from hugging_nano_gpt import CheckpointError
from hugging_nano_gpt.checkpoint.file import CheckpointFile
from hugging_nano_gpt.files.files import open_source

from ..helpers.comparison import assert_same
from ..helpers.contents import save
from ..helpers.limits import limit_time
from ..helpers.tiny import FIXTURES_DIR

TRUNCATIONS = 20

MATRIX = torch.arange(24, dtype=torch.float32).reshape(4, 6)

TENSORS = {
    "float32": torch.tensor([0.1, -0.0, float("nan"), float("-inf")]),
    "float64": torch.tensor([0.1], dtype=torch.float64),
    "float16": torch.tensor([0.1, 65504.0], dtype=torch.float16),
    "bfloat16": torch.tensor([0.1, 3e38], dtype=torch.bfloat16),
    "int64": torch.tensor([-1, 2**62]),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "crop of rows": MATRIX[1:3],
    "crop of columns": MATRIX[:, 2:5],
    "strided": MATRIX[::2, ::3],
    "transposed": MATRIX.T,
    "stride of 0 without repeats": MATRIX.as_strided((1, 3), (0, 2), 1),
}


@contextmanager
def open_checkpoint(path):
    with open_source(path) as file:
        yield CheckpointFile(path, file)


def read(path):
    with open_checkpoint(path) as file:
        return file.read_tree(file.contents)


def rewrite(path, edit, compression=zipfile.ZIP_STORED):
    """Writes an archive anew, with valid checksums, from what `edit(name, data)` returns; None leaves a record out."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            edited = edit(name, data)
            if edited is not None:
                archive.writestr(name, edited)
    return path


def replace_record(path, suffix, data):
    return rewrite(path, lambda name, old: data if name.endswith(suffix) else old)


def flip_byte(path, offset, bits=0x80):
    data = bytearray(path.read_bytes())
    data[offset] ^= bits
    path.write_bytes(data)


def find_record(path, suffix):
    """Returns where in the file the data of a record begins."""
    with zipfile.ZipFile(path) as archive:
        (info,) = [info for info in archive.infolist() if info.filename.endswith(suffix)]
        return path.read_bytes().index(archive.read(info), info.header_offset)


@pytest.mark.parametrize("name", TENSORS)
def test_read_tensor_of_each_kind_equals_torch_load(tmp_path, name):
    path = save({"tensor": TENSORS[name]}, tmp_path)
    expected = torch.load(path, weights_only=True)["tensor"].detach()
    tensor = read(path)["tensor"]
    assert_same(tensor, torch.Tensor(expected) if name == "parameter" else expected)
    assert tensor.is_contiguous()


def test_read_tensors_together_equal_torch_load(tmp_path):
    path = save(TENSORS | {"parameter": torch.ones(2)}, tmp_path)
    assert_same(read(path), torch.load(path, weights_only=True))


def test_read_fixture_equals_torch_load():
    path = FIXTURES_DIR / "nanogpt-head-nobias" / "ckpt.pt"
    assert_same(read(path), torch.load(path, weights_only=True))


def test_read_tied_tensors_gives_one_tensor(tmp_path):
    tensors = read(save({"wte": MATRIX, "lm_head": MATRIX, "other": MATRIX.clone()}, tmp_path))
    assert tensors["wte"] is tensors["lm_head"]
    assert tensors["other"] is not tensors["wte"]


def test_read_tied_crops_gives_one_tensor_without_the_rest(tmp_path):
    tensors = read(save({"wte": MATRIX[:2], "lm_head": MATRIX[:2], "other": MATRIX[2:]}, tmp_path))
    assert tensors["wte"] is tensors["lm_head"]
    assert tensors["wte"].untyped_storage().nbytes() == MATRIX[:2].nbytes
    assert torch.equal(tensors["other"], MATRIX[2:])


def test_read_views_of_one_block_reads_it_once(tmp_path, monkeypatch):
    names = []
    read_block = CheckpointFile._read_block
    monkeypatch.setattr(CheckpointFile, "_read_block", lambda *args: names.append(args[1]) or read_block(*args))
    read(
        save(
            {"whole": MATRIX, "again": MATRIX, "crop": MATRIX[1:], "transposed": MATRIX.T, "x": torch.ones(1)},
            tmp_path,
        )
    )
    assert len(names) == 2


def test_read_tensors_stay_when_the_file_is_overwritten(tmp_path):
    path = save({"a": MATRIX}, tmp_path)
    tensor = read(path)["a"]
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(tensor, MATRIX)


@pytest.mark.parametrize("size", [500, None], ids=["shorter", "all zeros"])
def test_read_file_that_changes_while_open_is_refused(tmp_path, size):
    """nanoGPT's train.py overwrites its file in place, even while another program reads it."""
    path = save({"a": MATRIX}, tmp_path)
    with open_checkpoint(path) as file:
        assert file.contents.keys() == {"a"}
        path.write_bytes(bytes(size or path.stat().st_size))
        with pytest.raises(CheckpointError, match=r"damaged or cut off: .*(an early end|a wrong checksum)"):
            file.read_tensors(file.contents)


def test_read_tree_keeps_plain_values_and_structure(tmp_path):
    tree = {"a": [1, (2.5, None), {"b": "text", 3: True}], "c": {"d": [MATRIX, [MATRIX[1:]]]}, "e": b"raw"}
    assert_same(read(save(tree, tmp_path)), tree)


def test_read_tree_with_a_set_of_tensors_reads_them(tmp_path):
    (tensor,) = read(save({"a": {MATRIX}}, tmp_path))["a"]
    assert_same(tensor, MATRIX)


def test_read_flipped_bytes_are_harmless_or_refused(tmp_path):
    """Flips every byte of a file in turn: those between the records do not matter, all others are refused."""
    path = save({"a": MATRIX, "tied": MATRIX, "crop": MATRIX[1:], "b": [1, "text", torch.ones(3)]}, tmp_path)
    whole, expected, outcomes = path.read_bytes(), read(path), Counter()
    for offset in range(len(whole)):
        path.write_bytes(whole)
        flip_byte(path, offset)
        try:
            assert_same(read(path), expected)
            outcomes["harmless"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
        except Exception as error:  # no other error may be raised, so list those that are
            outcomes[type(error).__name__] += 1
    assert outcomes.keys() == {"harmless", "refused"}


@pytest.mark.parametrize("bits", [0x01, 0x80])
def test_read_flipped_byte_in_tensor_is_refused_by_its_name(tmp_path, bits):
    path = save({"optimizer": {"state": {0: {"exp_avg": MATRIX}}}}, tmp_path)
    flip_byte(path, find_record(path, "/data/0") + 5, bits)
    with pytest.raises(CheckpointError, match=r"damaged or cut off: .*a wrong checksum of .*'state'.*'exp_avg'"):
        read(path)


def test_read_flipped_byte_in_pickle_is_refused(tmp_path):
    path = save({"a": MATRIX}, tmp_path)
    pickled = find_record(path, "/data.pkl")
    flip_byte(path, path.read_bytes().index(b"storage", pickled))
    with pytest.raises(CheckpointError, match=r"damaged or cut off: .*a wrong checksum of ckpt/data.pkl"):
        read(path)


@pytest.fixture
def without_checksums(tmp_path):
    """A file as torch.save writes it with compute_crc32=False: all checksums in it are 0."""
    torch.serialization.set_crc32_options(False)
    try:
        return save({"a": MATRIX, "b": torch.empty(0)}, tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)


def test_read_file_without_checksums_is_read_and_says_so(without_checksums):
    assert_same(read(without_checksums), {"a": MATRIX, "b": torch.empty(0)})
    with open_checkpoint(without_checksums) as file:
        assert file.assumptions == (
            "every number as it was written: the file has no checksums, as torch.save was told to write none",
        )


@pytest.mark.parametrize("suffix", ["/data.pkl", "/data/0"])
def test_read_file_with_one_checksum_lost_is_refused(tmp_path, suffix):
    path = save({"a": MATRIX}, tmp_path)
    with zipfile.ZipFile(path) as archive:
        (info,) = [info for info in archive.infolist() if info.filename.endswith(suffix)]
    data = bytearray(path.read_bytes())
    entry = data.rindex(info.filename.encode()) - 46  # in the directory at the end
    data[entry + 16 : entry + 20] = bytes(4)
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo(info.filename).CRC == 0
    with pytest.raises(CheckpointError, match=r"damaged or cut off: .*a wrong checksum of"):
        read(path)


@pytest.mark.parametrize("part", range(TRUNCATIONS))
def test_read_truncated_file_is_refused(tmp_path, part):
    path = save({"a": torch.randn(100, 10), "b": torch.ones(3)}, tmp_path)
    os.truncate(path, path.stat().st_size * part // TRUNCATIONS + part % 3)
    with pytest.raises(CheckpointError, match=r"damaged or cut off|not a checkpoint: expected a zip archive"):
        read(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_read_compressed_archive_is_refused(tmp_path, compression):
    path = rewrite(save({"a": MATRIX}, tmp_path), lambda name, data: data, compression)
    with pytest.raises(CheckpointError, match=r"a compressed record 'ckpt/data.pkl'"):
        read(path)


def test_read_rewritten_archive_is_read(tmp_path):
    """Shows that the crafted archives below are refused for their fault and not for how they are made."""
    path = rewrite(save({"a": MATRIX}, tmp_path), lambda name, data: data)
    assert_same(read(path), {"a": MATRIX})


def test_read_overlapping_records_is_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("ckpt/data.pkl", "ckpt/data/0"):
            archive.writestr(name, pickle.dumps({}, protocol=2))
        first, second = archive.infolist()
        second.header_offset = first.header_offset
    with pytest.raises(CheckpointError, match="overlapping records at 'ckpt/data/0'"):
        read(path)


@pytest.mark.parametrize(
    ("suffix", "data", "message"),
    [
        ("/byteorder", b"\xff\xfe", "expected numbers in .*-endian order"),
        ("/data.pkl", None, r"0 records named \*/data.pkl"),
        ("/data.pkl", b"", "damaged or cut off"),
        ("/data.pkl", b"\x80\x02}", "damaged or cut off"),
        ("/data.pkl", b"\x80\x02.", "damaged or cut off"),
        ("/data.pkl", b"not a pickle", "refused|damaged"),
        ("/data/0", None, "damaged or cut off: .*data/0"),
        ("/data/0", b"", "damaged or cut off"),
        ("/data/0", bytes(MATRIX.nbytes - 1), "damaged or cut off"),
        ("/data/0", bytes(MATRIX.nbytes + 1), "damaged or cut off"),
    ],
)
def test_read_wrong_record_is_refused(tmp_path, suffix, data, message):
    path = replace_record(save({"a": MATRIX}, tmp_path), suffix, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path)
    assert "weights_only=False" not in str(caught.value)  # torch's own message advises it


@pytest.mark.parametrize("name", ["ckpt/byteorder", "ckpt/BYTEORDER"])
def test_read_other_endian_file_is_refused(tmp_path, name):
    """torch finds the record in capitals too."""
    path = replace_record(save({"a": MATRIX}, tmp_path), "/byteorder", None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "little" if sys.byteorder == "big" else "big")
    with pytest.raises(
        CheckpointError, match=r"expected numbers in \w+-endian order, got \w+-endian; load and save it on"
    ):
        read(path)


def test_read_second_pickle_is_refused(tmp_path):
    path = save({"a": MATRIX}, tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps({}, protocol=2))
    with pytest.raises(CheckpointError, match=r"2 records named \*/data.pkl"):
        read(path)


class Storage:
    """Is pickled as the block data/0, which has 32 bytes."""

    def __init__(self, numel, kind):
        self.numel, self.kind = numel, kind


class View:
    """Is pickled as a tensor of any shape on a Storage, in bounds or not."""

    def __init__(self, size, stride=(1,), offset=0, numel=8, kind=torch.FloatStorage, dtype=None):
        self.args = (Storage(numel, kind), offset, size, stride, False, OrderedDict())
        self.dtype = dtype

    def __reduce__(self):
        if self.dtype is None:
            return torch._utils._rebuild_tensor_v2, self.args
        return torch._utils._rebuild_tensor_v3, (*self.args, self.dtype)


class ViewPickler(pickle.Pickler):
    def persistent_id(self, obj):
        return ("storage", obj.kind, "0", "cpu", obj.numel) if isinstance(obj, Storage) else None


def save_view(view, folder):
    path = save({"a": torch.arange(8.0)}, folder)
    with (folder / "data.pkl").open("wb") as file:
        ViewPickler(file, protocol=2).dump({"a": view})
    return replace_record(path, "/data.pkl", (folder / "data.pkl").read_bytes())


def test_read_tensor_in_a_block_of_odd_length_is_refused(tmp_path):
    path = save_view(View((1,), numel=31, kind=torch.UntypedStorage, dtype=torch.uint16), tmp_path)
    with pytest.raises(CheckpointError, match=r"damaged or cut off: .*a torch.uint16 tensor in a block of 31 bytes"):
        read(replace_record(path, "/data/0", bytes(31)))


def test_read_crafted_view_in_bounds_is_read(tmp_path):
    assert_same(read(save_view(View((3,), (2,), 1), tmp_path)), {"a": torch.tensor([1.0, 3.0, 5.0])})
    whole = View((16,), numel=32, kind=torch.UntypedStorage, dtype=torch.uint16)
    assert_same(read(save_view(whole, tmp_path)), {"a": torch.arange(8.0).view(torch.uint16)})


@pytest.mark.parametrize(
    "view",
    [
        View((9,)),
        View((8,), offset=1),
        View((8,), offset=-1),
        View((8,), stride=(2,)),
        View((8,), stride=(-1,), offset=7),
        View((1,), offset=2**62),
        View((2**40,), stride=(2**20,)),
        View((2**62, 4), stride=(0, 0)),
        View((8,), numel=9),
        View((4,), numel=4),
        View((8,), numel=2**50),
        View((1,), offset=2**63),
        View((2**32, 2**32), stride=(2**32, 1)),
        View((8.0,)),
        View((8,), stride=(1, 1)),
        View((5,), numel=4, kind=torch.DoubleStorage),
        View((17,), numel=16, kind=torch.HalfStorage),
        View((33,), numel=32, kind=torch.ByteStorage),
        View((17,), numel=32, kind=torch.UntypedStorage, dtype=torch.uint16),
        View((32,), numel=32, kind=torch.UntypedStorage, dtype=torch.uint16),
        View((1,), numel=32, kind=torch.UntypedStorage, dtype=torch.complex128, offset=2),
        View((1,), numel=31, kind=torch.UntypedStorage, dtype=torch.uint16),
    ],
    ids=lambda view: f"{view.args[1:4]} of {view.args[0].numel} {view.args[0].kind.__name__}",
)
def test_read_view_out_of_bounds_is_refused(tmp_path, view, monkeypatch):
    """By our own arithmetic: in torch 2.6 an offset of 2**62 wraps around, as in the function patched here."""
    monkeypatch.setattr(torch.Tensor, "as_strided", lambda block, size, *_: block.new_zeros(size))
    path = save_view(view, tmp_path)
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        read(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (MATRIX.to_sparse(), "a: expected a dense tensor, got torch.sparse_coo"),
        (MATRIX.to("meta"), "damaged or cut off: .* a without data"),
        (torch.tensor([1 + 2j]).conj(), "a: expected a dense tensor, got a negated or conjugated view"),
        (torch.tensor([1 + 2j]).conj().imag, "a: expected a dense tensor, got a negated or conjugated view"),
        (torch.tensor([1.5]).expand(3, 2), "a: expected a dense tensor, got one whose numbers share memory"),
        (MATRIX.as_strided((3, 3), (2, 1)), "a: expected a dense tensor, got one whose numbers share memory"),
    ],
    ids=["sparse", "meta", "conjugated", "negated", "expanded", "overlapping"],
)
def test_read_tensor_that_is_not_plain_is_refused(tmp_path, tensor, message):
    path = save({"a": tensor}, tmp_path)
    with open_checkpoint(path) as file, pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: .*{message}"):
        file.read_tensors(file.contents)


@pytest.mark.parametrize(
    "bomb",
    [
        b"]" * 100_000 + b"a" * 99_999,
        b"]" + b"\x85" * 100_000,
        b"}" + b"K\x00}" * 100_000 + b"s" * 100_000,
        b"]q\x00h\x00a",
    ],
    ids=["lists", "tuples", "dicts", "itself"],
)
def test_read_endless_nesting_is_refused(tmp_path, bomb):
    path = replace_record(save({}, tmp_path), "/data.pkl", b"\x80\x02" + bomb + b".")
    with limit_time(20), pytest.raises(CheckpointError, match=r"damaged or cut off: .*lists within lists"):
        read(path)


def test_read_lists_shared_without_end_is_refused_at_once(tmp_path):
    """They are small in the file and in memory, but writing them out, as a message does, would take 2**60 values."""
    tree = [1]
    for _ in range(60):
        tree = [tree, tree]
    path = save({"a": tree}, tmp_path)
    with limit_time(3), pytest.raises(CheckpointError, match=r"damaged or cut off: .*lists within lists"):
        read(path)


def test_read_shared_lists_stay_shared(tmp_path):
    shared = [1, MATRIX]
    found = read(save({"a": [shared, shared]}, tmp_path))["a"]
    assert found[0] is found[1]
    assert_same(found[0], shared)


def make_pipe(path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("Windows has no pipes among files")
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_pipe, "expected a regular file, got a device, pipe or socket; give the path of a ckpt.pt"),
        (os.mkdir, "expected a file, got a directory; give the path of a checkpoint file"),
        (lambda path: None, "cannot be opened: No such file or directory; check the path"),
        (lambda path: path.symlink_to("nowhere"), "cannot be opened: No such file or directory; check the path"),
        (lambda path: path.symlink_to(path), "cannot be opened: .*; check the path"),
        (Path.touch, "not a checkpoint: .*got an empty file; give the file that the training"),
        (lambda path: path.write_text("step 0: loss 4.2\n"), "not a checkpoint: .*got 17 bytes of something else"),
        (lambda path: path.write_bytes(b"PK\x03\x04"), "damaged or cut off"),
        (lambda path: path.write_bytes(pickle.dumps({"model": {}})), "not a checkpoint: expected a zip archive"),
        (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), "not a checkpoint: expected a zip"),
    ],
    ids="fifo,directory,missing,dangling link,link loop,empty,text,magic only,bare pickle,old torch".split(","),
)
def test_open_path_without_checkpoint_is_refused(tmp_path, make, message):
    path = tmp_path / "file"
    make(path)
    with limit_time(5), pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: {message}"):
        read(path)


def test_open_name_too_long_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be opened: File name too long; check the path"):
        read(tmp_path / ("x" * 300))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("locked", ["file", "folder"])
def test_open_unreadable_file_is_refused(tmp_path, locked):
    (tmp_path / "folder").mkdir()
    path = save({"a": MATRIX}, tmp_path / "folder")
    hidden = path if locked == "file" else path.parent
    hidden.chmod(0)
    try:
        with pytest.raises(CheckpointError, match="cannot be opened: Permission denied; check the path"):
            read(path)
    finally:
        hidden.chmod(0o700)
