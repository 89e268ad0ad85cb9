"""Fixtures that several rooms use: a tiny checkpoint as train.py writes it, models, and the number of threads."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from hugging_nano_gpt import Checkpoint, NanoGPTLMHeadModel, read_checkpoint
from hugging_nano_gpt.demo import CKPT_PATH

pytest.register_assert_rewrite("tests.helpers")  # their asserts explain themselves, too

from .helpers.contents import make_contents, save  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def keep_what_is_loaded():
    """Excludes loaded objects from garbage collection, which Trainer and torch call often: half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def two_threads():
    """The recorded run was made with two threads; with one, sums are added in another order (4e-7)."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_contents() -> dict[str, Any]:
    return make_contents()


@pytest.fixture
def contents(shared_contents) -> dict[str, Any]:
    """A copy that each test may change; a new AdamW step would take 20 times as long."""
    return copy.deepcopy(shared_contents)


@pytest.fixture
def ckpt_path(contents, tmp_path) -> Path:
    return save(contents, tmp_path)


@pytest.fixture
def checkpoint(ckpt_path) -> Checkpoint:
    return read_checkpoint(ckpt_path)


@pytest.fixture
def model(checkpoint):
    """A toy model with a training state in which no value is a default."""
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(checkpoint.path)
    checkpoint.path.unlink()  # tests check the other files in the folder
    return model


@pytest.fixture(scope="module")
def demo() -> NanoGPTLMHeadModel:
    return NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
