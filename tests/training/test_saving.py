"""A full disk while Trainer saves gives an error that says so, and what was saved before still exists."""

import pytest
from transformers import Trainer

from hugging_nano_gpt import CheckpointError
from hugging_nano_gpt.training.trainer_checkpoint import explain_full_disk

from ..helpers.limits import limit_file_size
from ..helpers.programs import run_command
from ..helpers.toy_run import SETTINGS, flatten_checkpoint, list_differences, make_workplace, train
from ..helpers.trace import STEPS, load_start, make_trainer

FULL = r"checkpoint-2: cannot be written whole: the disk is full, or a quota .* resume_from_checkpoint=True"


@pytest.fixture
def saved(tmp_path):
    """A trainer with the checkpoint of its first update in its folder, about to make the second."""
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    make_trainer(tmp_path, load_start(), STEPS[:1], **settings).train()
    return make_trainer(tmp_path, load_start(), STEPS[:2], **settings)


@pytest.mark.parametrize("size_bytes", [30_000, 150_000], ids=["weights", "optimizer"])
def test_full_disk_while_trainer_saves_is_named_and_the_checkpoint_before_stays(saved, tmp_path, size_bytes):
    with limit_file_size(size_bytes), pytest.raises(CheckpointError, match=FULL):
        saved.train(resume_from_checkpoint=True)
    again = make_trainer(tmp_path, load_start(), STEPS[:2], save_strategy="steps", save_steps=1, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    assert (again.iter_num, again.state.global_step) == (102, 2)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_full_disk_while_only_the_model_is_saved_is_named(saved, tmp_path):
    with limit_file_size(30_000), pytest.raises(CheckpointError, match="alone: cannot be written whole: the disk is"):
        saved.save_model(str(tmp_path / "alone"))


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), PermissionError(13, "Permission denied")], ids=str)
def test_other_errors_while_saving_are_not_changed(error):
    with pytest.raises(type(error), match=r"CUDA error|Permission denied"), explain_full_disk("out"):
        raise error


def test_full_disk_in_the_command_is_named_and_the_run_resumes_from_the_checkpoint_before(tmp_path, monkeypatch):
    changes = {"max_iters": 8, "eval_interval": 4}
    settings = [f"--{name}={value}" for name, value in {**SETTINGS, **changes}.items()]
    save = Trainer._save_optimizer_and_scheduler

    def save_on_a_full_disk(trainer, folder):
        with limit_file_size(1000 if trainer.state.global_step == 8 else 10**9):
            save(trainer, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", save_on_a_full_disk)
    result = run_command("train", *settings, cwd=make_workplace(tmp_path))
    assert result.returncode == 1
    assert "error: out/checkpoint-8: cannot be written whole: the disk is full" in result.stderr
    assert "(--resume, " in result.stderr
    monkeypatch.undo()
    assert run_command("train", *settings, "--resume", cwd=tmp_path).returncode == 0
    whole = tmp_path / "whole"
    whole.mkdir()
    train(whole, **changes)
    found, expected = (flatten_checkpoint(folder / "out" / "ckpt.pt") for folder in (tmp_path, whole))
    assert list_differences(found, expected) == []
