"""Training, bit for bit: a recorded run of nanoGPT's train.py, replayed through a loop and through the Trainer.

tests/fixtures/trace was made by train.py: two checkpoints 100 updates apart, and every offset, learning rate and loss
between them (2 micro-steps an update, 2 CPU threads).
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hugging_nano_gpt import ConversionError, DataError, NanoGPTLMHeadModel, read_checkpoint
from hugging_nano_gpt.demo import CKPT_PATH
from hugging_nano_gpt.training import (
    FixedOffsetSampler,
    NanoGPTCheckpointCallback,
    NanoGPTSchedule,
    NanoGPTTrainer,
    TokenDataset,
    compute_lr,
    make_optimizer,
    read_optimizer,
    training_arguments_from_nanogpt,
)

from .tiny import TORCH_VERSION, make_model
from .trace import (
    CONFIG,
    END,
    START,
    STEPS,
    TOLERANCE,
    TRACE_DIR,
    find_largest_difference,
    flatten_moments,
    load_start,
    make_trainer,
    train_by_hand,
)

LOSSES = [micro["loss"] for step in STEPS for micro in step["micro"]]


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    """The trace was made with two threads, and with one the sums come in another order (4e-7)."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def record_losses(model):
    losses = []
    model.register_forward_hook(lambda module, args, outputs: losses.append(outputs.loss.item()))
    return losses


def measure_distance(model, optimizer, expected=None):
    """Returns how far parameters and moments are from expected ones; without any, from those that nanoGPT reached."""
    parameters, moments = expected or (END.state_dict, flatten_moments(END.training_state.optimizer.moments))
    found = flatten_moments(read_optimizer(optimizer, model).moments)
    return max(find_largest_difference(model.state_dict(), parameters), find_largest_difference(found, moments))


