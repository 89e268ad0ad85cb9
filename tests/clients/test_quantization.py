"""Models quantized by torchao and bitsandbytes on the CPU: the tied head stays tied, and perplexity hardly changes."""

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from hugging_nano_gpt import ConversionError, NanoGPTLMHeadModel
from hugging_nano_gpt.demo import CKPT_PATH

from ..helpers.tiny import make_batch, make_model

pytestmark = [
    # PEFT reads a property of the model that newer Transformers have renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # bitsandbytes warns at each product that it computes in float16.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
]


def make_torchao_int8():
    torchao = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(torchao.Int8WeightOnlyConfig())


def make_bitsandbytes_int8():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def make_bitsandbytes_nf4():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


KINDS = [make_torchao_int8, make_bitsandbytes_int8, make_bitsandbytes_nf4]
all_kinds = pytest.mark.parametrize("make_config", KINDS, ids=lambda make: make.__name__.removeprefix("make_"))


@pytest.fixture(scope="module")
def text():
    """Tokens (8, 128) that the demo model generated after a newline."""
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    torch.manual_seed(1337)
    return model.generate(torch.zeros(8, 1, dtype=torch.long), max_new_tokens=127, do_sample=True)


@torch.no_grad()
def compute_perplexity(model, text):
    return model(text, labels=text).loss.exp().item()


def load_toy(folder, **kwargs):
    """Saves and loads a toy model of width 64: on a CPU, bitsandbytes 0.50 is wrong for other widths with 4 bits."""
    make_model(n_embd=64).save_pretrained(folder)
    return NanoGPTLMHeadModel.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize(("make_config", "share"), [(make_torchao_int8, 0.002), (make_bitsandbytes_int8, 0.004)])
def test_quantised_demo_model_costs_little_perplexity(make_config, share, text):
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    expected = compute_perplexity(model, text)
    quantised = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH, quantization_config=make_config())
    found = compute_perplexity(quantised, text)
    assert found != expected
    assert found < expected * (1 + share)  # measured: 3.966 to 3.971 and 3.975


@all_kinds
def test_head_and_embedding_stay_one_float_matrix(make_config, tmp_path):
    model = load_toy(tmp_path, quantization_config=make_config())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert type(model.lm_head.weight) is torch.nn.Parameter
    assert model.lm_head.weight.dtype == torch.float32
    layer = model.transformer.h[0].attn.c_attn
    assert type(layer.weight) is not torch.nn.Parameter


@all_kinds
def test_quantised_model_generates_past_block_size(make_config, tmp_path):
    model = load_toy(tmp_path, quantization_config=make_config())
    assert model.generate(make_batch(1, 5)[0], max_new_tokens=40, do_sample=False).shape == (1, 45)


@all_kinds
def test_quantised_model_is_saved_and_loaded(make_config, tmp_path):
    model = load_toy(tmp_path / "toy", quantization_config=make_config())
    model.save_pretrained(tmp_path / "saved")
    loaded = NanoGPTLMHeadModel.from_pretrained(tmp_path / "saved")
    ids, _ = make_batch(2, 32)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


@all_kinds
def test_quantised_model_is_refused_on_the_way_back(make_config, tmp_path):
    model = load_toy(tmp_path / "toy", quantization_config=make_config())
    with pytest.raises(ConversionError, match=r"ckpt.pt: expected floating-point layers, got quantised ones"):
        model.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    assert not (tmp_path / "ckpt.pt").exists()


@pytest.mark.parametrize("with_head", [True, False])
def test_model_quantised_in_place_is_refused_and_keeps_its_embedding(with_head, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    model = make_model()
    ids, _ = make_batch(2, 32)
    expected, embedding = model(ids).logits, model.transformer.wte.weight.clone()

    def is_chosen(module, name):
        return isinstance(module, torch.nn.Linear) and (with_head or name != "lm_head")

    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=is_chosen)
    assert (model.lm_head.weight is model.transformer.wte.weight) is not with_head
    assert torch.equal(model.transformer.wte.weight, embedding)
    assert 0 < (model(ids).logits - expected).abs().max() < 1
    with pytest.raises(ConversionError, match=r"got quantised ones at 'transformer\.h\.0\.attn\.c_attn\.weight'"):
        model.to_nanogpt_ckpt(tmp_path / "ckpt.pt")


@all_kinds
def test_adapter_trained_on_a_quantised_base_merges_into_the_float_model(make_config, tmp_path):
    peft = pytest.importorskip("peft")
    model = load_toy(tmp_path / "toy", quantization_config=make_config())
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    ids, _ = make_batch(4, 32)
    losses = []
    for _ in range(15):
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    adapted.save_pretrained(tmp_path / "adapter")

    base = NanoGPTLMHeadModel.from_pretrained(tmp_path / "toy")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    merged.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    loss = NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt")(ids, labels=ids).loss.item()
    assert loss < losses[0] - 1
