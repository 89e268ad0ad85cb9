"""tokenization/bpe.py: tiktoken encodings as tokenizers with the same ids, and the places where GPT-2's is found."""

import base64
import random
import re
import sys

import pytest
import tiktoken
import torch
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

import hugging_nano_gpt.tokenization.bpe as bpe
from hugging_nano_gpt import (
    MissingDependencyError,
    NanoGPTConfig,
    NanoGPTLMHeadModel,
    TokenizerError,
    build_gpt2_tokenizer,
    build_tiktoken_tokenizer,
)
from hugging_nano_gpt.tokenization.find import load_tokenizer

from ..helpers.encodings import END_OF_TEXT, PATTERNS, make_encoding, make_gpt2_encoding, make_texts


def count_differences(tokenizer, encoding, texts):
    encoded = tokenizer(texts).input_ids
    return sum(ids != encoding.encode(t, allowed_special="all") for ids, t in zip(encoded, texts, strict=True))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_tiktoken_ids_are_the_same_on_random_unicode(tmp_path, pattern):
    encoding = make_encoding(pattern)
    build_tiktoken_tokenizer(encoding).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = make_texts(encoding)
    assert sum(END_OF_TEXT in text for text in texts) > 50
    assert count_differences(tokenizer, encoding, texts) == 0
    assert tokenizer.batch_decode(tokenizer(texts).input_ids) == texts
    ordinary = tokenizer(texts, split_special_tokens=True).input_ids
    assert ordinary == [encoding.encode_ordinary(text) for text in texts]


def test_tiktoken_ids_of_every_code_point_are_the_same():
    encoding = make_encoding()
    tokenizer = build_tiktoken_tokenizer(encoding)
    points = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    texts = ["a".join(points[start : start + 256]) for start in range(0, len(points), 256)]
    assert count_differences(tokenizer, encoding, texts) == 0


def test_tiktoken_decoding_of_any_ids_is_the_same():
    encoding = make_encoding()
    tokenizer = build_tiktoken_tokenizer(encoding)
    rng = random.Random(2)
    for _ in range(500):  # most of these are not UTF-8
        ids = [rng.randrange(encoding.n_vocab) for _ in range(10)]
        assert tokenizer.decode(ids) == encoding.decode(ids)


def test_untranslated_pattern_gives_other_ids(monkeypatch):
    monkeypatch.setattr(bpe, "_translate_pattern", lambda pattern: pattern)
    encoding = make_encoding(PATTERNS["cl100k_base"])
    with pytest.raises(
        TokenizerError, match=r"encoding 'small': has no equal as a tokenizer.json: expected tiktoken's"
    ):
        build_tiktoken_tokenizer(encoding)
    monkeypatch.setattr(bpe, "_find_difference", lambda *_: None)
    assert count_differences(build_tiktoken_tokenizer(encoding), encoding, make_texts(encoding)) > 0


@pytest.mark.parametrize(
    ("pattern", "translated"),
    [
        (r"\p{N}{1,3}+|a", r"(?>\p{N}{1,3})|a"),
        (r"[a\]$]{2}+|\d{1,}+", r"(?>[a\]$]{2})|(?>\d{1,})"),
        (r"^a\$[$^]\s++$", r"\Aa\$[$^]\s++\z"),
        (r"[^\r\n]?+x{1,3}", r"[^\r\n]?+x{1,3}"),
    ],
)
def test_translate_pattern_rewrites_only_what_differs(pattern, translated):
    assert bpe._translate_pattern(pattern) == translated


def test_pattern_that_reads_differently_is_refused():
    with pytest.raises(TokenizerError, match=r"has no equal as a tokenizer.json.*reads in another way"):
        build_tiktoken_tokenizer(make_encoding(r"\w+|\W"))  # only tiktoken's \w matches joiners


def test_special_tokens_keep_their_ids_across_a_gap():
    encoding = make_encoding(special_tokens=(END_OF_TEXT, "<|fim|>"), gap=5)
    tokenizer = build_tiktoken_tokenizer(encoding)
    ids = [encoding.n_vocab - 2, encoding.n_vocab - 1]
    assert tokenizer(f"{END_OF_TEXT}<|fim|>").input_ids == ids
    assert tokenizer.decode([ids[0] - 1]) == ""  # an id in the gap
    assert tokenizer.decode([*ids, 7], skip_special_tokens=True) == encoding.decode([7])
    assert count_differences(tokenizer, encoding, make_texts(encoding, 300)) == 0


