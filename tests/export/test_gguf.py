"""GGUF files, read back by gguf and by Transformers; tests/export/test_llama_cpp.py runs them in llama.cpp itself."""

import re
import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel

from hugging_nano_gpt import (
    CheckpointError,
    ConversionError,
    MissingDependencyError,
    NanoGPTLMHeadModel,
    build_character_tokenizer,
    export_gguf,
    export_model,
    read_meta,
)
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

from ..helpers.ggufs import export_and_read, make_kind, read_gelu_note, read_metadata, spoil_tensors
from ..helpers.limits import limit_file_size
from ..helpers.members import MEMBERS
from ..helpers.programs import run_command
from ..helpers.tiny import FIXTURES_DIR, compute_logits, make_batch, make_model

gguf = pytest.importorskip("gguf")

# llama.cpp's names, written out here so that they are independent of gguf's table.
LAYER = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def name_tensors(model) -> dict[str, torch.Tensor]:
    """Returns what a model's file contains: zeros for biases that the model lacks, no output layer if it is tied."""
    state_dict = dict(model.state_dict())
    sources = {"token_embd.weight": "transformer.wte.weight", "position_embd.weight": "transformer.wpe.weight"}
    for part in ("weight", "bias"):
        sources[f"output_norm.{part}"] = f"transformer.ln_f.{part}"
        for layer in range(model.config.n_layer):
            sources |= {
                f"blk.{layer}.{new}.{part}": f"transformer.h.{layer}.{old}.{part}" for old, new in LAYER.items()
            }
    if not model.config.tie_word_embeddings:
        sources["output.weight"] = "lm_head.weight"
    zeros = {
        name: torch.zeros(len(state_dict[f"{name.removesuffix('bias')}weight"]))
        for name in sources.values()
        if name.endswith(".bias")
    }
    return {new: {**zeros, **state_dict}[old].float() for new, old in sources.items()}


def assert_has_tensors(reader, model):
    """Asserts that a file of f32 has every tensor of a model, bit for bit, and no other."""
    expected = name_tensors(model)
    assert {tensor.name for tensor in reader.tensors} == expected.keys()
    for tensor in reader.tensors:
        wanted = expected[tensor.name].numpy()
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.shape.tolist() == list(reversed(wanted.shape))  # ggml counts from the innermost dimension
        np.testing.assert_array_equal(tensor.data.view(np.uint32), wanted.view(np.uint32), err_msg=tensor.name)


@pytest.mark.parametrize("name", [*MEMBERS, "llmc/gpt2_tiny_bf16.bin", "demo"])
def test_every_fixture_is_written_bit_for_bit(name, tmp_path):
    path, (options, _, _) = FIXTURES_DIR / name, MEMBERS.get(name, ({}, None, None))
    model = export_model(CKPT_PATH if name == "demo" else path, tmp_path / "m.gguf", to="gguf", **options).model
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert_has_tensors(reader, model)
    config = model.config
    expected = {
        "general.architecture": "gpt2",
        "general.type": "model",
        "general.name": "m",
        "general.file_type": gguf.LlamaFileType.ALL_F32,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "gpt2.context_length": config.block_size,
        "gpt2.embedding_length": config.n_embd,
        "gpt2.feed_forward_length": 4 * config.n_embd,
        "gpt2.block_count": config.n_layer,
        "gpt2.attention.head_count": config.n_head,
        "gpt2.attention.layer_norm_epsilon": np.float32(1e-5),
        "gpt2.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "none",
    }
    assert read_metadata(reader) == expected


