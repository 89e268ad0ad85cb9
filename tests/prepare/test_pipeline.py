"""From a text to a model with commands alone, and the tokenizer of a data set as all of them find it."""

import re
import shutil

import pytest
import tiktoken

import hugging_nano_gpt.tokenization.bpe as bpe
from hugging_nano_gpt import NanoGPTLMHeadModel, TokenizerError, find_tokenizer, prepare_data
from hugging_nano_gpt.tokenization.find import load_named, read_data_vocab_size

from ..helpers.encodings import make_gpt2_encoding
from ..helpers.pipeline import TRAIN, make_folder, run
from ..helpers.programs import run_command
from ..helpers.scripts import link_scripts, run_script, skip_without_nanogpt
from ..helpers.texts import make_text


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "input.txt").write_text(make_text(2000), newline="")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("tokenizer", "n_tokens"), [("char", 37), ("bpe:300", 300)])
def test_commands_go_from_a_text_to_a_folder_that_generates(workplace, tokenizer, n_tokens):
    prepared, trained, evaluated, converted = make_folder(tokenizer)
    assert f"vocab size: {n_tokens}\n" in prepared
    assert f"found vocab_size = {n_tokens} (inside data/mine/meta.pkl)\n" in trained
    assert ("bits per character" if tokenizer == "char" else "bits per byte") in evaluated
    assert f"and a tokenizer of {n_tokens} tokens" in converted
    texts = [
        run("generate", name, "the king", "--num-samples", "1", "--max-new-tokens", "20")
        for name in ("out/ckpt.pt", "model")
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith("the king")


@pytest.mark.nanogpt
@skip_without_nanogpt
def test_nanogpt_itself_trains_and_samples_on_a_trained_tokenizer(workplace):
    run("prepare", "input.txt", "data/mine", "--tokenizer", "bpe:300")
    link_scripts(workplace)
    assert "found vocab_size = 300 (inside data/mine/meta.pkl)" in run_script(workplace, "train.py", *TRAIN)
    flags = ("--device=cpu", "--dtype=float32", "--num_samples=1", "--max_new_tokens=30", "--start=king")
    printed = run_script(workplace, "sample.py", *flags)
    assert "Loading meta from data/mine/meta.pkl..." in printed
    assert re.search(r"^king", printed, re.MULTILINE)


# The tokenizer.json of a data set.


def find(folder, vocab_size):
    return find_tokenizer(folder / "out" / "ckpt.pt", {"dataset": "mine"}, vocab_size, block_size=8)


@pytest.fixture
def prepared(text_path, tmp_path):
    """A folder whose data set has a trained tokenizer of 300 tokens, and a meta.pkl for nanoGPT."""
    prepare_data(text_path, tmp_path / "data" / "mine", tokenizer="bpe:300")
    return tmp_path


@pytest.mark.parametrize("has_meta", [True, False])
@pytest.mark.parametrize("vocab_size", [300, 304, 320])
def test_tokenizer_json_is_found_for_as_many_rows_or_rounded_up(prepared, vocab_size, has_meta):
    if not has_meta:
        (prepared / "data" / "mine" / "meta.pkl").unlink()
    tokenizer = find(prepared, vocab_size)
    assert (len(tokenizer), tokenizer.model_max_length) == (300, 8)
    assert tokenizer("the king").input_ids == load_named(str(prepared / "data" / "mine"), None)("the king").input_ids


@pytest.mark.parametrize("vocab_size", [299, 301, 500, 50304])
def test_tokenizer_json_of_another_size_is_refused(prepared, vocab_size):
    message = r"ckpt\.pt: no tokenizer found: .*got .*data/mine/tokenizer\.json of 300 tokens.*; give"
    with pytest.raises(TokenizerError, match=message):
        find(prepared, vocab_size)


def test_tokenizer_json_that_cannot_be_read_is_refused(prepared):
    (prepared / "data" / "mine" / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"data/mine: has no tokenizer that can be loaded"):
        find(prepared, 300)
    (prepared / "data" / "mine" / "meta.pkl").unlink()
    with pytest.raises(TokenizerError, match=r"data/mine: has no tokenizer that can be loaded"):
        read_data_vocab_size(prepared / "data" / "mine")


def test_train_reads_the_vocabulary_from_a_tokenizer_json_alone(workplace):
    run("prepare", "input.txt", "data/mine", "--tokenizer", "bpe:300")
    (workplace / "data" / "mine" / "meta.pkl").unlink()
    assert "found vocab_size = 300 (inside data/mine/tokenizer.json)\n" in run("train", *TRAIN)
    assert NanoGPTLMHeadModel.from_nanogpt_ckpt("out/ckpt.pt").config.vocab_size == 300
    shutil.rmtree("data/mine")
    run("prepare", "input.txt", "data/mine", "--tokenizer", "bpe:310")
    result = run_command("train", *TRAIN, "--init_from=resume")
    assert "vocab_size: expected at most 300, got 310 in data/mine/meta.pkl" in result.stderr


def test_train_gives_gpt2s_tokens_the_rows_of_train_py(workplace, monkeypatch):
    encoding = make_gpt2_encoding()
    monkeypatch.setattr(bpe, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    run("prepare", "input.txt", "data/mine")
    assert not (workplace / "data" / "mine" / "meta.pkl").exists()  # as in data/shakespeare
    assert read_data_vocab_size(workplace / "data" / "mine") == (50257, workplace / "data" / "mine" / "tokenizer.json")
    assert "defaulting to vocab_size of GPT-2 to 50304" in run("train", *TRAIN)
    monkeypatch.setattr(bpe, "get_encoding", None)  # from here on, the tokenizer.json is all that is left
    assert len(find(workplace, 50304)) == 50257
