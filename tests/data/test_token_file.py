"""Token files of every kind give the tokens that were written; files that are no token files are refused."""

import gzip
import io
import pickle

import numpy as np
import pytest
import torch

from hugging_nano_gpt import DataError
from hugging_nano_gpt.training import TokenDataset

BLOCK_SIZE = 8
SMALL = np.random.default_rng(0).integers(0, 50257, 500)
LARGE = np.random.default_rng(1).integers(0, 128256, 500)  # Llama 3's
GPT2, LLAMA3 = (20240520, 1, "<u2"), (20240801, 7, "<u4")


def make_shard(tokens, kind, **header):
    magic, version, dtype = kind
    values = np.zeros(256, dtype="<i4")
    values[:3] = header.get("magic", magic), header.get("version", version), header.get("count", len(tokens))
    return values.tobytes() + tokens.astype(dtype).tobytes()


def make_npy(tokens, dtype):
    file = io.BytesIO()
    np.save(file, tokens.astype(dtype) if dtype else tokens)
    return file.getvalue()


def read_tokens(path, data):
    """Returns all tokens of a file, as the windows serve them."""
    path.write_bytes(data)
    dataset = TokenDataset(path, BLOCK_SIZE)
    windows = [dataset[offset] for offset in range(0, len(dataset), BLOCK_SIZE)]
    assert {window[name].dtype for window in windows for name in window} == {torch.int64}
    return torch.cat([window["input_ids"] for window in windows]), dataset.n_tokens


@pytest.mark.parametrize(
    ("tokens", "data"),
    [
        (SMALL, SMALL.astype("<u2").tobytes()),
        (SMALL, make_shard(SMALL, GPT2)),
        (SMALL, make_shard(SMALL, LLAMA3)),
        (LARGE, make_shard(LARGE, LLAMA3)),
        *((SMALL, make_npy(SMALL, dtype)) for dtype in ("<u2", "<u4", "<i4", "<i8", "<u8", ">u2", ">i4")),
        *((LARGE, make_npy(LARGE, dtype)) for dtype in ("<u4", "<i8")),
        (SMALL % 256, make_npy(SMALL % 256, "u1")),
    ],
)
def test_tokens_of_every_known_file_are_those_written(tmp_path, tokens, data):
    found, n_tokens = read_tokens(tmp_path / "train.bin", data)
    assert n_tokens == len(tokens)
    assert torch.equal(found, torch.from_numpy(tokens[: len(found)]))
    assert len(found) >= len(tokens) - 2 * BLOCK_SIZE


@pytest.mark.parametrize("n_tokens", [9, 63, 64, 500])
@pytest.mark.parametrize("vocab_size", [2, 16, 65, 256, 50257, 65536])
def test_plain_tokens_of_any_vocabulary_are_not_refused(tmp_path, n_tokens, vocab_size):
    tokens = np.random.default_rng(n_tokens).integers(0, vocab_size, n_tokens)
    assert read_tokens(tmp_path / "train.bin", tokens.astype("<u2").tobytes())[1] == n_tokens


@pytest.mark.parametrize("tokens", [[7], [0], [3, 1], [1, 0], [64, 5], [300, 2, 40]])
def test_regular_tokens_are_not_refused(tmp_path, tokens):
    assert read_tokens(tmp_path / "train.bin", np.resize(tokens, 600).astype("<u2").tobytes())[1] == 600


RANDOM = np.random.default_rng(2)
AMINO_ACIDS, HEXADECIMAL = "ACDEFGHIKLMNPQRSTVWY", "0123456789abcdef"
CHINESE = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))


def draw_symbols(alphabet, n_symbols):
    return "".join(RANDOM.choice(list(alphabet), n_symbols))


def space_out(alphabet, line_length=None, n_symbols=40_000):
    """Writes symbols with a space between any two, in one line or in several."""
    symbols, length = draw_symbols(alphabet, n_symbols), line_length or n_symbols
    return "\n".join(" ".join(symbols[start : start + length]) for start in range(0, n_symbols, length))


def encode(text):
    """Encodes a text as nanoGPT's prepare.py for characters does."""
    number = {character: index for index, character in enumerate(sorted(set(text)))}
    return np.array([number[character] for character in text])


SPACED = {
    "amino acids": space_out(AMINO_ACIDS),
    "amino acids in lines": space_out(AMINO_ACIDS, 60),
    "amino acids in short lines": space_out(AMINO_ACIDS, 2),
    "hexadecimal": space_out(HEXADECIMAL),
    "hexadecimal in lines": space_out(HEXADECIMAL, 16),
    "hexadecimal, short": space_out(HEXADECIMAL, n_symbols=100),
    "letters after a tab": "\t" + space_out(AMINO_ACIDS + AMINO_ACIDS.lower(), 61),
    "chinese in lines": space_out(CHINESE, 40),
}


@pytest.mark.parametrize("name", SPACED)
def test_symbols_with_spaces_between_are_not_refused_as_wider_tokens(tmp_path, name):
    tokens = encode(SPACED[name])
    assert read_tokens(tmp_path / "train.bin", tokens.astype("<u2").tobytes())[1] == len(tokens)


