"""ONNX Runtime on every fixture and every kind of model: minutes, so only `make exports` runs it."""

import re

import numpy as np
import pytest
import torch

from hugging_nano_gpt import NanoGPTConfig, NanoGPTLMHeadModel, export_model, export_onnx
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

from ..helpers.graphs import assert_close, find_differences, make_padded_batch, read_graph
from ..helpers.members import MEMBERS
from ..helpers.tiny import FIXTURES_DIR, MODEL_ARGS, compute_logits, make_batch, make_model

pytestmark = pytest.mark.slow
for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name)

from ..helpers.runtime import Runtime  # noqa: E402  # after the check that it can be imported

PROMPTS = """
First Citizen:|All:|ROMEO:|JULIET:|KING RICHARD III:|HENRY BOLINGBROKE:|What|O, the|The king|My lord,|I am|To be, or
Where is|Now,|And then|Good night|Thou art|a|Z|But soft, what light through yonder window breaks?
"""


def check_numbers(model, folder):
    """Checks logits at lengths that were not recorded, with padding and with a cache, and greedy tokens."""
    runtime, block_size = Runtime(folder), model.config.block_size
    idx, mask = make_padded_batch(3, block_size - 4)
    idx, is_token = idx % model.config.vocab_size, mask.bool().numpy()
    expected = compute_logits(model, idx, mask)
    assert_close(runtime.compute(idx.numpy(), mask.numpy())[is_token], expected[is_token])
    runtime.start(3)
    pieces = [runtime.read(idx[:, a:b].numpy(), mask[:, :b].numpy()) for a, b in ((0, 7), (7, 8), (8, idx.shape[1]))]
    assert_close(np.concatenate(pieces, axis=1)[is_token], expected[is_token])
    assert_close(runtime.compute(idx[:1, :5].numpy()), compute_logits(model, idx[:1, :5]))
    prompt, mask, count = idx[:2, :6], mask[:2, :6], block_size - 6
    tokens = model.generate(
        prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert np.array_equal(runtime.generate(prompt.numpy(), count, mask.numpy()), tokens.numpy())


@pytest.mark.parametrize("name", [*MEMBERS, "llmc/gpt2_tiny_bf16.bin"])
def test_every_fixture_computes_the_same(name, tmp_path):
    options = MEMBERS.get(name, ({}, None, None))[0]
    model = export_model(FIXTURES_DIR / name, tmp_path / "out", to="onnx", **options).model.float()
    assert not find_differences(read_graph(tmp_path / "out"), model)
    check_numbers(model, tmp_path / "out")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("activation_function", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_each_kind_of_model_computes_the_same(bias, is_tied, activation_function, tmp_path):
    config = NanoGPTConfig(
        **MODEL_ARGS | {"bias": bias}, tie_word_embeddings=is_tied, activation_function=activation_function
    )
    model = NanoGPTLMHeadModel(config).eval()
    model.load_state_dict(make_model(bias=bias).state_dict())
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)  # of both where they are tied
    export_onnx(model, tmp_path / "out")
    assert not find_differences(read_graph(tmp_path / "out"), model)
    check_numbers(model, tmp_path / "out")
    for block in model.transformer.h:
        block.mlp.act = torch.nn.SiLU()
    idx = make_batch(2, 9)[0]
    assert np.abs(Runtime(tmp_path / "out").compute(idx.numpy()) - compute_logits(model, idx).numpy()).max() > 0.1


def test_greedy_tokens_of_the_demo_are_those_of_generate(tmp_path):
    conversion = export_model(CKPT_PATH, tmp_path / "out", to="onnx", meta_path=META_PATH)
    runtime, prompts = Runtime(tmp_path / "out"), re.split(r"[|\n]", PROMPTS.strip())
    assert len(prompts) == 20
    for prompt in prompts:
        idx = torch.tensor([conversion.tokenizer(prompt).input_ids])
        count = conversion.model.config.block_size - idx.shape[1]
        tokens = conversion.model.generate(idx, max_new_tokens=count, do_sample=False)
        assert np.array_equal(runtime.generate(idx.numpy(), count), tokens.numpy())


def test_float16_is_rounded_as_float16_is(tmp_path):
    model = make_model().half()
    export_onnx(model, tmp_path / "out")
    assert not find_differences(read_graph(tmp_path / "out"), model)
    idx = make_batch(2, 20)[0]
    logits = Runtime(tmp_path / "out").compute(idx.numpy())
    assert logits.dtype == np.float16
    ours, exact = compute_logits(model, idx).float().numpy(), compute_logits(model.float(), idx).numpy()
    assert np.abs(logits - exact).max() < 3 * np.abs(ours - exact).max()
