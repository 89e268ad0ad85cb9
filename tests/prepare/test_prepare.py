"""prepare_data: the bytes of nanoGPT's own prepare.py, for any number of threads, written completely or not at all."""

import hashlib
import pickle
import runpy
import sys
import time
import tracemalloc
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import hugging_nano_gpt.prepare.prepare as prepare_module
import hugging_nano_gpt.prepare.tokens as tokens_module
from hugging_nano_gpt import ConversionError, TokenizerError, prepare_data, read_meta
from hugging_nano_gpt.tokenization.characters import read_vocab_size
from hugging_nano_gpt.tokenization.find import load_named

from ..helpers.folders import list_files, read_files
from ..helpers.scripts import NANOGPT_DIR, skip_without_nanogpt
from ..helpers.texts import make_text

# The data sets of nanoGPT's that have a prepare.py, and how to get the same from this package.
CHAR, BPE, DOCUMENTS = "shakespeare_char", "shakespeare", "openwebtext"
TOKENIZERS = {CHAR: "char", BPE: "gpt2", DOCUMENTS: "gpt2"}

# The first 16 digits of the SHA-256 of the files that nanoGPT's prepare.py (@ 3adf61e) wrote from the same inputs.
RECORDED = {
    CHAR: {"train.bin": "5361008899d6886f", "val.bin": "ff516b1ef31012ed"},
    BPE: {"train.bin": "a4121d06de49350f", "val.bin": "50add1f1285c7d3f"},
    DOCUMENTS: {"train.bin": "a0f972a4d509fe6d", "val.bin": "fb2b4336031fc8ed"},
}


def hash_bins(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in folder.glob("*.bin")}


@pytest.fixture(params=TOKENIZERS)
def name(request):
    return request.param


@pytest.fixture
def source(name, request, gpt2):
    return request.getfixturevalue("documents_path" if name == DOCUMENTS else "text_path")


def test_bytes_are_those_recorded_of_nanogpt(name, source, tmp_path, small_blocks):
    n_tokens = prepare_data(source, tmp_path / "out", tokenizer=TOKENIZERS[name])
    assert hash_bins(tmp_path / "out") == RECORDED[name]
    sizes = {split: (tmp_path / "out" / f"{split}.bin").stat().st_size for split in ("train", "val")}
    assert {split: 2 * n for split, n in n_tokens.items()} == sizes


def run_prepare_py(name, source, folder):
    """Runs nanoGPT's prepare.py in a folder, with a local file where it would download one."""
    import datasets

    folder.mkdir()
    code = (Path(NANOGPT_DIR) / "data" / name / "prepare.py").read_text()
    if name == DOCUMENTS:  # fewer documents than it writes batches, and no processes
        for line, change in (("total_batches = 1024", "total_batches = 1"), ("num_proc = 8", "num_proc = None")):
            assert line in code
            code = code.replace(line, change)
        loaded = datasets.load_dataset("json", data_files=str(source)).select_columns(["text"])
    else:
        loaded = None
        (folder / "input.txt").write_bytes(source.read_bytes())
    (folder / "prepare.py").write_text(code)
    with (
        mock.patch.object(datasets, "load_dataset", return_value=loaded),
        mock.patch.dict(sys.modules, requests=types.ModuleType("requests")),
    ):
        runpy.run_path(str(folder / "prepare.py"), run_name="__main__")


