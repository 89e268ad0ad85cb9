"""ONNX: names, axes and weights of the graph, ONNX Runtime's logits and tokens, and what is refused.

Every fixture and every kind of model takes minutes: tests/export/test_onnx_runtime.py, by `make exports`.
"""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from hugging_nano_gpt import ConversionError, MissingDependencyError, export_gpt2, export_model, export_onnx, read_meta
from hugging_nano_gpt.convert.tensors import gather_checked_tensors
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH
from hugging_nano_gpt.export import onnx as module

from ..helpers.folders import DOCS_DIR
from ..helpers.graphs import assert_close, find_differences, make_padded_batch, read_graph, read_weights
from ..helpers.limits import limit_file_size
from ..helpers.tiny import compute_logits, make_batch, make_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from ..helpers.runtime import Runtime  # noqa: E402  # after the check that it can be imported

DOC = (DOCS_DIR / "onnx.md").read_text()


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """The demo's model, tied and without biases, as ONNX."""
    folder = tmp_path_factory.mktemp("onnx") / "demo"
    export_model(CKPT_PATH, folder, to="onnx", meta_path=META_PATH)
    return folder


@pytest.fixture(scope="module")
def toy():
    """A model with biases and an output layer of its own, and its graph, which takes seconds to make."""
    model = make_model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * -1.5)
    return model, module._make_graph(module._make_plain(model, gather_checked_tensors(model, "toy", None)))


@pytest.fixture
def quick(toy, monkeypatch):
    """The toy model, whose graph is not made again."""
    model, graph = toy
    monkeypatch.setattr(module, "_make_graph", lambda plain: graph)
    return model


