"""tokenization/characters.py: character tables as tokenizers in a process without this package, and as meta.pkl."""

import json
import pickle
import random
import re
import shutil
import sys

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerFast, pipeline

from hugging_nano_gpt import (
    CharacterTable,
    NanoGPTLMHeadModel,
    TokenizerError,
    build_character_tokenizer,
    build_tiktoken_tokenizer,
    find_tokenizer,
    read_meta,
    write_meta,
)
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH
from hugging_nano_gpt.tokenization import characters, find

from ..helpers.encodings import make_encoding
from ..helpers.limits import limit_file_size
from ..helpers.programs import run_program

# Loads folders where this package cannot be imported, and encodes and decodes texts.
CLIENT = """
import json, sys
sys.modules["hugging_nano_gpt"] = None  # import raises ImportError
from transformers import AutoTokenizer

def use(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # so it never prompts
    ids = tokenizer(texts).input_ids
    failures = []
    for text in ("~", "well~known", "\\u00e9"):
        try:
            failures.append(tokenizer(text).input_ids)
        except Exception as error:
            failures.append(str(error))
    return {
        "ids": ids,
        "decoded": [tokenizer.decode(row) for row in ids],
        "skipped": tokenizer.batch_decode(ids, skip_special_tokens=True),
        "failures": failures,
        "special": tokenizer.special_tokens_map,
        "settings": [len(tokenizer), tokenizer.vocab_size, tokenizer.model_max_length, tokenizer.padding_side],
    }

found = {folder: use(folder, texts) for folder, texts in json.load(sys.stdin).items()}
try:
    import hugging_nano_gpt
    raise SystemExit("the package was imported")
except ImportError:
    pass
print(json.dumps(found))
"""