@pytest.mark.nanogpt
@skip_without_nanogpt
@pytest.mark.filterwarnings("ignore")  # of files that prepare.py leaves open
def test_bytes_are_those_of_nanogpt_itself(name, source, tmp_path, capsys, small_blocks):
    run_prepare_py(name, source, tmp_path / "theirs")
    printed = capsys.readouterr().out
    prepare_data(source, tmp_path / "ours", tokenizer=TOKENIZERS[name])
    assert hash_bins(tmp_path / "ours") == hash_bins(tmp_path / "theirs") == RECORDED[name]
    ours = capsys.readouterr().out
    assert set(printed.splitlines()) <= set(ours.splitlines())
    if name == CHAR:
        metas = [pickle.loads((tmp_path / folder / "meta.pkl").read_bytes()) for folder in ("ours", "theirs")]
        assert metas[0] == metas[1]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_bytes_are_the_same_for_any_number_of_threads(name, source, tmp_path, small_blocks, num_proc):
    prepare_data(source, tmp_path / "out", tokenizer=TOKENIZERS[name], num_proc=num_proc)
    assert hash_bins(tmp_path / "out") == RECORDED[name]


def test_results_that_come_late_keep_their_place(text_path, tmp_path, small_blocks, monkeypatch):
    """The threads end in another order than they began."""
    encode, delays = tokens_module.CharacterTokens.encode_each, iter([0.02, 0.0] * 500)

    def encode_late(self, texts):
        time.sleep(next(delays))
        return encode(self, texts)

    monkeypatch.setattr(tokens_module.CharacterTokens, "encode_each", encode_late)
    prepare_data(text_path, tmp_path / "out", tokenizer="char", num_proc=4)
    assert hash_bins(tmp_path / "out") == RECORDED[CHAR]


