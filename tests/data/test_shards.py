"""Several files as one data set: the windows of one file of all their tokens."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from hugging_nano_gpt import DataError, MissingDependencyError, evaluate_loss
from hugging_nano_gpt.data import dataset as dataset_module
from hugging_nano_gpt.data.shards import find_split, list_shards
from hugging_nano_gpt.training import RandomOffsetSampler, TokenDataset, collate_windows

from ..helpers.tiny import make_tokenizer
from ..helpers.token_files import BLOCK_SIZE, TOKENS, assert_is_batch, write_plain, write_shard
from ..helpers.toy_run import SETTINGS, flatten_checkpoint, list_differences, train
from ..helpers.trace import TRACE_DIR, load_start


def write_npy(path, tokens):
    path = path.with_suffix(".npy")
    np.save(path, tokens)
    return path


CUTS = [0, 3, 3 + BLOCK_SIZE, 200, 201, len(TOKENS)]  # shards shorter than a window too
WRITERS = {"nanoGPT": [write_plain], "llm.c": [write_shard], "build-nanogpt": [write_npy]}
WRITERS["mixed"] = [write_plain, write_shard, write_npy]


def write_shards(folder, writers=(write_plain,), prefix="train_", tokens=TOKENS, cuts=CUTS):
    folder.mkdir(exist_ok=True)
    for number, (begin, end) in enumerate(pairwise(cuts)):
        writers[number % len(writers)](folder / f"{prefix}{number:06d}.bin", tokens[begin:end])
    return folder


@pytest.mark.parametrize("most_open", [128, 2], ids=["open", "reopened"])
@pytest.mark.parametrize("writers", WRITERS.values(), ids=WRITERS)
def test_windows_of_shards_are_those_of_one_file(tmp_path, monkeypatch, writers, most_open):
    monkeypatch.setattr(dataset_module, "_MOST_OPEN", most_open)
    folder = write_shards(tmp_path / "shards", writers)
    for path in (folder, folder / "*train*", str(folder / "train_*.???")):
        dataset = TokenDataset(path, BLOCK_SIZE)
        assert (dataset.n_tokens, len(dataset)) == (len(TOKENS), len(TOKENS) - BLOCK_SIZE)
        offsets = list(range(len(dataset)))
        assert_is_batch(collate_windows([dataset[offset] for offset in offsets]), offsets)
    with pytest.raises(IndexError, match="expected an offset from 0 to 491, got 492"):
        dataset[492]


def test_pickled_shards_read_the_same(tmp_path):
    dataset = TokenDataset(write_shards(tmp_path / "shards"), BLOCK_SIZE)
    dataset[1]
    assert_is_batch(collate_windows([pickle.loads(pickle.dumps(dataset))[1]]), [1])


def test_shards_are_in_the_order_of_their_names(tmp_path):
    names = ["a_09.bin", "a_10.bin", "a_11.npy", "b_01.bin"]
    for name in [*reversed(names), "meta.pkl", ".a_1.bin"]:
        (tmp_path / name).touch()
    assert [path.name for path in list_shards(tmp_path)] == names
    assert [path.name for path in list_shards(tmp_path / "a_?[9]*")] == names[:1]


def test_file_whose_name_looks_like_a_pattern_is_itself(tmp_path):
    path = write_plain(tmp_path / "train[1].bin")
    write_plain(tmp_path / "train1.bin", TOKENS[:100])
    assert TokenDataset(path, BLOCK_SIZE).n_tokens == len(TOKENS)


def test_folder_of_two_splits_is_refused(tmp_path):
    folder = write_shards(write_shards(tmp_path / "shards"), prefix="fineweb_val_")
    message = r"shards: expected shards of one split, got files of train and val; give a pattern, as '.*/\*train\*'$"
    with pytest.raises(DataError, match=message):
        TokenDataset(folder, BLOCK_SIZE)
    with pytest.raises(DataError, match="expected shards of one split"):
        TokenDataset(folder / "*.bin", BLOCK_SIZE)


def test_split_is_a_word_in_a_name(tmp_path):
    folder = write_shards(tmp_path / "shards", prefix="latest_interval_trained_")
    assert len(TokenDataset(folder, BLOCK_SIZE)) == len(TOKENS) - BLOCK_SIZE


def test_tokens_of_two_types_are_refused(tmp_path):
    folder = write_shards(tmp_path / "shards")
    write_npy(folder / "train_000005", TOKENS.astype(np.uint32))
    message = (
        r"train_000005\.npy: expected uint16 tokens, as in train_000000\.bin, got uint32; give shards of one type"
    )
    with pytest.raises(DataError, match=message):
        TokenDataset(folder, BLOCK_SIZE)


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
    assert find_split(tmp_path, "val") == tmp_path / expected


@pytest.mark.parametrize("name", ["", "*.bin", "train_[0-9].bin"])
def test_folder_without_shards_is_refused(tmp_path, name):
    (tmp_path / "meta.pkl").touch()
    with pytest.raises(DataError, match=r"no token files: expected \.bin or \.npy, got none; check the path"):
        TokenDataset(tmp_path / name, BLOCK_SIZE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: path.write_bytes(b"\0"),
            "expected uint16 tokens, got an odd number of bytes, 1; write it again",
        ),
        (lambda path: path.write_bytes(b""), "expected tokens, got an empty file; write it again, or remove it"),
        (lambda path: path.write_text("To be, or not to be"), "expected uint16 tokens, got text; run the data set's"),
        (lambda path: write_shard(path, count=7), "expected an llm.c shard of version 1 and 1038 bytes"),
    ],
    ids=["odd", "empty", "text", "cut off"],
)
def test_damaged_shard_is_named(tmp_path, damage, message):
    folder = write_shards(tmp_path / "shards")
    damage(folder / "train_000003.bin")
    with pytest.raises(DataError, match=rf"train_000003\.bin: {message}"):
        TokenDataset(folder, BLOCK_SIZE)


def test_shard_that_is_cut_off_while_it_is_read_is_named(tmp_path):
    dataset = TokenDataset(write_shards(tmp_path / "shards"), BLOCK_SIZE)
    (tmp_path / "shards" / "train_000002.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match=r"train_000002\.bin: expected 189 tokens, as it had, got fewer; write it"):
        dataset[50]


def write_toy_shards(folder):
    """Writes the toy data set as shards, with its meta.pkl."""
    (folder / "data").mkdir()
    (folder / "data" / "toy").mkdir()
    (folder / "data" / "toy" / "meta.pkl").write_bytes((TRACE_DIR / "meta.pkl").read_bytes())
    for split in ("train", "val"):
        tokens = np.fromfile(TRACE_DIR / f"{split}.bin", dtype="<u2")
        cuts = [0, 1000, 1010, len(tokens)]
        write_shards(folder / "data" / "toy", prefix=f"{split}_", tokens=tokens, cuts=cuts)
    return folder / "data" / "toy"


def test_run_on_shards_has_the_bits_of_the_run_on_one_file(tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    write_toy_shards(tmp_path / "cut")
    for name in ("whole", "cut"):
        train(tmp_path / name, max_iters=4)
    found, expected = (flatten_checkpoint(tmp_path / name / "out" / "ckpt.pt") for name in ("cut", "whole"))
    assert list_differences(found, expected) == []
    assert len(found) > SETTINGS["n_layer"]


def test_evaluation_of_shards_is_that_of_one_file(tmp_path):
    folder = write_toy_shards(tmp_path)
    found, expected = (evaluate_loss(TRACE_DIR / "ckpt_200.pt", path) for path in (folder, TRACE_DIR))
    assert found.data == str(folder / "val_*.bin")
    assert (found.loss, found.n_tokens) == (expected.loss, expected.n_tokens)
    assert (found.estimate, found.matches_recorded) == (expected.estimate, True)
    again = evaluate_loss(TRACE_DIR / "ckpt_200.pt", folder / "val_*.bin")
    assert (again.loss, again.matches_recorded) == (expected.loss, True)


# As a data set of the datasets library


@pytest.fixture
def cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_rows_have_every_token_but_the_first_as_a_target_once(tmp_path, cache):
    rows = TokenDataset(write_shards(tmp_path / "shards"), BLOCK_SIZE).to_datasets()
    assert len(rows) == (len(TOKENS) - 1) // (BLOCK_SIZE - 1)
    assert rows.column_names == ["input_ids", "labels"]
    assert rows["input_ids"][:] == rows["labels"][:]
    targets = [token for row in rows["labels"] for token in row[1:]]  # the model shifts them
    assert targets == TOKENS[1 : 1 + len(targets)].tolist()
    assert all(len(row) == BLOCK_SIZE for row in rows["input_ids"])


def test_rows_of_a_file_that_has_changed_are_read_again(tmp_path, cache):
    path = write_plain(tmp_path / "train.bin")
    first = TokenDataset(path, BLOCK_SIZE).to_datasets()
    write_plain(path, TOKENS[::-1])
    second = TokenDataset(path, BLOCK_SIZE).to_datasets()
    assert (first[0]["labels"], second[0]["labels"]) == (TOKENS[:8].tolist(), TOKENS[::-1][:8].tolist())


def make_arguments(folder, args_class=TrainingArguments, **settings):
    usual = {"per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "report_to": "none"}
    usual |= {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "bf16": False}
    return args_class(str(folder), **usual, **settings)


def compute_by_hand(model, batch):
    """Computes nanoGPT's loss of the rows: each token predicts the next one."""
    ids = batch["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def test_plain_trainer_trains_with_the_loss_computed_by_hand(tmp_path, cache):
    model = load_start()
    rows = TokenDataset(TRACE_DIR / "val.bin", model.config.block_size).to_datasets()
    trainer = Trainer(model, make_arguments(tmp_path / "out"), train_dataset=rows)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == (4, model.config.block_size)
    expected = compute_by_hand(model, batch)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets it
def test_sft_trainer_trains_with_the_loss_computed_by_hand(tmp_path, cache):
    trl = pytest.importorskip("trl")
    model = load_start()
    rows = TokenDataset(TRACE_DIR / "val.bin", model.config.block_size).to_datasets()
    tokenizer = make_tokenizer(pad_token="\n", eos_token="\n")
    args = make_arguments(tmp_path / "out", trl.SFTConfig)
    trainer = trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == (4, model.config.block_size)
    expected = compute_by_hand(model, batch)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-6)


def test_rows_without_a_target_are_refused(tmp_path):
    with pytest.raises(DataError, match="expected a block_size of 2 or more, got 1; give a larger one"):
        TokenDataset(write_plain(tmp_path / "train.bin"), 1).to_datasets()


def test_rows_without_datasets_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("hugging_nano_gpt.errors.find_spec", lambda name: None)
    dataset = TokenDataset(write_plain(tmp_path / "train.bin"), BLOCK_SIZE)
    with pytest.raises(
        MissingDependencyError, match=r"^to_datasets: datasets is not installed; pip install datasets$"
    ):
        dataset.to_datasets()


def test_offsets_do_not_depend_on_where_the_tokens_are_cut(tmp_path):
    whole, cut = write_plain(tmp_path / "train.bin"), write_shards(tmp_path / "shards")
    drawn = [list(RandomOffsetSampler(TokenDataset(path, BLOCK_SIZE), 4, 20)) for path in (whole, cut)]
    assert drawn[0] == drawn[1]
