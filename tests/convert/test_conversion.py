"""from_nanogpt_ckpt and to_nanogpt_ckpt: complete files become complete models, and back."""

import importlib

import pytest
import torch
from safetensors.torch import load_file

from hugging_nano_gpt import (
    CheckpointError,
    ConversionError,
    NanoGPTConfig,
    NanoGPTForSequenceClassification,
    NanoGPTLMHeadModel,
    NanoGPTModel,
    read_checkpoint,
)
from hugging_nano_gpt.demo import CKPT_PATH, DEMO_DIR, GOLDEN_TOLERANCE

from ..helpers.tiny import FIXTURES_DIR, MODEL_ARGS, make_batch, make_model

# Today's format; tests/checkpoint/test_family.py has the others.
TODAYS = ("nanogpt-2023-06-14-f08abb45", "nanogpt-head-compiled", "nanogpt-head-nobias")
FOLDERS = [DEMO_DIR, *(FIXTURES_DIR / name for name in TODAYS)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_loaded_model_gives_upstream_logits(folder):
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(folder / "ckpt.pt")
    golden = load_file(folder / "golden.safetensors")
    outputs = model(golden["idx"], shift_labels=golden.get("targets"))
    # Upstream ran on another machine: float32 sums in another order. The demo's logits, of size 12, are 1.3e-5 off on
    # a CPU without AVX512 and 9e-3 off with the tanh GELU; the toy models' 6e-6 and at least 1e-4.
    atol = GOLDEN_TOLERANCE if folder == DEMO_DIR else 1e-5
    torch.testing.assert_close(outputs.logits, golden["logits"], rtol=0, atol=atol)
    if "loss" in golden:
        torch.testing.assert_close(outputs.loss, golden["loss"].reshape(()), rtol=0, atol=1e-5)


def test_golden_logits_with_two_layers_swapped_differ():
    """Shows that the comparison with upstream can fail."""
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    golden = load_file(DEMO_DIR / "golden.safetensors")
    state_dict = model.state_dict()
    for name in [name for name in state_dict if ".h.0." in name]:
        other = name.replace(".h.0.", ".h.1.")
        state_dict[name], state_dict[other] = state_dict[other].clone(), state_dict[name].clone()
    model.load_state_dict(state_dict)
    assert (model(golden["idx"]).logits - golden["logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_round_trip_keeps_every_key_and_bit(folder, tmp_path):
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(folder / "ckpt.pt")
    model.to_nanogpt_ckpt(tmp_path / "out" / "ckpt.pt")
    first, second = read_checkpoint(folder / "ckpt.pt"), read_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert list(first.state_dict) == list(second.state_dict)
    assert all(torch.equal(first.state_dict[name], second.state_dict[name]) for name in first.state_dict)
    assert first.model_args == second.model_args
    for name in ("iter_num", "best_val_loss", "config"):
        assert getattr(first.training_state, name) == getattr(second.training_state, name)
    again = NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "out" / "ckpt.pt").state_dict()
    assert all(torch.equal(first.state_dict[name], again[name]) for name in first.state_dict)


def test_loaded_model_is_ready_and_remembers_its_origin():
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    assert not model.training
    assert model.dtype is torch.float32
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.name_or_path == model.config.name_or_path == str(CKPT_PATH)
    assert model.nanogpt_training_state.iter_num == 5000
    assert model.nanogpt_training_state.config["dataset"] == "shakespeare_char"
    assert model.nanogpt_training_state.optimizer is None
    assert {name: getattr(model.config, name) for name in MODEL_ARGS} == read_checkpoint(CKPT_PATH).model_args


def test_loaded_model_is_independent_of_the_file(tmp_path):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(CKPT_PATH.read_bytes())
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(path)
    idx, _ = make_batch(1, 8)
    expected = model(idx).logits
    with path.open("r+b") as file:  # as train.py does when it saves again
        file.truncate(0)
    assert torch.equal(model(idx).logits, expected)


def test_dtype_argument_converts_and_default_keeps(tmp_path):
    assert NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH, dtype=torch.bfloat16).dtype is torch.bfloat16
    make_model().to(torch.float16).to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    assert NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt").dtype is torch.float16


def test_config_arguments_take_the_place_of_the_checkpoints():
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(
        CKPT_PATH, dropout=0.2, activation_function="gelu_new", pad_token_id=3, attn_implementation="eager"
    )
    assert (model.config.dropout, model.config.activation_function, model.config.pad_token_id) == (0.2, "gelu_new", 3)
    assert model.transformer.h[0].mlp.dropout.p == 0.2
    assert model.config._attn_implementation == "eager"


def test_shape_argument_is_refused():
    with pytest.raises(ConversionError, match=r"ckpt.pt: 'n_layer' cannot be set: expected .*\[3\], got \[4\]; leave"):
        NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH, n_layer=4)


