"""What `train` finds in its out_dir: the newer checkpoint is never overwritten, and only one run trains there."""

import subprocess
import sys
from dataclasses import replace

import filelock
import pytest
import torch

from hugging_nano_gpt import CheckpointError, ConversionError, DataError, read_checkpoint, write_checkpoint
from hugging_nano_gpt.training import TokenDataset
from hugging_nano_gpt.training.out_dir import lock_out_dir

from ..helpers.programs import run_command
from ..helpers.reference_run import ReferenceRun, flatten_saved
from ..helpers.toy_run import SETTINGS, VOCAB_SIZE, flatten_checkpoint, list_differences, make_workplace, train
from ..helpers.trace import TRACE_DIR

SHORT = {"max_iters": 4}


@pytest.fixture
def out_dir(tmp_path):
    """The out_dir of a run that ended after checkpoint-4."""
    train(tmp_path, **SHORT)
    return tmp_path / "out"


def go_on_elsewhere(out_dir, iter_num):
    """Writes the ckpt.pt of a train.py that continued from it."""
    checkpoint = read_checkpoint(out_dir / "ckpt.pt")
    state = replace(checkpoint.training_state, iter_num=iter_num)
    write_checkpoint(replace(checkpoint, training_state=state), out_dir / "ckpt.pt", overwrite=True)
    return (out_dir / "ckpt.pt").read_bytes()


def read_iter_nums(out_dir):
    folders = {path.name for path in out_dir.glob("checkpoint-*")}
    return folders, read_checkpoint(out_dir / "ckpt.pt").training_state.iter_num


# Which of two checkpoints is the newer


def test_resume_with_a_newer_ckpt_pt_is_refused_and_both_ways_out_work(tmp_path, out_dir, capsys):
    before = go_on_elsewhere(out_dir, 8)
    message = (
        r"ckpt\.pt: is newer than out/checkpoint-4: expected at most iteration 4, got 8, which would be "
        r"overwritten; give --init_from=resume without --resume to go on from ckpt\.pt, or move ckpt\.pt elsewhere"
    )
    with pytest.raises(ConversionError, match=message):
        train(tmp_path, resume=True)
    assert (out_dir / "ckpt.pt").read_bytes() == before

    train(
        tmp_path, init_from="resume"
    )  # one way: iter_num continues from ckpt.pt's, and the older checkpoint is removed
    assert read_iter_nums(out_dir) == ({"checkpoint-4"}, 12)
    assert read_checkpoint(out_dir / "ckpt.pt").training_state.optimizer.moments["transformer.wte.weight"]["step"] == 8


def test_resume_with_the_newer_ckpt_pt_moved_away_goes_back(tmp_path, out_dir):
    go_on_elsewhere(out_dir, 8)
    (out_dir / "ckpt.pt").rename(tmp_path / "elsewhere.pt")
    train(tmp_path, resume=True)
    assert read_iter_nums(out_dir) == ({"checkpoint-12"}, 12)
    train(tmp_path, out_dir="whole")
    found, expected = (flatten_checkpoint(tmp_path / name / "ckpt.pt") for name in ("out", "whole"))
    assert list_differences(found, expected) == []


def test_init_from_resume_with_a_newer_checkpoint_of_trainers_is_refused(tmp_path, out_dir):
    before = go_on_elsewhere(out_dir, 2)
    message = (
        r"out/checkpoint-4: is newer than out/ckpt\.pt: expected at most iteration 2, got 4, which would be "
        r"overwritten; give --resume to go on from checkpoint-4, or move checkpoint-4 elsewhere to go back to ckpt\.pt"
    )
    with pytest.raises(ConversionError, match=message):
        train(tmp_path, init_from="resume")
    assert (out_dir / "ckpt.pt").read_bytes() == before


def test_resume_with_a_ckpt_pt_that_cannot_be_compared_is_refused(tmp_path, out_dir):
    (out_dir / "ckpt.pt").write_bytes((out_dir / "ckpt.pt").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"out/ckpt\.pt: damaged .*; or move it elsewhere to go on from out/ch"):
        train(tmp_path, resume=True)


# only ckpt.pt


def test_resume_with_only_a_ckpt_pt_continues_from_it_and_says_so(tmp_path, out_dir, capsys):
    (out_dir / "checkpoint-4").rename(tmp_path / "earlier")
    saved = ReferenceRun({**SETTINGS, **SHORT}, TRACE_DIR, VOCAB_SIZE).run().saved
    capsys.readouterr()
    train(tmp_path, resume=True)
    assert "Resuming training from out\n" in capsys.readouterr().out
    expected = flatten_saved(ReferenceRun(SETTINGS, TRACE_DIR, VOCAB_SIZE, saved).run())
    assert list_differences(flatten_checkpoint(out_dir / "ckpt.pt"), expected) == []


