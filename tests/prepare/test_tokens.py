"""prepare/tokens.py: a text encoded in pieces has the ids of the whole text, and what a tokenizer loses is noted."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

import hugging_nano_gpt.prepare.tokens as tokens_module
from hugging_nano_gpt import TokenizerError, build_character_tokenizer, build_tiktoken_tokenizer, read_meta
from hugging_nano_gpt.demo import META_PATH
from hugging_nano_gpt.prepare.tokens import TokenizerTokens, cut_text

from ..helpers.encodings import PATTERNS, make_encoding, make_texts

BEHIND_SPACE = re.compile(r"\s(?=\S)")


def list_cuts(pattern, text):
    return [match.end() for match in pattern.finditer(text)]


def differs(encoding, text, position):
    left, right = text[:position], text[position:]
    return encoding.encode_ordinary(text) != encoding.encode_ordinary(left) + encoding.encode_ordinary(right)


@pytest.fixture(params=PATTERNS)
def encoding(request):
    return make_encoding(PATTERNS[request.param])


def test_no_token_crosses_a_cut(encoding):
    texts = ["".join(make_texts(encoding, 6, seed)) for seed in range(150)]
    cuts = [(text, position) for text in texts for position in list_cuts(tokens_module._CUT, text)]
    assert len(cuts) > 500
    assert not [cut for cut in cuts if differs(encoding, *cut)]


def test_cut_behind_a_space_is_found_to_change_ids(encoding):
    texts = ["".join(make_texts(encoding, 6, seed)) for seed in range(20)]
    assert any(differs(encoding, text, position) for text in texts for position in list_cuts(BEHIND_SPACE, text))


def cut_into_blocks(text, size):
    return [[text[start : start + size]] for start in range(0, len(text), size)]


@pytest.mark.parametrize("size", [7, 50, 1000])
def test_pieces_have_the_ids_of_the_whole_text(encoding, size, monkeypatch):
    monkeypatch.setattr(tokens_module, "_WINDOW", 20)
    text = "".join(make_texts(encoding, 500, seed=3))

    tokens = TokenizerTokens("mine", build_tiktoken_tokenizer(encoding), encoding)
    pieces = [piece for (piece,) in cut_text(cut_into_blocks(text, size), tokens)]
    assert "".join(pieces) == text
    assert np.concatenate(tokens.encode_each(pieces)).tolist() == encoding.encode_ordinary(text)
    assert len(pieces) > 3 or size < 20  # in shorter blocks than the window, no cut can be tried


def make_llama_tokenizer():
    """Makes a tokenizer that puts a space before every text, as Llama 2's, and loses capitals: no text can be cut."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_text_whose_tokenizer_sees_across_every_cut_stays_whole(monkeypatch):
    monkeypatch.setattr(tokens_module, "_WINDOW", 20)
    tokens = TokenizerTokens("mine", make_llama_tokenizer())
    text = "a few words " * 100
    assert list(cut_text(cut_into_blocks(text, 100), tokens)) == [[text]]


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        ("The words", ["mine: loses some of the text: its tokens decode to another one"]),
        ("the words!", ["mine: 1 of the first 11 tokens are the unknown token"]),
        ("the words", []),
    ],
)
def test_loss_of_text_is_noted(text, notes):
    tokens = TokenizerTokens("mine", make_llama_tokenizer())
    assert tokens.describe([text], False) == notes
    notes.append("mine: has no end-of-text token, so nothing separates the documents")
    assert tokens.describe([text], True) == notes


def test_special_tokens_in_a_text_are_ordinary_text():
    encoding = make_encoding()
    tokenizer = build_tiktoken_tokenizer(encoding)
    text = "it's<|endoftext|>it's"
    ids = TokenizerTokens("mine", tokenizer).encode_each([text])[0].tolist()
    assert ids == TokenizerTokens("mine", tokenizer, encoding).encode_each([text])[0].tolist()
    assert ids == encoding.encode_ordinary(text)
    assert encoding.eot_token not in ids
    assert tokenizer(text).input_ids != ids  # the user's tokenizer is as it was


def test_character_that_a_tokenizer_does_not_know_is_named():
    tokens = TokenizerTokens("mine", build_character_tokenizer(read_meta(META_PATH)))
    with pytest.raises(TokenizerError, match=r"^mine: expected characters of the tokenizer's 65, got '\xd6'; give"):
        tokens.encode_each(["R\xd6MEO"])
