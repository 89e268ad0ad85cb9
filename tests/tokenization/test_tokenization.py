"""tokenization/characters.py: meta.pkl is read safely, texts are encoded and decoded, and wrong tables are refused."""

import os
import pickle
import re

import pytest

from hugging_nano_gpt import TokenizerError
from hugging_nano_gpt.demo import META_PATH
from hugging_nano_gpt.tokenization.characters import read_meta

from ..helpers.contents import Malicious
from ..helpers.limits import limit_time

TEXT = "ROMEO:\nWhat light through yonder window breaks?\n"


def make_meta(characters):
    """Makes the dict that nanoGPT's data/shakespeare_char/prepare.py pickles."""
    return {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: index for index, character in enumerate(characters)},
    }


def assert_refused(path, message):
    with limit_time(5), pytest.raises(TokenizerError, match=f"^{re.escape(str(path))}: {message}"):
        read_meta(path)


def test_read_meta_of_demo_gives_the_alphabet(table):
    assert len(table.characters) == 65
    assert "".join(table.characters[:4]) == "\n !$"
    assert table.characters == tuple(sorted(table.characters))


def test_read_meta_gives_the_ids_of_the_file(table):
    with META_PATH.open("rb") as file:
        stoi = pickle.load(file)["stoi"]
    assert table.encode(TEXT) == [stoi[character] for character in TEXT]


def test_encode_and_decode_give_the_text_back(table):
    everything = "".join(table.characters)
    assert table.decode(table.encode(TEXT + everything)) == TEXT + everything
    assert table.encode(everything) == list(range(65))
    assert (table.encode(""), table.decode([])) == ([], "")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_read_meta_of_any_protocol_and_alphabet_is_read(tmp_path, protocol):
    alphabet = ["\u00e9", "a", "\U0001f642"]
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(make_meta(alphabet), protocol))
    table = read_meta(str(tmp_path / "meta.pkl"))
    assert table.characters == tuple(alphabet)
    assert table.encode("\U0001f642a") == [2, 1]


def test_encode_unknown_characters_names_them(table):
    with pytest.raises(
        TokenizerError, match=r"text: expected characters of the model's 65, got \[?'%', '~'\]?; leave"
    ):
        table.encode("~Well%~")


def test_encode_many_unknown_characters_stays_short(table):
    with pytest.raises(TokenizerError, match=r"text: expected .*\(1000 in all\)"):
        table.encode("".join(map(chr, range(0x4E00, 0x4E00 + 1000))))


@pytest.mark.parametrize("index", [65, 10**9, -1])
def test_decode_id_outside_the_alphabet_is_refused(table, index):
    with pytest.raises(TokenizerError, match=rf"expected .* got .*{index}"):
        table.decode([1, index])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_read_meta_malicious_executes_nothing(tmp_path, protocol):
    path, canary = tmp_path / "meta.pkl", tmp_path / "canary"
    pickled = pickle.dumps({**make_meta("ab"), "extra": Malicious(canary)}, protocol)
    path.write_bytes(pickled)
    assert_refused(
        path, r"expected a pickle of plain Python types, .* refused the name \w+\.mkdir, nothing was executed"
    )
    assert not canary.exists()
    pickle.loads(pickled)  # shows that the pickle works
    assert canary.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"cbuiltins\neval\n(V1+1\ntR.",
        b"(V1+1\nibuiltins\neval\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x031+1\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n)R.",
        b"P0\n.",
    ],
    ids=["GLOBAL", "INST", "STACK_GLOBAL", "harmless class", "PERSID"],
)
def test_read_meta_naming_anything_is_refused(tmp_path, pickled):
    (tmp_path / "meta.pkl").write_bytes(pickled)
    assert_refused(tmp_path / "meta.pkl", "expected a pickle of plain Python types, got UnpicklingError: ")


@pytest.mark.parametrize("size", [0, 1, 10, 100, 350, -1])
def test_read_meta_truncated_is_refused(tmp_path, size):
    (tmp_path / "meta.pkl").write_bytes(META_PATH.read_bytes()[:size])
    assert_refused(tmp_path / "meta.pkl", "expected a pickle of plain Python types, got .*; give the meta.pkl that")


@pytest.mark.parametrize(
    "meta",
    [
        ["a", "b"],
        {},
        {"vocab_size": 50257},
        {"itos": {0: "a"}},
        {"stoi": {"a": 0}},
        {"itos": ["a"], "stoi": {"a": 0}},
        {"itos": {0: "a", 2: "b"}, "stoi": {"a": 0, "b": 2}},
        {"itos": {0: "a", 1: "b"}, "stoi": {"a": 1, "b": 0}},
        {"itos": {0: "a", 1: "b"}, "stoi": {"a": 0}},
        {"itos": {0: "a", 1: "a"}, "stoi": {"a": 1}},
        {"itos": {0: "ab"}, "stoi": {"ab": 0}},
        {"itos": {0: 5}, "stoi": {5: 0}},
        {"itos": {0: ["a"]}, "stoi": {}},
    ],
    ids=str,
)
def test_read_meta_without_inverse_tables_is_refused(tmp_path, meta):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert_refused(tmp_path / "meta.pkl", "expected 'itos' and 'stoi' to be inverse tables of characters .*; make it")


def test_read_meta_too_large_is_refused(tmp_path):
    with (tmp_path / "meta.pkl").open("wb") as file:
        file.truncate((64 << 20) + 1)  # a sparse file, which takes no space
    assert_refused(tmp_path / "meta.pkl", "expected a meta.pkl, got a directory, a device or too large a file; check")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot be opened: No such file or directory; check the path"),
        (os.mkdir, "expected a meta.pkl, got a directory.*; check the path"),
        (os.mkfifo, "expected a meta.pkl, got a directory.*; check the path"),
        (lambda path: path.write_text("hello"), "expected a pickle of plain Python types, got"),
    ],
    ids=["missing", "directory", "fifo", "text"],
)
def test_read_meta_from_no_pickle_is_refused(tmp_path, make, message):
    make(tmp_path / "meta.pkl")
    assert_refused(tmp_path / "meta.pkl", message)
