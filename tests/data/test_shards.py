"""Several token files as one data set: read, trained on and evaluated as the one file with all of their tokens."""

import os
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hugging_nano_gpt import DataError, MissingDependencyError, evaluate_loss
from hugging_nano_gpt.data import shards
from hugging_nano_gpt.training import TokenDataset

from ..helpers.tiny import make_tokenizer
from ..helpers.toy_run import SETTINGS, flatten_checkpoint, list_differences, train
from ..helpers.trace import START_PATH, TRACE_DIR, load_start
from .test_dataset import BLOCK_SIZE, TOKENS, write_plain, write_shard

ENDS = [0, 200, 205, 212, 500]  # the second and the third file are shorter than a window


def write_npy(path, tokens):
    np.save(path, tokens)
    return path


WRITERS = {".bin": write_plain, "_llmc.bin": write_shard, ".npy": write_npy}


def write_shards(folder, write=write_plain, suffix=".bin", tokens=TOKENS, ends=ENDS, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, (begin, end) in enumerate(pairwise(ends)):
        write(folder / f"{split}_{number:06d}{suffix}", tokens[begin:end])
    return folder


def read_all(dataset):
    return [{name: tensor.tolist() for name, tensor in dataset[offset].items()} for offset in range(len(dataset))]


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path / "shards")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return TokenDataset(write_plain(tmp_path_factory.mktemp("whole") / "train.bin"), BLOCK_SIZE)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("pattern", ["", "train_*", "*_00000?*"])
def test_shards_have_the_windows_of_one_file_with_their_tokens(tmp_path, whole, suffix, pattern):
    write_shards(tmp_path / "shards", WRITERS[suffix], suffix)
    dataset = TokenDataset(tmp_path / "shards" / pattern, BLOCK_SIZE)
    assert (len(dataset), dataset.n_tokens) == (len(whole), 500)
    assert read_all(dataset) == read_all(whole)


def test_shards_in_another_order_have_other_windows(folder, whole):
    """Shows that the test above can fail."""
    (folder / "train_000000.bin").rename(folder / "train_000009.bin")
    assert read_all(TokenDataset(folder, BLOCK_SIZE)) != read_all(whole)


def test_folder_is_read_without_what_is_no_token_file(folder, whole):
    (folder / "meta.pkl").write_bytes(b"no tokens")
    assert read_all(TokenDataset(folder, BLOCK_SIZE)) == read_all(whole)


def test_file_whose_name_looks_like_a_glob_is_read(tmp_path, whole):
    path = write_plain(tmp_path / "train[1].bin")
    assert read_all(TokenDataset(path, BLOCK_SIZE)) == read_all(whole)


def test_more_shards_than_may_be_open_have_the_same_windows(folder, whole, monkeypatch):
    monkeypatch.setattr(shards, "_MOST_OPEN", 3)
    monkeypatch.setattr(os, "open", None)
    assert read_all(TokenDataset(folder, BLOCK_SIZE)) == read_all(whole)


def test_pickled_shards_have_the_same_windows(folder, whole):
    dataset = TokenDataset(folder, BLOCK_SIZE)
    read_all(dataset)
    assert read_all(pickle.loads(pickle.dumps(dataset))) == read_all(whole)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "train_000001.bin").write_bytes(b"\0" * 7), r"train_000001\.bin: .* odd number"),
        (lambda folder: (folder / "train_000002.bin").write_bytes(b""), r"train_000002\.bin: .*an empty file; write"),
        (
            lambda folder: write_npy(folder / "train_000003.npy", TOKENS.astype(np.uint32)),
            r"train_000003\.npy: expected uint16 tokens as in train_000000\.bin, got uint32; give files of one type",
        ),
        (
            lambda folder: write_plain(folder / "val_000000.bin"),
            r"shards: expected the files of one split, got 'train_000003\.bin', 'val_000000\.bin'; give a glob.*train",
        ),
        (
            lambda folder: [path.unlink() for path in folder.iterdir()],
            r"shards: expected files of tokens \(\.bin, \.npy\), got none; check",
        ),
    ],
    ids=["damaged", "empty", "two types", "two splits", "no files"],
)
def test_shards_that_cannot_be_one_text_are_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(DataError, match=message):
        TokenDataset(folder, BLOCK_SIZE)


def test_glob_of_no_file_is_refused(folder):
    with pytest.raises(DataError, match=r"val_\*\.bin: expected files of tokens"):
        TokenDataset(folder / "val_*.bin", BLOCK_SIZE)


