"""PEFT: adapters on our layers are saved, loaded and merged, and merged models are written in nanoGPT's format."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hugging_nano_gpt import (
    ConversionError,
    NanoGPTConfig,
    NanoGPTForSequenceClassification,
    NanoGPTLMHeadModel,
    read_checkpoint,
)
from hugging_nano_gpt.demo import CKPT_PATH

from ..helpers.tiny import MODEL_ARGS, make_batch, make_model

peft = pytest.importorskip("peft")

# PEFT reads a property of the model that newer Transformers have renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Base and update are added before the product instead of after it: float32 logits of size 10 differed by 1e-5.
TOLERANCE = {"rtol": 0, "atol": 1e-4}


def adapt(model, **settings):
    """Adds LoRA to a model, with random weights instead of zeros."""
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False, **settings}
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()


def list_adapted(model):
    return {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_all_linear_is_every_projection_and_not_the_head(tie_word_embeddings):
    model = NanoGPTLMHeadModel(NanoGPTConfig(**MODEL_ARGS, tie_word_embeddings=tie_word_embeddings))
    expected = {
        f"base_model.model.transformer.h.{layer}.{name}"
        for layer in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert list_adapted(adapt(model)) == expected


def test_all_linear_is_every_projection_of_a_classifier_and_not_its_score():
    model = NanoGPTForSequenceClassification(NanoGPTConfig(**MODEL_ARGS, num_labels=3))
    adapted = adapt(model, task_type="SEQ_CLS")
    assert len(list_adapted(adapted)) == 8
    assert not [name for name in list_adapted(adapted) if "score" in name]
    assert adapted.base_model.model.score.modules_to_save.default.weight.requires_grad


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"target_modules": ["c_attn", "c_fc"], "bias": "all"}])
def test_merged_model_goes_to_nanogpt_and_back(tmp_path, settings):
    model = make_model()
    ids, _ = make_batch(2, 32)
    before = model(ids).logits
    adapted = adapt(model, **settings)
    expected = adapted(ids).logits
    assert (expected - before).abs().max() > 1
    merged = adapted.merge_and_unload()
    assert type(merged) is NanoGPTLMHeadModel
    assert merged.lm_head.weight is merged.transformer.wte.weight
    torch.testing.assert_close(merged(ids).logits, expected, **TOLERANCE)
    merged.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    assert torch.equal(NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt")(ids).logits, merged(ids).logits)


def test_merged_weights_are_base_plus_update(tmp_path):
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = adapt(model, r=4, lora_alpha=12)
    updates = {}
    for name in list_adapted(adapted):
        layer = adapted.get_submodule(name)
        update = 12 / 4 * layer.lora_B.default.weight.detach() @ layer.lora_A.default.weight.detach()
        updates[f"{name.removeprefix('base_model.model.')}.weight"] = update
    adapted.merge_and_unload().to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    written = read_checkpoint(tmp_path / "ckpt.pt")
    assert len(updates) == 12
    for name, tensor in written.state_dict.items():
        if name in updates:
            torch.testing.assert_close(tensor, base[name] + updates[name], rtol=0, atol=1e-6)
            assert (tensor - base[name]).abs().max() > 1e-2
        else:
            assert torch.equal(tensor, base[name])
    assert written.training_state.iter_num == 5000


def test_adapter_is_saved_alone_and_loads_onto_its_base(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    adapted = adapt(NanoGPTLMHeadModel.from_pretrained(tmp_path / "base"))
    adapted.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    ids, _ = make_batch(2, 32)
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
    assert torch.equal(loaded(ids).logits, adapted(ids).logits)
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")  # which records its base's folder
    assert torch.equal(automatic(ids).logits, adapted(ids).logits)


def wrap_by_peft(model):
    return adapt(model)


def wrap_by_transformers(model):
    """Does what model.add_adapter does, which refuses PEFT before 0.22 from Transformers 5.24 on."""
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules="all-linear"), model)


def wrap_merged(model):
    adapted = adapt(model)
    adapted.merge_adapter()  # merged, but still wrapped
    return adapted


def wrap_head(model):
    return adapt(model, target_modules=["c_attn"], modules_to_save=["ln_f"])


@pytest.mark.parametrize("wrap", [wrap_by_peft, wrap_by_transformers, wrap_merged, wrap_head])
def test_model_with_an_adapter_is_refused(tmp_path, wrap):
    wrapped = wrap(make_model())
    with pytest.raises(ConversionError, match=r"got PEFT's at '.*c_attn'.*merge the adapter first.*nothing was writ"):
        wrapped.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    assert not (tmp_path / "ckpt.pt").exists()


def test_plain_trainer_trains_an_adapter_and_nothing_else(tmp_path):
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = adapt(model, init_lora_weights=True).train()
    ids, _ = make_batch(8, 64)
    settings = {"max_steps": 20, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), **settings, report_to="none", disable_tqdm=True, use_cpu=True)
    trainer = Trainer(adapted, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    kept = adapted.unload().state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in base.items())
