"""GPT-2's layout: stock GPT2LMHeadModel computes the same, the way back gives the same bits, the rest is refused."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
from transformers.utils.logging import disable_propagation, enable_propagation

from hugging_nano_gpt import (
    CheckpointError,
    ConversionError,
    NanoGPTConfig,
    NanoGPTLMHeadModel,
    TokenizerError,
    build_character_tokenizer,
    build_tiktoken_tokenizer,
    convert_to_checkpoint,
    convert_to_folder,
    export_gpt2,
    export_model,
    import_gpt2,
    read_checkpoint,
    read_meta,
    verify_models,
)
from hugging_nano_gpt.convert import gpt2 as module
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

from ..helpers.comparison import assert_same
from ..helpers.encodings import make_encoding
from ..helpers.folders import DOCS_DIR
from ..helpers.limits import limit_file_size
from ..helpers.members import MEMBERS
from ..helpers.tiny import FIXTURES_DIR, MODEL_ARGS, compute_logits, make_gpt2, make_model, quantise

# For the order of float32 sums, which the matrix library picks by the layout; docs/gpt2.md has what was measured.
ATOL = 1e-5
DOC = (DOCS_DIR / "gpt2.md").read_text()


def assert_close_logits(left, right):
    torch.testing.assert_close(compute_logits(left), compute_logits(right), rtol=0, atol=ATOL)


def load_stock(folder) -> GPT2LMHeadModel:
    """Loads a folder without this package; every tensor has to be in it, and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is GPT2LMHeadModel
    assert not any(info.values())
    return model


def export_and_load(model, folder, **kwargs) -> GPT2LMHeadModel:
    export_gpt2(model, folder, **kwargs)
    return load_stock(folder)


@pytest.mark.parametrize("name", [*MEMBERS, "llmc/gpt2_tiny_bf16.bin", "demo"])
def test_every_fixture_computes_the_same_and_comes_back_with_the_same_bits(name, tmp_path):
    path, (options, _, _) = FIXTURES_DIR / name, MEMBERS.get(name, ({}, None, None))
    model = export_model(CKPT_PATH if name == "demo" else path, tmp_path / "a", to="gpt2", **options).model
    stock = load_stock(tmp_path / "a")
    assert stock.dtype == model.dtype
    back = import_gpt2(tmp_path / "a")
    assert_same(dict(back.state_dict()), dict(model.state_dict()))
    assert back.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path / "a")}
    assert back.generation_config.to_dict() == model.generation_config.to_dict()
    assert back.nanogpt_training_state == model.nanogpt_training_state
    export_gpt2(back, tmp_path / "b")
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()
    assert_close_logits(stock.float(), model.float())  # float: bfloat16 rounds more than the sums differ


@pytest.mark.parametrize("skipped", module._TRANSPOSED)
def test_skipped_transpose_shows(skipped, tmp_path, monkeypatch):
    """In the logits for attn.c_proj, which is square; for the others already in the shapes."""
    model = make_model()
    monkeypatch.setattr(module, "_TRANSPOSED", tuple(name for name in module._TRANSPOSED if name != skipped))
    if skipped != "attn.c_proj.weight":
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            export_gpt2(model, tmp_path / "out")
        assert not list(tmp_path.iterdir())
        return
    stock = export_and_load(model, tmp_path / "out")
    assert (compute_logits(stock) - compute_logits(model)).abs().max() > 0.1
    assert_same(
        dict(import_gpt2(tmp_path / "out").state_dict()), dict(model.state_dict())
    )  # this alone does not show that the numbers are right


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("activation_function", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_each_kind_of_model_computes_the_same(bias, is_tied, activation_function, tmp_path):
    model = make_model(bias=bias)
    config = NanoGPTConfig(
        **MODEL_ARGS | {"bias": bias}, tie_word_embeddings=is_tied, activation_function=activation_function
    )
    kind = NanoGPTLMHeadModel(config).eval()
    kind.load_state_dict(model.state_dict())
    with torch.no_grad():
        kind.lm_head.weight.mul_(1.5)  # of both where they are tied
    stock = export_and_load(kind, tmp_path / "out")
    assert (stock.lm_head.weight is stock.transformer.wte.weight) is is_tied
    assert stock.config.activation_function == activation_function
    assert_close_logits(stock, kind)
    assert_same(dict(import_gpt2(tmp_path / "out").state_dict()), dict(kind.state_dict()))


def test_wrong_gelu_shows(tmp_path):
    model = make_model()
    export_gpt2(model, tmp_path / "out")
    wrong = GPT2LMHeadModel.from_pretrained(tmp_path / "out", activation_function="gelu_new")
    assert (compute_logits(wrong) - compute_logits(model)).abs().max() > 10 * ATOL


def test_config_has_what_other_programs_read(tmp_path):
    model = make_model(dropout=0.25, block_size=24)
    model.generation_config.update(bos_token_id=3, eos_token_id=[4, 5], suppress_tokens=[63, 64])
    export_gpt2(model, tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"n_ctx": 24, "n_positions": 24, "layer_norm_epsilon": 1e-5, "activation_function": "gelu"}
    expected |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.25)
    expected |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "scale_attn_weights": True}
    assert {name: fields[name] for name in expected} == expected
    assert "auto_map" not in fields
    settings = load_stock(tmp_path / "out").generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.suppress_tokens) == (3, [4, 5], [63, 64])


