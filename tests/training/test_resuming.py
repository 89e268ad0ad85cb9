"""Resuming in NanoGPTTrainer: all parts of a checkpoint have the same updates; the new run's settings are used."""

import functools
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hugging_nano_gpt import CheckpointError, NanoGPTLMHeadModel, read_checkpoint
from hugging_nano_gpt.training import NanoGPTSchedule, compute_lr, drawing, make_optimizer, read_optimizer
from hugging_nano_gpt.training import trainer as trainer_module

from ..helpers.comparison import assert_same
from ..helpers.trace import CONFIG, START, STEPS, list_offsets, load_start, make_trainer, train_by_hand

SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "logging_steps": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with Trainer's own checkpoints after updates 102 and 104."""
    folder = tmp_path_factory.mktemp("saved")
    make_trainer(folder, load_start(), STEPS[:4], **SAVING).train()
    return folder


def change_settings(trainer, **changes):
    """Makes a trainer with other settings than the recorded run."""
    trainer.training_state = replace(trainer.training_state, config={**trainer.config, **changes})
    trainer.args.learning_rate = changes.get("learning_rate", trainer.args.learning_rate)
    return trainer


def list_rates(trainer):
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def list_steps(trainer):
    """Lists the updates that each parameter's moments have seen."""
    return {int(moments["step"]) for moments in read_optimizer(trainer.optimizer, trainer.model).moments.values()}


def assert_written_together(trainer, folder, iter_num):
    """Asserts that the weights and moments of a checkpoint are both the trainer's current ones."""
    trainer.save_nanogpt_ckpt(folder / "ckpt.pt", overwrite=True)
    written = read_checkpoint(folder / "ckpt.pt")
    state = written.training_state
    assert (trainer.iter_num, state.iter_num, list_steps(trainer)) == (iter_num, iter_num, {iter_num})
    assert {int(moments["step"]) for moments in state.optimizer.moments.values()} == {iter_num}
    assert trainer.model.nanogpt_training_state.iter_num == iter_num
    assert all(torch.equal(written.state_dict[name], t) for name, t in trainer.model.state_dict().items())


@functools.cache
def train_whole(n_updates):
    """Returns the parameters after some updates that were never interrupted."""
    model = load_start()
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(Path(folder), model, STEPS[:n_updates]).train()
    return list(model.parameters())


def assert_ends_as_whole(trainer, n_updates):
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), train_whole(n_updates), strict=True))


# Settings of the new run


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_decay_iters": 400},
        {"lr_decay_iters": 101},
        {"learning_rate": 1e-4},
        {"min_lr": 1e-3},
        {"warmup_iters": 150},
        {"decay_lr": False},
        {"learning_rate": 6e-3, "lr_decay_iters": 1000, "min_lr": 0.0},
    ],
    ids=str,
)
def test_resume_uses_the_schedule_of_the_new_run(saved, tmp_path, changes):
    config = {**CONFIG, **changes}
    trainer = change_settings(make_trainer(tmp_path, load_start(), STEPS[:4], logging_steps=1), **changes)
    trainer.train(resume_from_checkpoint=str(saved / "checkpoint-2"))
    rates = [compute_lr(iter_num, config) for iter_num in (102, 103)]
    assert list_rates(trainer)[-2:] == rates
    assert rates != [compute_lr(iter_num, CONFIG) for iter_num in (102, 103)]

    ends = []
    for settings in (config, CONFIG):  # in a plain loop: train.py reads weights and moments, and sets its own rate
        model = load_start().train()
        optimizer = make_optimizer(model, state=START.training_state.optimizer)
        train_by_hand(model, optimizer, STEPS[:2])
        train_by_hand(model, optimizer, STEPS[2:4], config=settings)
        ends.append(model.state_dict())
    found = trainer.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in ends[0].items())
    assert not any(torch.equal(found[name], tensor) for name, tensor in ends[1].items())


def test_schedule_loads_the_number_of_updates_and_keeps_its_settings():
    optimizers = [torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]) for _ in range(2)]
    before = NanoGPTSchedule(optimizers[0], CONFIG, iter_num=150)
    config = {**CONFIG, "learning_rate": 1e-2, "lr_decay_iters": 1000}
    schedule = NanoGPTSchedule(optimizers[1], config)
    schedule.load_state_dict(before.state_dict())
    assert schedule.last_epoch == 150
    assert schedule.get_last_lr() == [optimizers[1].param_groups[0]["lr"]] == [compute_lr(150, config)]
    optimizers[1].step()
    schedule.step()
    assert schedule.get_last_lr() == [compute_lr(151, config)]


