"""prepare/sources.py: what is read of a text and of documents, and what is said of those that cannot be used."""

import json
import re

import numpy as np
import pytest

import hugging_nano_gpt.prepare.sources as sources
from hugging_nano_gpt import DataError, MissingDependencyError, TokenizerError, prepare_data
from hugging_nano_gpt.errors import require
from hugging_nano_gpt.prepare.sources import Texts, find_characters

from ..helpers.folders import list_files
from ..helpers.programs import run_command


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 19])
def test_text_is_what_python_reads_in_blocks_of_any_size(tmp_path, monkeypatch, size):
    monkeypatch.setattr(sources, "_BLOCK_BYTES", size)
    path = tmp_path / "input.txt"
    path.write_bytes("\ufeffa\r\n\r\rb\xe9\u4e2d\U0001f642\r\n\n caf\xe9 \r".encode())
    text = path.read_text(encoding="utf-8")
    texts = Texts([path])
    assert "".join(block for (block,) in texts.read("train")) == text[: int(len(text) * 0.9)]
    assert "".join(block for (block,) in texts.read("val")) == text[int(len(text) * 0.9) :]
    assert list(texts.characters) == sorted(set(text))


def test_characters_at_both_ends_of_unicode_are_found():
    points = [*range(0x3000), 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]
    assert find_characters(["".join(map(chr, points))]) == tuple(map(chr, points))


@pytest.mark.parametrize("data", [b"abc\xff", b"abc" * 500 + b"\xe4\xb8", b"ab\xed\xa0\x80c"])
@pytest.mark.parametrize("size", [1, 4, 1 << 19])
def test_byte_that_is_not_utf8_is_named(tmp_path, monkeypatch, data, size):
    monkeypatch.setattr(sources, "_BLOCK_BYTES", size)
    (tmp_path / "input.txt").write_bytes(data)
    with pytest.raises(UnicodeDecodeError) as expected:
        data.decode()
    offset = expected.value.start
    message = rf"input\.txt: expected text in UTF-8, got byte {data[offset]:#04x} at offset {offset} \("
    with pytest.raises(DataError, match=message):
        prepare_data(tmp_path / "input.txt", tmp_path / "out", tokenizer="char")
    assert list_files(tmp_path) == ["input.txt"]


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def read_tokens(path):
    return np.fromfile(path, dtype=np.uint16).tolist()


