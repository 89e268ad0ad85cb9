"""ONNX: the model as one graph that ONNX Runtime runs without torch, with keys and values in and out for decoding.

torch.export records the model's own forward pass and torch.onnx translates it, so there is no second implementation to
keep right. Inputs and outputs have the names that Optimum and transformers.js know; the weights have nanoGPT's names,
layout and bits. All operators are ONNX's own. Recording takes seconds, more with more layers.

Shapes: B batch, T tokens, P tokens before them, S = P + T keys, H heads, D head size, V vocabulary.
"""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..convert.gpt2 import make_gpt2_config
from ..convert.tensors import gather_checked_tensors
from ..errors import require
from ..files.files import check_folder, open_folder
from ..model.configuration_nano_gpt import NanoGPTConfig
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from ..tokenization.vocabulary import make_generation_config

_OPSET = 18

# A protocol buffer has at most 2 GiB; weights that do not fit are a second file, under the name that others expect.
_MAX_FILE_BYTES = 2_000_000_000
_FILE, _WEIGHTS_FILE = "model.onnx", "model.onnx_data"


def export_onnx(
    model: NanoGPTLMHeadModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Writes a model as a folder with model.onnx, for ONNX Runtime, Optimum and transformers.js.

    The graph takes input_ids (B, T), attention_mask (B, S), position_ids (B, T), all int64, and for every layer
    past_key_values.N.key and .value (B, H, P, D); P may be 0. It returns logits (B, T, V) and present.N.key and
    .value (B, H, S, D). Weights are moved and not computed with, and a tied one is stored once; logits differ from
    ours only by the order of float32 sums (docs/onnx.md). The graph does not do what generate does past block_size.

    Args:
        model: As in export_gguf, whose other arguments mean the same here. In bfloat16, which ONNX Runtime does not
            compute with on CPUs, it is written in float32.
        folder: Folder to write: a new or an empty one; with overwrite, files that are not a model's stay.

    Raises:
        ConversionError: If the model has wrapped or quantised layers or NaN, the folder has files and overwrite is
            not given, or it cannot be written.
        TokenizerError: If the tokenizer has more tokens than the model has rows.
        MissingDependencyError: If onnx or onnxscript is not installed.
    """
    require("export to ONNX", "onnx", "onnxscript")
    folder = Path(folder)
    check_folder(folder, overwrite)
    graph = _make_graph(_make_plain(model, gather_checked_tensors(model, folder, tokenizer)))
    config = make_gpt2_config(model.config)
    config.architectures = ["GPT2LMHeadModel"]
    with open_folder(folder, overwrite) as temporary:
        _write(graph, temporary)
        config.save_pretrained(temporary)
        make_generation_config(model, tokenizer).save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return ("bfloat16 became float32, without a change of any number",) if model.dtype == torch.bfloat16 else ()


class _Past:
    """Keys and values of all layers as plain tensors, with the methods of a cache that the model calls."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.tensors = tensors  # key and value of every layer in turn, (B, H, P or S, D)

    def get_seq_length(self) -> int:
        return self.tensors[0].shape[2]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:  # (B, H, T, D) each -> (B, H, S, D)
        at = 2 * layer_idx
        self.tensors[at] = torch.cat((self.tensors[at], key), dim=2)
        self.tensors[at + 1] = torch.cat((self.tensors[at + 1], value), dim=2)
        return self.tensors[at], self.tensors[at + 1]


class _Step(nn.Module):
    """The forward pass as the graph has it: tensors in, tensors out."""

    def __init__(self, model: NanoGPTLMHeadModel):
        super().__init__()
        self.transformer = model.transformer
        if not model.config.tie_word_embeddings:
            self.lm_head = model.lm_head

    def forward(
        self,
        input_ids: torch.Tensor,  # (B, T)
        attention_mask: torch.Tensor,  # (B, S)
        position_ids: torch.Tensor,  # (B, T)
        past_key_values: list[torch.Tensor],  # (B, H, P, D) each
    ) -> tuple[torch.Tensor, ...]:
        past = _Past(list(past_key_values))
        start, length = past.get_seq_length(), input_ids.shape[1]
        keys, queries = torch.arange(start + length), torch.arange(start, start + length)[:, None]
        # A token sees itself and the tokens before it. Padding sees itself too: a softmax over nothing would be NaN,
        # and the NaN would spread, because 0 * NaN is NaN.
        is_seen = (keys < queries) & attention_mask[:, None, None].bool() | (keys == queries)  # (B, 1, T, S)
        mask = torch.zeros((), dtype=past_key_values[0].dtype).masked_fill(~is_seen, -torch.inf)
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            cache=past,
            use_cache=True,
        )
        head = getattr(self, "lm_head", self.transformer.wte)
        return nn.functional.linear(outputs.last_hidden_state, head.weight), *past.tensors


