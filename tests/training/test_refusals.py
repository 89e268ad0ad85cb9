"""What Trainer uses and NanoGPTTrainer would ignore is refused by name; what it uses or does not need is accepted."""

import pytest
from transformers import TrainingArguments

from hugging_nano_gpt import ConversionError
from hugging_nano_gpt.training import NanoGPTTrainer, TokenDataset, collate_windows
from hugging_nano_gpt.training.refusals import _PARAMETERS, _SETTINGS

from ..helpers.tiny import make_model
from ..helpers.trace import TRACE_DIR


def compute(*args, **kwargs):
    """A function like those that users write."""


# Each with a value that is not Trainer's default, and the error's text about it.
ASKED = {
    "data_collator": (compute, "give train_batch_sampler"),
    "compute_loss_func": (compute, "use plain Trainer"),
    "compute_metrics": (compute, "use plain Trainer"),
    "preprocess_logits_for_metrics": (compute, "use plain Trainer"),
    "optimizer_cls_and_kwargs": ((compute, {}), r"give optimizers=\(optimizer, None\)"),
    "label_smoothing_factor": (0.1, "use plain Trainer"),
    "train_sampling_strategy": ("group_by_length", "give train_batch_sampler"),
    "auto_find_batch_size": (True, "give train_batch_sampler"),
    "split_batches": (True, "give train_batch_sampler"),
    "per_device_eval_batch_size": (3, "per_device_train_batch_size; set that"),
    "bf16_full_eval": (True, "set bf16"),
    "fp16_full_eval": (True, "set fp16"),
    "optim": ("sgd", r"give optimizers=\(optimizer, None\)"),
    "optim_args": ("betas=1", r"give optimizers=\(optimizer, None\)"),
    "optim_target_modules": ("all-linear", r"give optimizers=\(optimizer, None\)"),
    "adam_epsilon": (1e-6, r"give optimizers=\(optimizer, None\)"),
    "lr_scheduler_type": ("cosine", "set decay_lr, warmup_iters"),
    "lr_scheduler_kwargs": ({"num_cycles": 2}, "set decay_lr, warmup_iters"),
    "warmup_steps": (10, "set decay_lr, warmup_iters"),
    "seed": (0, "give random_state"),
    "data_seed": (0, "give random_state"),
    # Not in every release, or impossible in one process: set after the arguments are made.
    "group_by_length": (True, "give train_batch_sampler"),
    "warmup_ratio": (0.1, "set decay_lr, warmup_iters"),
    "parallelism_config": (object(), "use DDP, or fsdp=True"),
}
SET_LATER = {"group_by_length", "train_sampling_strategy", "warmup_ratio", "parallelism_config"}


def make_trainer(folder, **asked):
    settings = {name: asked.pop(name) for name in asked.keys() & {*_SETTINGS, "metric_for_best_model"}}
    settings = {"per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", **settings}
    if "split_batches" in settings:
        settings["accelerator_config"] = {"split_batches": settings.pop("split_batches")}
    later = {name: settings.pop(name) for name in settings.keys() & SET_LATER}
    args = TrainingArguments(str(folder), **settings)
    for name, value in later.items():
        setattr(args, name, value)
    return NanoGPTTrainer(make_model(vocab_size=31), args, TokenDataset(TRACE_DIR / "train.bin", 32), **asked)


def test_every_setting_that_is_refused_is_tested():
    assert ASKED.keys() == _PARAMETERS.keys() | _SETTINGS.keys()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ASKED)
def test_what_would_be_ignored_is_refused_by_name(tmp_path, name):
    value, advice = ASKED[name]
    message = rf"NanoGPTTrainer: expected nothing that it would ignore, got {name}=.* \(.*{advice}"
    with pytest.raises(ConversionError, match=message):
        make_trainer(tmp_path, **{name: value})


def test_everything_that_would_be_ignored_is_named_at_once(tmp_path):
    with pytest.raises(ConversionError, match=r"got compute_metrics=.*, label_smoothing_factor=0\.1 .*, seed=7 "):
        make_trainer(tmp_path, seed=7, label_smoothing_factor=0.1, compute_metrics=compute)


def test_what_changes_nothing_is_accepted(tmp_path):
    same = {"data_collator": collate_windows, "compute_metrics": None, "seed": 1337, "optim": "adamw_torch"}
    sampler = [[0]]
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=4, train_batch_sampler=sampler, **same)
    assert trainer.data_collator is collate_windows
    assert make_trainer(tmp_path, data_collator=None).data_collator is collate_windows


def test_several_data_sets_to_evaluate_are_refused_by_name(tmp_path):
    several = {"books": TokenDataset(TRACE_DIR / "val.bin", 32)}
    message = r"eval_dataset: expected one data set, .* got a dict of 'books'; evaluate others by trainer\.evaluate\("
    with pytest.raises(ConversionError, match=message):
        make_trainer(tmp_path, eval_dataset=several)
    trainer = make_trainer(tmp_path)
    with pytest.raises(ConversionError, match=message):
        trainer.evaluate(several)


def test_train_loss_as_the_metric_of_the_best_model_is_refused_by_name(tmp_path):
    with pytest.raises(ConversionError, match=r"metric_for_best_model: .* got 'train/loss'; give 'loss'"):
        make_trainer(tmp_path, metric_for_best_model="train/loss")
