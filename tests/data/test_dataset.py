"""The windows and offsets of nanoGPT's get_batch, from its token files and from llm.c's."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader

from hugging_nano_gpt import DataError, NanoGPTError
from hugging_nano_gpt.data.dataset import check_ids
from hugging_nano_gpt.data.offsets import SharedBatches
from hugging_nano_gpt.training import RandomOffsetSampler, TokenDataset, collate_windows

from ..helpers.token_files import BLOCK_SIZE, TOKENS, assert_is_batch, write_plain, write_shard

WRITERS = pytest.mark.parametrize("write", [write_plain, write_shard], ids=["plain", "llm.c"])


@pytest.fixture
def dataset(tmp_path):
    return TokenDataset(write_plain(tmp_path / "train.bin"), BLOCK_SIZE)


def make_loader(dataset, sampler, n_workers=0):
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_windows, num_workers=n_workers)


@WRITERS
def test_windows_of_any_offset_are_get_batchs_pairs(tmp_path, write):
    dataset = TokenDataset(write(tmp_path / "train.bin"), BLOCK_SIZE)
    assert len(dataset) == len(TOKENS) - BLOCK_SIZE  # get_batch draws below it
    for offset in range(len(dataset)):
        assert_is_batch(collate_windows([dataset[offset]]), [offset])


@pytest.mark.parametrize("name", ["input_ids", "shift_labels"])
def test_windows_moved_by_one_token_are_told_apart(dataset, name):
    """Shows that the test above can fail."""
    batch = {**collate_windows([dataset[7]]), name: collate_windows([dataset[8]])[name]}
    with pytest.raises(AssertionError):
        assert_is_batch(batch, [7])


@WRITERS
def test_file_of_one_window_and_its_last_target_is_long_enough(tmp_path, write):
    tokens = TOKENS[: BLOCK_SIZE + 1]
    dataset = TokenDataset(write(tmp_path / "train.bin", tokens), BLOCK_SIZE)
    assert len(dataset) == 1
    assert_is_batch(collate_windows([dataset[0]]), [0], tokens)


@pytest.mark.parametrize("offset", [-1, 492, 10**9])
def test_window_of_an_offset_outside_the_file_is_refused(dataset, offset):
    with pytest.raises(IndexError, match=rf"train\.bin: expected an offset from 0 to 491, got {offset}$"):
        dataset[offset]


@pytest.mark.parametrize("seed", [1337, 0])
@pytest.mark.parametrize("batch_size", [1, 12])
def test_random_offsets_are_those_that_get_batch_draws_after_the_seed(dataset, seed, batch_size):
    torch.manual_seed(seed)
    expected = [torch.randint(len(TOKENS) - BLOCK_SIZE, (batch_size,)).tolist() for _ in range(50)]
    assert list(RandomOffsetSampler(dataset, batch_size, n_batches=50, seed=seed)) == expected


def test_random_offsets_by_default_are_those_of_train_pys_seed(dataset):
    assert list(RandomOffsetSampler(dataset, 4, 3)) == list(RandomOffsetSampler(dataset, 4, 3, seed=1337))


def test_random_offsets_leave_torchs_own_random_numbers_alone(dataset):
    before = torch.get_rng_state()
    list(RandomOffsetSampler(dataset, 4, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_random_offsets_of_each_rank_are_those_of_seed_plus_rank(dataset):
    drawn = [list(RandomOffsetSampler(dataset, 4, 10, seed=1337, rank=rank)) for rank in range(4)]
    assert drawn == [list(RandomOffsetSampler(dataset, 4, 10, seed=1337 + rank)) for rank in range(4)]
    assert len({str(offsets) for offsets in drawn}) == 4


def test_random_offsets_drawn_in_two_passes_continue(dataset):
    sampler = RandomOffsetSampler(dataset, 4, n_batches=5)
    assert [*sampler, *sampler] == list(RandomOffsetSampler(dataset, 4, n_batches=10))


def test_random_offsets_without_a_number_of_batches_have_no_end_and_no_length(dataset):
    sampler = RandomOffsetSampler(dataset, 4)
    with pytest.raises(TypeError, match="without n_batches has no length"):
        len(sampler)
    batches = iter(sampler)
    assert [next(batches) for _ in range(1000)] == list(RandomOffsetSampler(dataset, 4, n_batches=1000))
    assert len(RandomOffsetSampler(dataset, 4, n_batches=7)) == 7


def test_random_offsets_reach_the_first_window_and_the_last(tmp_path):
    dataset = TokenDataset(write_plain(tmp_path / "train.bin", TOKENS[: BLOCK_SIZE + 3]), BLOCK_SIZE)
    assert {offset for batch in RandomOffsetSampler(dataset, 8, 20) for offset in batch} == {0, 1, 2}


def test_batches_of_given_offsets_come_as_given_every_time(dataset):
    batches = [[5, 0, 5], (491,), range(3)]
    loader = make_loader(dataset, batches)
    for _ in range(2):
        for batch, offsets in zip(loader, batches, strict=True):
            assert_is_batch(batch, offsets)


@WRITERS
# Both are harmless here: a fork with torch's threads running (Python 3.12 and newer), and two workers on one core.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("n_workers", [0, 2])
def test_batches_with_or_without_workers_are_get_batchs(tmp_path, write, n_workers):
    dataset = TokenDataset(write(tmp_path / "train.bin"), BLOCK_SIZE)
    loader = make_loader(dataset, RandomOffsetSampler(dataset, 4, n_batches=9), n_workers)
    torch.manual_seed(1337)
    expected = [torch.randint(len(TOKENS) - BLOCK_SIZE, (4,)).tolist() for _ in range(9)]
    assert len(loader) == 9
    for batch, offsets in zip(loader, expected, strict=True):
        assert_is_batch(batch, offsets)


@pytest.mark.parametrize(
    ("n_batches", "shares"), [(4, [[0, 2], [1, 3]]), (5, [[0, 2, 4], [1, 3, 0]]), (1, [[0], [0]])]
)
def test_batches_are_shared_out_as_by_plain_trainer(n_batches, shares):
    """Accelerate's own sampler, which plain Trainer's loaders have, gives each process the same batches."""
    batches = [[number] for number in range(n_batches)]
    for rank, share in enumerate(shares):
        shared = SharedBatches(batches, rank, world_size=2)
        assert list(shared) == [[number] for number in share]
        assert len(shared) == len(share)
        theirs = torch.utils.data.BatchSampler(range(n_batches), batch_size=1, drop_last=False)
        assert list(BatchSamplerShard(theirs, num_processes=2, process_index=rank)) == list(shared)


def test_batch_is_made_of_contiguous_int64_and_nothing_else(dataset):
    batch = collate_windows([{**dataset[offset], "extra": 1} for offset in (3, 1)])
    assert list(batch) == ["input_ids", "shift_labels"]
    for tensor in batch.values():
        assert (tensor.dtype, tensor.shape, tensor.is_contiguous()) == (torch.int64, (2, BLOCK_SIZE), True)


def test_pickled_dataset_carries_the_path_and_no_open_file(dataset):
    window = dataset[17]
    pickled = pickle.dumps(dataset)
    assert TOKENS.tobytes() not in pickled
    again = pickle.loads(pickled)
    assert (again.path, len(again)) == (dataset.path, len(dataset))
    assert all(torch.equal(again[17][name], window[name]) for name in window)
    assert all(torch.equal(dataset[17][name], window[name]) for name in window)


def test_dataset_whose_file_is_replaced_keeps_what_it_opened(dataset):
    """As when prepare.py writes a new file under the same name during a run."""
    window = dataset[0]["input_ids"]
    other = write_plain(dataset.path.with_name("new.bin"), TOKENS[::-1])
    other.replace(dataset.path)
    assert torch.equal(dataset[0]["input_ids"], window)


def measure_mapped_bytes():
    """Returns how many bytes of the process's resident memory are of files and shared."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(1024 * int(fields[name].split()[0]) for name in ("RssFile", "RssShmem"))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's own count")
