"""What every exporter refuses: incomplete or changed models, and tokenizers too large; the table of exports."""

from typing import get_type_hints

import pytest
import torch

from hugging_nano_gpt import (
    ConversionError,
    TokenizerError,
    build_character_tokenizer,
    export_gguf,
    export_gpt2,
    export_model,
    export_onnx,
    read_meta,
)
from hugging_nano_gpt.demo import META_PATH
from hugging_nano_gpt.export.exporting import EXPORTS
from hugging_nano_gpt.export.gguf import _FILE_TYPES
from hugging_nano_gpt_cli import commands, options

from ..helpers.folders import DOCS_DIR
from ..helpers.tiny import make_classifier, make_model, quantise

NEEDED = {export_gpt2: (), export_gguf: ("gguf",), export_onnx: ("onnx", "onnxscript")}


@pytest.fixture(params=NEEDED, ids=lambda export: export.__name__)
def export(request):
    for name in NEEDED[request.param]:
        pytest.importorskip(name)
    return request.param


def make_wrapped():
    model = make_model()
    model.transformer.h[0].mlp.c_fc = torch.nn.Sequential(model.transformer.h[0].mlp.c_fc)
    return model


def make_diverged():
    model = make_model()
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] = torch.nan
    return model


def make_with_head(weight):
    model = make_model()
    model.lm_head.weight = torch.nn.Parameter(weight)
    return model


def make_quantised():
    return make_with_head(torch.ones(65, 32).as_subclass(type("Int8", (torch.Tensor,), {})))


def make_dynamic():
    return quantise(make_model().eval())


def make_fake_quantised():
    """Has nanoGPT's parameters, under nanoGPT's names, and computes with others."""
    model = make_model()
    layer = model.transformer.h[0].mlp.c_fc
    fake = torch.ao.nn.qat.Linear(32, 128, qconfig=torch.ao.quantization.default_qat_qconfig)
    fake.weight, fake.bias = layer.weight, layer.bias
    model.transformer.h[0].mlp.c_fc = fake
    return model


def make_loosened():
    return make_with_head(torch.ones(65, 32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_wrapped, r"got torch.nn.modules.container.Sequential at 'transformer.h.0.mlp.c_fc'; give the model as"),
        (make_dynamic, r"got torch.ao.nn.quantized.dynamic.*Linear at 'transformer.h.0.attn.c_attn', .*\(9 in all\)"),
        (make_fake_quantised, "got torch.ao.nn.qat.modules.linear.Linear at 'transformer.h.0.mlp.c_fc'"),
        (make_diverged, "got NaN or infinity in 'transformer.wpe.weight'"),
        (make_quantised, "expected floating-point layers, got quantised ones at 'lm_head.weight'"),
        (make_loosened, "lm_head.weight: expected the numbers of transformer.wte.weight"),
        (make_classifier, "missing 'lm_head.weight'"),
    ],
)
def test_models_that_are_not_whole_or_plain_are_refused(export, make, message, tmp_path):
    with pytest.raises(ConversionError, match=message):
        export(make(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [make_dynamic, make_fake_quantised, make_wrapped])
def test_layers_that_were_replaced_are_refused_on_the_way_back(make, tmp_path):
    with pytest.raises(ConversionError, match=r"ckpt.pt: expected the layers that .*give the model as it was"):
        make().to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    assert not list(tmp_path.iterdir())


def test_tokenizer_with_more_tokens_than_rows_is_refused(export, tmp_path):
    tokenizer = build_character_tokenizer(read_meta(META_PATH))
    with pytest.raises(TokenizerError, match=r"expected at most 64 tokens, as the model has rows, got 65"):
        export(make_model(vocab_size=64), tmp_path / "out", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_command_line_and_documentation_have_the_exports_of_the_table():
    option = get_type_hints(commands.export, include_extras=True)["to"]
    assert [each.value for each in option.__origin__] == list(EXPORTS)
    assert option.__metadata__[0].help == "; ".join(f"{name}: {each.makes}" for name, each in EXPORTS.items()) + "."
    assert [each.value for each in options.FileType] == list(_FILE_TYPES)
    page = (DOCS_DIR / "exporting.md").read_text()
    header = next(line for line in page.splitlines() if line.startswith("| |"))
    assert header.startswith(f"| | {' | '.join(each.column for each in EXPORTS.values())} | vLLM")
    assert all(f'"{name}", a f' in export_model.__doc__ for name in EXPORTS)