# A text whose first character, such as a tab, comes late: its tokens of 4 bytes have no 0 for long.
LATE = encode(draw_symbols(AMINO_ACIDS, 50_000) + "\t" + draw_symbols(AMINO_ACIDS, 50_000))
SPREAD = RANDOM.zipf(1.2, 50_000)  # as in a real vocabulary: mostly the first ids

WIDER = {
    "a late first character": LATE,
    "bytes": np.frombuffer(("Before we proceed any further, hear me speak.\n" * 999).encode(), dtype="u1"),
    "spaced bytes": np.frombuffer(space_out(HEXADECIMAL).encode(), dtype="u1"),
    "spaced characters": encode(space_out(AMINO_ACIDS, 60)),
    "a vocabulary of 512": SPREAD % 511 + 1,
    "GPT-2's vocabulary": SPREAD % 50257,
    "Llama 3's vocabulary": SPREAD % 128256,
    "Gemma's vocabulary": SPREAD % 262144,
}


@pytest.mark.parametrize("dtype", ["<u4", "<i8"])
@pytest.mark.parametrize("name", WIDER)
def test_wider_tokens_of_real_texts_are_refused(tmp_path, name, dtype):
    with pytest.raises(DataError, match=WIDE):
        read_tokens(tmp_path / "train.bin", WIDER[name].astype(dtype).tobytes())


def make_torch_file():
    file = io.BytesIO()
    torch.save(torch.from_numpy(SMALL), file)
    return file.getvalue()


TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20
WIDE = r"got every second one below 4, as in tokens of 4 or 8 bytes; np\.save the tokens to a \.npy file"
ROW = "expected one row of integers, got"

# Earlier versions read each of these as uint16 tokens.
OTHERS = {
    "uint32": (SMALL.astype("<u4").tobytes(), WIDE),
    "uint32 of Llama 3": (LARGE.astype("<u4").tobytes(), WIDE),
    "int64": (SMALL.astype("<i8").tobytes(), WIDE),
    "int32 of characters": ((SMALL % 65).astype("<i4").tobytes(), WIDE),
    "text": (TEXT.encode(), r"got text; run the data set's prepare\.py"),
    "odd text": (TEXT.encode()[:-1], "got text"),
    "long text": ((TEXT * 100).encode(), "got text"),
    "text cut inside a character": (("\xe4" * 40000).encode()[:65537], "got text"),
    "json": (b'{"text": "hello"}\r\n' * 50, "got text"),
    "torch": (make_torch_file(), "got an archive"),
    "pickle": (pickle.dumps(SMALL.tolist()), "got a pickle"),
    "gzip": (gzip.compress(SMALL.astype("<u2").tobytes()), "got a gzip file"),
    "parquet": (b"PAR1" + b"\xff" * 500, "got a Parquet file"),
    "llm.c's model": (make_shard(SMALL, (20240326, 3, "<f4")), "llm.c's with magic number 20240326; give a shard"),
    "llm.c's evaluation": (make_shard(SMALL, (20240522, 1, "<u2")), "llm.c's with magic number 20240522"),
    "shard of tomorrow": (make_shard(SMALL, (20270101, 1, "<u2")), "llm.c's with magic number 20270101"),
    "shard of another version": (
        make_shard(SMALL, LLAMA3, version=1),
        "shard of version 7 and 3024 bytes, got version 1",
    ),
    "shard of the other type": (make_shard(SMALL, (20240801, 7, "<u2")), "3024 bytes, got version 7 and 2024 bytes"),
    "npy of floats": (make_npy(SMALL, "<f4"), rf"{ROW} float32 of shape \(500,\)"),
    "npy of rows": (make_npy(SMALL.reshape(50, 10), None), rf"{ROW} int64 of shape \(50, 10\)"),
    "npy of truth": (make_npy(SMALL > 3, None), rf"{ROW} bool"),
    "npy of objects": (make_npy(np.array([1, "a"], dtype=object), None), rf"{ROW} .*Python objects"),
    "npy cut off": (make_npy(SMALL, "<u2")[:-2], rf"not a whole \.npy file: {ROW}"),
    "npy with more behind": (make_npy(SMALL, "<u2") + b"1", r"\.npy file of 1128 bytes, got 1129 bytes"),
    "npy without header": (make_npy(SMALL, "<u2")[:20], rf"not a whole \.npy file: {ROW}"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_file_is_refused_with_advice(tmp_path, name):
    data, message = OTHERS[name]
    with pytest.raises(DataError, match=rf"train\.bin: .*{message}") as caught:
        read_tokens(tmp_path / "train.bin", data)
    assert "; " in str(caught.value)


def test_empty_npy_is_too_short(tmp_path):
    with pytest.raises(DataError, match=r"train\.bin: (too short|not a whole)"):
        read_tokens(tmp_path / "train.bin", make_npy(SMALL[:0], "<u2"))


def test_advice_for_wider_tokens_works(tmp_path):
    """Tokens that were refused are read after np.save, as uint16 too."""
    for dtype in ("<u4", "<u2"):
        np.save(tmp_path / "train.npy", SMALL.astype(dtype))
        assert TokenDataset(tmp_path / "train.npy", BLOCK_SIZE)[3]["input_ids"].tolist() == SMALL[3:11].tolist()
