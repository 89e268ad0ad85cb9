"""Values of settings that train.py cannot run with are refused by name; all others are accepted."""

import math

import numpy as np
import pytest
import torch

from hugging_nano_gpt import ConversionError, DeviceError, read_checkpoint
from hugging_nano_gpt.training import TRAIN_DEFAULTS, compute_lr, training_arguments_from_nanogpt
from hugging_nano_gpt.training.train_settings import check_settings

from ..helpers.toy_run import SETTINGS, train

WRONG = [
    *((name, value) for name in ("eval_interval", "log_interval") for value in (0, -1, True, None)),
    *((name, value) for name in ("gradient_accumulation_steps", "batch_size", "block_size") for value in (0, -1, 3.0)),
    *((name, value) for name in ("n_layer", "n_head", "n_embd") for value in (0, -2, 2.0, "2")),
    *((name, value) for name in ("dropout", "beta1", "beta2") for value in (-0.1, 1.0, math.nan)),
    *((name, value) for name in ("learning_rate", "weight_decay", "grad_clip") for value in (-1, math.nan, "1e-3")),
    *((name, value) for name in ("bias", "decay_lr", "compile", "eval_only") for value in (1, "yes")),
    *(("eval_iters", value) for value in (-1, 2.0)),
    *(("max_iters", value) for value in (2.5, math.inf, 10**400)),
    *(("device", value) for value in ("cud", "gpu", "", "cuda:x")),
    *(("dtype", value) for value in ("bf16", "fp32", "float23", "", None)),
    ("out_dir", ""),
]

# train.py runs with each of these; a test below makes the run with some of them.
RIGHT = [
    *(("max_iters", value) for value in (0, -1, 6e5)),
    *(("warmup_iters", value) for value in (0, -3, 20)),
    *(("lr_decay_iters", value) for value in (0, 2)),
    *(("min_lr", value) for value in (0, -1e-3)),
    *(("device", value) for value in ("cuda:7", "mps", torch.device("cpu"))),
    ("eval_iters", 0),
    ("grad_clip", 0),
    ("grad_clip", math.inf),
    ("learning_rate", 1),
    ("batch_size", np.int64(3)),
    ("eval_interval", 4.0),
    ("dtype", "bfloat16"),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_value_that_train_py_cannot_run_with_is_refused_by_name(name, value):
    with pytest.raises(ConversionError, match=rf"^settings: {name}: .*expected [^;]*, got [^;]*; change"):
        check_settings({**SETTINGS, name: value})


@pytest.mark.parametrize(("name", "value"), RIGHT, ids=str)
def test_value_that_train_py_accepts_is_accepted(name, value):
    check_settings({**SETTINGS, name: value})


def test_every_bad_setting_is_named_at_once():
    bad = {"eval_interval": 0, "log_interval": 0, "batch_size": 0, "eval_iters": -1, "dtype": "bf16", "n_embd": 17}
    with pytest.raises(ConversionError) as caught:
        check_settings({**SETTINGS, **bad})
    assert all(f"{name}: expected" in str(caught.value) for name in bad)


def test_defaults_of_train_py_are_accepted():
    check_settings(TRAIN_DEFAULTS)


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        ({}, True),
        ({"warmup_iters": 0, "lr_decay_iters": 0}, True),
        ({"decay_lr": False}, False),
        ({"max_iters": 9}, False),  # train.py would divide by zero in a later update
        ({"init_from": "resume"}, False),  # perhaps in an earlier one
    ],
)
def test_decay_that_ends_with_the_warmup_is_refused_where_train_py_divides_by_zero(changes, is_refused):
    settings = {**SETTINGS, "warmup_iters": 10, "lr_decay_iters": 10, "max_iters": 10, **changes}
    if is_refused:
        with pytest.raises(ConversionError, match=r"lr_decay_iters: expected another number than warmup_iters=\d+"):
            check_settings(settings)
    else:
        check_settings(settings)


def test_learning_rate_where_train_py_divides_by_zero_is_refused_by_name():
    config = {"warmup_iters": 10, "lr_decay_iters": 10}
    assert compute_lr(11, config) == TRAIN_DEFAULTS["min_lr"]
    with pytest.raises(ConversionError, match=r"lr_decay_iters: expected another number than warmup_iters, got 10"):
        compute_lr(10, config)


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"dtype": "bf16"}, {"device": "cud"}, {"log_interval": 0}])
def test_run_with_a_value_that_train_py_cannot_run_with_does_not_start(tmp_path, capsys, changes):
    with pytest.raises(ConversionError, match=f"settings: {next(iter(changes))}: expected"):
        train(tmp_path, **changes)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["meta", "xpu"])
def test_run_on_a_missing_device_does_not_start(tmp_path, capsys, device):
    with pytest.raises(DeviceError, match=rf"device: expected .*cpu.* got '{device}'"):
        train(tmp_path, device=device)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("max_iters", [0, -1])
def test_run_of_no_iterations_makes_one_update_as_train_py_does(tmp_path, max_iters):
    assert train(tmp_path, max_iters=max_iters).iter_num == 1


def test_estimate_of_no_batches_is_nan_as_train_pys_is(tmp_path, capsys):
    train(tmp_path, eval_iters=0, max_iters=4)
    assert "step 4: train loss nan, val loss nan\nsaving checkpoint" in capsys.readouterr().out
    assert math.isnan(read_checkpoint(tmp_path / "out" / "ckpt.pt").training_state.best_val_loss)


@pytest.mark.parametrize("name", ["gradient_accumulation_steps", "batch_size", "log_interval", "dtype", "device"])
def test_arguments_of_a_config_that_train_py_cannot_run_with_are_refused(name):
    value = "fp32" if name in ("dtype", "device") else 0
    with pytest.raises(ConversionError, match=rf"settings: {name}: expected"):
        training_arguments_from_nanogpt({**SETTINGS, name: value})


def test_arguments_do_not_check_settings_that_they_do_not_use():
    training_arguments_from_nanogpt(
        {**SETTINGS, "n_head": 3, "dataset": None, "wandb_run_name": None, "block_size": 0}
    )