def test_shards_are_the_file_in_parts(text_path, tmp_path):
    n_tokens = prepare_data(text_path, tmp_path / "one", tokenizer="char")
    prepare_data(text_path, tmp_path / "shards", tokenizer="char", shard_size=1000)
    for split in ("train", "val"):
        shards = [path.read_bytes() for path in sorted((tmp_path / "shards").glob(f"{split}_*.bin"))]
        assert len(shards) == -(-n_tokens[split] // 1000) > 1
        assert {len(shard) for shard in shards[:-1]} == {2000}
        assert b"".join(shards) == (tmp_path / "one" / f"{split}.bin").read_bytes()
    assert "train_000000.bin" in list_files(tmp_path / "shards")
    assert "train.bin" not in list_files(tmp_path / "shards")


def test_several_texts_are_one_in_the_order_given_and_a_folder_by_name(tmp_path):
    text, folder = make_text(300).replace("\r", ""), tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    for path, part in (("all.md", text), ("texts/b/2.txt", text[500:]), ("texts/a.txt", text[:500])):
        (tmp_path / path).write_text(part)
    (folder / "other.md").write_text("not a text")
    paths = [folder / "a.txt", folder / "b" / "2.txt"]
    for out, source in (("one", tmp_path / "all.md"), ("several", paths), ("folder", folder)):
        prepare_data(source, tmp_path / out, tokenizer="char")
    assert hash_bins(tmp_path / "one") == hash_bins(tmp_path / "several") == hash_bins(tmp_path / "folder")


def test_memory_does_not_grow_with_the_text(tmp_path):
    """Some blocks of half a MiB are in memory, and a table of all code points: 16 MB."""
    (tmp_path / "input.txt").write_text("So shaken as we are, so wan with care,\n" * 1_000_000)
    tracemalloc.start()
    try:
        prepare_data(tmp_path / "input.txt", tmp_path / "out", tokenizer="char", num_proc=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (tmp_path / "input.txt").stat().st_size / 2


# What is written, and when.


def test_other_files_stay_and_those_of_an_earlier_call_need_force(text_path, tmp_path):
    out = tmp_path / "data"
    out.mkdir()
    (out / "prepare.py").write_text("# nanoGPT's")
    (out / "input.txt").write_bytes(text_path.read_bytes())
    prepare_data(out / "input.txt", out, tokenizer="bpe:300", shard_size=5000)
    before = read_files(out)
    message = r"data: has been prepared already: expected none .*got 'meta\.pkl', 'tokenizer\.json', .*--force"
    with pytest.raises(ConversionError, match=message):
        prepare_data(out / "input.txt", out, tokenizer="char")
    assert read_files(out) == before
    prepare_data(out / "input.txt", out, tokenizer="char", overwrite=True)
    assert list_files(out) == ["input.txt", "meta.pkl", "prepare.py", "train.bin", "val.bin"]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_interruption_leaves_nothing(text_path, tmp_path, small_blocks, monkeypatch, exists, error):
    out = tmp_path / "out"
    if exists:
        prepare_data(text_path, out, tokenizer="bpe:300")
    before = read_files(tmp_path)

    def write_some(arrays, folder, split, shard_size):
        (folder / f"{split}.bin").write_bytes(next(iter(arrays)))
        raise error

    monkeypatch.setattr(prepare_module, "write_tokens", write_some)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ConversionError):
        prepare_data(text_path, out, tokenizer="char", overwrite=True)
    assert read_files(tmp_path) == before
    assert out.exists() == exists


# The tokenizer.


def test_gpt2_gets_a_tokenizer_json_of_the_same_ids_and_small_ones_a_meta_for_train_py(text_path, tmp_path, gpt2):
    prepare_data(text_path, tmp_path / "out")
    assert list_files(tmp_path / "out") == [
        "meta.pkl",
        "tokenizer.json",
        "tokenizer_config.json",
        "train.bin",
        "val.bin",
    ]
    text = make_text().replace("\r\n", "\n").replace("\r", "\n")
    ids = np.fromfile(tmp_path / "out" / "train.bin", dtype=np.uint16).tolist()
    tokenizer = load_named(str(tmp_path / "out"), None)
    assert tokenizer(text[: int(len(text) * 0.9)]).input_ids == ids
    assert read_vocab_size(tmp_path / "out" / "meta.pkl") == gpt2.n_vocab
    prepare_data(text_path, tmp_path / "again", tokenizer=str(tmp_path / "out"))  # without tiktoken
    again, out = (read_files(tmp_path / folder) for folder in ("again", "out"))
    assert {name for name in out if again[name] != out[name]} <= {"tokenizer_config.json"}  # which names the folder


def test_trained_tokenizer_is_the_same_each_time_and_knows_only_the_train_split(text_path, tmp_path):
    for out in ("a", "b"):
        prepare_data(text_path, tmp_path / out, tokenizer="bpe:320", num_proc=2 if out == "b" else 1)
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b")
    tokenizer = load_named(str(tmp_path / "a"), None)
    assert len(tokenizer) == 320
    assert tokenizer.eos_token == "<|endoftext|>"
    text_path.write_bytes(text_path.read_bytes()[:-2000] + b"zzzyyyxxx" * 100)
    prepare_data(text_path, tmp_path / "c", tokenizer="bpe:320")
    assert not [token for token in load_named(str(tmp_path / "c"), None).get_vocab() if "zzz" in token]


def test_meta_of_a_trained_tokenizer_serves_train_py_and_sample_py(text_path, tmp_path):
    prepare_data(text_path, tmp_path / "out", tokenizer="bpe:300")
    meta = pickle.loads((tmp_path / "out" / "meta.pkl").read_bytes())
    assert meta["vocab_size"] == 300
    ids = [meta["stoi"][c] for c in "\nking 12"]  # as sample.py encodes
    assert load_named(str(tmp_path / "out"), None).decode(ids) == "\nking 12"
    tokens = np.fromfile(tmp_path / "out" / "val.bin", dtype=np.uint16).tolist()
    text = make_text().replace("\r\n", "\n").replace("\r", "\n")
    printed = "".join([meta["itos"][i] for i in tokens])  # as sample.py decodes
    assert printed.isascii() is False
    assert [part for part in printed.split() if part.isascii()] == [
        part for part in text[int(len(text) * 0.9) :].split() if part.isascii()
    ]
    with pytest.raises(TokenizerError, match=r"meta\.pkl: .* inverse tables .*; give --tokenizer .*out$"):
        read_meta(tmp_path / "out" / "meta.pkl")