@pytest.mark.parametrize("fault", ["swapped", "transposed"])
def test_wrong_tensors_show(fault, tmp_path, monkeypatch):
    model = make_kind()
    assert_has_tensors(export_and_read(model, tmp_path / "right.gguf"), model)
    spoil_tensors(monkeypatch, fault)
    with pytest.raises(AssertionError, match=r"blk\.0\.attn_output\.weight"):
        assert_has_tensors(export_and_read(model, tmp_path / "wrong.gguf"), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_f16_rounds_matrices_as_torch_does(dtype, tmp_path):
    model = make_kind().to(dtype)
    lost = export_gguf(model, tmp_path / "m.gguf", file_type="f16")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert read_metadata(reader)["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    expected = name_tensors(model)
    halves = 0
    for tensor in reader.tensors:
        wanted = expected[tensor.name]
        if wanted.ndim == 2 and tensor.name != "position_embd.weight":
            wanted, halves = wanted.half(), halves + 1
        np.testing.assert_array_equal(tensor.data, wanted.numpy(), strict=True)
    assert halves == 9
    rounding = "weights are rounded to float16; LayerNorms, biases and positions are not"
    assert (rounding in lost) is (dtype != torch.float16)


@pytest.mark.parametrize("n_embd", [32, 40])
def test_q8_0_is_within_half_a_step(n_embd, tmp_path):
    model = make_kind(n_embd=n_embd)
    lost = export_gguf(model, tmp_path / "m.gguf", file_type="q8_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert read_metadata(reader)["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    expected, kinds = name_tensors(model), {}
    for tensor in reader.tensors:
        kinds[tensor.name] = tensor.tensor_type.name
        wanted = expected[tensor.name].numpy()
        if tensor.tensor_type != gguf.GGMLQuantizationType.Q8_0:
            continue
        np.testing.assert_array_equal(tensor.data, gguf.quantize(wanted, tensor.tensor_type))
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        steps = np.abs(wanted.reshape(-1, 32)).max(1) / 127
        error = np.abs(found - wanted).reshape(-1, 32).max(1)
        assert (error <= steps * (0.5 + 127 * 2**-11) + 1e-6).all()  # the scale is a float16
        assert error.max() > 0
    assert kinds["position_embd.weight"] == kinds["output_norm.weight"] == kinds["blk.0.ffn_up.bias"] == "F32"
    assert kinds["blk.1.ffn_down.weight"] == "Q8_0"  # its rows are 4 * n_embd
    assert kinds["token_embd.weight"] == kinds["blk.1.attn_qkv.weight"] == ("Q8_0" if n_embd == 32 else "F16")
    assert any("not a multiple of 32 are float16" in sentence for sentence in lost) is (n_embd == 40)


def test_numbers_too_large_for_a_type_are_refused(tmp_path):
    model = make_kind()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] = -1e5
    message = r"too large: transformer.h.1.mlp.c_fc.weight: expected at most 65504 for f16, got 100000; give another"
    with pytest.raises(ConversionError, match=message):
        export_gguf(model, tmp_path / "m.gguf", file_type="f16")
    assert_has_tensors(export_and_read(model, tmp_path / "m.gguf"), model)
    assert export_and_read(model, tmp_path / "q.gguf", file_type="q8_0").tensors
    model = make_kind().double()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = 1e39
    with pytest.raises(ConversionError, match=r"transformer.ln_f.weight: expected at most \S+ for f32, got 1e\+39"):
        export_gguf(model, tmp_path / "x.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "q.gguf"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("activation_function", ["gelu", "gelu_new"])
def test_transformers_reads_the_same_model(bias, is_tied, activation_function, tmp_path):
    """Its reader reads the context length into n_ctx, which its GPT-2 does not use: n_positions has to be given."""
    model = make_kind(is_tied=is_tied, activation_function=activation_function, bias=bias)
    tokenizer = build_character_tokenizer(read_meta(META_PATH))
    export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    settings = {"gguf_file": "m.gguf", "activation_function": activation_function}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, **settings, n_positions=32)
    assert type(stock) is GPT2LMHeadModel
    assert (stock.lm_head.weight is stock.transformer.wte.weight) is is_tied
    idx, _ = make_batch(2, 32)
    torch.testing.assert_close(compute_logits(stock, idx), compute_logits(model, idx), rtol=0, atol=1e-5)
    for name, tensor in model.state_dict().items():
        found = stock.state_dict()[name]
        is_transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))  # Conv1D
        assert torch.equal(found.t() if is_transposed else found, tensor), name
    assert AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf").n_positions == 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_difference_of_the_gelus_is_measured_on_the_model(dtype, tmp_path):
    model = make_kind(activation_function="gelu").to(dtype).train()
    before = torch.random.get_rng_state()
    length, difference, tanh, exact = read_gelu_note(export_gguf(model, tmp_path / "a.gguf"))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert model.dtype == dtype
    assert length == 32
    assert 1e-4 < difference < 1e-2  # a toy model; the wrong GELU gives at least 1e-4 everywhere in these tests
    assert exact != tanh == pytest.approx(exact, rel=1e-2)
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_proj.weight.zero_()
    assert read_gelu_note(export_gguf(model, tmp_path / "b.gguf"))[1] == 0  # no GELU gets through
    for activation in ("gelu_new", "gelu_pytorch_tanh"):
        tanh_model = make_kind(activation_function=activation)
        assert read_gelu_note(export_gguf(tanh_model, tmp_path / f"{activation}.gguf")) == []


