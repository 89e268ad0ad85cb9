"""The servers of the demo model, without and with a chat template, and a model of bytes, for the tests of serve."""

import pytest

from hugging_nano_gpt import build_tiktoken_tokenizer

from ..helpers.encodings import make_encoding
from ..helpers.serving import CHAT_TEMPLATE, connect, serve_app
from ..helpers.tiny import make_model, make_tokenizer


@pytest.fixture(scope="module")
def client(demo):
    with serve_app(demo, make_tokenizer()) as address, connect(address) as client:
        yield client


@pytest.fixture(scope="module")
def chat_client(demo):
    with serve_app(demo, make_tokenizer(chat_template=CHAT_TEMPLATE)) as address, connect(address) as client:
        yield client


@pytest.fixture(scope="module")
def byte_parts():
    """A random model of bytes; most of its answers end inside a character or contain halves of characters."""
    tokenizer = build_tiktoken_tokenizer(make_encoding())
    return make_model(vocab_size=len(tokenizer)), tokenizer