def test_converter_of_transformers_moves_special_tokens_across_a_gap(tmp_path):
    encoding = make_encoding(gap=5)
    path = tmp_path / "ranks.tiktoken"
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in encoding._mergeable_ranks.items()]
    path.write_text("\n".join(lines))
    theirs = TikTokenConverter(str(path), encoding._pat_str, extra_special_tokens=encoding._special_tokens).converted()
    assert theirs.encode(END_OF_TEXT).ids != encoding.encode(END_OF_TEXT, allowed_special="all")


def test_token_that_merging_never_makes_is_used_for_a_whole_piece_only():
    # The ranks decide how "qxz" is merged, from "qx" or from "xz". No two parts of "qqxzj" are tokens.
    encoding = make_encoding(merges=(b"qqxzj", b"qx", b"xz", b"qxz", b"aaa", b"aa", b"aaaaa"))
    assert bpe._find_merge(b"qqxzj", encoding._mergeable_ranks) is None
    assert bpe._find_merge(b"qxz", encoding._mergeable_ranks) == (b"qx", b"z")
    tokenizer = build_tiktoken_tokenizer(encoding)
    rng = random.Random(3)
    texts = ["qqxzj", "qqxzjqqxzj", *("".join(rng.choices("aqxzj ", k=12)) for _ in range(2000))]
    assert count_differences(tokenizer, encoding, texts) == 0
    assert len(tokenizer("qqxzj").input_ids) == 1


@pytest.mark.parametrize("seed", range(5))
def test_random_ranks_give_the_same_ids(seed):
    """The ranks are in an order that no training gives."""
    rng = random.Random(seed)
    tokens = {bytes(rng.choices(b"abc", k=rng.randint(2, 6))) for _ in range(200)}
    encoding = make_encoding(merges=rng.sample(sorted(tokens), len(tokens)), n_merges=0)
    texts = ["".join(rng.choices("abc", k=rng.randint(1, 25))) for _ in range(2000)]
    assert count_differences(build_tiktoken_tokenizer(encoding), encoding, texts) == 0


def test_end_of_text_is_bos_eos_and_pad():
    encoding = make_encoding()
    tokenizer = build_tiktoken_tokenizer(encoding, block_size=64)
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} == {encoding.eot_token}
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (64, "left")
    assert len(tokenizer) == tokenizer.vocab_size == encoding.n_vocab
    batch = tokenizer(["it's", "it's o'clock"], padding=True)
    assert batch.input_ids[0][0] == encoding.eot_token
    assert batch.attention_mask[0][0] == 0


def test_encoding_without_end_of_text_has_no_named_token():
    tokenizer = build_tiktoken_tokenizer(make_encoding(special_tokens=("<|x|>",)))
    assert tokenizer.special_tokens_map == {}
    assert tokenizer.added_tokens_encoder.keys() == {"<|x|>"}


def test_special_token_spelled_like_another_is_refused():
    with pytest.raises(TokenizerError, match=r"0 bytes missing and 'it' as another token too"):
        build_tiktoken_tokenizer(make_encoding(special_tokens=("it",)))


def test_missing_bytes_are_refused():
    encoding = make_encoding()
    ranks = {token: rank for token, rank in encoding._mergeable_ranks.items() if token != b"\x80"}
    small = tiktoken.Encoding("small", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={})
    with pytest.raises(TokenizerError, match="1 bytes missing"):
        build_tiktoken_tokenizer(small)


@pytest.fixture(scope="module")
def gpt2():
    return make_gpt2_encoding()


@pytest.fixture
def without_cache(monkeypatch):
    monkeypatch.setattr(bpe, "try_to_load_from_cache", lambda *_: None)


