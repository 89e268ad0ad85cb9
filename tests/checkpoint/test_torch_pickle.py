"""checkpoint/torch_pickle.py: what torch.save writes is read, in any thread; anything else does nothing."""

import contextlib
import pickle
import pickletools
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from hugging_nano_gpt import CheckpointError, read_checkpoint, read_meta
from hugging_nano_gpt.checkpoint.file import CheckpointFile
from hugging_nano_gpt.checkpoint.torch_pickle import unpickle
from hugging_nano_gpt.files import pickles
from hugging_nano_gpt.files.files import open_source
from hugging_nano_gpt.files.pickles import Foreign
from hugging_nano_gpt.tokenization.characters import read_vocab_size

from ..helpers.comparison import assert_same
from ..helpers.contents import save
from ..helpers.limits import limit_time, measure_peak_bytes
from ..helpers.tiny import FIXTURES_DIR

BUILD_NANOGPT = FIXTURES_DIR / "build-nanogpt" / "model_05000.pt"


def read(path, **kwargs):
    with open_source(path) as file:
        opened = CheckpointFile(path, file, **kwargs)
        return opened.read_tree(opened.contents)


@pytest.mark.parametrize("n_threads", [2, 8])
def test_build_nanogpt_files_are_read_in_threads(n_threads):
    """torch's list of admitted names belongs to the process: with it, threads removed each other's names."""
    expected = read_checkpoint(BUILD_NANOGPT).state_dict
    with ThreadPoolExecutor(n_threads) as threads:
        for found in threads.map(read_checkpoint, [BUILD_NANOGPT] * 6 * n_threads):
            assert_same(found.state_dict, expected)


def test_reading_leaves_what_torch_admits_alone(monkeypatch):
    admitted = torch.serialization.get_safe_globals()
    monkeypatch.setattr(torch.serialization, "add_safe_globals", lambda names: pytest.fail(f"{names} were admitted"))
    read_checkpoint(BUILD_NANOGPT)
    assert torch.serialization.get_safe_globals() == admitted


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_of_every_protocol_are_read(tmp_path, protocol):
    values = {
        "a": [None, True, -(2**70), 0.1, float("inf"), "\u00e9\U0001f642", b"\x00\xff", (), (1, 2, 3, 4), {1, 2}],
        "b": {"x": torch.float16, "y": torch.Size([2, 3]), "z": torch.device("cpu"), "c": 2j},
        ("key", 1): {"float8": torch.zeros(3, dtype=torch.float8_e4m3fn).view(torch.uint8), "t": torch.ones(2, 2)},
    }
    path = tmp_path / "ckpt.pt"
    torch.save(values, path, pickle_protocol=protocol)
    assert_same(read(path), values)


@pytest.mark.parametrize(
    "number",
    [
        np.float64(2.5),
        np.float32(0.1),
        np.float16(-1),
        np.int64(-7),
        np.uint8(200),
        np.bool_(True),
        np.dtype(">f4").type(3),
    ],
    ids=lambda number: number.dtype.name,
)
def test_numpy_scalars_become_plain_numbers(tmp_path, number):
    found = read(save({"best_val_loss": number}, tmp_path))["best_val_loss"]
    assert type(found) is type(number.item())
    assert found == number.item()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "float8_e5m2", "uint16", "complex64"])
