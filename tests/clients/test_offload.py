"""Models that accelerate spreads over devices, here the CPU and the disk."""

import pytest
import torch

from hugging_nano_gpt import NanoGPTLMHeadModel

from ..helpers.comparison import assert_same
from ..helpers.tiny import make_batch, make_model

accelerate = pytest.importorskip("accelerate")

# Older Transformers warn because they think that the model runs on the meta device of its offloaded tensors.
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate\\(\\) with the `input_ids`:UserWarning")


def load_automatically(folder):
    return NanoGPTLMHeadModel.from_pretrained(folder / "model", device_map="auto")


def load_with_little_memory(folder):
    settings = {"device_map": "auto", "max_memory": {"cpu": 60_000}, "offload_folder": folder / "offload"}
    model = NanoGPTLMHeadModel.from_pretrained(folder / "model", **settings)
    assert "disk" in model.hf_device_map.values()
    return model


def load_with_all_on_disk(folder):
    settings = {"device_map": {"": "disk"}, "offload_folder": folder / "offload"}
    return NanoGPTLMHeadModel.from_pretrained(folder / "model", **settings)


def offload_to_cpu(folder):
    model = NanoGPTLMHeadModel.from_pretrained(folder / "model")
    return accelerate.cpu_offload(model, execution_device="cpu")


@pytest.mark.parametrize(
    "load",
    [load_automatically, load_with_little_memory, load_with_all_on_disk, offload_to_cpu],
    ids=lambda f: f.__name__,
)
def test_spread_model_computes_the_same_and_goes_back_whole(load, tmp_path):
    whole = make_model()
    whole.save_pretrained(tmp_path / "model")
    spread = load(tmp_path)
    ids, _ = make_batch(2, 20)
    assert torch.equal(spread(ids).logits, whole(ids).logits)
    settings = {"max_new_tokens": 20, "do_sample": False}  # past block_size
    assert torch.equal(spread.generate(ids, **settings), whole.generate(ids, **settings))
    spread.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    back = NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt")
    assert back.lm_head.weight is back.transformer.wte.weight
    assert_same(dict(back.state_dict()), dict(whole.state_dict()))
