"""Training on a GPU, tested without one: nothing waits for the GPU, TF32 is on, each process uses one GPU."""

import math

import pytest
import torch
from transformers import PreTrainedModel, TrainingArguments

from hugging_nano_gpt.errors import ConversionError
from hugging_nano_gpt.training import arguments, training_arguments_from_nanogpt

from ..helpers.trace import CONFIG, STEPS, load_start, make_trainer


@pytest.fixture
def trainer(tmp_path):
    return make_trainer(tmp_path, load_start(), STEPS[:2], logging_steps=1)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_batches_go_to_a_gpu_from_pinned_memory_without_waiting(trainer, monkeypatch, device):
    asked = []

    def note(tensor, *args, **kwargs):
        asked.append(("pinned" if tensor.data_ptr() in pinned else "pageable", *args, kwargs))
        return tensor

    pinned = set()
    batch = next(iter(trainer.get_train_dataloader()))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.add(tensor.data_ptr()) or tensor)
    monkeypatch.setattr(TrainingArguments, "device", torch.device(device))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", note)
        trainer._prepare_inputs(batch)
    if device == "cuda":
        assert asked == [("pinned", torch.device("cuda"), {"non_blocking": True})] * 2
    else:
        assert asked == [("pageable", {"device": torch.device("cpu")})] * 2


def test_loss_that_is_no_number_is_logged_as_such(tmp_path):
    """Trainer's filter waits for the loss of each micro-step, and would log another number."""
    model = load_start()
    model.transformer.ln_f.weight.data.fill_(math.nan)
    trainer = make_trainer(tmp_path, model, STEPS[:2], logging_steps=1)
    trainer.train()
    assert math.isnan(trainer.state.log_history[0]["loss"])


def test_parameters_are_counted_once(trainer, monkeypatch):
    counted = []
    count = PreTrainedModel.num_parameters
    monkeypatch.setattr(
        PreTrainedModel, "num_parameters", lambda *args, **kwargs: counted.append(kwargs) or count(*args, **kwargs)
    )
    trainer.train()
    assert counted.count({"exclude_embeddings": True}) == 1
    tokens = 2 * 2 * CONFIG["batch_size"] * CONFIG["block_size"]
    assert trainer.state.total_flos == 6 * tokens * count(trainer.model, exclude_embeddings=True)


@pytest.mark.parametrize(
    ("device", "is_there", "expected"), [("cuda", True, True), ("cuda", False, None), ("cpu", True, None)]
)
def test_tf32_is_on_if_a_gpu_has_it_as_in_train_py(monkeypatch, device, is_there, expected):
    monkeypatch.setattr(arguments, "is_torch_tf32_available", lambda: is_there)
    monkeypatch.setattr(arguments, "NanoGPTArguments", dict)
    args, _ = training_arguments_from_nanogpt({**CONFIG, "device": device})
    assert args.get("tf32") is expected


@pytest.mark.parametrize(("device", "is_said"), [("cuda:1", True), ("cuda:0", False), ("cuda", False), ("cpu", False)])
def test_another_gpu_than_the_first_is_reported_as_unused(monkeypatch, device, is_said):
    monkeypatch.setattr(arguments, "NanoGPTArguments", dict)
    _, left = training_arguments_from_nanogpt({**CONFIG, "device": device})
    assert left.get("device") == (
        "Trainer takes the first GPU that it sees: set CUDA_VISIBLE_DEVICES=1" if is_said else None
    )
    monkeypatch.setenv("LOCAL_RANK", "1")  # torchrun gives each process its own
    assert "device" not in training_arguments_from_nanogpt({**CONFIG, "device": device})[1]


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda args: 2))
    with pytest.raises(ConversionError, match="expected one, got 2; start it with `torchrun --nproc-per-node=2`"):
        make_trainer(tmp_path, load_start(), STEPS[:2])