def test_base_and_classifier_load_the_same_transformer():
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    base = NanoGPTModel.from_nanogpt_ckpt(CKPT_PATH)
    classifier = NanoGPTForSequenceClassification.from_nanogpt_ckpt(CKPT_PATH, num_labels=1)
    idx, _ = make_batch(1, 8)
    hidden = model.transformer(idx).last_hidden_state
    assert torch.equal(base(idx).last_hidden_state, hidden)
    assert torch.equal(classifier.transformer(idx).last_hidden_state, hidden)
    assert classifier.score.weight.shape == (1, 96)


def test_gpt2_vocabulary_starts_and_ends_at_end_of_text(tmp_path):
    model = NanoGPTLMHeadModel(NanoGPTConfig(**{**MODEL_ARGS, "vocab_size": 50304, "n_embd": 8}))
    model.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    loaded = NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt")
    assert (loaded.generation_config.bos_token_id, loaded.generation_config.eos_token_id) == (50256, 50256)


def test_fresh_model_writes_nanogpts_starting_state(tmp_path):
    model = NanoGPTLMHeadModel(NanoGPTConfig(**MODEL_ARGS))
    model.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    contents = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert set(contents) == {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
    assert contents["model_args"] == MODEL_ARGS
    assert (contents["iter_num"], contents["best_val_loss"], contents["config"]) == (0, 1e9, {})
    assert type(contents["best_val_loss"]) is float
    head, embedding = contents["model"]["lm_head.weight"], contents["model"]["transformer.wte.weight"]
    assert head.data_ptr() == embedding.data_ptr()


def test_written_optimizer_loads_into_nanogpts_groups(tmp_path):
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    model.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)["optimizer"]
    original = torch.load(CKPT_PATH, weights_only=True)["optimizer"]
    assert [group["params"] for group in state["param_groups"]] == [g["params"] for g in original["param_groups"]]
    assert state["state"] == {}
    for ours, theirs in zip(state["param_groups"], original["param_groups"], strict=True):
        assert ours.keys() <= theirs.keys()  # torch 2.6 lacks one setting of the torch that wrote the file
        assert (ours["betas"], ours["weight_decay"]) == (theirs["betas"], theirs["weight_decay"])
    groups = [[p for p in model.parameters() if p.ndim >= 2], [p for p in model.parameters() if p.ndim < 2]]
    torch.optim.AdamW([{"params": group} for group in groups]).load_state_dict(state)


@pytest.mark.parametrize("is_by_name", [True, False])
def test_given_training_state_is_written(tmp_path, is_by_name):
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    named = read_checkpoint(CKPT_PATH).training_state.optimizer
    optimizer = named if is_by_name else torch.load(CKPT_PATH, weights_only=True)["optimizer"]
    model.to_nanogpt_ckpt(
        tmp_path / "ckpt.pt",
        optimizer=optimizer,
        iter_num=6000,
        best_val_loss=torch.tensor(1.5),
        config={"dataset": "x"},
    )
    state = read_checkpoint(tmp_path / "ckpt.pt").training_state
    assert (state.iter_num, state.best_val_loss, state.config) == (6000, 1.5, {"dataset": "x"})
    for name, moments in named.moments.items():
        assert all(torch.equal(moments[key], state.optimizer.moments[name][key]) for key in moments)


def test_foreign_optimizer_is_refused_and_nothing_written(tmp_path):
    optimizer = torch.load(CKPT_PATH, weights_only=True)["optimizer"]
    optimizer["state"][0]["exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(ConversionError, match=r"ckpt.pt: optimizer: expected nanoGPT's AdamW .*nothing was written"):
        NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH).to_nanogpt_ckpt(tmp_path / "ckpt.pt", optimizer=optimizer)
    assert not list(tmp_path.iterdir())


def test_untied_model_is_refused_unless_its_matrices_are_equal(tmp_path):
    model = NanoGPTLMHeadModel(NanoGPTConfig(**MODEL_ARGS, tie_word_embeddings=False))
    with pytest.raises(ConversionError, match=r"lm_head\.weight: expected the numbers of transformer\.wte\.weight"):
        model.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.transformer.wte.weight)
    model.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    assert NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt").config.tie_word_embeddings


def test_tanh_model_is_written_with_a_warning(tmp_path, caplog):
    model = make_model()
    model.config.activation_function = "gelu_new"
    importlib.import_module("transformers.utils.logging").enable_propagation()
    try:
        model.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    finally:
        importlib.import_module("transformers.utils.logging").disable_propagation()
    assert "'gelu_new', today's nanoGPT exact GELU" in caplog.text


def test_resized_vocabulary_survives_the_way_back(tmp_path):
    model = make_model()
    model.resize_token_embeddings(80, mean_resizing=False)
    model.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    loaded = NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt")
    assert loaded.config.vocab_size == 80
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_unreadable_path_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a file, got a directory; give the path of a checkpoint file"):
        NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path)
