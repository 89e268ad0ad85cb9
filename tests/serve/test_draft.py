"""The growing text of a served answer: complete characters, nothing lost at its end, stops cut exactly."""

import random

import pytest
import torch

from hugging_nano_gpt import build_tiktoken_tokenizer
from hugging_nano_gpt.serve.draft import Draft

from ..helpers.encodings import make_encoding
from ..helpers.tiny import make_tokenizer

N_DRAFTS = 300


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiktoken_tokenizer(make_encoding())


def write(tokenizer, ids, stops=(), ends=(), n_top=None):
    """Writes a draft token by token; returns the pieces."""
    draft, pieces = Draft(tokenizer, 0, stops=list(stops), ends=list(ends), n_top=n_top), []
    logprobs = torch.zeros(len(tokenizer)).log_softmax(-1) if n_top is not None else None
    for token in ids:
        if draft.add(token, logprobs):
            break
        pieces.append(draft.take(is_last=False))
    return [*pieces, draft.take(is_last=True)]


def make_ids(rng, tokenizer):
    """Makes ids of characters of one to four bytes, some of them cut, and of random tokens."""
    letters = "aa \u00e9\u20ac\U0001f600\ufffd"
    ids = tokenizer("".join(rng.choices(letters, k=rng.randrange(1, 12)))).input_ids
    for _ in range(rng.randrange(4)):
        ids.insert(rng.randrange(len(ids) + 1), rng.randrange(len(tokenizer)))
    return ids[: rng.randrange(1, len(ids) + 1)]


def test_pieces_are_the_whole_text_of_any_tokens(tokenizer):
    rng, n_broken = random.Random(1), 0
    for _ in range(N_DRAFTS):
        ids = make_ids(rng, tokenizer)
        pieces, expected = write(tokenizer, ids), tokenizer.decode(ids)
        assert "".join(piece.text for piece in pieces) == expected
        assert not any(piece.text.endswith("\ufffd") for piece in pieces[:-1])
        assert sum(piece.n_drawn for piece in pieces) == len(ids)
        n_broken += expected.endswith("\ufffd")
    assert n_broken > N_DRAFTS / 10


def cut(text, stops):
    """Cuts a text before the first stop to be complete."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


def test_stops_cut_exactly_and_none_is_sent_in_part(tokenizer):
    rng, n_cut = random.Random(2), 0
    for _ in range(N_DRAFTS):
        ids = make_ids(rng, tokenizer)
        text = tokenizer.decode(ids)
        stops = ["".join(rng.choices("a \u00e9\u20acx", k=rng.randrange(1, 4))) for _ in range(rng.randrange(1, 4))]
        pieces, expected = write(tokenizer, ids, stops), cut(text, stops)
        assert "".join(piece.text for piece in pieces) == expected
        assert pieces[-1].finish_reason == ("length" if expected == text else "stop")
        n_cut += expected != text
    assert n_cut > N_DRAFTS / 10


def test_tokens_with_log_probabilities_are_those_that_begin_in_the_text(tokenizer):
    rng = random.Random(3)
    for _ in range(N_DRAFTS // 3):
        ids = make_ids(rng, tokenizer)
        pieces = write(tokenizer, ids, stops=["a "], n_top=2)
        text, tokens = "".join(piece.text for piece in pieces), [token for piece in pieces for token in piece.tokens]
        if text == tokenizer.decode(ids):
            assert len(tokens) == len(ids)
        assert all(token.offset <= len(text) for token in tokens)
        assert [token.offset for token in tokens] == sorted(token.offset for token in tokens)
        assert all(text[token.offset :].startswith(token.text) for token in tokens if "token_id:" not in token.text)


def test_stops_and_ends_in_the_prompt_are_ignored():
    tokenizer = make_tokenizer()
    ids = tokenizer("to be").input_ids
    draft = Draft(tokenizer, 0, stops=["to", "ee"], ends=[ids[0]], n_top=None)
    draft.add_prompt(ids, None)
    assert not draft.add(ids[-1], None)  # "ee" starts in the prompt
    assert draft.add(ids[0], None)
    assert draft.take(is_last=True).text == "to bee"
