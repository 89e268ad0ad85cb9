"""A nanoGPT model in memory becomes a Transformers model that shares its tensors, with or without wrappers."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hugging_nano_gpt import ConversionError, NanoGPTLMHeadModel

from ..helpers.reference import ReferenceGPT
from ..helpers.scripts import NANOGPT_DIR, skip_without_nanogpt
from ..helpers.tiny import MODEL_ARGS, make_batch


class Wrapper(nn.Module):
    """Contains a module, like DDP."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def make_gpt(**changes):
    args = {**MODEL_ARGS, "dropout": 0.2, **changes}
    gpt = ReferenceGPT(**args)
    gpt.config = SimpleNamespace(**args)
    return gpt.train()


WRAPPERS = {"bare": lambda gpt: gpt, "compiled": torch.compile, "ddp": lambda gpt: Wrapper(torch.compile(gpt))}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # warnings of torch's compiler
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_model_shares_the_tensors_of_the_gpt(wrap, bias):
    gpt = make_gpt(bias=bias)
    before = torch.get_rng_state()
    model = NanoGPTLMHeadModel.from_nanogpt(wrap(gpt))
    assert torch.equal(torch.get_rng_state(), before)
    assert [id(p) for p in model.parameters()] == [id(p) for p in gpt.parameters()]
    assert model.lm_head.weight is model.transformer.wte.weight is gpt.lm_head.weight
    assert (model.training, gpt.training, model.config.dropout) == (False, True, 0.2)


def test_what_the_gpt_learns_the_model_knows():
    gpt, (idx, targets) = make_gpt(), make_batch(2, 16)
    model = NanoGPTLMHeadModel.from_nanogpt(gpt)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=0.1)
    gpt(idx, targets)[1].backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(model(idx).logits, gpt.eval()(idx)[0])
    tokens = model.generate(idx[:1, :4], max_new_tokens=40, do_sample=False)
    assert torch.equal(tokens, gpt.generate_greedily(idx[:1, :4], 40))


def test_frozen_parameters_stay_so():
    gpt = make_gpt()
    gpt.transformer["wpe"].weight.requires_grad_(False)
    NanoGPTLMHeadModel.from_nanogpt(gpt)
    assert not gpt.transformer["wpe"].weight.requires_grad


def test_model_is_saved_and_loaded_as_any_other(tmp_path):
    model = NanoGPTLMHeadModel.from_nanogpt(make_gpt())
    model.save_pretrained(tmp_path)
    model.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    for loaded in (
        NanoGPTLMHeadModel.from_pretrained(tmp_path),
        NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt"),
    ):
        assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())


def test_other_models_are_refused():
    with pytest.raises(ConversionError, match=r"^Linear: not a nanoGPT model: expected a config with n_layer, "):
        NanoGPTLMHeadModel.from_nanogpt(nn.Linear(2, 2))
    changed = make_gpt()
    changed.extra = nn.Linear(2, 2)
    with pytest.raises(ConversionError, match=r"other parameters than nanoGPT's: .*'extra\.bias', 'extra\.weight'"):
        NanoGPTLMHeadModel.from_nanogpt(changed)
    narrow = make_gpt()
    narrow.config.n_embd = 16
    with pytest.raises(
        ConversionError, match=r"wte\.weight: expected shape \(65, 16\), as its config says, got \(65, 32\)"
    ):
        NanoGPTLMHeadModel.from_nanogpt(narrow)


@pytest.mark.nanogpt
@skip_without_nanogpt
def test_nanogpts_own_model_is_taken(monkeypatch):
    monkeypatch.syspath_prepend(NANOGPT_DIR)
    monkeypatch.delitem(sys.modules, "model", raising=False)
    import model as nanogpt

    gpt = nanogpt.GPT(nanogpt.GPTConfig(**MODEL_ARGS)).eval()
    idx, targets = make_batch(2, 16)
    with torch.no_grad():
        assert torch.equal(NanoGPTLMHeadModel.from_nanogpt(gpt)(idx).logits, gpt(idx, targets)[0])
