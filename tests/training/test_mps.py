"""How a Mac's GPU is used, tested without one: float32 and no pinned memory, as in train.py, and its generator."""

import re
from types import SimpleNamespace

import pytest
import torch

from hugging_nano_gpt import ConversionError
from hugging_nano_gpt.convert.source import choose_device
from hugging_nano_gpt.evaluate import estimate
from hugging_nano_gpt.training import TokenDataset, arguments, drawing, training_arguments_from_nanogpt

from ..helpers.folders import ROOT
from ..helpers.programs import run_command
from ..helpers.tiny import make_batch, make_model
from ..helpers.toy_run import make_workplace
from ..helpers.trace import TRACE_DIR


@pytest.fixture
def mps(monkeypatch):
    """Simulates torch on a Mac; returns the states that its generator was set to."""
    states = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([3, 200], dtype=torch.uint8))
    monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
    return states


@pytest.mark.parametrize("config", [{}, {"device": "mps"}, {"device": "mps:0", "dtype": "bfloat16"}], ids=str)
def test_training_on_mps_is_in_float32_without_pinned_memory(monkeypatch, mps, config):
    monkeypatch.setattr(arguments, "NanoGPTArguments", dict)
    args, _ = training_arguments_from_nanogpt(config)
    assert not args.keys() & {"bf16", "fp16", "use_cpu", "tf32"}
    assert args["dataloader_pin_memory"] is False


def test_train_refuses_mps_where_torch_has_none(tmp_path):
    with pytest.raises(
        ConversionError, match="device: expected a GPU of Apple's for 'mps', got a torch that finds no"
    ):
        training_arguments_from_nanogpt({"device": "mps"})
    result = run_command("train", "--dataset=toy", "--device=mps", "--compile=False", cwd=make_workplace(tmp_path))
    assert result.returncode == 1
    assert re.search(r"device: expected .*'mps'", result.stderr.splitlines()[-1])


def test_mps_is_used_only_if_it_is_named(mps):
    assert choose_device(None) == torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_batches_for_mps_are_not_pinned(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    dataset, args = TokenDataset(TRACE_DIR / "train.bin", 32), SimpleNamespace(device=torch.device("mps"))
    batches = drawing.DrawnBatches(dataset, make_model().config, args)
    batches.choose([0, 1])
    assert {tensor.device.type for tensor in batches.take().values()} == {"cpu"}  # Trainer moves them


def test_checkpoint_keeps_the_generator_of_mps(mps, tmp_path):
    drawing.write_next_batch(tmp_path, [4, 2], rank=0, world_size=1)
    assert drawing.read_next_batch(tmp_path, rank=0, world_size=1) == [4, 2]
    assert [state.tolist() for state in mps] == [[3, 200]]


def test_checkpoint_of_a_mac_is_resumed_without_mps(mps, tmp_path, monkeypatch):
    drawing.write_next_batch(tmp_path, [4, 2], rank=0, world_size=1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert drawing.read_next_batch(tmp_path, rank=0, world_size=1) == [4, 2]
    assert mps == []


def test_losses_are_moved_to_the_cpu_before_they_become_float64(monkeypatch):
    """MPS has no float64."""
    double, to_cpu, moved = torch.Tensor.double, torch.Tensor.cpu, []

    def note(tensor):
        moved.append(to_cpu(tensor))
        return moved[-1]

    def double_on_the_cpu(tensor):
        assert any(tensor is each for each in moved)
        return double(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", note)
    monkeypatch.setattr(torch.Tensor, "double", double_on_the_cpu)
    idx, targets = make_batch(2, 8)
    losses = estimate.compute_losses(make_model(), {"input_ids": idx, "shift_labels": targets}, "a batch")
    assert losses.dtype == torch.float64


def test_make_gpu_takes_mps(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    import gpu
    from gpu_parts.probe import Setting

    args = gpu.parse_args(["--device", "mps"])
    assert (args.device, args.size) == ("mps", "toy")
    Setting("mps", is_toy=True).synchronize()
    Setting("cpu", is_toy=True).synchronize()
    assert waited == ["mps"]
