"""What the tests of prepare share: a text, documents, and tiktoken's and the Hub's files replaced by small ones."""

import json

import pytest
import tiktoken

import hugging_nano_gpt.prepare.sources as sources
import hugging_nano_gpt.prepare.tokens as tokens
import hugging_nano_gpt.tokenization.bpe as bpe

from ..helpers.encodings import make_encoding
from ..helpers.texts import make_text


@pytest.fixture
def text_path(tmp_path):
    path = tmp_path / "input.txt"
    path.write_bytes(make_text().encode())
    return path


@pytest.fixture
def documents_path(tmp_path, monkeypatch):
    """A file of 2,500 documents, 2 of them val's; `datasets` has its cache in a folder of the test's."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "documents.jsonl"
    rows = [{"id": index, "text": make_text(index % 7, seed=index)} for index in range(2500)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def gpt2(monkeypatch):
    """A small encoding under the name of GPT-2's, which is not on this machine."""
    encoding = make_encoding()
    monkeypatch.setattr(bpe, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    return encoding


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that a text of a test has many."""
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(tokens, "_WINDOW", 50)