@pytest.fixture
def places(documents_path, tmp_path, monkeypatch):
    """A folder with what people name by mistake."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("text.txt", "hello\n" * 20), ("empty.txt", ""), ("one.txt", "a")):
        (tmp_path / name).write_text(text)
    write_rows(tmp_path / "numbers.jsonl", [{"text": index} for index in range(9)])
    write_rows(tmp_path / "nothing.jsonl", [{"text": ""}] * 9)
    write_rows(tmp_path / "null.jsonl", [{"text": None}] * 9)
    write_rows(tmp_path / "alone.jsonl", [{"text": "a"}])
    (tmp_path / "broken.jsonl").write_text('{"text": "a"')
    (tmp_path / "folder").mkdir()
    return tmp_path


MESSAGES = {
    "nowhere.txt": r"nowhere\.txt: no such file or folder; check the path$",
    "./nowhere": r"nowhere: no such file or folder; check the path$",
    "text.txt nowhere.txt": r"nowhere\.txt: no such file or folder; check the path$",
    "empty.txt": r"empty\.txt: expected a text of at least 2 characters, got 0; give a longer text$",
    "one.txt": r"one\.txt: expected a text of at least 2 characters, got 1; give a longer text$",
    "text.txt documents.jsonl": r"text\.txt: expected files of one kind, got 'text\.txt', 'documents\.jsonl'; give ",
    "text.txt --column text": r"text\.txt: expected no column for a text, got 'text'; leave out --column$",
    "documents.jsonl --column txt": r"expected a column 'txt', got 'id', 'text'; give one of these \(--column\)$",
    "documents.jsonl --column id": r"expected texts in the column 'id', got int in row 0 of train; give another",
    "numbers.jsonl": r"numbers\.jsonl: expected texts in the column 'text', got int in row 0 of train; give another",
    "nothing.jsonl": r"nothing\.jsonl: expected texts in the column 'text', got empty ones in all of train; give",
    "null.jsonl": r"null\.jsonl: expected texts in the column 'text', got empty ones in all of train; give another",
    "alone.jsonl": r"alone\.jsonl: expected at least 2 documents, one for val, got 1; give more, or a text$",
    "broken.jsonl": r"broken\.jsonl: cannot be read as a data set: .*; check it, and its name$",
    "folder": r"folder: cannot be read as a data set: .*; check it, and its name$",
    "text.txt --tokenizer bpe:70000": r"bpe:70000: expected at most 65,536 tokens, .* got 70,000; give a smaller",
    "text.txt --tokenizer bpe:256": r"bpe:256: expected at least 257 tokens, which are .*, as --tokenizer bpe:8000$",
    "text.txt --tokenizer bpe": r"encoding 'bpe': is not known to tiktoken: expected one of ",
    "text.txt --tokenizer folder": r"folder: no tokenizer in it: expected tokenizer\.json, ",
}


@pytest.mark.parametrize("line", MESSAGES)
def test_source_that_cannot_be_used_takes_one_line(places, line):
    before = list_files(places)
    names, flag, option = line.partition(" --")
    options = [] if "--tokenizer" in line else ["--tokenizer", "char"]
    result = run_command("prepare", *names.split(), "out", *(flag + option).split(), *options)
    assert result.returncode == 1
    assert re.fullmatch(rf"error: .*{MESSAGES[line].removesuffix('$')}.*\n", result.stderr)
    assert [name for name in list_files(places) if not name.startswith("cache")] == before


def test_missing_datasets_is_named(text_path, documents_path, monkeypatch, tmp_path):
    def refuse(where, *requirements, **kwargs):
        require(where, *(name.replace("datasets", "no_such_package") for name in requirements), **kwargs)

    monkeypatch.setattr(sources, "require", refuse)
    with pytest.raises(MissingDependencyError, match=r"^documents: .* is not installed; pip install '.*>=4\.7'$"):
        prepare_data(documents_path, tmp_path / "out", tokenizer="char")
    prepare_data(text_path, tmp_path / "out", tokenizer="char")  # a text needs no package


def test_documents_of_every_kind_give_the_same_bytes(documents_path, tmp_path):
    import datasets

    # A .csv cannot contain "\r" on its own: it ends a row.
    documents_path.write_text(documents_path.read_text().replace("\\r", ""))
    loaded = datasets.load_dataset("json", data_files=str(documents_path))
    loaded["train"].to_csv(tmp_path / "documents.csv")
    loaded["train"].to_parquet(tmp_path / "documents.parquet")
    loaded.save_to_disk(tmp_path / "saved")
    (tmp_path / "local").mkdir()
    loaded["train"].to_parquet(tmp_path / "local" / "train.parquet")
    tokens = {}
    for name in ("documents.jsonl", "documents.csv", "documents.parquet", "saved", "local"):
        prepare_data(tmp_path / name, tmp_path / f"out-{name}", tokenizer="char")
        tokens[name] = read_tokens(tmp_path / f"out-{name}" / "train.bin")
    assert len({tuple(each) for each in tokens.values()}) == 1


def test_validation_split_of_a_data_set_becomes_val(documents_path, tmp_path, capsys):
    import datasets

    rows = datasets.Dataset.from_dict({"story": ["ab", "", "c"]})
    others = datasets.Dataset.from_dict({"story": ["d"]})
    splits = datasets.DatasetDict({"test": rows, "train": rows, "validation": others})
    splits.save_to_disk(tmp_path / "saved")
    n_tokens = prepare_data(tmp_path / "saved", tmp_path / "out", tokenizer="char", column="story")
    assert n_tokens == {"train": 6, "val": 2}
    assert capsys.readouterr().out.startswith("number of documents: 3 in train, 1 in val\n")
    assert read_tokens(tmp_path / "out" / "train.bin") == [1, 2, 0, 0, 3, 0]  # a newline after each
    assert read_tokens(tmp_path / "out" / "val.bin") == [4, 0]
    splits.pop("train")
    splits.save_to_disk(tmp_path / "without")
    with pytest.raises(DataError, match=r"without: expected a split 'train', got 'test', 'validation'; give another"):
        prepare_data(tmp_path / "without", tmp_path / "out2", tokenizer="char", column="story")


@pytest.mark.parametrize(
    ("source", "expected"),
    [("openwebtext", ("openwebtext", None)), ("a/wiki:wiki-103.v1", ("a/wiki", "wiki-103.v1"))],
)
def test_name_of_a_data_set_goes_to_datasets(documents_path, tmp_path, monkeypatch, source, expected):
    import datasets

    rows, asked = datasets.Dataset.from_dict({"text": ["ab", "c"] * 4}), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or {"train": rows})
    prepare_data(source, tmp_path / "out", tokenizer="char")
    assert asked == [expected]


def test_characters_that_do_not_fit_uint16_are_refused(tmp_path):
    points = [point for point in range(0x20, 0x12000) if not 0xD800 <= point < 0xE000]
    (tmp_path / "input.txt").write_text("".join(map(chr, points)), encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"^char: expected at most 65,536 tokens, .* got 71,648; give a smaller"):
        prepare_data(tmp_path / "input.txt", tmp_path / "out", tokenizer="char")
    assert list_files(tmp_path) == ["input.txt"]