def test_reading_a_whole_file_does_not_keep_it_in_memory(tmp_path):
    path = tmp_path / "train.bin"
    with path.open("wb") as file:
        file.truncate(2**26)
    dataset = TokenDataset(path, 1024)
    dataset[0]
    before = measure_mapped_bytes()
    for offset in range(0, len(dataset), 2048):
        dataset[offset]
    assert measure_mapped_bytes() - before < 2**22


def test_windows_are_the_same_without_pread(dataset, monkeypatch):
    """As on Windows."""
    expected = [dataset[offset] for offset in (17, 3)]
    monkeypatch.delattr(os, "pread")
    for window, offset in zip(expected, (17, 3), strict=True):
        assert all(torch.equal(dataset[offset][name], window[name]) for name in window)


def test_file_that_is_cut_off_while_it_is_read_is_refused(dataset):
    dataset[400]
    os.truncate(dataset.path, 500)
    with pytest.raises(DataError, match=r"train\.bin: expected 500 tokens, as it had, got fewer; write it again"):
        dataset[400]


def test_file_that_is_gone_before_it_is_read_is_refused(dataset):
    dataset.path.unlink()
    with pytest.raises(DataError, match=r"train\.bin: cannot be read any more: No such file"):
        dataset[0]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path, r"cannot be opened: No such file or directory; check the path, or run .*prepare\.py$"),
        (
            lambda path: path.mkdir(),
            r"no token files: expected \.bin or \.npy, got none; check the path, or run the data set's prepare",
        ),
        (lambda path: path.write_bytes(b"\0" * 999), "expected uint16 tokens, got an odd number of bytes, 999; write"),
        (
            lambda path: path.write_bytes(b""),
            "too short: expected more than block_size=8 tokens, got 0; give a longer",
        ),
        (lambda path: write_plain(path, TOKENS[:8]), "expected more than block_size=8 tokens, got 8; give a longer"),
        (lambda path: write_shard(path, TOKENS[:8]), "expected more than block_size=8 tokens, got 8; give a longer"),
        (
            lambda path: write_shard(path, version=2),
            "expected an llm.c shard of version 1 and 2024 bytes, got version 2 and 2024 bytes; write it again$",
        ),
        (lambda path: write_shard(path, TOKENS[:-1], count=500), "2024 bytes, got version 1 and 2022 bytes; write"),
        (lambda path: write_shard(path, count=499), "2022 bytes, got version 1 and 2024 bytes; write"),
        (lambda path: write_shard(path, count=-1), "1022 bytes, got version 1 and 2024 bytes; write"),
        (
            lambda path: path.write_bytes(write_shard(path).read_bytes()[:1000]),
            "2024 bytes, got version 1 and 1000 bytes; write",
        ),
        (lambda path: path.write_bytes(write_shard(path).read_bytes()[:-1]), "got version 1 and 2023 bytes; write"),
    ],
    ids=[
        "missing",
        "folder",
        "odd",
        "empty",
        "short",
        "short shard",
        "version",
        "truncated shard",
        "longer shard",
        "negative count",
        "truncated header",
        "odd shard",
    ],
)
def test_file_that_is_not_whole_is_refused(tmp_path, write, message):
    path = tmp_path / "train.bin"
    write(path)
    with pytest.raises(DataError, match=r"train\.bin: .*" + message) as caught:
        TokenDataset(path, BLOCK_SIZE)
    assert isinstance(caught.value, NanoGPTError)


@pytest.mark.parametrize(
    ("input_ids", "shift_labels", "wrong"),
    [
        ([0, 64], [64, 0], None),
        ([0, 65], [65, 0], 65),
        ([0, 1], [1, 65], 65),  # in the last target only
        ([-1, 1], [1, 0], -1),
        ([2**31, 1], [1, 0], 2**31),
        ([0, 1], [1, -100], None),  # a target that is ignored
    ],
)
def test_ids_that_the_model_does_not_have_are_refused(input_ids, shift_labels, wrong):
    batch = {"input_ids": torch.tensor([input_ids, [0, 0]]), "shift_labels": torch.tensor([[0, 0], shift_labels])}
    if wrong is None:
        check_ids(batch, 65, "train.bin")
        return
    message = (
        rf"^train\.bin: does not fit the model: expected token ids below vocab_size=65, got {wrong}; give the data"
    )
    with pytest.raises(DataError, match=message):
        check_ids(batch, 65, "train.bin")
