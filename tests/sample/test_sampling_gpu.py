"""Sampling like sample.py on a GPU, tested without one: autocast, TF32, the whole window for each token."""

import pytest
import torch
import torch.nn.functional as F

from hugging_nano_gpt import NanoGPTLMHeadModel
from hugging_nano_gpt.convert.source import load_source
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH
from hugging_nano_gpt.sample.sampling import Sampler, make_sampler

from ..helpers.tiny import make_batch, make_model

DTYPE = torch.bfloat16


@torch.no_grad()
def sample_in_bfloat16(model, idx, count, top_k):
    """Samples like nanoGPT's generate under autocast, where logits are bfloat16 until the softmax."""
    for _ in range(count):
        with torch.autocast("cpu", dtype=DTYPE):
            logits = model(idx[:, -model.config.block_size :], logits_to_keep=1, use_cache=False).logits[:, -1]
        assert logits.dtype == DTYPE
        logits = logits / 0.8
        logits[logits < torch.topk(logits, top_k).values[:, [-1]]] = -torch.inf
        idx = torch.cat([idx, torch.multinomial(F.softmax(logits.float(), dim=-1), 1)], dim=1)
    return idx


@pytest.mark.parametrize("seed", range(4))
def test_under_autocast_the_samples_are_those_of_bfloat16_logits(seed):
    model = make_model()
    idx, _ = make_batch(1, 4)
    torch.manual_seed(seed)
    expected = sample_in_bfloat16(model, idx, 60, top_k=20)  # past block_size
    found = []
    torch.manual_seed(seed)
    Sampler(model, None, DTYPE).draw(idx, max_new_tokens=60, temperature=0.8, top_k=20, streamer=Collect(found))
    assert found == expected[0].tolist()


class Collect:
    """A streamer that collects the tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def put(self, value):
        self.tokens.extend(value.flatten().tolist())

    def end(self):
        pass


@pytest.mark.parametrize(
    ("device", "is_supported", "dtype", "expected"),
    [
        ("cuda", True, None, torch.bfloat16),
        ("cuda", False, None, torch.float16),
        ("cuda", True, torch.float32, None),
        ("cpu", True, None, None),
        ("mps", True, None, None),
    ],
)
def test_autocast_is_sample_pys(monkeypatch, device, is_supported, dtype, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: is_supported)
    monkeypatch.setattr(NanoGPTLMHeadModel, "to", lambda model, device: model)
    monkeypatch.setattr(NanoGPTLMHeadModel, "device", torch.device(device))
    source = load_source(CKPT_PATH, meta_path=META_PATH, device=torch.device(device), dtype=dtype or "auto")
    assert make_sampler(source, is_autocast=dtype is None).autocast_dtype == expected


@pytest.mark.parametrize("was_on", [False, True], ids=["off", "on by Trainer"])
@pytest.mark.parametrize("device", ["cuda", "cpu", "mps"])
def test_tf32_is_on_while_a_gpu_samples_and_restored_afterwards(monkeypatch, device, was_on):
    seen = []
    switch, name = torch.backends.cuda.matmul, "allow_tf32"
    off, on = False, True
    if hasattr(switch, "fp32_precision"):  # since torch 2.9
        name, off, on = "fp32_precision", "none", "tf32"
    before = getattr(switch, name)
    setattr(switch, name, on if was_on else off)
    monkeypatch.setattr(NanoGPTLMHeadModel, "generate", lambda *args, **kwargs: seen.append(getattr(switch, name)))
    monkeypatch.setattr(NanoGPTLMHeadModel, "device", torch.device(device))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: torch.no_grad())  # it would need the GPU
    try:
        Sampler(make_model(), None).draw(torch.zeros(1, 1), max_new_tokens=1, temperature=1.0, top_k=0)
        assert getattr(switch, name) == (on if was_on else off)
    finally:
        setattr(switch, name, before)
    assert seen == [on if device == "cuda" or was_on else off]
