"""Training, bit for bit: a recorded run of nanoGPT's train.py, replayed through a loop and through the Trainer.

tests/fixtures/trace was made by train.py: two checkpoints 100 updates apart, and every offset, learning rate and loss
between them (2 micro-steps an update, 2 CPU threads).
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hugging_nano_gpt import ConversionError, DataError, NanoGPTLMHeadModel, read_checkpoint
from hugging_nano_gpt.demo import CKPT_PATH
from hugging_nano_gpt.training import (
    NanoGPTCheckpointCallback,
    NanoGPTSchedule,
    NanoGPTTrainer,
    TokenDataset,
    compute_lr,
    make_optimizer,
    read_optimizer,
    training_arguments_from_nanogpt,
)

from ..helpers.tiny import make_model
from ..helpers.trace import (
    CONFIG,
    END,
    START,
    STEPS,
    TOLERANCE,
    find_largest_difference,
    flatten_moments,
    load_start,
    make_trainer,
    record_losses,
    train_by_hand,
)

LOSSES = [micro["loss"] for step in STEPS for micro in step["micro"]]


pytestmark = pytest.mark.usefixtures("two_threads")


def measure_distance(model, optimizer, expected=None):
    """Returns the largest difference of parameters and moments from expected ones, by default nanoGPT's."""
    parameters, moments = expected or (END.state_dict, flatten_moments(END.training_state.optimizer.moments))
    found = flatten_moments(read_optimizer(optimizer, model).moments)
    return max(find_largest_difference(model.state_dict(), parameters), find_largest_difference(found, moments))


def assert_same_settings(left, right):
    """Compares what both have, because each torch has settings that older ones lack."""
    for ours, theirs in zip(left.settings, right.settings, strict=True):
        assert len(ours.keys() & theirs.keys()) >= 10
        assert all(ours[key] == theirs[key] for key in ours.keys() & theirs.keys())


@pytest.fixture(scope="module")
def by_hand(two_threads):
    """The model, optimizer and losses of all recorded updates in a plain loop."""
    return replay_by_hand(STEPS)


def replay_by_hand(steps):
    model = load_start().train()
    losses = record_losses(model)
    optimizer = make_optimizer(model, state=START.training_state.optimizer)
    train_by_hand(model, optimizer, steps)
    return model, optimizer, losses


def test_replay_by_hand_ends_where_nanogpt_did(by_hand):
    model, optimizer, losses = by_hand
    assert max(abs(found - expected) for found, expected in zip(losses, LOSSES, strict=True)) <= TOLERANCE
    assert measure_distance(model, optimizer) <= TOLERANCE


def test_replay_through_trainer_ends_where_nanogpt_did_and_equals_the_loop_bitwise(tmp_path, by_hand):
    model = load_start()
    losses = record_losses(model)
    trainer = make_trainer(tmp_path, model, STEPS, logging_steps=1)
    trainer.train()
    assert max(abs(found - expected) for found, expected in zip(losses, LOSSES, strict=True)) <= TOLERANCE
    assert measure_distance(model, trainer.optimizer) <= TOLERANCE
    assert trainer.iter_num == 200
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == [step["lr"] for step in STEPS]

    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_hand[0].parameters(), strict=True))

    trainer.save_nanogpt_ckpt(tmp_path / "ckpt.pt")
    with pytest.raises(ConversionError, match=r"ckpt\.pt: is there already"):
        trainer.save_nanogpt_ckpt(tmp_path / "ckpt.pt", overwrite=False)
    written = read_checkpoint(tmp_path / "ckpt.pt")
    assert written.training_state.iter_num == 200
    assert written.training_state.config == CONFIG
    assert_same_settings(written.training_state.optimizer, END.training_state.optimizer)
    assert all(torch.equal(written.state_dict[name], t) for name, t in model.state_dict().items())


class SummedMicroSteps(NanoGPTTrainer):
    """Adds up the micro-steps' losses instead of averaging them."""

    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model, inputs, **kwargs) * 2


