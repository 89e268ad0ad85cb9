"""New weights: for a seed, the weights and the state of torch's generator have the same bits as nanoGPT's."""

import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hugging_nano_gpt import NanoGPTConfig, NanoGPTForSequenceClassification, NanoGPTLMHeadModel

from ..helpers.reference import ReferenceGPT
from ..helpers.scripts import NANOGPT_DIR, skip_without_nanogpt
from ..helpers.tiny import MODEL_ARGS

SHAPES = [{}, {"bias": False}, {"n_layer": 3, "n_embd": 20, "vocab_size": 7, "block_size": 5, "dropout": 0.1}]


def make_reference(seed, args):
    torch.manual_seed(seed)
    reference = ReferenceGPT(**args)
    reference.draw_weights()
    return reference.state_dict(), torch.get_rng_state()


def assert_bits_equal(model, state_dict):
    assert model.state_dict().keys() == state_dict.keys()
    assert all(torch.equal(tensor, state_dict[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("make", [NanoGPTLMHeadModel, AutoModelForCausalLM.from_config])
def test_new_model_has_nanogpts_bits_and_leaves_its_random_state(changes, make):
    args = {**MODEL_ARGS, **changes}
    expected, random_state = make_reference(1337, args)
    torch.manual_seed(1337)
    model = make(NanoGPTConfig(**args))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_bits_equal(model, expected)


@pytest.mark.nanogpt
@skip_without_nanogpt
@pytest.mark.parametrize("changes", SHAPES)
def test_new_model_equals_nanogpts_own(changes, monkeypatch):
    monkeypatch.syspath_prepend(NANOGPT_DIR)
    monkeypatch.delitem(sys.modules, "model", raising=False)
    import model as nanogpt

    args = {**MODEL_ARGS, **changes}
    torch.manual_seed(1337)
    expected = nanogpt.GPT(nanogpt.GPTConfig(**args))
    random_state = torch.get_rng_state()
    torch.manual_seed(1337)
    model = NanoGPTLMHeadModel(NanoGPTConfig(**args))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_bits_equal(model, expected.state_dict())


class PreOrder(NanoGPTLMHeadModel):
    """Initializes each module before its children."""

    def initialize_weights(self):
        for module in self.modules():
            self._init_weights(module)


class OneDraw(NanoGPTLMHeadModel):
    """Initializes the residual projections only once, with their own deviation."""

    def initialize_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                self._init_weights(module)


@pytest.mark.parametrize("broken", [PreOrder, OneDraw])
def test_weights_initialized_in_another_order_differ(broken):
    """Shows that the comparison can fail."""
    expected, random_state = make_reference(1337, MODEL_ARGS)
    torch.manual_seed(1337)
    model = broken(NanoGPTConfig(**MODEL_ARGS))
    is_same = [torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items()]
    assert not all(is_same) or not torch.equal(torch.get_rng_state(), random_state)


def test_untied_head_has_its_own_numbers():
    model = NanoGPTLMHeadModel(NanoGPTConfig(**MODEL_ARGS, tie_word_embeddings=False))
    head, embedding = model.lm_head.weight, model.transformer.wte.weight
    assert not torch.equal(head, embedding)
    assert [round(matrix.std().item(), 2) for matrix in (head, embedding)] == [0.02, 0.02]


@pytest.mark.parametrize("model_class", [NanoGPTLMHeadModel, NanoGPTForSequenceClassification])
def test_part_of_a_model_can_be_initialized_again(model_class):
    """Only in the constructor of the whole model is the part not initialized on its own."""
    model = model_class(NanoGPTConfig(**MODEL_ARGS))
    for module in model.transformer.modules():
        module._is_hf_initialized = False
    before = model.transformer.wte.weight.clone()
    model.transformer.init_weights()
    assert not torch.equal(before, model.transformer.wte.weight)


def test_loading_uses_no_random_numbers(tmp_path):
    model = NanoGPTLMHeadModel(NanoGPTConfig(**MODEL_ARGS))
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = NanoGPTLMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert_bits_equal(loaded, model.state_dict())