def assert_same_settings(left, right):
    """Compares what both have: each torch knows settings that older ones do not."""
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
    """Makes a trainer whose batches have labels, from which Trainer counts the tokens that it divides the loss by."""

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
    """Begins the schedule one update late."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = NanoGPTSchedule(self.optimizer, CONFIG, iter_num=99)
        return self.lr_scheduler


class ForgottenMoments(NanoGPTTrainer):
    """Starts AdamW afresh, as every converter script does."""

    def create_optimizer(self, model=None):
        self.optimizer = make_optimizer(self.model, self._settings())
        return self.optimizer


@pytest.fixture(scope="module")
def after_20(two_threads):
    """Parameters and moments after the first 20 recorded updates: what is wrong shows in them already."""
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
def test_ids_that_the_model_does_not_have_are_refused_before_they_train(tmp_path, dtype):
    tokens = np.zeros(100, dtype=dtype)
    tokens[50] = 31
    np.save(tmp_path / "tokens.npy", tokens)
    trainer = make_trainer(tmp_path, load_start(), STEPS[:1])
    trainer.train_dataset = TokenDataset(tmp_path / "tokens.npy", 32)
    trainer._train_batch_sampler = FixedOffsetSampler([[0, 60], [18, 60]])
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
def test_schedule_at_its_corners_is_nanogpts(iter_num, expected):
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


def test_optimizer_of_another_kind_is_refused(tmp_path):
    model = make_model()
    model(torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    with pytest.raises(ConversionError, match="expected AdamW's moments, got others"):
        read_optimizer(optimizer, model)
    with pytest.raises(ConversionError, match=r"expected one over all .* parameters of the model, got 1"):
        read_optimizer(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), model)


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
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)


needs_compiler = pytest.mark.skipif(TORCH_VERSION < (2, 7), reason="the compiler of torch 2.6 fails")
ignore_compiler = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # torch's own, when it compiles


class Windows(torch.utils.data.Dataset):
    """The first windows of the trace as plain examples, as users of Trainer have them."""

    def __init__(self, count):
        self.dataset, self.count = TokenDataset(TRACE_DIR / "train.bin", 32), count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        ids = self.dataset[32 * range(self.count)[index]]["input_ids"]  # one sampler asks until an IndexError
        return {"input_ids": ids, "labels": ids}


def make_plain_trainer(folder, model, windows=8, **settings):
    defaults = {"per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "report_to": "none"}
    args = TrainingArguments(
        str(folder), **{**defaults, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, **settings}
    )
    return Trainer(model, args, train_dataset=Windows(windows))


def test_plain_trainer_logs_the_loss_of_nanogpt_and_its_groups(tmp_path):
    model = load_start()
    trainer = make_plain_trainer(tmp_path, model, max_grad_norm=0.0)
    batch = next(iter(trainer.get_train_dataloader()))
    ids = batch["input_ids"]
    with torch.no_grad():  # nanoGPT's loss of these tokens: the first 31 predict the last 31
        expected = model(ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss.item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-6)
    groups = trainer.optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    without_decay = [names[id(parameter)] for parameter in groups[1]["params"]]
    assert without_decay == [name for name, parameter in model.named_parameters() if parameter.ndim < 2]
    assert groups[1]["weight_decay"] == 0.0


def test_plain_trainer_shifts_labels_when_it_smooths_them(tmp_path):
    model = load_start()
    trainer = make_plain_trainer(tmp_path, model, label_smoothing_factor=0.1)
    ids = next(iter(trainer.get_train_dataloader()))["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        expected = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1).item()
        unshifted = nn.functional.cross_entropy(
            model(ids).logits.flatten(0, 1), ids.flatten(), label_smoothing=0.1
        ).item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(unshifted - expected) > 0.1


def measure_switches(folder, settings, twin):
    """Makes 6 updates with each of two settings; returns how far apart they end, as a share of the way from the start.

    0 is the same bits, and 1 as far as not to have trained at all.
    """
    ends = []
    for changes in (settings, twin):
        model = load_start()
        trainer = make_plain_trainer(folder, model, windows=24, max_steps=6, learning_rate=1e-3, **changes)
        trainer.train()
        assert [math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry] == [True] * 6
        ends.append(nn.utils.parameters_to_vector(model.parameters()))
    start = nn.utils.parameters_to_vector(load_start().parameters())
    return ((ends[0] - ends[1]).norm() / (ends[1] - start).norm()).item()


# Another order of float32 sums; measured at most 3e-6, and 0.014 with the nearest wrong setting below.
OTHER_SUMS = (0.0, 1e-4)


@pytest.mark.parametrize(
    ("settings", "twin", "limits"),
    [
        ({CHECKPOINTING: True}, {}, (0.0, 0.0)),
        ({"bf16": True}, {}, (1e-3, 0.15)),  # 8 bits, where they are used at all; measured 0.05
        ({"gradient_accumulation_steps": 3}, {"per_device_train_batch_size": 12}, OTHER_SUMS),
        ({"optim": "adamw_torch"}, {"optim": "adamw_torch_fused"}, OTHER_SUMS),
        # Of a batch with every window the order does not matter.
        (
            {"per_device_train_batch_size": 24, "train_sampling_strategy": "group_by_length"},
            {"per_device_train_batch_size": 24},
            OTHER_SUMS,
        ),
        # The graphs without the code of the default back end, which takes half a minute to make.
        pytest.param({"torch_compile_backend": "aot_eager"}, {}, OTHER_SUMS, marks=[needs_compiler, *ignore_compiler]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_plain_trainer_with_its_usual_switches_ends_where_it_does_without(tmp_path, settings, twin, limits):
    least, most = limits
    assert least <= measure_switches(tmp_path, settings, twin) <= most


@pytest.mark.parametrize(
    "wrong",
    [
        {"per_device_train_batch_size": 3},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        {"adam_beta2": 0.9},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_plain_trainer_with_another_setting_ends_elsewhere(tmp_path, wrong):
    """Shows that the test above can fail."""
    assert measure_switches(tmp_path, wrong, {}) > 100 * OTHER_SUMS[1]


def test_neftune_adds_noise_in_training_alone(tmp_path):
    model = load_start()
    trainer = make_plain_trainer(tmp_path, model, neftune_noise_alpha=5.0, logging_steps=1, max_grad_norm=0.0)
    ids = next(iter(trainer.get_train_dataloader()))["input_ids"]
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    trainer.train()
    assert 1e-3 < abs(trainer.state.log_history[0]["loss"] - expected) < 1
    assert not model.transformer.wte._forward_hooks


def test_plain_trainer_resumed_in_the_middle_of_an_epoch_ends_at_the_same_bits(tmp_path):
    """8 windows in batches of 2 are 4 updates an epoch: the checkpoint is one and a half epochs in."""
    settings = {"max_steps": 10, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 6}
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-6")):
        model = load_start()
        losses = record_losses(model)
        make_plain_trainer(tmp_path, model, **settings).train(resume_from_checkpoint=checkpoint)
        ends.append((losses, model.state_dict()))
    (losses, parameters), (resumed_losses, resumed) = ends
    assert resumed_losses == losses[6:]  # the first 6 updates are not made again
    assert all(torch.equal(parameters[name], resumed[name]) for name in parameters)


def test_flattened_documents_have_the_loss_of_separate_ones():
    """DataCollatorWithFlattening packs documents into one row, and marks them by positions that begin again."""
    model = load_start()
    documents = [Windows(3)[index]["input_ids"][:length].tolist() for index, length in enumerate((32, 7, 20))]
    batch = DataCollatorWithFlattening()([{"input_ids": document} for document in documents])
    assert batch["position_ids"].shape == (1, 59)
    with torch.no_grad():
        packed = model(**batch, use_cache=False).loss
        separate = [model(torch.tensor([d]), labels=torch.tensor([d])).loss * (len(d) - 1) for d in documents]
    torch.testing.assert_close(packed, sum(separate) / (59 - 3), rtol=0, atol=1e-6)