def add_labels(trainer_class, make_labels):
    """Makes a trainer whose batches have labels; Trainer divides the loss by their number."""

    class WithLabels(trainer_class):
        def get_train_dataloader(self):
            loader = super().get_train_dataloader()
            collate = loader.collate_fn
            loader.collate_fn = lambda windows: make_labels(collate(windows))
            return loader

    return WithLabels


# Trainer's default: labels instead of targets, so that a row of 32 tokens has 31, and the loss a sum over their
# number.
TrainersOwnLoss = add_labels(
    NanoGPTTrainer, lambda batch: {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
)


class DecayedNorms(NanoGPTTrainer):
    """Decays LayerNorm weights as if they were matrices."""

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        optimizer.param_groups[1]["weight_decay"] = 0.1
        return optimizer


class LateSchedule(NanoGPTTrainer):
    """Starts the schedule one update late."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = NanoGPTSchedule(self.optimizer, CONFIG, iter_num=99)
        return self.lr_scheduler


class ForgottenMoments(NanoGPTTrainer):
    """Starts AdamW without moments, as every converter script does."""

    def create_optimizer(self, model=None):
        self.optimizer = make_optimizer(self.model, self._settings())
        return self.optimizer


@pytest.fixture(scope="module")
def after_20(two_threads):
    """Parameters and moments after the first 20 recorded updates, which is enough to detect an error."""
    model, optimizer, _ = replay_by_hand(STEPS[:20])
    return model.state_dict(), flatten_moments(read_optimizer(optimizer, model).moments)


@pytest.mark.parametrize(
    ("trainer_class", "is_right"),
    [
        (NanoGPTTrainer, True),
        (SummedMicroSteps, False),
        (TrainersOwnLoss, False),
        (DecayedNorms, False),
        (LateSchedule, False),
        (ForgottenMoments, False),
    ],
)
def test_replay_with_one_thing_wrong_ends_elsewhere(trainer_class, is_right, after_20, tmp_path):
    """Shows that the replay can fail."""
    model = load_start()
    trainer = make_trainer(tmp_path, model, STEPS[:20], trainer_class=trainer_class)
    trainer.train()
    distance = measure_distance(model, trainer.optimizer, after_20)
    assert distance == 0.0 if is_right else distance > 100 * TOLERANCE


def test_replay_divided_by_the_number_of_targets_ends_where_nanogpt_did(tmp_path):
    """Trainer's sum over num_items_in_batch is nanoGPT's mean of means, bit for bit with 2 micro-steps."""
    model = load_start()
    counted = add_labels(NanoGPTTrainer, lambda batch: {**batch, "labels": batch["shift_labels"]})
    trainer = make_trainer(tmp_path, model, STEPS, trainer_class=counted)
    trainer.train()
    assert measure_distance(model, trainer.optimizer) <= TOLERANCE


@pytest.fixture
def interrupted(tmp_path):
    """Parameters and losses of 8 updates that were never interrupted, and the checkpoint that was saved after 5."""
    model = load_start()
    losses = record_losses(model)
    make_trainer(tmp_path, model, STEPS[:8], save_strategy="steps", save_steps=5, save_total_limit=None).train()
    return model.state_dict(), losses, tmp_path / "checkpoint-5"


def resume(folder):
    """Makes the last 3 of the 8 updates; returns parameters and losses."""
    model = load_start()
    losses = record_losses(model)
    make_trainer(folder.parent, model, STEPS[:8]).train(resume_from_checkpoint=str(folder))
    return model.state_dict(), losses


def test_trainer_resumed_from_its_own_checkpoint_ends_at_the_same_bits(interrupted):
    expected, expected_losses, folder = interrupted
    parameters, losses = resume(folder)
    assert losses == expected_losses[-2 * 3 :]  # 2 micro-steps an update, and none of the first 5 made again
    assert all(torch.equal(parameters[name], tensor) for name, tensor in expected.items())


def clear_moments(state):
    for moments in state["state"].values():
        moments["exp_avg"].zero_()


@pytest.mark.parametrize(
    ("name", "spoil"),
    [("optimizer.pt", clear_moments), ("scheduler.pt", lambda state: state.update(last_epoch=50))],
    ids=["optimizer.pt", "scheduler.pt"],
)
def test_trainer_resumed_with_another_state_ends_elsewhere(interrupted, name, spoil):
    """Shows that the test above can fail."""
    expected, _, folder = interrupted
    state = torch.load(folder / name, weights_only=True)
    spoil(state)
    torch.save(state, folder / name)
    assert find_largest_difference(resume(folder)[0], expected) > 100 * TOLERANCE


def test_callback_writes_a_nanogpt_checkpoint_at_every_save(tmp_path):
    model = load_start()
    trainer = make_trainer(tmp_path, model, STEPS[:6], save_strategy="steps", save_steps=3, eval_strategy="steps")
    trainer.add_callback(NanoGPTCheckpointCallback(trainer, tmp_path / "ckpt.pt"))
    trainer.train()
    state = read_checkpoint(tmp_path / "ckpt.pt").training_state
    assert state.iter_num == 106
    assert {int(moments["step"]) for moments in state.optimizer.moments.values()} == {106}


def test_best_val_loss_survives_a_resume_from_trainers_own_checkpoint(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    first = make_trainer(tmp_path, load_start(), STEPS[:2], **settings)
    first.training_state = replace(START.training_state, best_val_loss=1e9)
    first.train()
    second = make_trainer(tmp_path, load_start(), STEPS[:3])
    second.training_state = replace(START.training_state, best_val_loss=1e9)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert first.best_val_loss == second.best_val_loss < 10


def test_evaluate_logs_both_losses_under_nanogpts_names(tmp_path):
    trainer = make_trainer(tmp_path, load_start(), STEPS)
    metrics = trainer.evaluate()
    assert set(metrics) == {"train/loss", "val/loss", "eval_loss"}
    assert metrics["val/loss"] == metrics["eval_loss"]
    assert metrics["val/loss"] == pytest.approx(START.training_state.best_val_loss, abs=0.1)  # 5 random batches each
    assert trainer.best_val_loss == min(metrics["val/loss"], START.training_state.best_val_loss)
    assert trainer.model.training is False


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_ids_that_the_model_does_not_have_are_refused_before_training(tmp_path, dtype):
    tokens = np.zeros(100, dtype=dtype)
    tokens[50] = 31
    np.save(tmp_path / "tokens.npy", tokens)
    trainer = make_trainer(tmp_path, load_start(), STEPS[:1])
    trainer.train_dataset = TokenDataset(tmp_path / "tokens.npy", 32)
    trainer._train_batch_sampler = [[0, 60], [18, 60]]
    message = r"tokens\.npy: does not fit the model: expected token ids below vocab_size=31, got 31; give the data"
    with pytest.raises(DataError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(DataError, match=message):
        trainer.evaluate()


def test_schedule_equals_the_recorded_one_exactly():
    assert [compute_lr(step["iter"], CONFIG) for step in STEPS] == [step["lr"] for step in STEPS]


@pytest.mark.parametrize(
    ("iter_num", "expected"),
    [(0, 3e-3 * 1 / 11), (9, 3e-3 * 10 / 11), (10, 3e-3), (200, 3e-4), (201, 3e-4), (10**6, 3e-4)],
)
def test_schedule_at_its_edge_cases_is_nanogpts(iter_num, expected):
    assert compute_lr(iter_num, CONFIG) == pytest.approx(expected, rel=1e-15)


def test_schedule_without_decay_is_constant():
    assert {compute_lr(number, {**CONFIG, "decay_lr": False}) for number in range(0, 300, 7)} == {3e-3}


def test_schedule_starting_anywhere_equals_one_from_the_start():
    optimizers = [torch.optim.AdamW([nn.Parameter(torch.zeros(1))]) for _ in range(2)]
    first, second = NanoGPTSchedule(optimizers[0], CONFIG), NanoGPTSchedule(optimizers[1], CONFIG, iter_num=7)
    for _ in range(7):
        optimizers[0].step()
        first.step()
    assert first.get_last_lr() == second.get_last_lr() == [compute_lr(7, CONFIG)]


def test_optimizer_groups_are_nanogpts():
    model = make_model()
    optimizer = make_optimizer(model, {"learning_rate": 1e-3, "weight_decay": 0.2, "beta2": 0.99})
    decayed, others = optimizer.param_groups
    assert [p.ndim for p in decayed["params"]] == [p.ndim for p in model.parameters() if p.ndim >= 2]
    assert {p.ndim for p in others["params"]} == {1}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.2, 0.0)
    assert (decayed["lr"], decayed["betas"]) == (1e-3, (0.9, 0.99))


def test_moments_survive_any_grouping_of_the_parameters():
    checkpoint = read_checkpoint(CKPT_PATH)
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    optimizer = make_optimizer(model, state=checkpoint.training_state.optimizer)
    again = read_optimizer(optimizer, model)
    assert_same_settings(again, checkpoint.training_state.optimizer)
    for name, moments in checkpoint.training_state.optimizer.moments.items():
        assert all(torch.equal(moments[key], again.moments[name][key]) for key in moments)

    shuffled = torch.optim.AdamW(reversed(list(model.parameters())))
    shuffled.state = optimizer.state
    moments = read_optimizer(shuffled, model).moments
    assert moments.keys() == again.moments.keys()
    assert all(torch.equal(moments[name]["exp_avg"], again.moments[name]["exp_avg"]) for name in moments)


def test_moments_of_other_parameters_are_refused():
    state = read_checkpoint(CKPT_PATH).training_state.optimizer
    with pytest.raises(
        ConversionError, match=r"expected moments of the optimizer's parameters, missing 'transformer\.h\.0"
    ):
        make_optimizer(make_model(), state=state)


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ({"block_size": 64}, r"transformer\.wpe\.weight of \(128, 96\) for \(64, 96\)"),
        ({"vocab_size": 70}, r"transformer\.wte\.weight of \(65, 96\) for \(70, 96\)"),
        ({"vocab_size": 60}, r"transformer\.wte\.weight of \(65, 96\) for \(60, 96\)"),
        ({"n_embd": 48}, r"transformer\.wte\.weight of \(65, 96\) for \(65, 48\), .*\(\d+ in all\)"),
    ],
    ids=str,
)
def test_moments_of_other_shapes_are_refused(model_args, message):
    checkpoint = read_checkpoint(CKPT_PATH)
    model = make_model(**{**checkpoint.model_args, **model_args})
    with pytest.raises(ConversionError, match=rf"expected moments of the parameters' shapes, got {message}; crop or"):
        make_optimizer(model, state=checkpoint.training_state.optimizer)


def test_moments_of_a_cropped_model_are_refused_before_it_trains(tmp_path):
    model = load_start()
    model.crop_block_size(16)
    with pytest.raises(ConversionError, match=r"transformer\.wpe\.weight of \(32, 32\) for \(16, 32\)"):
        make_trainer(tmp_path, model, STEPS[:1]).train()


def test_optimizer_over_other_parameters_is_refused():
    with pytest.raises(ConversionError, match=r"expected one over all .* parameters of the model, got 1"):
        read_optimizer(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), make_model())


def test_arguments_from_nanogpt_map_or_name_every_setting(tmp_path):
    config = {**CONFIG, "out_dir": str(tmp_path), "max_iters": 250, "surprise": 1}
    args, left = training_arguments_from_nanogpt(config, iter_num=100)
    assert (args.max_steps, args.gradient_accumulation_steps, args.per_device_train_batch_size) == (150, 2, 8)
    assert (args.learning_rate, args.weight_decay, args.adam_beta1, args.adam_beta2) == (3e-3, 0.1, 0.9, 0.95)
    assert (args.max_grad_norm, args.eval_steps, args.save_steps, args.logging_steps) == (1.0, 100, 100, 50)
    assert (args.use_cpu, args.torch_compile, args.report_to) == (True, False, [])
    assert left["warmup_iters"] == "NanoGPTTrainer reads it from config"
    assert left["surprise"] == "unknown to nanoGPT"
    assert "n_layer" in left
    assert "learning_rate" not in left


# renamed in transformers 5.23
