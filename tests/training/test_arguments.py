"""Settings that are missing from a config get train.py's defaults, in every way to make a trainer."""

import math

import pytest
import torch
from transformers import TrainingArguments

from hugging_nano_gpt import ConversionError, NanoGPTLMHeadModel, TrainingState
from hugging_nano_gpt.training import (
    TRAIN_DEFAULTS,
    NanoGPTTrainer,
    TokenDataset,
    arguments,
    compute_lr,
    training_arguments_from_nanogpt,
)

from ..helpers.tiny import make_model
from ..helpers.trace import CONFIG, START, TRACE_DIR

DEFAULTS = {"learning_rate": 6e-4, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95, "max_grad_norm": 1.0}
OTHERS = {"learning_rate": 1e-3, "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.99, "grad_clip": 0.5}


def make_arguments(folder, **settings):
    """Makes TrainingArguments as Trainer's users do."""
    quiet = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(str(folder), use_cpu=True, remove_unused_columns=False, **{**quiet, **settings})


def make_trainer(model, args, **kwargs):
    return NanoGPTTrainer(model, args, TokenDataset(TRACE_DIR / "train.bin", 32), **kwargs)


def get_settings(trainer):
    """Returns the settings of the optimizer and of clipping."""
    optimizer = trainer.create_optimizer()
    decayed, others = optimizer.param_groups
    assert others["weight_decay"] == 0.0
    beta1, beta2 = decayed["betas"]
    found = (decayed["lr"], decayed["weight_decay"], beta1, beta2, trainer.args.max_grad_norm)
    return dict(zip(DEFAULTS, found, strict=True))


# training_arguments_from_nanogpt


def test_empty_config_gives_train_pys_defaults():
    args, left = training_arguments_from_nanogpt({})
    assert {name: getattr(args, name) for name in DEFAULTS} == DEFAULTS
    assert (args.output_dir, args.run_name, args.report_to) == ("out", "gpt2", [])
    assert (args.max_steps, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (600_000, 12, 40)
    assert (args.eval_steps, args.save_steps, args.logging_steps, args.torch_compile) == (2000, 2000, 1, True)
    assert args.save_total_limit == 1  # as train.py keeps one file
    assert left == {}


@pytest.mark.parametrize("name", [name for name in TRAIN_DEFAULTS if name not in ("device", "dtype")])
def test_setting_that_is_missing_is_train_pys_default(monkeypatch, name):
    """One at a time, with all others in the config."""
    monkeypatch.setattr(arguments, "NanoGPTArguments", dict)
    without = {key: value for key, value in CONFIG.items() if key != name}
    found, _ = training_arguments_from_nanogpt(without)
    expected, _ = training_arguments_from_nanogpt({**without, name: TRAIN_DEFAULTS[name]})
    assert {**found, "nanogpt_config": {}} == {**expected, "nanogpt_config": {}}


@pytest.mark.parametrize(
    ("has_gpu", "has_bfloat16", "config", "expected"),
    [
        (True, True, {}, "bf16"),
        (True, False, {}, "fp16"),
        (True, True, {"dtype": "float32"}, None),
        (False, False, {}, "use_cpu"),
        (True, True, {"device": "cpu"}, "use_cpu"),
    ],
)
def test_device_and_dtype_that_are_missing_are_train_pys(monkeypatch, has_gpu, has_bfloat16, config, expected):
    monkeypatch.setattr(arguments, "NanoGPTArguments", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bfloat16)
    args, _ = training_arguments_from_nanogpt(config)
    assert [name for name in ("bf16", "fp16", "use_cpu") if name in args] == ([] if expected is None else [expected])


def test_micro_steps_of_the_default_are_divided_too(monkeypatch):
    monkeypatch.setattr(arguments, "NanoGPTArguments", dict)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert training_arguments_from_nanogpt({})[0]["gradient_accumulation_steps"] == 5
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConversionError, match="expected a multiple of the 3 processes, got 40"):
        training_arguments_from_nanogpt({})


# NanoGPTTrainer


@pytest.mark.parametrize("config", [{}, OTHERS, {"beta2": 0.99}, {"grad_clip": 0.0}], ids=str)
@pytest.mark.parametrize("is_given", [True, False], ids=["state", "no state"])
def test_arguments_of_trainers_own_get_the_configs_settings_or_train_pys(tmp_path, caplog, config, is_given):
    state = TrainingState(config=config)
    model = make_model(vocab_size=31)
    if not is_given:
        model.config.nanogpt_training_state = {"iter_num": 0, "best_val_loss": 1e9, "config": config}
    args = make_arguments(tmp_path)
    trainer = make_trainer(model, args, training_state=state if is_given else None)
    names = dict(zip(OTHERS, DEFAULTS, strict=True))
    assert get_settings(trainer) == {**DEFAULTS, **{names[name]: value for name, value in config.items()}}
    assert "weight_decay=" in caplog.text
    assert "Transformers' defaults count as not given" in caplog.text
    assert (args.weight_decay, args.adam_beta2) == (0.0, 0.999)  # the user's object is not changed


def test_arguments_that_are_given_are_used(tmp_path, caplog):
    given = {"learning_rate": 1e-4, "weight_decay": 0.3, "adam_beta1": 0.7, "adam_beta2": 0.98, "max_grad_norm": 2.0}
    trainer = make_trainer(make_model(vocab_size=31), make_arguments(tmp_path, **given))
    assert get_settings(trainer) == given
    assert "count as not given" not in caplog.text


@pytest.mark.parametrize(
    "changes", [{}, {"weight_decay": 0.0}, {"learning_rate": 5e-5}, {"adam_beta2": 0.999}], ids=str
)
def test_mapped_arguments_at_transformers_defaults_are_used_too(tmp_path, caplog, changes):
    config = {**OTHERS, "device": "cpu", "compile": False, "out_dir": str(tmp_path)}
    args, _ = training_arguments_from_nanogpt(config, eval_strategy="no", **changes)
    names = dict(zip(OTHERS, DEFAULTS, strict=True))
    expected = {names[name]: value for name, value in OTHERS.items()} | changes
    assert get_settings(make_trainer(make_model(vocab_size=31), args)) == expected
    assert "count as not given" not in caplog.text


@pytest.mark.parametrize("is_fresh", [True, False], ids=["a new model", "a checkpoint's"])
def test_schedule_of_the_config_is_used_where_no_state_is_given(tmp_path, is_fresh):
    changes = {"warmup_iters": 150, "learning_rate": 2e-3, "min_lr": 1e-5, "lr_decay_iters": 900, "max_iters": 102}
    config = {**CONFIG, **changes, "out_dir": str(tmp_path)}
    model = make_model(vocab_size=31) if is_fresh else load_remembering()
    begin = 0 if is_fresh else 100
    args, _ = training_arguments_from_nanogpt(config, 100, eval_strategy="no", save_strategy="no", logging_steps=1)
    trainer = make_trainer(model, args)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == [compute_lr(begin + number, config) for number in range(2)]
    assert trainer.config == config


def load_remembering():
    return NanoGPTLMHeadModel.from_nanogpt_ckpt(TRACE_DIR / "ckpt_100.pt")


def test_config_of_a_given_state_is_used(tmp_path):
    args, _ = training_arguments_from_nanogpt({**CONFIG, "warmup_iters": 150, "out_dir": str(tmp_path)})
    trainer = make_trainer(
        load_remembering(),
        args,
        training_state=START.training_state,
        eval_dataset=TokenDataset(TRACE_DIR / "val.bin", 32),
    )
    assert trainer.config == CONFIG


# num_train_epochs


@pytest.mark.parametrize("epochs", [1, 0.25, 3])
@pytest.mark.parametrize("sizes", [(4, 1), (2, 3)])
def test_epoch_has_as_many_tokens_as_the_file(tmp_path, epochs, sizes):
    batch_size, micro_steps = sizes
    path = tmp_path / "train.bin"
    path.write_bytes((TRACE_DIR / "train.bin").read_bytes()[: 2 * 1000])
    args = make_arguments(
        tmp_path,
        max_steps=-1,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=micro_steps,
    )
    trainer = NanoGPTTrainer(make_model(vocab_size=31), args, TokenDataset(path, 32))
    trainer.train()
    expected = math.ceil(epochs * 1000 / (batch_size * micro_steps * 32))
    assert trainer.state.global_step == trainer.iter_num == expected


def test_epochs_asked_for_override_max_iters(tmp_path):
    config = {**CONFIG, "out_dir": str(tmp_path)}
    quiet = {"eval_strategy": "no", "save_strategy": "no"}
    dataset = TokenDataset(TRACE_DIR / "train.bin", 32)
    args, _ = training_arguments_from_nanogpt(config, num_train_epochs=2, **quiet)
    n_tokens = CONFIG["batch_size"] * CONFIG["gradient_accumulation_steps"] * 32
    assert make_trainer(load_remembering(), args).args.max_steps == math.ceil(2 * dataset.n_tokens / n_tokens)
    args, _ = training_arguments_from_nanogpt(config, num_train_epochs=2, max_steps=7, **quiet)
    assert make_trainer(load_remembering(), args).args.max_steps == 7


def test_epochs_of_given_batches_are_trainers_own(tmp_path):
    args = make_arguments(tmp_path, max_steps=-1, num_train_epochs=2)
    sampler = [[0, 1], [2, 3], [4, 5]]
    trainer = make_trainer(make_model(vocab_size=31), args, train_batch_sampler=sampler)
    trainer.train()
    assert trainer.state.global_step == 6