def test_generation_goes_the_same_way(tmp_path):
    export_model(CKPT_PATH, tmp_path / "out", to="gpt2")
    model, stock = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH), load_stock(tmp_path / "out")
    settings = {"max_new_tokens": 100, "do_sample": False, "pad_token_id": 0}
    idx = torch.tensor([[30, 27, 25]])
    mask = torch.ones_like(idx)
    tokens = [each.generate(idx, attention_mask=mask, **settings) for each in (model, stock)]
    assert torch.equal(*tokens)


def test_imported_model_shares_no_memory_with_its_source():
    gpt2 = make_gpt2()
    model = import_gpt2(gpt2)
    before = compute_logits(model)
    with torch.no_grad():
        for parameter in gpt2.parameters():
            parameter.zero_()
    assert torch.equal(compute_logits(model), before)


@pytest.mark.parametrize("activation_function", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_imported_gpt2_computes_the_same(activation_function, tmp_path):
    gpt2 = make_gpt2(activation_function=activation_function)
    gpt2.save_pretrained(tmp_path / "gpt2")
    for model in (import_gpt2(gpt2), import_gpt2(str(tmp_path / "gpt2"))):
        assert not model.training
        assert_close_logits(model, gpt2)
        assert model.config.activation_function == activation_function
        assert (model.config.dropout, model.config.bias) == (0.1, True)
        assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    stock = export_and_load(model, tmp_path / "back")
    assert_same(dict(stock.state_dict()), dict(gpt2.state_dict()))
    assert stock.config.n_inner is None


def test_gpt2_as_openai_published_it_is_imported(tmp_path):
    """Its files name the tensors without `transformer.`, have the mask as a buffer, and no lm_head."""
    gpt2 = make_gpt2()
    gpt2.save_pretrained(tmp_path)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {f"h.{layer}.attn.bias": torch.ones(32, 32).tril().view(1, 1, 32, 32) for layer in range(2)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = import_gpt2(tmp_path)
    assert_close_logits(model, gpt2)
    assert_same(dict(model.state_dict()), dict(import_gpt2(gpt2).state_dict()))


def test_imported_gpt2_goes_to_nanogpt(tmp_path):
    gpt2 = make_gpt2(activation_function="gelu")
    import_gpt2(gpt2, dropout=0.0).to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt")
    assert model.config.dropout == 0.0
    assert_close_logits(model, gpt2)


def test_commands_take_gpt2_as_they_take_nanogpt(tmp_path):
    export_model(CKPT_PATH, tmp_path / "gpt2", to="gpt2", meta_path=META_PATH)
    conversion = convert_to_folder(tmp_path / "gpt2", tmp_path / "folder", dtype="bfloat16")
    assert (conversion.model.dtype, conversion.model.config.bias) == (torch.bfloat16, False)
    assert conversion.tokenizer.decode(conversion.tokenizer("To be").input_ids) == "To be"
    convert_to_checkpoint(tmp_path / "gpt2", tmp_path / "ckpt.pt")
    before, after = (read_checkpoint(path, with_optimizer=False) for path in (CKPT_PATH, tmp_path / "ckpt.pt"))
    assert_same(dict(after.state_dict), dict(before.state_dict))
    assert after.training_state == before.training_state
    assert verify_models(CKPT_PATH, tmp_path / "gpt2").is_equal
    make_gpt2(n_inner=7).save_pretrained(tmp_path / "odd")
    with pytest.raises(ConversionError, match="n_inner: expected None or 128, got 7"):
        convert_to_checkpoint(tmp_path / "odd", tmp_path / "odd.pt")
    assert not (tmp_path / "odd.pt").exists()


def test_import_takes_what_from_pretrained_takes():
    gpt2 = make_gpt2().to(torch.bfloat16)
    assert import_gpt2(gpt2).dtype == torch.bfloat16
    model = import_gpt2(gpt2, dtype=torch.float32, attn_implementation="eager")
    assert (model.dtype, model.config._attn_implementation) == (torch.float32, "eager")


def test_untied_gpt2_is_imported_untied():
    model = import_gpt2(make_gpt2(tie_word_embeddings=False))
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert_close_logits(model, make_gpt2(tie_word_embeddings=False))


def zero_biases(gpt2):
    with torch.no_grad():
        for name, parameter in gpt2.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    return gpt2


def test_zero_biases_stay_unless_they_are_dropped():
    gpt2 = zero_biases(make_gpt2())
    kept, dropped = import_gpt2(gpt2), import_gpt2(gpt2, bias=False)
    assert (kept.config.bias, dropped.config.bias) == (True, False)
    assert not [name for name in dropped.state_dict() if name.endswith(".bias")]
    for model in (kept, dropped):
        assert_close_logits(model, gpt2)


def test_biases_of_an_export_stay_when_asked_for(tmp_path):
    export_gpt2(make_model(bias=False), tmp_path / "out")
    assert import_gpt2(tmp_path / "out").config.bias is False
    model = import_gpt2(tmp_path / "out", bias=True)
    assert model.config.bias is True
    assert not model.transformer.ln_f.bias.any()


def test_biases_that_were_trained_are_kept_and_told(tmp_path, caplog):
    stock = export_and_load(make_model(bias=False), tmp_path / "out")
    with torch.no_grad():
        stock.transformer.h[1].ln_2.bias[3] = 0.5
    stock.save_pretrained(tmp_path / "trained")
    enable_propagation()
    try:
        model = import_gpt2(tmp_path / "trained")
    finally:
        disable_propagation()
    assert "got other numbers in 'transformer.h.1.ln_2.bias': they were trained since and are kept" in caplog.text
    assert model.config.bias is True
    assert_close_logits(model, stock)
    with pytest.raises(
        ConversionError, match=r"biases cannot be dropped: expected zeros, got .*'transformer.h.1.ln_2"
    ):
        import_gpt2(tmp_path / "trained", bias=False)


REFUSED = {
    "activation_function": ("gelu_fast", "'gelu' or 'gelu_new' or 'gelu_pytorch_tanh'"),
    "add_cross_attention": (True, "False"),
    "layer_norm_epsilon": (1e-6, "1e-05"),
    "n_inner": (64, "None or 128"),
    "reorder_and_upcast_attn": (True, "False"),
    "scale_attn_by_inverse_layer_idx": (True, "False"),
    "scale_attn_weights": (False, "True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_option_without_counterpart_is_refused_by_name(name, tmp_path):
    value, expected = REFUSED[name]
    gpt2 = make_gpt2(**{name: value})
    gpt2.save_pretrained(tmp_path)
    message = re.escape(f"{name}: expected {expected}, got {value!r}")
    for source in (gpt2, tmp_path):
        with pytest.raises(ConversionError, match=message):
            import_gpt2(source)


def test_all_options_are_refused_at_once():
    with pytest.raises(ConversionError) as caught:
        import_gpt2(make_gpt2(**{name: value for name, (value, _) in REFUSED.items()}, attn_pdrop=0.0))
    assert all(f"{name}: expected" in str(caught.value) for name in REFUSED)
    assert "got resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_three_dropouts_become_the_one_that_is_given():
    gpt2 = make_gpt2(embd_pdrop=0.2)
    with pytest.raises(
        ConversionError, match=r"dropouts: expected one for all three, or dropout= instead of them, got"
    ):
        import_gpt2(gpt2)
    assert import_gpt2(gpt2, dropout=0.3).config.dropout == 0.3
    with pytest.raises(ConversionError, match=r"dropout: expected a probability in \[0, 1\), got 2"):
        import_gpt2(gpt2, dropout=2)


def test_quantised_gpt2_is_refused(tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConversionError, match=r"quantization_config: expected None, got \{'quant_method': 'fp8'\}"):
        import_gpt2(tmp_path)


def test_other_models_are_refused(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "nanogpt")
    with pytest.raises(CheckpointError, match=r"not a GPT-2 model: expected model_type 'gpt2' .* 'hugging_nano_gpt'"):
        import_gpt2(tmp_path / "nanogpt")
    with pytest.raises(ConversionError, match="expected a folder, a hub id or a GPT2LMHeadModel, got a NanoGPTLM"):
        import_gpt2(model)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        import_gpt2(tmp_path / "missing")
    shutil.copytree(tmp_path / "nanogpt", tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "gpt2", "n_embd": "wide"}')
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*'n_embd'"):
        import_gpt2(tmp_path / "odd")
    gpt2 = make_gpt2()
    state_dict = {name: tensor for name, tensor in gpt2.state_dict().items() if "h.1.mlp.c_fc" not in name}
    gpt2.save_pretrained(tmp_path / "gpt2", state_dict=state_dict)
    with pytest.raises(CheckpointError, match=r"not a whole model: .* missing_keys 'transformer.h.1.mlp.c_fc.bias'"):
        import_gpt2(tmp_path / "gpt2")


def wrap(gpt2):
    gpt2.transformer.h[0].mlp.c_fc = torch.nn.Sequential(gpt2.transformer.h[0].mlp.c_fc)
    return gpt2


@pytest.mark.parametrize(
    ("change", "found"),
    [(wrap, "container.Sequential at 'transformer.h.0.mlp.c_fc'"), (quantise, "dynamic.*Linear at 'lm_head'")],
)
def test_import_of_changed_layers_is_refused(change, found):
    with pytest.raises(ConversionError, match=rf"expected the layers that .* got torch\..*{found}; give the model as"):
        import_gpt2(change(make_gpt2()))


def test_tokenizer_is_written_next_to_it(tmp_path):
    table = read_meta(META_PATH)
    for kind, tokenizer, text in (
        ("characters", build_character_tokenizer(table, block_size=32), "O!\n\nHo"),
        ("bpe", build_tiktoken_tokenizer(make_encoding()), "hello  there\n<|endoftext|>"),
    ):
        export_gpt2(make_model(vocab_size=len(tokenizer), n_layer=1), tmp_path / kind, tokenizer=tokenizer)
        loaded = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert loaded(text).input_ids == tokenizer(text).input_ids
        assert loaded.decode(loaded(text).input_ids) == text
    with pytest.raises(TokenizerError, match=r"expected at most 64 tokens, as the model has rows, got 65"):
        export_gpt2(
            make_model(vocab_size=64, n_layer=1),
            tmp_path / "small",
            tokenizer=build_character_tokenizer(table, block_size=32),
        )
    assert not (tmp_path / "small").exists()


def test_folder_is_exported_as_its_checkpoint_is(tmp_path):
    NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH).save_pretrained(tmp_path / "saved")
    build_character_tokenizer(read_meta(META_PATH), block_size=128).save_pretrained(tmp_path / "saved")
    export_model(tmp_path / "saved", tmp_path / "a", to="gpt2")
    export_model(CKPT_PATH, tmp_path / "b", to="gpt2", meta_path=META_PATH)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"]
    for contents in files:
        contents.pop("tokenizer_config.json")  # True if it was loaded from a folder
    assert files[0] == files[1]
    assert "tokenizer.json" in files[0]
    with pytest.raises(ConversionError, match="is the source"):
        export_model(tmp_path / "saved", tmp_path / "saved", to="gpt2", overwrite=True)
    with pytest.raises(CheckpointError, match=r"expected no 'n_head' for a folder.* got \[6\]; leave out --n-head"):
        export_model(tmp_path / "saved", tmp_path / "c", to="gpt2", n_head=6)
    with pytest.raises(ConversionError, match=r"expected a format of \['gpt2'.*\], got 'gpt3'"):
        export_model(tmp_path / "saved", tmp_path / "c", to="gpt3")


def test_folder_with_files_is_refused_and_a_failure_leaves_nothing(tmp_path):
    model, folder = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH), tmp_path / "out"
    with limit_file_size(100_000), pytest.raises(ConversionError, match="cannot be written"):
        export_gpt2(model, folder)
    assert not list(tmp_path.iterdir())
    export_gpt2(make_model(), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConversionError, match="is not empty"):
        export_gpt2(model, folder)
    with limit_file_size(100_000), pytest.raises(ConversionError, match="cannot be written"):
        export_gpt2(model, folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export_gpt2(model, folder, overwrite=True, max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_close_logits(load_stock(folder), model)


def test_gpt2_md_python_runs_as_written(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    shutil.copy(CKPT_PATH, tmp_path / "out" / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
    for block in blocks:
        exec(block, {})
    assert len(blocks) == 2


def test_gpt2_md_names_every_refused_option():
    assert not [name for name in REFUSED if name not in DOC and name != "activation_function"]