def test_settings_that_come_with_the_moments_are_logged(tmp_path, caplog):
    trainer = make_trainer(tmp_path, load_start(), STEPS[:1], weight_decay=0.3, adam_beta2=0.999)
    trainer.train()
    assert {(group["weight_decay"], group["betas"]) for group in trainer.optimizer.param_groups} == {
        (0.1, (0.9, 0.95)),
        (0.0, (0.9, 0.95)),
    }
    text = caplog.text
    assert "weight_decay: the arguments ask for 0.3, the moments come with 0.1" in text
    assert "betas: the arguments ask for (0.9, 0.999), the moments come with (0.9, 0.95)" in text


def test_settings_equal_to_those_of_the_moments_are_not_logged(tmp_path, caplog):
    make_trainer(tmp_path, load_start(), STEPS[:1]).train()
    assert "the arguments ask" not in caplog.text


def test_update_that_fp16_skips_is_counted_in_the_schedule(tmp_path):
    """train.py counts such an update; Trainer steps its scheduler only after updates that were made."""
    trainer = make_trainer(tmp_path, load_start(), STEPS[:4], logging_steps=1)

    class SkipSecond(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            trainer.optimizer._is_overflow = state.global_step == 1

    trainer.add_callback(SkipSecond())
    trainer.train()
    assert trainer.lr_scheduler.last_epoch == trainer.iter_num == 104
    assert trainer.optimizer.param_groups[0]["lr"] == compute_lr(104, CONFIG)


# The updates in weights and moments


@pytest.mark.parametrize("n_updates", [(2, 2), (1, 3), (2, 1, 1)])
def test_train_called_again_continues_where_it_ended(tmp_path, n_updates):
    trainer = make_trainer(tmp_path, load_start(), STEPS[: n_updates[0]], logging_steps=1)
    rates, done = [], 0
    for number in n_updates:
        trainer.args.max_steps = number
        trainer._train_batch_sampler = list_offsets(STEPS[done : done + number])
        trainer.train()
        rates += list_rates(trainer)
        done += number
        assert_written_together(trainer, tmp_path, 100 + done)
    assert rates == [compute_lr(100 + number, CONFIG) for number in range(4)]
    assert_ends_as_whole(trainer, 4)


def test_checkpoint_saved_before_training_has_the_moments_of_the_training_state(tmp_path):
    trainer = make_trainer(tmp_path, load_start(), STEPS[:1])
    trainer.evaluate()
    for _ in range(2):
        trainer.save_nanogpt_ckpt(tmp_path / "ckpt.pt", overwrite=True)
        written = read_checkpoint(tmp_path / "ckpt.pt")
        assert_same(written.state_dict, START.state_dict)
        assert written.training_state.iter_num == 100
        found, expected = written.training_state.optimizer, START.training_state.optimizer
        assert_same(found.moments, expected.moments)
        assert found.settings == expected.settings
        trainer.optimizer = make_optimizer(trainer.model)  # made, and without moments yet


def test_train_called_again_after_an_interruption_counts_the_updates_made(tmp_path):
    trainer = make_trainer(tmp_path, load_start(), STEPS[:4])
    trainer._train_batch_sampler = [*list_offsets(STEPS[:3]), [10**9], [0]]
    with pytest.raises(IndexError):
        trainer.train()
    assert trainer.iter_num == 103
    trainer._train_batch_sampler = list_offsets(STEPS[:4])
    trainer.train()
    trainer.save_nanogpt_ckpt(tmp_path / "ckpt.pt", overwrite=True)
    assert list_steps(trainer) == {trainer.iter_num} == {107}


@pytest.mark.parametrize("given", [100, 102, 104])
def test_resume_counts_from_the_checkpoint_with_any_state_given(saved, tmp_path, given):
    """The ckpt.pt that a script loads is replaced while it trains, so its iter_num is a later one."""
    trainer = make_trainer(tmp_path, load_start(), STEPS[:6])
    trainer.training_state = replace(START.training_state, iter_num=given)
    trainer.args.max_steps = 106 - given
    trainer.train(resume_from_checkpoint=str(saved / "checkpoint-4"))
    assert_written_together(trainer, tmp_path, 106)
    assert_ends_as_whole(trainer, 6)


def test_resume_in_a_trainer_that_has_trained_goes_back_to_the_checkpoint(saved, tmp_path):
    trainer = make_trainer(tmp_path, load_start(), STEPS[:5])
    trainer.train()
    expected = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train(resume_from_checkpoint=str(saved / "checkpoint-2"))
    assert_written_together(trainer, tmp_path, 105)
    assert all(torch.equal(expected[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_folder_of_a_checkpoint_records_the_updates_of_its_weights(saved):
    for number in (2, 4):
        model = NanoGPTLMHeadModel.from_pretrained(saved / f"checkpoint-{number}")
        assert model.nanogpt_training_state.iter_num == 100 + number
        assert model.nanogpt_training_state.config == CONFIG


@pytest.fixture
def best_at_two(monkeypatch):
    """Makes evaluations measure a validation loss that is lowest after two updates."""
    monkeypatch.setattr(
        "hugging_nano_gpt.training.trainer.estimate_losses",
        lambda trainer, datasets, *_: dict.fromkeys(datasets, 1.0 + abs(trainer.state.global_step - 2)),
    )


def make_best(folder, **settings):
    saving = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    return make_trainer(folder, load_start(), STEPS[:4], **{**saving, **best, "logging_steps": 1, **settings})


@pytest.mark.parametrize("metric", ["eval_loss", "val/loss"])
def test_best_model_comes_with_its_moments_and_its_count(tmp_path, best_at_two, metric):
    trainer = make_best(tmp_path, metric_for_best_model=metric)
    output = trainer.train()
    assert (output.global_step, trainer.best_val_loss) == (4, 1.0)
    assert_written_together(trainer, tmp_path, 102)
    two = load_start()
    alone = make_trainer(tmp_path / "alone", two, STEPS[:2])
    alone.train()
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), two.parameters(), strict=True))
    found, expected = (read_optimizer(t.optimizer, t.model).moments for t in (trainer, alone))
    assert all(torch.equal(found[name][key], expected[name][key]) for name in found for key in found[name])

    trainer.args.max_steps = 2
    trainer.args.load_best_model_at_end = False
    trainer._train_batch_sampler = list_offsets(STEPS[2:4])
    trainer.train()
    assert_written_together(trainer, tmp_path, 104)
    assert list_rates(trainer) == [compute_lr(iter_num, CONFIG) for iter_num in (102, 103)]


def test_best_model_saved_without_moments_starts_anew_and_says_so(tmp_path, caplog, best_at_two):
    trainer = make_best(tmp_path, save_only_model=True)
    trainer.train()
    assert "checkpoint-2: the best weights were saved without their moments" in caplog.text
    trainer.save_nanogpt_ckpt(tmp_path / "ckpt.pt", overwrite=True)
    state = read_checkpoint(tmp_path / "ckpt.pt").training_state
    assert (state.iter_num, state.optimizer.moments) == (102, {})
    trainer.args.load_best_model_at_end = False
    trainer.train()
    assert (trainer.iter_num, list_steps(trainer)) == (106, {4})


def test_evaluation_before_training_counts_among_the_losses(tmp_path, best_at_two):
    trainer = make_trainer(tmp_path, load_start(), STEPS[:1])
    trainer.training_state = replace(START.training_state, best_val_loss=1e9)
    trainer.evaluate()
    trainer.train()
    assert trainer.best_val_loss == 3.0


# Checkpoints that a kill left


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


FAULTS = {
    "weights": ("model.safetensors", "no weights (model.safetensors)"),
    "optimizer": ("optimizer.pt", "no optimizer (optimizer.pt)"),
    "schedule": ("scheduler.pt", "no schedule (scheduler.pt)"),
    "random state": ("rng_state.pth", "no random state (rng_state*.pth)"),
    "state": ("trainer_state.json", "no state (trainer_state.json)"),
    "next batch": ("nanogpt_next_batch_0.json", "no next batch (nanogpt_next_batch_*.json)"),
}


@pytest.fixture
def broken(saved, tmp_path):
    """A copy of the two checkpoints, whose last one the tests damage."""
    shutil.copytree(saved, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("is_cut", [False, True], ids=["missing", "cut off"])
@pytest.mark.parametrize("name", FAULTS)
def test_incomplete_checkpoint_is_refused_and_the_last_complete_one_is_found(broken, caplog, name, is_cut):
    file_name, message = FAULTS[name]
    path = broken / "checkpoint-4" / file_name
    cut(path) if is_cut else path.unlink()
    trainer = make_trainer(broken, load_start(), STEPS[:6])
    with pytest.raises(CheckpointError) as caught:
        trainer.train(resume_from_checkpoint=str(broken / "checkpoint-4"))
    assert str(caught.value).startswith(f"{broken / 'checkpoint-4'}: not a whole checkpoint of Trainer's: expected")
    assert (f"got a damaged {file_name};" if is_cut else f"got {message};") in str(caught.value)
    assert (trainer.iter_num, trainer.optimizer) == (100, None)

    trainer.train(resume_from_checkpoint=True)
    text = caplog.text
    assert f"{broken / 'checkpoint-2'}: resuming from here: not whole are 'checkpoint-4', which came later" in text
    assert_written_together(trainer, broken, 106)
    assert_ends_as_whole(trainer, 6)


def test_last_complete_checkpoint_is_that_of_the_highest_number(saved, broken, caplog):
    shutil.copytree(broken / "checkpoint-2", broken / "checkpoint-notes")
    shutil.move(broken / "checkpoint-4", broken / "checkpoint-10")
    (broken / "checkpoint-11").write_text("a file")
    (broken / "checkpoint-12").mkdir()
    trainer = make_trainer(broken, load_start(), STEPS[:5])
    trainer.train(resume_from_checkpoint=True)
    assert trainer.iter_num == 105
    assert "checkpoint-10: resuming from here: not whole are 'checkpoint-12', 'checkpoint-11'" in caplog.text


def test_shards_of_the_weights_all_have_to_be_there(broken):
    folder = broken / "checkpoint-4"
    model = NanoGPTLMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    trainer = make_trainer(broken, load_start(), STEPS[:6])
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.iter_num == 106
    next(folder.glob("model-00002-of-*")).unlink()
    with pytest.raises(CheckpointError, match=r"got a damaged model\.safetensors\.index\.json;"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_checkpoint_that_one_process_did_not_finish_is_incomplete(broken, caplog):
    path = broken / "checkpoint-4" / "nanogpt_next_batch_0.json"
    path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 2'))
    trainer = make_trainer(broken, load_start(), STEPS[:5])
    with pytest.raises(CheckpointError, match=r"got no nanogpt_next_batch_1\.json; give another"):
        trainer.train(resume_from_checkpoint=str(path.parent))
    trainer.train(resume_from_checkpoint=True)
    assert "not whole are 'checkpoint-4'" in caplog.text


def test_kept_checkpoint_is_removed_only_when_the_next_one_is_complete(tmp_path, monkeypatch):
    """The process is killed while the second one is saved, before the last file, which is not Trainer's."""
    model, write = load_start(), drawing.write_next_batch

    def write_and_be_killed(folder, *args):
        if folder.name == "checkpoint-4":
            raise KeyboardInterrupt
        write(folder, *args)

    for module in (drawing, trainer_module):
        monkeypatch.setattr(module, "write_next_batch", write_and_be_killed, raising=False)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, model, STEPS[:6], **{**SAVING, "save_total_limit": 1}).train()
    monkeypatch.undo()
    trainer = make_trainer(tmp_path, load_start(), STEPS[:6], **{**SAVING, "save_total_limit": 1})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.iter_num == 106
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_without_a_complete_checkpoint_resume_is_refused(broken):
    trainer = make_trainer(broken, load_start(), STEPS[:6])
    with pytest.raises(CheckpointError, match=r"no-such: not a whole checkpoint of Trainer's: .*got no such folder"):
        trainer.train(resume_from_checkpoint=str(broken / "no-such"))
    for number in (2, 4):
        (broken / f"checkpoint-{number}" / "optimizer.pt").unlink()
    message = "expected a whole checkpoint of Trainer's, got 'checkpoint-4', 'checkpoint-2'; begin without"
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=True)
    shutil.rmtree(broken)
    with pytest.raises(CheckpointError, match="expected a whole checkpoint of Trainer's, got none; begin without"):
        trainer.train(resume_from_checkpoint=True)
