"""Ctrl-C and SIGTERM: the update is finished, both checkpoints are written, and --resume gives the same bits."""

import signal

import pytest

from hugging_nano_gpt import read_checkpoint
from hugging_nano_gpt.training import interruption

from ..helpers.programs import run_command
from ..helpers.toy_run import SETTINGS, flatten_checkpoint, list_differences, make_workplace, signalled, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The contents of the ckpt.pt of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return flatten_checkpoint(folder / "out" / "ckpt.pt")


def list_folders(out_dir):
    return {path.name for path in out_dir.glob("checkpoint-*")}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("iter_num", [2, 7, 8])
def test_stopped_run_writes_both_checkpoints_and_resumes_to_the_bits_of_one_that_was_not_stopped(
    tmp_path, whole, capfd, number, code, iter_num
):
    handler = signal.getsignal(signal.SIGINT)
    with signalled(number, iter_num), pytest.raises(SystemExit) as stopped:
        train(tmp_path)
    assert stopped.value.code == code
    captured = capfd.readouterr()
    name = f"checkpoint-{iter_num}"
    end = f"stopped after iteration {iter_num}: wrote out/{name} and out/ckpt.pt; go on with --resume"
    assert captured.out.splitlines()[-1] == end
    assert f"{number.name}: stopping after this update; a second {number.name} stops at once\n" in captured.err
    assert list_folders(tmp_path / "out") == {name}
    assert read_checkpoint(tmp_path / "out" / "ckpt.pt").training_state.iter_num == iter_num
    assert signal.getsignal(signal.SIGINT) is handler
    train(tmp_path, resume=True)
    assert list_differences(flatten_checkpoint(tmp_path / "out" / "ckpt.pt"), whole) == []


def test_command_ends_with_the_code_of_the_signal(tmp_path):
    flags = [f"--{name}={value}" for name, value in {**SETTINGS, "max_iters": 4}.items()]
    with signalled(signal.SIGINT, 1):
        result = run_command("train", *flags, cwd=make_workplace(tmp_path))
    assert result.returncode == 130
    assert result.stdout.splitlines()[-1].endswith("go on with --resume")


def test_second_signal_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "_REPEAT_S", -1.0)
    with signalled(signal.SIGTERM, 2, again=True), pytest.raises(SystemExit) as stopped:
        train(tmp_path, gradient_accumulation_steps=1)
    assert stopped.value.code == 143


def test_signal_that_comes_twice_at_the_same_time_is_one(tmp_path):
    """torchrun forwards a signal that the terminal has already sent to its processes."""
    with signalled(signal.SIGINT, 2, again=True), pytest.raises(SystemExit):
        train(tmp_path)
    assert list_folders(tmp_path / "out") == {"checkpoint-2"}


def test_best_weights_in_ckpt_pt_stay_when_a_run_is_stopped(tmp_path, capsys):
    changes = {"always_save_checkpoint": False, "eval_interval": 3}
    with signalled(signal.SIGINT, 5), pytest.raises(SystemExit):
        train(tmp_path, **changes)
    assert "wrote out/checkpoint-5; go on with --resume" in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "out" / "ckpt.pt").training_state.iter_num == 3


def test_run_stopped_after_its_last_evaluation_keeps_the_checkpoint_of_that(tmp_path, capsys):
    """A run that was not stopped would not save again."""
    with signalled(signal.SIGINT, 6), pytest.raises(SystemExit):
        train(tmp_path, max_iters=7)
    assert "stopped after iteration 6: the run's last checkpoint was written before it" in capsys.readouterr().out
    assert list_folders(tmp_path / "out") == {"checkpoint-4"}
    assert read_checkpoint(tmp_path / "out" / "ckpt.pt").training_state.iter_num == 4