def test_shard_that_is_gone_is_named(folder):
    dataset = TokenDataset(folder, BLOCK_SIZE)
    (folder / "train_000003.bin").unlink()
    dataset[100]
    with pytest.raises(DataError, match=r"train_000003\.bin: cannot be read any more"):
        dataset[210]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("val.bin", "val.bin"),
        ("val_000000.bin", "val_*.bin"),
        ("fineweb_val_000000.bin", "*_val_*.bin"),
        ("edufineweb_val_000000.npy", "*_val_*.npy"),
        ("interval_0.bin", "val.bin"),
    ],
)
def test_split_is_found_under_the_names_of_the_family(tmp_path, name, expected):
    write_plain(tmp_path / name)
    write_plain(tmp_path / "train_000000.bin")
    assert shards.find_split(tmp_path, "val") == tmp_path / expected


def split_trace(folder):
    """Writes the two files of the trace as shards."""
    folder.mkdir(parents=True)
    for split, ends in (("train", [0, 20_000, 20_005, 54_000]), ("val", [0, 3000, 6000])):
        write_shards(folder, tokens=np.fromfile(TRACE_DIR / f"{split}.bin", dtype="<u2"), ends=ends, split=split)
    (folder / "meta.pkl").write_bytes((TRACE_DIR / "meta.pkl").read_bytes())
    return folder


def test_run_on_shards_writes_the_bits_of_one_on_whole_files(tmp_path):
    changes = {"max_iters": 4, "eval_interval": 2}
    train(tmp_path, **changes, out_dir="whole")
    (tmp_path / "data" / SETTINGS["dataset"]).unlink()
    split_trace(tmp_path / "data" / SETTINGS["dataset"])
    train(tmp_path, **changes)
    found, expected = (flatten_checkpoint(tmp_path / name / "ckpt.pt") for name in ("out", "whole"))
    assert list_differences(found, expected) == []


def test_evaluation_of_shards_is_that_of_the_whole_file(tmp_path):
    folder = split_trace(tmp_path / "data")
    found, expected = (evaluate_loss(START_PATH, data, eval_iters=2).to_json() for data in (folder, TRACE_DIR))
    assert found.pop("data") == str(folder / "val_*.bin")
    del expected["data"]
    assert found == expected
    assert found["estimate"]["best_val_loss"]


# For plain Trainer and TRL


def make_rows(dataset, tmp_path):
    return dataset.to_datasets(cache_dir=str(tmp_path / "cache"))


def test_rows_are_windows_whose_every_token_is_a_target_once(tmp_path, folder):
    rows = make_rows(TokenDataset(folder, BLOCK_SIZE), tmp_path)
    assert len(rows) == (len(TOKENS) - 1) // (BLOCK_SIZE - 1)
    assert rows["input_ids"][:] == rows["labels"][:]
    targets = [token for row in rows["labels"] for token in row[1:]]  # the model shifts labels
    assert targets == TOKENS[1 : len(targets) + 1].tolist()
    assert len(TOKENS) - 1 - len(targets) < BLOCK_SIZE - 1


def test_rows_of_a_file_that_is_written_again_are_new(tmp_path):
    path = write_plain(tmp_path / "train.bin")
    assert make_rows(TokenDataset(path, BLOCK_SIZE), tmp_path)[0]["labels"] == TOKENS[:BLOCK_SIZE].tolist()
    write_plain(path, TOKENS[::-1])
    assert make_rows(TokenDataset(path, BLOCK_SIZE), tmp_path)[0]["labels"] == TOKENS[::-1][:BLOCK_SIZE].tolist()


def compute_by_hand(model, rows):
    """Returns the mean loss of rows by nanoGPT's own targets, which are shifted already."""
    idx = torch.tensor(rows)
    with torch.no_grad():
        return model(idx[:, :-1], shift_labels=idx[:, 1:].contiguous()).loss.item()


SETTINGS_OF_TRAINER = {
    "max_steps": 1,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


# TRL 1.16 uses names that Transformers 5.23 has renamed, with any model.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_trainers_compute_the_loss_of_rows_as_by_hand(tmp_path, kind):
    rows = make_rows(TokenDataset(TRACE_DIR / "train.bin", 32), tmp_path).select(range(4))
    model = load_start().eval()
    expected = compute_by_hand(model, rows["input_ids"][:])
    if kind == "Trainer":
        args = TrainingArguments(str(tmp_path / "out"), **SETTINGS_OF_TRAINER)
        trainer = Trainer(model, args, train_dataset=rows)
    else:
        args = SFTConfig(str(tmp_path / "out"), max_length=32, bf16=False, **SETTINGS_OF_TRAINER)
        tokenizer = make_tokenizer(eos_token="\n", pad_token="\n")
        trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(compute_by_hand(model, [row[::-1] for row in rows["input_ids"]]) - expected) > 0.1


def test_block_without_a_target_is_refused(folder):
    with pytest.raises(DataError, match="expected a block_size of 2 or more, got 1"):
        TokenDataset(folder, 1).to_datasets()


def test_rows_without_datasets_are_refused(folder, monkeypatch):
    monkeypatch.setattr("hugging_nano_gpt.errors.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"TokenDataset\.to_datasets: datasets is not installed; pip"):
        TokenDataset(folder, BLOCK_SIZE).to_datasets()