def test_resume_in_an_empty_out_dir_begins(tmp_path):
    trainer = train(tmp_path, resume=True, **SHORT)
    assert trainer.iter_num == 5


@pytest.mark.parametrize("left", ["ckpt.pt", "checkpoint-4"])
@pytest.mark.parametrize("init_from", ["scratch", "gpt2-toy"])
def test_earlier_run_is_not_overwritten_without_force(tmp_path, out_dir, left, init_from):
    for name in {"ckpt.pt", "checkpoint-4"} - {left}:
        (out_dir / name).rename(tmp_path / name)
    message = rf"out: an earlier run is here: expected --resume to go on, .*--force .*, got none of them and '{left}'"
    with pytest.raises(ConversionError, match=message):
        train(tmp_path, init_from=init_from)
    assert (out_dir / left).exists()


def test_force_overwrites_at_the_first_save_and_not_before(tmp_path, out_dir):
    go_on_elsewhere(out_dir, 300)
    flags = [f"--{name}={value}" for name, value in {**SETTINGS, "eval_interval": 3, "max_iters": 3}.items()]
    with pytest.raises(DataError, match="too short"):
        train(tmp_path, force=True, block_size=10**6)
    assert read_iter_nums(out_dir) == ({"checkpoint-4"}, 300)
    result = run_command("train", *flags, "--force", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert read_iter_nums(out_dir) == ({"checkpoint-3"}, 3)


def test_resume_and_force_together_are_refused(tmp_path, out_dir):
    with pytest.raises(ConversionError, match="--resume, --force: expected at most one of the two, got both"):
        train(tmp_path, resume=True, force=True)


def test_folder_of_another_model_is_not_overwritten_without_force(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match=r"mine: is not empty: .*--force"):
        train(tmp_path, folder="mine", **SHORT)
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"
    train(tmp_path, folder="mine", force=True, **SHORT)
    train(tmp_path, folder="mine", resume=True, max_iters=8)


# A kill between the two checkpoints of an evaluation


@pytest.mark.parametrize("keeps_all", [True, False])
@pytest.mark.parametrize("max_iters", [4, 8])
def test_ckpt_pt_that_a_kill_kept_from_being_written_is_written_on_resume(tmp_path, keeps_all, max_iters):
    changes = {"always_save_checkpoint": keeps_all, "max_iters": max_iters}
    train(tmp_path, **changes)
    expected = flatten_checkpoint(tmp_path / "out" / "ckpt.pt")
    (tmp_path / "out" / "ckpt.pt").unlink()
    train(tmp_path, resume=True, **changes)
    assert list_differences(flatten_checkpoint(tmp_path / "out" / "ckpt.pt"), expected) == []


def test_ckpt_pt_of_the_best_weights_is_not_replaced_on_resume(tmp_path):
    """The losses of this run go up at its end."""
    changes = {"always_save_checkpoint": False, "learning_rate": 0.3, "eval_interval": 2}
    train(tmp_path, **changes)
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    folders, iter_num = read_iter_nums(tmp_path / "out")
    assert (folders, iter_num < 12) == ({"checkpoint-12"}, True)
    train(tmp_path, resume=True, **changes)
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before


# Settings of a resumed run


@pytest.mark.parametrize("way", [{"resume": True}, {"init_from": "resume"}])
@pytest.mark.parametrize(
    "changes",
    [{"n_layer": 4}, {"n_head": 4}, {"n_embd": 32}, {"dataset": "larger"}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_the_checkpoint_decides_cannot_be_changed_on_resume(tmp_path, out_dir, way, changes):
    data_dir = tmp_path / "data" / "larger"
    data_dir.mkdir()
    for name in ("train.bin", "val.bin"):
        (data_dir / name).symlink_to(TRACE_DIR / name)
    (data_dir / "meta.pkl").write_bytes(b"\x80\x04}\x8c\x0avocab_size\x4b\x20s.")  # 32
    name = {"dataset": "vocab_size"}.get(*[next(iter(changes))] * 2)
    with pytest.raises(
        ConversionError, match=rf"out/.*: a checkpoint's model cannot change: {name}: expected .*, got "
    ):
        train(tmp_path, **way, **changes)
    assert read_iter_nums(out_dir) == ({"checkpoint-4"}, 4)


def test_defaults_that_the_checkpoint_overrides_are_logged_and_the_config_is_what_was_used(tmp_path, out_dir, capsys):
    changes = {"bias": False, "n_layer": 12, "weight_decay": 0.2, "beta2": 0.95, "learning_rate": 1e-3}
    for way, path in (({"resume": True}, "out/checkpoint-4"), ({"init_from": "resume"}, "out/ckpt.pt")):
        capsys.readouterr()
        train(tmp_path, max_iters=8, **changes, **way)
        lines = capsys.readouterr().out.splitlines()
        assert f"n_layer=2, bias=True, as {path} has it" in lines
        assert "weight_decay=0.1, beta2=0.99, as the checkpoint's moments have it" in lines
        state = read_checkpoint(out_dir / "ckpt.pt").training_state
        used = {"bias": True, "n_layer": 2, "weight_decay": 0.1, "beta2": 0.99, "learning_rate": 1e-3}
        assert {name: state.config[name] for name in used} == used
        assert [(group["betas"], group["weight_decay"]) for group in state.optimizer.settings] == [
            ((0.9, 0.99), 0.1),
            ((0.9, 0.99), 0.0),
        ]


@pytest.mark.parametrize("block_size", [15, 17])
def test_another_block_size_on_resume_is_refused(tmp_path, out_dir, block_size):
    message = rf"checkpoint-4: block_size cannot change: expected 16, got {block_size}; give --block_size=16"
    with pytest.raises(ConversionError, match=message):
        train(tmp_path, resume=True, block_size=block_size)


def test_another_batch_size_on_resume_is_used_from_the_first_batch_on(tmp_path, out_dir, monkeypatch):
    sizes = []
    getitem = TokenDataset.__getitem__
    monkeypatch.setattr(TokenDataset, "__getitem__", lambda *args: sizes.append(args[1]) or getitem(*args))
    train(tmp_path, resume=True, batch_size=5, max_iters=5, eval_interval=5)
    # the first batch, one after each of two updates' two micro-steps, and those of one evaluation
    assert len(sizes) == 5 * (1 + 2 * 2 + 2 * SETTINGS["eval_iters"])


def test_smaller_data_set_on_resume_is_used(tmp_path, out_dir):
    data_dir = tmp_path / "data" / "smaller"
    data_dir.mkdir()
    for name in ("train.bin", "val.bin"):
        (data_dir / name).write_bytes((TRACE_DIR / name).read_bytes()[: 2 * 18])
    trainer = train(tmp_path, resume=True, dataset="smaller", max_iters=8)
    assert trainer.iter_num == 9


# Messages


def test_resume_says_from_which_checkpoint_and_that_the_run_was_complete(tmp_path, out_dir, capsys):
    capsys.readouterr()
    before = (out_dir / "ckpt.pt").read_bytes()
    trainer = train(tmp_path, resume=True, **SHORT)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "found vocab_size = 31 (inside data/toy/meta.pkl)",
        "Resuming training from out/checkpoint-4 (iteration 4)",
        "number of parameters: 0.01M",
        "num decayed parameter tensors: 10, with 6,896 parameters",
        "num non-decayed parameter tensors: 18, with 448 parameters",
        "using fused AdamW: False",
        "the run is complete: after iteration 4 nothing is saved with max_iters=4 and eval_interval=4; give a larger "
        "--max_iters to go on",
    ]
    assert (trainer.iter_num, (out_dir / "ckpt.pt").read_bytes()) == (4, before)
    weights = read_checkpoint(out_dir / "ckpt.pt").state_dict
    assert all(torch.equal(weights[name], tensor) for name, tensor in trainer.model.state_dict().items())


# One run at a time


HOLD = """
import sys, time
import filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_second_run_in_an_out_dir_is_refused_while_the_first_is_running(tmp_path):
    with (
        lock_out_dir(tmp_path / "out"),
        pytest.raises(ConversionError, match="out: another run trains here: expected"),
    ):
        train(tmp_path, **SHORT)
    assert not (tmp_path / "out" / "ckpt.pt").exists()
    train(tmp_path, **SHORT)


def test_lock_of_a_killed_run_is_gone(tmp_path):
    lock_path = make_workplace(tmp_path) / "out" / ".train.lock"
    lock_path.parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock_path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ConversionError, match="another run trains here"):
                train(tmp_path, **SHORT)
        finally:
            holder.kill()
    train(tmp_path, **SHORT)


def test_file_system_without_locks_is_logged_and_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    def refuse(*_args, **_kwargs):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    train(tmp_path, **SHORT)
    assert "out: cannot be locked on this file system" in caplog.text
