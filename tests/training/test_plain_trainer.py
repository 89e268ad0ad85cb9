"""Transformers' own Trainer with our models: nanoGPT's loss and groups, and each usual option has only its effect."""

import math

import pytest
import torch
from torch import nn
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hugging_nano_gpt import NanoGPTConfig, NanoGPTForSequenceClassification
from hugging_nano_gpt.training import TokenDataset, collate_windows

from ..helpers.tiny import MODEL_ARGS, TORCH_VERSION, make_model
from ..helpers.trace import TRACE_DIR, load_start, record_losses

pytestmark = pytest.mark.usefixtures("two_threads")

# Renamed in Transformers 5.23.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
when_it_compiles = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # warnings of torch
    pytest.mark.skipif(TORCH_VERSION < (2, 7), reason="the compiler of torch 2.6 fails on Transformers' code"),
]


class Windows(torch.utils.data.Dataset):
    """The first windows of the trace as plain examples, as users of Trainer have them."""

    def __init__(self, count):
        self.dataset, self.count = TokenDataset(TRACE_DIR / "train.bin", 32), count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        ids = self.dataset[32 * range(self.count)[index]]["input_ids"]  # one sampler reads until an IndexError
        return {"input_ids": ids, "labels": ids}


def make_arguments(folder, **settings):
    defaults = {"per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "report_to": "none"}
    return TrainingArguments(
        str(folder), **{**defaults, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, **settings}
    )


def make_plain_trainer(folder, model, windows=8, **settings):
    return Trainer(model, make_arguments(folder, **settings), train_dataset=Windows(windows))


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
    """Makes 6 updates with each of two settings; returns their distance, relative to the distance from the start.

    0 means the same bits, and 1 is the distance of an untrained model.
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
        ({"bf16": True}, {}, (1e-3, 0.15)),  # 8 bits, if bfloat16 is used at all; measured 0.05
        ({"gradient_accumulation_steps": 3}, {"per_device_train_batch_size": 12}, OTHER_SUMS),
        ({"optim": "adamw_torch"}, {"optim": "adamw_torch_fused"}, OTHER_SUMS),
        # In a batch with every window the order does not matter.
        (
            {"per_device_train_batch_size": 24, "train_sampling_strategy": "group_by_length"},
            {"per_device_train_batch_size": 24},
            OTHER_SUMS,
        ),
        # Graphs without the default back end, which takes half a minute to compile.
        pytest.param({"torch_compile_backend": "aot_eager"}, {}, OTHER_SUMS, marks=when_it_compiles),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_plain_trainer_with_usual_options_ends_where_it_does_without(tmp_path, settings, twin, limits):
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


def test_neftune_adds_noise_only_in_training(tmp_path):
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
    """DataCollatorWithFlattening packs documents into one row, and marks them by positions that restart at 0."""
    model = load_start()
    documents = [Windows(3)[index]["input_ids"][:length].tolist() for index, length in enumerate((32, 7, 20))]
    batch = DataCollatorWithFlattening()([{"input_ids": document} for document in documents])
    assert batch["position_ids"].shape == (1, 59)
    with torch.no_grad():
        packed = model(**batch, use_cache=False).loss
        separate = [model(torch.tensor([d]), labels=torch.tensor([d])).loss * (len(d) - 1) for d in documents]
    torch.testing.assert_close(packed, sum(separate) / (59 - 3), rtol=0, atol=1e-6)


# What Trainer uses as the labels of a batch


def adapt_toy():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(make_model(), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))


def make_toy_classifier():
    return NanoGPTForSequenceClassification(NanoGPTConfig(**MODEL_ARGS, num_labels=3))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize(
    ("load", "labels", "shapes"),
    [
        (load_start, None, ((6, 32, 31), (6, 32))),
        (adapt_toy, None, ((6, 32, 65), (6, 32))),
        (make_toy_classifier, 2, ((6, 3), (6,))),
    ],
)
def test_plain_trainer_evaluates_measures_and_loads_the_best(tmp_path, load, labels, shapes):
    rows = [{**window, **({} if labels is None else {"labels": labels})} for window in Windows(6)]
    measured = []

    def compute_metrics(prediction):
        measured.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"rows": len(prediction.predictions)}

    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    args = make_arguments(tmp_path, max_steps=2, **saving, **best)
    trainer = Trainer(load(), args, train_dataset=rows, eval_dataset=rows, compute_metrics=compute_metrics)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert trainer.state.best_metric == min(losses)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    assert metrics["eval_rows"] == 6
    assert measured == [shapes] * 3


def make_windows_trainer(folder, collator=None, **settings):
    """Makes a plain Trainer over windows with nanoGPT's targets, one for every token."""
    windows = torch.utils.data.Subset(TokenDataset(TRACE_DIR / "train.bin", 32), range(0, 8 * 32, 32))
    args = make_arguments(folder, **settings)
    return Trainer(load_start(), args, data_collator=collator, train_dataset=windows, eval_dataset=windows)


@pytest.mark.parametrize("collator", [None, collate_windows])
def test_plain_trainer_trains_on_nanogpts_targets_and_evaluates_them_if_label_names_names_them(tmp_path, collator):
    settings = {"label_names": ["shift_labels"], "per_device_eval_batch_size": 8, "max_grad_norm": 0.0}
    trainer = make_windows_trainer(tmp_path, collator, **settings)
    with torch.no_grad():
        expected = trainer.model.eval()(**collate_windows(list(trainer.eval_dataset))).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-6)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < expected


@pytest.mark.parametrize("collator", [None, collate_windows])
def test_plain_trainer_trains_on_nanogpts_targets_without_label_names(tmp_path, collator):
    trainers = [make_windows_trainer(tmp_path, collator, **names) for names in ({}, {"label_names": ["shift_labels"]})]
    for trainer in trainers:
        trainer.train()
    states = [trainer.model.state_dict() for trainer in trainers]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