def test_tensors_of_every_dtype_are_read(tmp_path, dtype):
    tensor = torch.arange(1, 7).to(getattr(torch, dtype)).reshape(2, 3)
    found = read(save({"a": tensor}, tmp_path))["a"]
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_parameters_with_attributes_are_read(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.is_residual_projection = True
    assert_same(read(save({"a": parameter}, tmp_path)), {"a": torch.ones(2)})


class Call:
    """Is pickled as a call of a function, or as an object that is then filled."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def touch(path):
    raise AssertionError(f"{path} was touched")


@pytest.mark.parametrize("state", [None, {"a": 1}, [1, 2]], ids=["called", "filled", "filled with a list"])
def test_an_unknown_name_is_refused_and_does_nothing(tmp_path, state):
    path = save({"a": Call(touch, tmp_path / "canary", state=state)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"could run code: .*got the names? .*test_torch_pickle.touch"):
        read(path)
    assert isinstance(read(path, takes_foreign=True)["a"], Foreign)


TEXT = b"X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000
COLLIDING = [b"\x8a\x0d" + (n * (2**61 - 1)).to_bytes(13, "little") for n in range(1, 50_000)]
KEY = b"}X" + struct.pack("<I", 10_000) + b"a" * 10_000
NUMBERS = b"".join(b"J" + struct.pack("<I", number) for number in range(9_999))

BOMBS = {
    "memo": b"}r" + struct.pack("<I", 2**32 - 1) + b".",  # a place in the memo, up to which C would allocate
    "bytearray": b"c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x01\x85R.",
    "bytearray's opcode": b"\x96" + struct.pack("<Q", 2**33) + b".",
    "tensor": b"ctorch\nTensor\n\x8a\x05\x00\x00\x00\x00\x01\x85R.",
    "zeros": b"ctorch\nzeros\n\x8a\x05\x00\x00\x00\x00\x01\x85R.",
    "repr": b"]" + b"2\x86" * 40 + b"0ctorch.serialization\n_get_layout\nh\x00\x85R.",
    "bytes": b"\x8e" + struct.pack("<Q", 2**62) + b".",
    "text": b"\x8d" + struct.pack("<Q", 2**40) + b".",
    "frame": b"\x95" + struct.pack("<Q", 2**40) + b"N.",
    "large int": b"\x8b"
    + struct.pack("<i", 1_000_000)
    + b"\x7f" * 1_000_000
    + b"q\x000}"
    + b"h\x00Ns" * 20_000
    + b".",
    "hash of shared tuples": b"}N" + b"2\x86" * 60 + b"Ns.",
    "hash of deep tuples": b"}N" + b"\x85" * 100_000 + b"Ns.",
    "ints of one hash": b"}(" + b"N".join(COLLIDING) + b"Nu.",
    "ints of one hash in a set": b"\x8f(" + b"".join(COLLIDING) + b"\x90.",
    "long keys compared": b"}" + TEXT + b"q\x00" + TEXT + b"q\x0100h\x00Ns" + b"h\x01Ns" * 20_000 + b".",
    "list within itself": b"]q\x00" + b"(h\x00h\x00e" * 20_000 + b".",
    "values behind long keys": KEY * 90 + b"](" + b"N" * 2000 + b"e" + b"s" * 90 + b".",
    "text many times": TEXT + b"q\x00(" + b"h\x00" * 20_000 + b"l.",
    "bytes many times": b"c_codecs\nencode\nq\x00" + TEXT + b"X\6\0\0\0latin1\x86q\1(" + b"h\0h\1R" * 20_000 + b"l.",
    "sets of a list": b"cbuiltins\nset\nq\0](" + NUMBERS + b"e\x85q\1(" + b"h\0h\1R" * 20_000 + b"l.",
}

NAMING = ("bytearray", "tensor", "zeros", "repr", "bytes many times", "sets of a list")


def spend_little(read, pickled):
    """Calls `read`, which may raise, uses what it returns, and checks that this takes little memory and time."""
    peak_before = measure_peak_bytes()
    with limit_time(5), contextlib.suppress(Exception):
        contents = read(b"\x80\x02" + pickled)
        repr(contents), list(pickles.iterate_values(contents))
    assert measure_peak_bytes() - peak_before < 100e6


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_ask_for_memory_or_time_get_none(name):
    spend_little(lambda data: unpickle(data, {}), BOMBS[name])


@pytest.mark.parametrize("name", [name for name in BOMBS if name not in NAMING])
@pytest.mark.parametrize("read", [read_meta, read_vocab_size])
def test_meta_that_asks_for_memory_or_time_gets_none(tmp_path, read, name):
    path = tmp_path / "meta.pkl"

    def write_and_read(data):
        path.write_bytes(data)
        return read(path)

    spend_little(write_and_read, BOMBS[name])


@pytest.mark.parametrize(
    "opcode", [b"]", b"\x8f", b"(", b"\x94", b"\x85"], ids=["list", "set", "mark", "memo", "tuple"]
)
def test_pickle_of_too_many_objects_is_refused(monkeypatch, opcode):
    monkeypatch.setattr(pickles, "_MOST_OBJECTS", 1000)
    assert len(pickles.unpickle_plain(b"(" + b"]" * 900 + b"l.")) == 900
    with pytest.raises(pickle.UnpicklingError, match="more than 1000 objects"):
        pickles.unpickle_plain(b"N" + opcode * 1001 + b".")


def test_every_character_of_unicode_is_read_within_the_bounds():
    """A twentieth of them, within a twentieth of the bounds, because all of them take seconds."""
    characters = [chr(code) for code in range(0x10000, 0x110000, 20)]
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: index for index, character in enumerate(characters)},
    }
    unpickler = pickles.Unpickler(pickle.dumps(meta))
    assert unpickler.load() == meta
    assert 20 * (pickles._MOST_OBJECTS - unpickler._n_left) < pickles._MOST_OBJECTS


@pytest.mark.parametrize(
    "pickled",
    [
        b"ccollections\nOrderedDict\nN}U\x01xK\x01s\x86b.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}U\x08__code__Nsb.",
        b"ctorch\nFloatStorage\n}U\x05dtypeNsb.",
        b"\x82\x01.",
        b"(ctorch\nSize\no.",
        b"P0\n.",
    ],
    ids=["class", "function", "storage", "extension", "obj", "text id"],
)
def test_pickles_cannot_change_what_they_name(pickled):
    with pytest.raises((pickle.UnpicklingError, KeyError)):
        unpickle(b"\x80\x02" + pickled, {})


def spell(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


@pytest.mark.parametrize("name", ["torch.save", "save", "torch.os", "torch.hub", "torch.Tensor", "torch.nothing"])
def test_layout_is_a_layout_and_nothing_else_of_torch(tmp_path, name):
    """A pickle could name torch.save as a layout and call it: reading a checkpoint could then write a file."""
    get_layout = b"\x80\x02ctorch.serialization\n_get_layout\n" + spell(name) + b"\x85R"
    canary = tmp_path / "canary"
    with pytest.raises(TypeError, match="a layout that torch does not have"):
        unpickle(get_layout + b"]" + spell(str(canary)) + b"\x86R.", {})
    assert not canary.exists()
    assert unpickle(get_layout.replace(spell(name), spell("torch.sparse_coo")) + b".", {})[0] is torch.sparse_coo


@pytest.mark.parametrize(
    "pickled",
    [
        b"ctorch._tensor\n_rebuild_from_type_v2\n(c_codecs\nencode\nN(U\1aU\6latin1tNtR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(c__main__\nGPTConfig\n)RK\0))I00\nNtR.",
        b"cnumpy.core.multiarray\nscalar\nc__main__\nGPTConfig\n)RC\1a\x86R.",
        b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\2f4\x85RK\3U\1(\x86bC\4aaaa\x86R.",
    ],
    ids=["type", "block", "dtype", "byte order"],
)
def test_functions_take_only_what_torch_save_gives_them(pickled):
    class GPTConfig:
        """As build_nanogpt.py admits it."""

    with pytest.raises(TypeError, match=r"a (tensor|number) (of|without)"):
        unpickle(b"\x80\x02" + pickled, {"__main__.GPTConfig": GPTConfig})


def test_no_name_becomes_what_runs_code():
    """Pickles that ask for names of Python's and torch's own, one by one, get Foreigns."""
    for module in "builtins __builtin__ os posix subprocess importlib functools operator torch".split():
        for name in ("eval", "exec", "getattr", "system", "Popen", "import_module", "partial", "load", "attrgetter"):
            found, names = unpickle(f"c{module}\n{name}\n.".encode(), {})
            assert isinstance(found, Foreign)
            assert names == [f"{module}.{name}"]
    assert len(list(pickletools.genops(b"cos\nsystem\n."))) == 2  # the names above are spelt as in a real pickle
