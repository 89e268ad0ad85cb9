"""torch.export: one program for every batch and length, with the same bits, and with a cache."""

import warnings

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.executorch import (
    TorchExportableModuleForDecoderOnlyLM,
    register_dynamic_cache_export_support,
)

from hugging_nano_gpt.model.inputs_nano_gpt import CACHE_NAME

from ..helpers.tiny import TORCH_VERSION, make_batch, make_model

SIZES = ((2, 9), (1, 1), (1, 32), (3, 17), (5, 2))  # (B, T); the first is the example that is recorded

pytestmark = pytest.mark.skipif(
    TORCH_VERSION < (2, 11), reason="torch 2.6 fails in its own code with a mask or a cache"
)


def make_inputs(batch, length, has_mask):
    inputs = {"input_ids": make_batch(batch, length)[0].contiguous()}  # else the strides become a condition
    if has_mask:
        inputs["attention_mask"] = (torch.arange(length) >= torch.arange(batch)[:, None] % length).long()
    return inputs


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize("has_mask", [False, True])
@torch.no_grad()
def test_program_gives_the_same_bits_at_any_batch_and_length(is_strict, has_mask):
    model = make_model()
    example = make_inputs(*SIZES[0], has_mask)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {**{name: {0: batch, 1: length} for name in example}, "use_cache": None}
    with warnings.catch_warnings():
        # strict mode warns of the variable with which Transformers records outputs
        warnings.filterwarnings("ignore", "While compiling, we found certain side effects", UserWarning)
        program = torch.export.export(
            model, (), {**example, "use_cache": False}, dynamic_shapes=shapes, strict=is_strict
        )
    for size in SIZES:
        inputs = make_inputs(*size, has_mask)
        logits = program.module()(**inputs, use_cache=False).logits
        assert torch.equal(logits, model(**inputs).logits)
        assert not torch.equal(logits, make_model(seed=1)(**inputs).logits)


@torch.no_grad()
def test_program_with_a_growing_cache_gives_the_same_bits():
    register_dynamic_cache_export_support()
    model = make_model()
    inputs = {**make_inputs(2, 9, has_mask=True), CACHE_NAME: DynamicCache(config=model.config)}
    program = torch.export.export(model, (), inputs, strict=False)
    expected = model(**make_inputs(2, 9, has_mask=True))
    outputs = program.module()(**inputs)
    assert torch.equal(outputs.logits, expected.logits)
    for layer, expected_layer in zip(outputs[CACHE_NAME].layers, expected[CACHE_NAME].layers, strict=True):
        assert torch.equal(layer.keys, expected_layer.keys)


@torch.no_grad()
def test_program_with_a_static_cache_generates_the_same_tokens():
    model = make_model()
    prompt = make_batch(1, 3)[0]
    expected = model.generate(prompt, max_new_tokens=29, do_sample=False)
    model.generation_config.cache_implementation = "static"
    recipe = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=32)
    step = recipe.export(input_ids=prompt[:, :1], cache_position=torch.tensor([0]), strict=False).module()
    tokens = prompt
    for position in range(31):
        logits = step(input_ids=tokens[:, position : position + 1], cache_position=torch.tensor([position]))
        if position >= prompt.shape[1] - 1:
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(tokens, expected)
