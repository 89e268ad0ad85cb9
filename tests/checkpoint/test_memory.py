"""Memory while converting: the optimizer state, two thirds of a file, costs nothing; each tensor is read once."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers.utils import logging

from hugging_nano_gpt import NanoGPTConfig, NanoGPTLMHeadModel
from hugging_nano_gpt.checkpoint.file import CheckpointFile
from hugging_nano_gpt.checkpoint.moments import group_by_dimension, list_parameter_shapes
from hugging_nano_gpt.demo import CKPT_PATH

from ..helpers.processes import run_forked
from ..helpers.tiny import TORCH_VERSION

# 4 layers of width 512: 54 MB of weights, so that an extra copy is larger than an allocator's noise.
ARGS = {"n_layer": 4, "n_head": 8, "n_embd": 512, "block_size": 64, "bias": True, "vocab_size": 1024, "dropout": 0.0}
WEIGHTS_BYTES = 4 * sum(torch.Size(shape).numel() for shape in list_parameter_shapes(ARGS, is_tied=True).values())

needs_offsets = pytest.mark.skipif(TORCH_VERSION < (2, 7), reason="torch 2.6 notes no offsets: its map is copied")


def read_status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def convert(path, out):
    """Converts a file, in a process of its own, and prints the peak growth of the memory."""
    logging.disable_progress_bar()
    NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH).save_pretrained(out)  # so that late imports are done
    Path("/proc/self/clear_refs").write_text("5")
    before = read_status("VmRSS")
    NanoGPTLMHeadModel.from_nanogpt_ckpt(path).save_pretrained(out, max_shard_size="20MB")
    print(read_status("VmHWM") - before)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """The same model twice: with the optimizer state of an update, and without."""
    folder = tmp_path_factory.mktemp("memory")
    model = NanoGPTLMHeadModel(NanoGPTConfig(**ARGS))
    model.to_nanogpt_ckpt(folder / "without.pt")
    shapes = list_parameter_shapes(ARGS, is_tied=True)
    names = [name for group in group_by_dimension(list(shapes), shapes) for name in group]
    contents = torch.load(folder / "without.pt", weights_only=True)
    contents["optimizer"]["state"] = {
        number: {
            "step": torch.tensor(1.0),
            "exp_avg": torch.randn(shapes[name]),
            "exp_avg_sq": torch.rand(shapes[name]),
        }
        for number, name in enumerate(names)
    }
    torch.save(contents, folder / "with.pt")
    assert (folder / "with.pt").stat().st_size > 2.9 * WEIGHTS_BYTES
    return folder


def measure(path, out):
    (done,) = run_forked([(convert, (path, out))], [os.environ])
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@needs_offsets
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_conversion_to_shards_takes_no_more_memory_for_an_optimizer(paths, tmp_path):
    growth = {name: measure(paths / f"{name}.pt", tmp_path / name) for name in ("without", "with")}
    shards = sorted((tmp_path / "with").glob("model-*.safetensors"))
    assert len(shards) >= 3
    assert growth["with"] < 1.9 * WEIGHTS_BYTES  # the weights, and one shard of 20 MB being written
    assert growth["with"] - growth["without"] < 0.05 * WEIGHTS_BYTES
    state_dict = NanoGPTLMHeadModel.from_nanogpt_ckpt(paths / "with.pt").state_dict()
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert all(torch.equal(file.get_tensor(name), state_dict[name]) for name in file.keys())  # noqa: SIM118


@needs_offsets
def test_each_stored_block_is_read_once_and_moments_not_at_all(paths, monkeypatch):
    read_bytes = []
    read_block = CheckpointFile._read_block
    monkeypatch.setattr(
        CheckpointFile,
        "_read_block",
        lambda self, name, stored: read_bytes.append(stored.nbytes) or read_block(self, name, stored),
    )
    NanoGPTLMHeadModel.from_nanogpt_ckpt(paths / "with.pt")
    assert sum(read_bytes) == WEIGHTS_BYTES