def _make_plain(model: NanoGPTLMHeadModel, tensors: dict[str, torch.Tensor]) -> NanoGPTLMHeadModel:
    """Makes a copy that can be recorded: plain tensors on the CPU, and attention as matrix products."""
    config = model.config
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    dtype = torch.float32 if model.dtype == torch.bfloat16 else model.dtype
    plain: NanoGPTLMHeadModel = NanoGPTLMHeadModel.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, attn_implementation="eager"
    )
    return plain


def _make_graph(model: NanoGPTLMHeadModel) -> Any:
    """Records the forward pass and translates it; returns an onnx_ir.Model whose weights are the model's tensors."""
    import onnx_ir

    inputs, outputs = _list_axes(model.config)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _record(model),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=_OPSET,
            optimize=False,
            verbose=False,
            dynamo=True,
        )
        assert program is not None  # with dynamo=True
        _simplify(program.model)
    graph = program.model.graph
    for value, axes in zip((*graph.inputs, *graph.outputs), (*inputs.values(), *outputs.values()), strict=True):
        value.shape = onnx_ir.Shape(axes)
    return program.model


def _list_axes(config: NanoGPTConfig) -> tuple[dict[str, tuple[str | int, ...]], dict[str, tuple[str | int, ...]]]:
    """Returns the axes of every input and of every output of the graph by name, in their order."""
    tokens, mask = ("batch_size", "sequence_length"), ("batch_size", "total_sequence_length")
    heads, head_dim = config.n_head, config.n_embd // config.n_head
    layers = [f"{layer}.{part}" for layer in range(config.n_layer) for part in ("key", "value")]
    past, present = (("batch_size", heads, f"{kind}_sequence_length", head_dim) for kind in ("past", "total"))
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": tokens}
    outputs = {"logits": (*tokens, config.vocab_size)}
    return (
        inputs | {f"past_key_values.{name}": past for name in layers},
        outputs | {f"present.{name}": present for name in layers},
    )


def _record(model: NanoGPTLMHeadModel) -> torch.export.ExportedProgram:
    config = model.config
    sizes = {"batch_size": 2, "sequence_length": 3, "past_sequence_length": 5}  # of the example; the graph has none
    batch, length, past_length = sizes.values()
    tokens = torch.zeros(batch, length, dtype=torch.long)
    attention_mask = torch.ones(batch, past_length + length, dtype=torch.long)
    past = torch.zeros(batch, config.n_head, past_length, config.n_embd // config.n_head, dtype=model.dtype)
    b, t, p = (torch.export.Dim(name, max=1 << 30) for name in sizes)  # torch 2.6 needs a maximum
    dynamic_shapes = (
        {0: b, 1: t},
        {0: b, 1: torch.export.Dim.AUTO},  # p + t, which cannot be written here and is inferred
        {0: b, 1: t},
        [{0: b, 2: p}] * (2 * config.n_layer),
    )
    args = (tokens, attention_mask, tokens.clone(), [past.clone() for _ in range(2 * config.n_layer)])
    return torch.export.export(_Step(model), args, dynamic_shapes=dynamic_shapes)


def _simplify(model: Any) -> None:
    """Folds the constants in a graph and drops the metadata of its recording; the weights stay unchanged."""
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    # While the weights are inputs, the optimizer does not transpose, rename or merge them.
    passes.AddInitializersToInputsPass()(model)
    optimizer.optimize_ir(model)
    passes.RemoveInitializersFromInputsPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)  # stack traces, with the paths of this machine
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():  # its axes have other names than the inputs'; a runtime infers them
                value.shape = value.type = None


def _write(model: Any, folder: Path) -> None:
    """Writes the graph, with its weights in the same file if they fit, and checks what was written."""
    import onnx
    import onnx_ir

    size_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    onnx_ir.save(model, folder / _FILE, external_data=_WEIGHTS_FILE if size_bytes > _MAX_FILE_BYTES else None)
    onnx.checker.check_model(folder / _FILE)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's messages to its own developers."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torch.onnx", "onnx_ir"))}
    for logger in levels:  # they say that torchvision is missing, and that weights which are inputs are not merged
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # onnxscript 0.6 prints its rewrite rules
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