ALPHABETS = {
    "demo": read_meta(META_PATH).characters,
    "odd": tuple("\x00 \t\r\n.,!?'a\xa0\u2028\ufeff\u0301e\U0001f642\u2581\u0120#"),
    "one": ("\n",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, table):
    """A folder with config.json, the weights and the tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    model.save_pretrained(folder)
    build_character_tokenizer(table, block_size=model.config.block_size).save_pretrained(folder)
    return folder


def make_texts(characters, n_texts=200):
    rng = random.Random(0)
    spaces = [c for c in characters if c.isspace()] or [characters[0]]
    texts = ["".join(rng.choices(characters, k=rng.randint(0, 60))) for _ in range(n_texts - 20)]
    return texts + ["".join(rng.choices(spaces, k=rng.randint(1, 9))) + rng.choice(characters) for _ in range(20)]


@pytest.fixture(scope="module")
def client(folder, table, tmp_path_factory):
    """The results of CLIENT with two tokenizers; the second has an id for unknown characters."""
    lenient = tmp_path_factory.mktemp("lenient")
    build_character_tokenizer(table, unknown_id=1).save_pretrained(lenient)
    texts = {str(folder): make_texts(table.characters), str(lenient): ["a  b"]}
    result = run_program(sys.executable, "-c", CLIENT, text=json.dumps(texts))
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout).values())


def test_saved_folder_works_in_a_process_without_the_package(client, folder, table):
    assert json.loads((folder / "config.json").read_text())["model_type"] == "hugging_nano_gpt"
    texts, got = make_texts(table.characters), client[0]
    with META_PATH.open("rb") as file:
        stoi = pickle.load(file)["stoi"]
    assert got["ids"] == [[stoi[c] for c in text] for text in texts]
    assert got["decoded"] == got["skipped"] == texts
    assert got["failures"] == [f"Unk token `{characters._NO_UNKNOWN}` not found in the vocabulary"] * 3
    assert got["special"] == {}
    assert got["settings"] == [65, 65, 128, "left"]


def test_unknown_id_is_the_id_of_each_unknown_character(client, table):
    got = client[1]
    assert got["failures"] == [[1], table.encode("well known"), [1]]
    assert got["decoded"] == got["skipped"] == ["a  b"]


@pytest.mark.parametrize("characters", ALPHABETS.values(), ids=ALPHABETS)
def test_ids_and_text_are_exact_after_saving_twice(tmp_path, characters):
    table = CharacterTable(characters)
    build_character_tokenizer(table).save_pretrained(tmp_path / "first")
    AutoTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "second")
    texts = ["".join(characters), *make_texts(characters)]
    ids = tokenizer(texts).input_ids
    assert ids == [table.encode(text) for text in texts]
    assert tokenizer.batch_decode(ids) == tokenizer.batch_decode(ids, skip_special_tokens=True) == texts


def test_ids_outside_the_table_decode_to_nothing(table):
    tokenizer = build_character_tokenizer(table)
    assert tokenizer.decode([39, 65, 40, 10**6]) == table.decode([39, 40])


def test_without_the_policy_unknown_characters_would_vanish(table):
    silent = Tokenizer(models.BPE({c: i for i, c in enumerate(table.characters)}, []))
    assert silent.encode("a~b").ids == table.encode("ab")


def test_a_named_special_token_would_lose_its_character(tmp_path, table):
    """Why no character is bos, eos or pad: what Transformers loads under these names, it drops and does not train."""
    tokenizer = build_character_tokenizer(table)
    tokenizer.pad_token = "\n"
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    assert collator([tokenizer("a\nb")])["labels"].tolist() == [[39, -100, 40]]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.decode(table.encode("a\nb"), skip_special_tokens=True) == "ab"


def test_special_tokens_set_after_loading_lose_nothing(folder, table):
    """What lm-eval and TRL ask of a tokenizer, with the lines of docs/tokenizers.md for an unchanged model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = "\n"
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} == {0}
    assert (len(tokenizer), tokenizer.vocab_size) == (65, 65)
    texts = make_texts(table.characters)
    ids = tokenizer(texts).input_ids
    assert ids == [table.encode(text) for text in texts]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    batch = tokenizer(["a\n", "abc\n"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [[0, 0, 39, 0], [39, 40, 41, 0]]
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_end_of_text_added_to_tokenizer_and_model_survives_saving(folder, tmp_path, table):
    """The code of docs/tokenizers.md for a model that learns to end its texts and is trained with padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), NanoGPTLMHeadModel.from_pretrained(folder)
    end = "<|endoftext|>"
    tokenizer.add_special_tokens({"bos_token": end, "eos_token": end, "pad_token": end})
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), NanoGPTLMHeadModel.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 65 < model.config.vocab_size
    texts = make_texts(table.characters)
    ids = tokenizer(texts).input_ids
    assert ids == [table.encode(text) for text in texts]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([tokenizer("a\nb"), tokenizer("a")])
    assert batch["labels"].tolist() == [[39, 0, 40], [-100, -100, 39]]
    assert torch.isfinite(model(**batch).loss)
    with pytest.raises(TokenizerError, match=r"got tokens such as '<\|endoftext\|>'"):
        write_meta(tokenizer, tmp_path / "meta.pkl")


def test_pipeline_generates_the_characters_of_the_model(folder, table):
    model, tokenizer = NanoGPTLMHeadModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = generate("ROMEO:\n", max_new_tokens=60, do_sample=False)[0]["generated_text"]
    ids = model.generate(torch.tensor([table.encode("ROMEO:\n")]), max_new_tokens=60, do_sample=False)
    assert text == table.decode(ids[0].tolist())
    assert text.count("\n") > 1


@pytest.mark.parametrize(
    ("characters", "reason"),
    [((), "none"), (("a", "bc"), "'bc'"), (("a", ""), "''"), (("a", "a"), "a character twice"), (("\ud83d",), "")],
)
def test_wrong_tables_are_refused(tmp_path, characters, reason):
    message = f"expected a table of different single characters that UTF-8 can encode, got {reason}"
    with pytest.raises(TokenizerError, match=f"^table: {message}"):
        build_character_tokenizer(CharacterTable(characters))
    with pytest.raises(TokenizerError, match=message):
        write_meta(CharacterTable(characters), tmp_path / "meta.pkl")


@pytest.mark.parametrize("unknown_id", [-1, 65])
def test_unknown_id_outside_the_table_is_refused(table, unknown_id):
    with pytest.raises(TokenizerError, match=f"unknown_id: expected an id of 0 to 64, got {unknown_id}; give one"):
        build_character_tokenizer(table, unknown_id=unknown_id)


@pytest.mark.parametrize("kind", ["table", "tokenizer", "loaded"])
def test_write_meta_is_read_by_pickle_and_read_meta(tmp_path, folder, table, kind):
    source = {"table": table, "tokenizer": build_character_tokenizer(table, unknown_id=3)}.get(kind)
    path = tmp_path / "data" / "mine" / "meta.pkl"
    write_meta(source or AutoTokenizer.from_pretrained(folder), path)
    assert read_meta(path) == table
    with path.open("rb") as file, META_PATH.open("rb") as original:  # as train.py and sample.py read it
        assert pickle.load(file) == pickle.load(original)


def test_write_meta_replaces_only_with_overwrite(tmp_path, table):
    path = tmp_path / "meta.pkl"
    path.write_text("mine")
    with pytest.raises(TokenizerError, match=r"is there already: expected a new path; give another or overwrite=True"):
        write_meta(table, path)
    assert path.read_text() == "mine"
    write_meta(table, path, overwrite=True)
    assert read_meta(path) == table


def test_write_meta_that_fails_leaves_nothing(tmp_path, table):
    path = tmp_path / "meta.pkl"
    with limit_file_size(100), pytest.raises(TokenizerError, match=r"cannot be written: .*"):
        write_meta(table, path)
    assert not list(tmp_path.iterdir())


def make_word_level(characters, split=True, lower=False):
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=characters[0]))
    backend.decoder = decoders.Fuse()
    if split:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if lower:
        backend.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_write_meta_takes_any_tokenizer_that_is_a_table(tmp_path):
    write_meta(make_word_level("\n aA"), tmp_path / "meta.pkl")
    assert read_meta(tmp_path / "meta.pkl").characters == ("\n", " ", "a", "A")


@pytest.mark.parametrize("kind", ["bpe", "whole words", "lower case", "bytes", "gap"])
def test_write_meta_of_no_character_table_is_refused(tmp_path, kind):
    if kind in ("bpe", "bytes"):
        tokenizer = build_tiktoken_tokenizer(make_encoding(special_tokens=(), n_merges=300 if kind == "bpe" else 0))
    elif kind == "gap":
        backend = Tokenizer(models.BPE({"a": 0, "b": 2}, []))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    else:
        tokenizer = make_word_level("\n aA", split=kind != "whole words", lower=kind == "lower case")
    with pytest.raises(
        TokenizerError, match=r"meta.pkl: not a character table: .*; nanoGPT's meta.pkl cannot express it"
    ):
        write_meta(tokenizer, tmp_path / "meta.pkl")
    assert not (tmp_path / "meta.pkl").exists()


@pytest.fixture
def nanogpt_dir(tmp_path):
    """A folder like nanoGPT's, with out/ and data/shakespeare_char/meta.pkl."""
    (tmp_path / "nanoGPT" / "data" / "shakespeare_char").mkdir(parents=True)
    (tmp_path / "nanoGPT" / "out").mkdir()
    shutil.copy(META_PATH, tmp_path / "nanoGPT" / "data" / "shakespeare_char")
    return tmp_path / "nanoGPT"


CONFIG = {"dataset": "shakespeare_char"}


def test_find_tokenizer_next_to_the_checkpoints_folder(nanogpt_dir, table):
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    config = model.nanogpt_training_state.config
    tokenizer = find_tokenizer(nanogpt_dir / "out" / "ckpt.pt", config, model.config.vocab_size, block_size=128)
    assert tokenizer("hm\n").input_ids == table.encode("hm\n")
    assert tokenizer.model_max_length == 128


def test_find_tokenizer_in_the_working_directory(nanogpt_dir, tmp_path, monkeypatch, table):
    monkeypatch.chdir(nanogpt_dir)
    tokenizer = find_tokenizer(tmp_path / "elsewhere" / "deep" / "ckpt.pt", CONFIG, 65)
    assert tokenizer("hm\n").input_ids == table.encode("hm\n")
    monkeypatch.chdir(nanogpt_dir / "out")
    assert len(find_tokenizer("ckpt.pt", CONFIG, 65)) == 65


def test_find_tokenizer_prefers_the_one_that_fits(nanogpt_dir, tmp_path, monkeypatch):
    other = tmp_path / "data" / "shakespeare_char" / "meta.pkl"
    write_meta(CharacterTable(("a", "b")), other)
    monkeypatch.chdir(tmp_path)
    assert len(find_tokenizer(nanogpt_dir / "out" / "ckpt.pt", CONFIG, 2)) == 2
    message = rf"no tokenizer found: expected a meta.pkl of 9 .*65 characters.*{re.escape(str(other))} of 2 characters"
    with pytest.raises(TokenizerError, match=message):
        find_tokenizer(nanogpt_dir / "out" / "ckpt.pt", CONFIG, 9)


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_find_tokenizer_is_gpt2_without_a_meta_pkl(tmp_path, monkeypatch, vocab_size):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find, "build_gpt2_tokenizer", lambda *, block_size: ("GPT-2's", block_size))
    assert find_tokenizer("out/ckpt.pt", {"dataset": "openwebtext"}, vocab_size, block_size=8) == ("GPT-2's", 8)
    with pytest.raises(TokenizerError, match=r"out/ckpt.pt: no tokenizer found: .* data set None, got none; give"):
        find_tokenizer("out/ckpt.pt", {}, 65)


@pytest.mark.parametrize(
    "dataset", ["../data/shakespeare_char", "../../secret", "/", "", ".", "..", "a\\b", "a\0", "c:x", None, 5, ["a"]]
)
def test_find_tokenizer_stays_in_the_data_folder(nanogpt_dir, dataset, monkeypatch):
    shutil.copy(META_PATH, nanogpt_dir / "data" / "meta.pkl")  # where "." and "" would lead
    shutil.copy(META_PATH, nanogpt_dir / "meta.pkl")
    shutil.copytree(nanogpt_dir / "data" / "shakespeare_char", nanogpt_dir.parent / "secret")
    with pytest.raises(TokenizerError, match=r"no tokenizer found: .*got none"):
        find_tokenizer(nanogpt_dir / "out" / "ckpt.pt", {"dataset": dataset}, 65)
    assert find_tokenizer(nanogpt_dir / "out" / "ckpt.pt", CONFIG, 65)