def read_axes(values) -> dict[str, list[str | int]]:
    return {each.name: [dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in values}


def test_graph_has_the_names_and_axes_that_others_know(demo_folder):
    graph = read_graph(demo_folder)
    tokens, mask = ["batch_size", "sequence_length"], ["batch_size", "total_sequence_length"]
    layers = [f"{layer}.{part}" for layer in range(3) for part in ("key", "value")]
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": tokens}
    inputs |= {f"past_key_values.{name}": ["batch_size", 3, "past_sequence_length", 32] for name in layers}
    outputs = {"logits": [*tokens, 65]}
    outputs |= {f"present.{name}": ["batch_size", 3, "total_sequence_length", 32] for name in layers}
    for found, expected in ((read_axes(graph.input), inputs), (read_axes(graph.output), outputs)):
        assert list(found.items()) == list(expected.items())


def test_tied_weights_are_stored_once_in_the_models_bits(demo, demo_folder):
    graph = read_graph(demo_folder)
    assert not find_differences(graph, demo)
    assert "lm_head.weight" not in read_weights(graph)
    size_bytes = (demo_folder / "model.onnx").stat().st_size
    assert 0 < size_bytes - 4 * demo.num_parameters() < 25_000  # a second wte would be 24,960 bytes more


def test_untied_weights_are_stored_in_the_models_bits(quick, tmp_path):
    export_onnx(quick, tmp_path / "out")
    graph = read_graph(tmp_path / "out")
    assert not find_differences(graph, quick)
    weights = read_weights(graph)
    assert not np.array_equal(weights["lm_head.weight"], weights["transformer.wte.weight"])


def test_file_tells_nothing_of_the_machine_it_was_made_on(demo_folder):
    contents = (demo_folder / "model.onnx").read_bytes()
    assert not [each for each in (b"hugging_nano_gpt", b"site-packages", b"stack_trace") if each in contents]


def test_swapped_weights_show(demo, demo_folder, tmp_path):
    shutil.copytree(demo_folder, tmp_path / "swapped")
    proto = onnx.load(tmp_path / "swapped" / "model.onnx")
    first, second = (f"transformer.h.{layer}.attn.c_proj.weight" for layer in (0, 1))
    by_name = {each.name: each for each in proto.graph.initializer}
    by_name[first].name, by_name[second].name = second, first
    onnx.save(proto, tmp_path / "swapped" / "model.onnx")
    assert find_differences(proto.graph, demo) == [second, first]
    idx = make_batch(2, 20)[0]
    difference = Runtime(tmp_path / "swapped").compute(idx.numpy()) - compute_logits(demo, idx).numpy()
    assert np.abs(difference).max() > 0.1


def test_logits_are_the_models_at_any_batch_and_length(demo, demo_folder, quick, tmp_path):
    export_onnx(quick, tmp_path / "toy")
    for model, folder in ((demo, demo_folder), (quick, tmp_path / "toy")):
        runtime = Runtime(folder)
        for batch, length in ((1, 1), (1, model.config.block_size), (3, 7), (2, 3)):
            idx = make_batch(batch, length)[0]
            assert_close(runtime.compute(idx.numpy()), compute_logits(model, idx))


def test_logits_after_a_cache_are_the_models(demo, demo_folder):
    runtime, idx = Runtime(demo_folder), make_batch(3, 40)[0]
    runtime.start(3)
    pieces = [runtime.read(piece.numpy()) for piece in idx.split((20, 1, 1, 17, 1), dim=1)]
    assert_close(np.concatenate(pieces, axis=1), compute_logits(demo, idx))
    assert next(iter(runtime.past.values())).shape == (3, 3, 40, 32)


def test_padded_rows_are_the_models_with_and_without_a_cache(demo, demo_folder):
    runtime, (idx, mask) = Runtime(demo_folder), make_padded_batch(3, 20)
    expected, is_token = compute_logits(demo, idx, mask).numpy(), mask.bool().numpy()
    logits = runtime.compute(idx.numpy(), mask.numpy())
    assert np.isfinite(logits).all()
    assert_close(logits[is_token], expected[is_token])
    runtime.start(3)
    pieces = [runtime.read(idx[:, a:b].numpy(), mask[:, :b].numpy()) for a, b in ((0, 4), (4, 19), (19, 20))]
    assert_close(np.concatenate(pieces, axis=1)[is_token], expected[is_token])
    assert np.abs(runtime.compute(idx.numpy())[is_token] - expected[is_token]).max() > 0.1  # unmasked


def test_greedy_tokens_are_those_of_generate(demo, demo_folder):
    prompt, mask = make_padded_batch(2, 8)
    tokens = demo.generate(prompt, attention_mask=mask, max_new_tokens=100, do_sample=False, pad_token_id=0)
    assert np.array_equal(Runtime(demo_folder).generate(prompt.numpy(), 100, mask.numpy()), tokens.numpy())


def test_text_beyond_block_size_is_an_error(demo_folder):
    runtime = Runtime(demo_folder)
    with pytest.raises(Exception, match=r"idx=128 must be within the inclusive range \[-128,127\]"):
        runtime.compute(np.zeros((1, 129), np.int64))


def test_folder_has_what_other_programs_read(demo_folder):
    assert sorted(path.name for path in demo_folder.iterdir() if "tokenizer" not in path.name) == [
        "config.json",
        "generation_config.json",
        "model.onnx",
    ]
    fields = json.loads((demo_folder / "config.json").read_text())
    expected = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_head": 3, "n_layer": 3, "n_embd": 96}
    assert {name: fields[name] for name in expected} == expected
    tokenizer = AutoTokenizer.from_pretrained(demo_folder)
    assert tokenizer.decode(tokenizer("ROMEO:").input_ids) == "ROMEO:"


def test_exporting_says_nothing_and_leaves_the_model_as_it_was(tmp_path, capfd):
    """Of a model in bfloat16, which becomes float32, in training mode with dropout."""
    model, idx = make_model(n_layer=1, dropout=0.25).to(torch.bfloat16).train(), make_batch(2, 9)[0]
    before, config = {name: t.clone() for name, t in model.state_dict().items()}, model.config.to_dict()
    disable_progress_bar()  # of Transformers' loading
    capfd.readouterr()
    lost = export_onnx(model, tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert lost == ("bfloat16 became float32, without a change of any number",)
    assert model.training
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not find_differences(read_graph(tmp_path / "out"), model.float())
    assert_close(Runtime(tmp_path / "out").compute(idx.numpy()), compute_logits(model.eval(), idx))


def test_large_weights_are_in_a_file_next_to_the_graph(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_FILE_BYTES", 1000)
    export_onnx(quick, tmp_path / "out")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("model*")}
    assert sizes.keys() == {"model.onnx", "model.onnx_data"}
    assert sizes["model.onnx_data"] > 0.9 * 4 * quick.num_parameters()  # small ones stay in the graph
    idx = make_batch(2, 9)[0]
    assert_close(Runtime(tmp_path / "out").compute(idx.numpy()), compute_logits(quick, idx))
    assert not find_differences(read_graph(tmp_path / "out"), quick)
    export_gpt2(quick, tmp_path / "out", overwrite=True)
    assert not list((tmp_path / "out").glob("model.onnx*"))


def test_folder_with_files_is_refused_and_a_failure_leaves_nothing(quick, tmp_path, monkeypatch):
    folder = tmp_path / "out"

    def fail(*_):
        raise KeyboardInterrupt

    with limit_file_size(20_000), pytest.raises(ConversionError, match="cannot be written"):
        export_onnx(quick, folder)
    with monkeypatch.context() as patch:
        patch.setattr(onnx.checker, "check_model", fail)
        with pytest.raises(KeyboardInterrupt):
            export_onnx(quick, folder)
    assert not list(tmp_path.iterdir())
    export_onnx(quick, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConversionError, match="is not empty"):
        export_onnx(quick, folder)
    with limit_file_size(20_000), pytest.raises(ConversionError, match="cannot be written"):
        export_onnx(quick, folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export_onnx(quick, folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_missing_package_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match=r"onnxscript is not installed; pip install onnx onnxscript"):
        export_onnx(make_model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_onnx_md_decodes_as_written(demo, demo_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(demo_folder, tmp_path / "onnx-folder")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
    exec(block, {})
    table = read_meta(META_PATH)
    tokens = demo.generate(torch.tensor([table.encode("ROMEO:")]), max_new_tokens=100, do_sample=False)
    text = table.decode(tokens[0].tolist())
    assert capsys.readouterr().out == text + "\n"
    exec(block.replace("min(100,", "min(1000,"), {})
    longest = capsys.readouterr().out.removesuffix("\n")
    assert (longest[:106], len(longest)) == (text, 128)  # block_size
