"""checkpoint/state_dict.py: prefixes of wrappers and mask buffers are removed, and nothing that looks alike."""

import re

import pytest
import torch

from hugging_nano_gpt import CheckpointError, read_checkpoint

from ..conftest import assert_same, save

LN = "transformer.h.1.ln_1.weight"


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_read_wrapper_prefix_is_stripped(contents, tmp_path, prefix):
    plain = contents["model"]
    contents["model"] = {prefix + name: tensor for name, tensor in plain.items()}
    assert_same(read_checkpoint(save(contents, tmp_path)).state_dict, plain)


@pytest.mark.parametrize("front", ["", "_orig_mod.", "module."])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod_.", "orig_mod.", "fsdp_wrapped_module."])
def test_read_wrapper_prefix_inside_a_name_is_kept_and_refused(contents, tmp_path, prefix, front):
    name = LN.replace("ln_1", f"{prefix}ln_1")
    contents["model"][front + name] = contents["model"].pop(LN)
    with pytest.raises(CheckpointError, match=rf"missing '{LN}'.* got unknown '{re.escape(name)}'"):
        read_checkpoint(save(contents, tmp_path))


def test_read_name_twice_after_stripping_is_refused(contents, tmp_path):
    contents["model"][f"_orig_mod.{LN}"] = contents["model"][LN] + 1
    with pytest.raises(CheckpointError, match=rf"each tensor once, got '{LN}' again as '_orig_mod\.{LN}'"):
        read_checkpoint(save(contents, tmp_path))


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_read_mask_buffers_are_dropped_and_biases_kept(contents, tmp_path, prefix):
    plain = dict(contents["model"])
    for layer in range(2):
        contents["model"][f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    contents["model"] = {prefix + name: tensor for name, tensor in contents["model"].items()}
    state_dict = read_checkpoint(save(contents, tmp_path)).state_dict
    assert_same(state_dict, plain)
    assert "transformer.h.0.attn.c_attn.bias" in state_dict


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("transformer.h.0.attn.bias", torch.ones(32)),
        ("transformer.h.0.mlp.bias", torch.ones(1, 1, 32, 32)),
        ("transformer.h.0.attn.bias.x", torch.ones(1, 1, 32, 32)),
        ("x.transformer.h.0.attn.bias", torch.ones(1, 1, 32, 32)),
    ],
)
def test_read_buffer_that_is_no_mask_is_refused(contents, tmp_path, name, tensor):
    contents["model"][name] = tensor
    with pytest.raises(CheckpointError, match=f"got unknown '{re.escape(name)}'"):
        read_checkpoint(save(contents, tmp_path))