def test_gpt2_of_tiktoken_fits_the_padded_model(gpt2, without_cache, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": gpt2}.__getitem__)
    tokenizer = build_gpt2_tokenizer(block_size=1024)
    assert (len(tokenizer), tokenizer.vocab_size, tokenizer.model_max_length) == (50257, 50257, 1024)
    assert tokenizer.eos_token_id == 50256
    assert count_differences(tokenizer, gpt2, make_texts(gpt2, 200)) == 0
    for spare in ([50257], [50303]):  # sample.py panics here
        assert tokenizer.decode(spare) == ""
        assert tokenizer.convert_ids_to_tokens(spare) == [None]
    assert tokenizer.decode([104, 50300, 105]) == "hi"


def test_gpt2_special_ids_are_those_of_the_model(gpt2, without_cache, monkeypatch, tmp_path):
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": gpt2}.__getitem__)
    config = NanoGPTConfig(block_size=8, vocab_size=50304, n_layer=1, n_head=1, n_embd=2)
    NanoGPTLMHeadModel(config).to_nanogpt_ckpt(tmp_path / "ckpt.pt", overwrite=True)
    settings = NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt").generation_config
    tokenizer = build_gpt2_tokenizer()
    assert (settings.bos_token_id, settings.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert torch.tensor(settings.suppress_tokens).min() == len(tokenizer)


def test_gpt2_of_the_hub_cache_is_read_first(gpt2, monkeypatch, tmp_path):
    path = tmp_path / "tokenizer.json"
    build_tiktoken_tokenizer(gpt2).backend_tokenizer.save(str(path))
    monkeypatch.setattr(bpe, "try_to_load_from_cache", lambda name, _: str(path) if name == "gpt2" else object())
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    tokenizer = build_gpt2_tokenizer()
    texts = make_texts(gpt2, 200)
    assert count_differences(tokenizer, gpt2, texts) == 0
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (50256, "left")


@pytest.mark.parametrize("contents", ["{", "small"])
def test_gpt2_of_a_wrong_cache_is_refused(monkeypatch, tmp_path, contents):
    path = tmp_path / "tokenizer.json"
    path.write_text(contents)
    if contents == "small":
        build_tiktoken_tokenizer(make_encoding()).backend_tokenizer.save(str(path))
    monkeypatch.setattr(bpe, "try_to_load_from_cache", lambda *_: str(path))
    with pytest.raises(TokenizerError, match=f"^{re.escape(str(path))}: .*; delete it, and download it again"):
        build_gpt2_tokenizer()


OR_FILES = r"or give a folder with its vocab.json and merges.txt, or its encoder.json and vocab.bpe \(--tokenizer\)$"


def test_without_tiktoken_the_command_is_named(without_cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(
        MissingDependencyError, match=rf"encoding 'gpt2': tiktoken .*; pip install tiktoken; {OR_FILES}"
    ):
        build_gpt2_tokenizer()


def test_without_network_it_says_what_to_do(without_cache, monkeypatch):
    def fail(_):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    message = rf"cannot provide it: ConnectionError: no route; .*TIKTOKEN_CACHE_DIR names; {OR_FILES}"
    with pytest.raises(TokenizerError, match=message):
        build_gpt2_tokenizer()


def test_unknown_encoding_is_refused():
    with pytest.raises(TokenizerError, match=r"encoding 'gpt9': is not known to tiktoken: expected one of .*'gpt2'"):
        build_tiktoken_tokenizer("gpt9")


# GPT-2's two files.

NAMES = [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")]


def save_files(encoding, folder, names):
    folder.mkdir()
    build_tiktoken_tokenizer(encoding).backend_tokenizer.model.save(str(folder))
    for old, new in zip(NAMES[0], names, strict=True):
        (folder / old).rename(folder / new)
    return folder


@pytest.mark.parametrize("names", NAMES, ids=lambda names: names[0])
def test_tokenizer_of_gpt2_files_has_the_same_ids_without_network_or_tiktoken(tmp_path, monkeypatch, names):
    encoding = make_encoding()
    folder = save_files(encoding, tmp_path / "gpt2", names)
    config = NanoGPTConfig(block_size=8, vocab_size=encoding.n_vocab, n_layer=1, n_head=1, n_embd=2)
    model = NanoGPTLMHeadModel(config)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    tokenizer = load_tokenizer(model, tmp_path, tokenizer=str(folder))
    assert count_differences(tokenizer, encoding, make_texts(encoding, 300)) == 0
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} == {encoding.eot_token}
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (8, "left")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("a<|endoftext|>").input_ids[-1] == encoding.eot_token


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "merges.txt").unlink(), "no tokenizer in it: .* and merges.txt, got 'vocab.json';"),
        (lambda folder: (folder / "merges.txt").write_text("a b c d\n"), "cannot be read with merges.txt"),
        (lambda folder: (folder / "vocab.json").write_text("{"), "vocab.json: cannot be read"),
        (
            lambda folder: (folder / "vocab.json").write_text('{"a": 0}'),
            "vocab.json: (cannot be read|expected GPT-2's)",
        ),
    ],
    ids=["half", "merges", "json", "another vocabulary"],
)
def test_gpt2_files_that_are_not_whole_are_refused(tmp_path, spoil, message):
    encoding = make_encoding()
    folder = save_files(encoding, tmp_path / "gpt2", NAMES[0])
    spoil(folder)
    config = NanoGPTConfig(block_size=8, vocab_size=encoding.n_vocab, n_layer=1, n_head=1, n_embd=2)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(NanoGPTLMHeadModel(config), tmp_path, tokenizer=str(folder))
