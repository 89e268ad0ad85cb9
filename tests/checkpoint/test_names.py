"""checkpoint/state_dict.py: prefixes of wrappers and mask buffers are removed, and nothing that looks alike."""

import re

import pytest
import torch

from hugging_nano_gpt import CheckpointError, read_checkpoint

from ..helpers.comparison import assert_same
from ..helpers.contents import save
from ..helpers.tiny import FIXTURES_DIR

LN = "transformer.h.1.ln_1.weight"


RENAMES = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "ddp": lambda name: f"module.{name}",
    "compiled ddp": lambda name: f"_orig_mod.module.{name}",
    "ddp compiled": lambda name: f"module._orig_mod.{name}",
    "fabric": lambda name: f"_forward_module.{name}",
    "compiled block": lambda name: name.replace("transformer.h.0.", "transformer.h.0._orig_mod."),
    "checkpointed block": lambda name: name.replace("transformer.h.1.", "transformer.h.1._checkpoint_wrapped_module."),
    "fsdp attention": lambda name: name.replace(".attn.", ".attn._fsdp_wrapped_module."),
    "all": lambda name: f"_fsdp_wrapped_module.{name}".replace(".h.0.", ".h.0._fsdp_wrapped_module._orig_mod."),
}


@pytest.mark.parametrize("wrapper", RENAMES)
def test_read_parts_of_wrappers_are_removed_from_names(contents, tmp_path, wrapper):
    plain = contents["model"]
    contents["model"] = {RENAMES[wrapper](name): tensor for name, tensor in plain.items()}
    assert_same(read_checkpoint(save(contents, tmp_path)).state_dict, plain)


@pytest.mark.parametrize("front", ["", "_orig_mod.", "module."])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod_.", "orig_mod.", "fsdp_wrapped_module."])
def test_read_wrapper_prefix_inside_a_name_is_kept_and_refused(contents, tmp_path, prefix, front):
    name = LN.replace("ln_1", f"{prefix}ln_1")
    contents["model"][front + name] = contents["model"].pop(LN)
    with pytest.raises(CheckpointError, match=rf"missing '{LN}'.* got unknown '{re.escape(name)}'"):
        read_checkpoint(save(contents, tmp_path))


@pytest.mark.parametrize("again", [f"_orig_mod.{LN}", LN.replace("ln_1", "_orig_mod.ln_1")])
def test_read_name_twice_after_stripping_is_refused(contents, tmp_path, again):
    contents["model"][again] = contents["model"][LN] + 1
    with pytest.raises(CheckpointError, match=f"each tensor once, got '{LN}' again as '{re.escape(again)}'"):
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


@pytest.mark.parametrize("is_bare", [False, True])
def test_tied_head_that_is_left_out_is_the_embedding(contents, tmp_path, is_bare):
    del contents["model"]["lm_head.weight"]
    path = save(contents["model"] if is_bare else contents, tmp_path)
    checkpoint = read_checkpoint(path, n_head=4)
    assert checkpoint.tie_word_embeddings
    assert checkpoint.state_dict["lm_head.weight"] is checkpoint.state_dict["transformer.wte.weight"]
    assert any("lm_head tied" in text for text in checkpoint.assumptions)


@pytest.mark.parametrize("folder", ["nanogpt-2022-12-28-fe804286/ckpt.pt", "mingpt/model.pt"])
def test_head_that_was_not_tied_then_is_not_left_out(tmp_path, folder):
    whole = torch.load(FIXTURES_DIR / folder, weights_only=True)
    del whole.get("model", whole)["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"missing 'lm_head.weight'"):
        read_checkpoint(save(whole, tmp_path), n_head=4)
