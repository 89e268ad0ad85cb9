"""The table of characters of the demo model's meta.pkl, which the tests of its reading and its tokenizer share."""

import pytest

from hugging_nano_gpt import read_meta
from hugging_nano_gpt.demo import META_PATH


@pytest.fixture(scope="module")
def table():
    return read_meta(META_PATH)
