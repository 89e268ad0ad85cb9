"""log.jsonl: what it says, what a resumed run keeps of it, and that it changes no bit of the run."""

import json
import logging
import signal

import pytest

from hugging_nano_gpt import CheckpointError
from hugging_nano_gpt.training import compute_lr
from hugging_nano_gpt.training.log import RunLog

from ..helpers.toy_run import SETTINGS, flatten_checkpoint, list_differences, signalled, train

TOKENS = 96  # of an update: 2 micro-steps of 3 windows of 16 tokens


def read_log(folder, out_dir="out"):
    return [json.loads(line) for line in (folder / out_dir / "log.jsonl").read_text().splitlines()]


def drop_times(entries):
    return [{name: value for name, value in entry.items() if name != "time_ms"} for entry in entries]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was never stopped; it logs every second iteration."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, log_interval=2)
    return folder


def test_log_has_a_line_for_each_printed_iteration_and_each_evaluation(tmp_path, capsys):
    trainer = train(tmp_path, log_interval=5)
    entries = read_log(tmp_path)
    printed = capsys.readouterr().out
    updates = [entry for entry in entries if "loss" in entry]
    evaluations = [entry for entry in entries if "val/loss" in entry]
    assert [entry["iter"] for entry in entries] == [0, 0, 4, 5, 8, 10, 12]
    assert len(updates) + len(evaluations) == len(entries)
    for entry in updates:
        iter_num = entry["iter"]
        assert list(entry) == ["iter", "loss", "lr", "time_ms", "tokens"]
        assert f"iter {iter_num}: loss {entry['loss']:.4f}, time {entry['time_ms']:.2f}ms," in printed
        assert (entry["lr"], entry["tokens"]) == (compute_lr(iter_num, SETTINGS), TOKENS * (iter_num + 1))
    history = [entry for entry in trainer.state.log_history if "val/loss" in entry]
    for entry, kept in zip(evaluations, history, strict=True):
        assert list(entry) == ["iter", "train/loss", "val/loss", "lr", "tokens"]
        assert (entry["train/loss"], entry["val/loss"]) == (kept["train/loss"], kept["val/loss"])
        assert (entry["lr"], entry["tokens"]) == (compute_lr(entry["iter"], SETTINGS), TOKENS * entry["iter"])


def test_log_of_a_resumed_run_is_that_of_one_that_never_stopped(tmp_path, whole):
    """The first run makes a fifth update after its last checkpoint, which the second one makes again."""
    train(tmp_path, max_iters=4, log_interval=2)
    with (tmp_path / "out" / "log.jsonl").open("a") as file:
        file.write('{"iter": 3, "loss": 2.')  # cut off by a kill
    train(tmp_path, resume=True, log_interval=2)
    assert drop_times(read_log(tmp_path)) == drop_times(read_log(whole))
    found, expected = (flatten_checkpoint(folder / "out" / "ckpt.pt") for folder in (tmp_path, whole))
    assert list_differences(found, expected) == []


def test_log_of_a_run_that_a_signal_stopped_goes_on_where_it_stopped(tmp_path, whole):
    with signalled(signal.SIGTERM, 7), pytest.raises(SystemExit):
        train(tmp_path, log_interval=2)
    assert [entry["iter"] for entry in read_log(tmp_path)] == [0, 0, 2, 4, 4, 6]
    train(tmp_path, resume=True, log_interval=2)
    assert drop_times(read_log(tmp_path)) == drop_times(read_log(whole))


def test_log_of_a_run_from_ckpt_pt_has_its_first_evaluation_once(tmp_path):
    train(tmp_path, max_iters=4)
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "earlier")
    train(tmp_path, init_from="resume", max_iters=8)
    assert [entry["iter"] for entry in read_log(tmp_path) if "val/loss" in entry] == [0, 4, 8]
    assert [entry["iter"] for entry in read_log(tmp_path) if "loss" in entry] == list(range(9))


def test_log_of_an_earlier_run_is_replaced_by_force(tmp_path):
    train(tmp_path, max_iters=4)
    train(tmp_path, max_iters=2, force=True)
    assert [entry["iter"] for entry in read_log(tmp_path)] == [0, 0, 1, 2]


def test_run_whose_log_cannot_be_written_goes_on_without_it(tmp_path, caplog):
    log = RunLog(tmp_path / "missing" / "log.jsonl", TOKENS)
    for iter_num in range(2):
        log.add_update(iter_num, loss=1.0, lr=0.1, seconds=0.01)
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert errors == [f"{log.path}: cannot be written: No such file or directory; the run goes on without it"]


def test_log_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / "out" / "log.jsonl").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"log\.jsonl: expected a file, got a directory"):
        train(tmp_path)


def test_cut_keeps_the_bytes_of_the_lines_before(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [
        b'{"iter": 0, "loss": "nan"}\n',
        b"\0\0\0\n",
        b'{"iter": 2, "val/loss": 1}\n',
        b'{"iter": 2,  "loss":3}\n',
    ]
    path.write_bytes(b"".join(lines))
    RunLog(path, TOKENS).cut(3, is_evaluated_again=False)
    assert path.read_bytes() == b"".join([lines[0], *lines[2:]])
    RunLog(path, TOKENS).cut(2, is_evaluated_again=False)
    assert path.read_bytes() == lines[0] + lines[2]
    RunLog(path, TOKENS).cut(2, is_evaluated_again=True)
    assert path.read_bytes() == lines[0]


def test_losses_that_are_not_finite_are_strings(tmp_path):
    log = RunLog(tmp_path / "log.jsonl", TOKENS)
    log.add_evaluation(3, train_loss=float("nan"), val_loss=float("inf"), lr=0.1)
    assert log.path.read_text() == '{"iter": 3, "train/loss": "nan", "val/loss": "inf", "lr": 0.1, "tokens": 288}\n'


def test_other_processes_write_nothing(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, TOKENS, is_writing=False)
    log.add_update(0, loss=1.0, lr=0.1, seconds=0.01)
    assert not path.exists()
    path.write_text("{}")
    log.cut(0, is_evaluated_again=True)
    assert path.read_text() == "{}"


def test_log_does_not_change_a_bit_of_the_run(tmp_path, monkeypatch):
    train(tmp_path)
    monkeypatch.setattr(RunLog, "_add", lambda self, entry: None)
    train(tmp_path, out_dir="without")
    assert not (tmp_path / "without" / "log.jsonl").exists()
    found, expected = (flatten_checkpoint(tmp_path / name / "ckpt.pt") for name in ("out", "without"))
    assert list_differences(found, expected) == []