@pytest.mark.parametrize("model_args", [{"block_size": 1}, {"block_size": 2}, {"vocab_size": 1}])
def test_gelus_are_compared_on_the_smallest_models(model_args, tmp_path):
    lost = export_gguf(make_kind(activation_function="gelu", **model_args), tmp_path / "m.gguf")
    assert read_gelu_note(lost)[0] == model_args.get("block_size", 32)
    assert np.isfinite(read_gelu_note(lost)).all()


def test_context_that_llama_cpp_rounds_up_is_told(tmp_path):
    lost = export_gguf(make_kind(block_size=24), tmp_path / "a.gguf")
    assert any("aborts after 24 of this model" in sentence for sentence in lost)
    lost = export_gguf(make_kind(block_size=256), tmp_path / "b.gguf")
    assert not any("aborts" in sentence for sentence in lost)


def test_other_file_types_are_refused(tmp_path):
    with pytest.raises(ConversionError, match=r"expected a file type of \['f32', 'f16', 'q8_0'\], got 'q4_0'"):
        export_gguf(make_model(), tmp_path / "m.gguf", file_type="q4_0")
    assert not list(tmp_path.iterdir())


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match="export_gguf: gguf is not installed; pip install gguf"):
        export_gguf(make_model(), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_file_is_not_overwritten_and_a_failure_leaves_nothing(tmp_path):
    model, path = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH), tmp_path / "sub" / "m.gguf"
    with limit_file_size(100_000), pytest.raises(CheckpointError, match="cannot be written"):
        export_gguf(model, path)
    assert not list(path.parent.iterdir())
    small = make_kind()
    export_gguf(small, path)
    before = path.read_bytes()
    with pytest.raises(ConversionError, match=f"{path}: is there already: .*--force, overwrite=True"):
        export_gguf(model, path)
    with limit_file_size(100_000), pytest.raises(CheckpointError, match="cannot be written"):
        export_gguf(model, path, overwrite=True)
    assert path.read_bytes() == before
    assert_has_tensors(export_and_read(model, path, overwrite=True), model)
    assert [each.name for each in path.parent.iterdir()] == ["m.gguf"]
    with pytest.raises(ConversionError, match="expected a file to write, got a folder"):
        export_gguf(small, path.parent, overwrite=True)


def test_two_exports_are_the_same_file(tmp_path):
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    notes = [export_gguf(model, tmp_path / name / "m.gguf") for name in "ab"]
    assert notes[0] == notes[1]
    assert (tmp_path / "a" / "m.gguf").read_bytes() == (tmp_path / "b" / "m.gguf").read_bytes()


def test_export_command_writes_the_file_type_asked_for(tmp_path):
    path = tmp_path / "m.gguf"
    arguments = ("export", CKPT_PATH, path, "--to", "gguf", "--meta", META_PATH, "--file-type", "q8_0")
    result = run_command(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == f"Wrote {path}: 350,976 parameters, float32, and a tokenizer of 65 tokens"
    assert len(read_gelu_note([line.strip() for line in lines])) == 4
    found = read_metadata(gguf.GGUFReader(path))
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    result = run_command(*arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(rf"error: {path}: is there already: .*--force.*\n", result.stderr)
    assert run_command(*arguments, "--force").returncode == 0
    result = run_command("export", CKPT_PATH, tmp_path / "gpt2", "--to", "gpt2", "--file-type", "f16")
    assert (result.returncode, result.stdout) == (1, "")
    assert "expected a file type for 'gguf' alone, got 'f16' for 'gpt2'; leave out --file-type" in result.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["m.gguf"]
