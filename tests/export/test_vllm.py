"""export/vllm.py and what vLLM reads of the model, without vLLM; `make vllm` runs vLLM itself."""

import ast
import inspect
import json
import sys
import textwrap
import tomllib
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest
import torch

from hugging_nano_gpt import NanoGPTLMHeadModel
from hugging_nano_gpt.export import vllm as module
from hugging_nano_gpt.model import modeling_nano_gpt, persistence_nano_gpt

from ..helpers.folders import ROOT
from ..helpers.tiny import make_batch, make_model

GROUP = "vllm.general_plugins"
BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCE = ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(modeling_nano_gpt.NanoGPTAttention.forward))))


@pytest.fixture
def models(monkeypatch):
    """What the ModelRegistry of a fake vLLM has registered."""
    models = {}
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = type("ModelRegistry", (), {"register_model": staticmethod(models.__setitem__)})
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    return models


def test_entry_point_registers_the_architecture_that_folders_name(models, tmp_path):
    make_model().save_pretrained(tmp_path)
    [architecture] = json.loads((tmp_path / "config.json").read_text())["architectures"]
    [(name, value)] = PROJECT["entry-points"][GROUP].items()
    register = EntryPoint(name, value, GROUP).load()
    for _ in range(2):  # vLLM calls it in each of its processes, and more than once in one
        register()
        assert models == {architecture: BACKEND}


def test_a_vllm_without_registry_is_told_and_not_broken(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    module.register_with_vllm()
    assert "not registered with vLLM: ImportError" in caplog.text


def list_faults(source):
    """Lists what vLLM's Transformers backend, which reads and rewrites this source, cannot handle."""
    tree = ast.parse(source)
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    targets = [
        ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
    ]
    claims = {
        "the interface is fetched once": calls.count("ALL_ATTENTION_FUNCTIONS.get_interface") == 1,
        "into a local that is called once": [calls.count(target) for target in targets] == [1],
        "scaling is an attribute": "scaling=self.scaling" in source,
        "the split is literal": "self.c_attn(hidden_states).split((C, C, C), dim=-1)" in source,
        "heads are counted by views": "(*input_shape, -1, self.head_dim)" in source,
        "the output is reshaped": ".reshape(*input_shape, -1)" in source,
    }
    return [claim for claim, is_true in claims.items() if not is_true]


def test_attention_source_keeps_the_shape_that_vllm_reads():
    assert list_faults(SOURCE) == []


@pytest.mark.parametrize(
    ("right", "wrong", "fault"),
    [
        ("attn_weights = attention_interface(", "attn_weights = self.attend(", "into a local that is called once"),
        ("ALL_ATTENTION_FUNCTIONS.get_interface(", "get_attention(", "the interface is fetched once"),
        ("scaling=self.scaling", "scaling=self.head_dim ** (-0.5)", "scaling is an attribute"),
        ("split((C, C, C), dim=-1)", "chunk(3, dim=-1)", "the split is literal"),
        ("-1, self.head_dim", "self.config.n_head, self.head_dim", "heads are counted by views"),
        (".reshape(*input_shape, -1)", ".transpose(1, 2)", "the output is reshaped"),
    ],
)
def test_attention_source_of_another_shape_is_noticed(right, wrong, fault):
    assert SOURCE.count(right) == 1
    assert fault in list_faults(SOURCE.replace(right, wrong))


def test_base_model_computes_as_vllm_calls_it():
    """One row of packed tokens as embeddings, its own positions, no cache, and a tuple back."""
    model = make_model()
    base = getattr(model, NanoGPTLMHeadModel.base_model_prefix)
    assert type(base).__name__ == persistence_nano_gpt.AUTO_MAP["AutoModel"].rpartition(".")[2]
    assert base._supports_attention_backend
    assert [layer.attn.layer_idx for layer in base.h] == [0, 1]
    ids, _ = make_batch(1, 9)
    positions = torch.arange(9)[None] + 4
    embeds = base.get_input_embeddings()(ids)
    options = {"use_cache": False, "return_dict": False}
    hidden_states = base(inputs_embeds=embeds, position_ids=positions, **options)[0]
    shifted = base(inputs_embeds=embeds + base.wpe(positions) - base.wpe(positions - 4), **options)[0]
    torch.testing.assert_close(hidden_states, shifted, rtol=0, atol=2e-5)
    assert (hidden_states - base(inputs_embeds=embeds, **options)[0]).abs().max() > 1e-2
