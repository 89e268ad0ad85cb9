"""GGUF: nanoGPT models, with their tokenizers, as one file of llama.cpp's gpt2 architecture.

nn.Linear's weights have the layout that ggml reads, so none is transposed (other converters undo GPT-2's Conv1D).
llama.cpp wants every bias: where the model has none they are zeros, which change no number. Tensors are converted and
written one at a time.

Sources: llama.cpp's src/models/gpt2.cpp and conversion/base.py, as in llama-cpp-python 0.3.36; gguf 0.19.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from ..convert.tensors import gather_checked_tensors, get_model_args, select_tensors
from ..errors import ConversionError, join_some, require
from ..files.files import check_file, open_atomically
from ..model.configuration_nano_gpt import NanoGPTConfig
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from ..tokenization.vocabulary import make_generation_config
from .gguf_vocabulary import add_vocabulary

if TYPE_CHECKING:
    import gguf

    _TypedTensors = dict[str, tuple[torch.Tensor, gguf.GGMLQuantizationType]]  # by llama.cpp's name

# By the names that llama.cpp's converter knows: the value of general.file_type, and the largest number that fits. q8_0
# stores integers up to 127, times a float16.
_FILE_TYPES = {
    "f32": ("ALL_F32", torch.finfo(torch.float32).max),
    "f16": ("MOSTLY_F16", torch.finfo(torch.float16).max),
    "q8_0": ("MOSTLY_Q8_0", 127 * torch.finfo(torch.float16).max),
}

# llama.cpp's converter always keeps this tensor in float32, and every tensor of one dimension.
_ALWAYS_F32 = "position_embd.weight"

# Number of weights that share a scale in q8_0; rows that are not a multiple of it become float16, as in llama.cpp's
# converter.
_Q8_0_BLOCK = 32

# llama.cpp rounds the length of its context up to a multiple of this, and may read positions that the model lacks.
_CONTEXT_STEP = 256

# Number of tokens that the model generates to compare two GELUs on.
_N_PROBED = 64


def export_gguf(
    model: NanoGPTLMHeadModel,
    path: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    file_type: str = "f32",
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Writes a model as a GGUF file, which llama.cpp and what is built on it run.

    "f32" keeps every weight of float32, float16 and bfloat16 models exactly. llama.cpp computes the tanh GELU for
    gpt2; what that changes in a model of exact GELU is measured on text that the model generates, and returned.

    Args:
        model: The model, of any floating dtype; tied or not.
        path: File to write. Missing folders are made.
        tokenizer: Tokenizer to write with it. llama.cpp runs two kinds: single characters, and byte-level BPE that
            splits text as GPT-2 does. Without one the file is for token ids only.
        file_type: "f32", "f16" or "q8_0" (8 bits, a float16 scale for every 32 weights); LayerNorms, biases and
            positions stay float32 in all of them.
        overwrite: Whether what exists may be replaced.

    Returns:
        What the export does not keep, one sentence each.

    Raises:
        ConversionError: If the model has wrapped or quantised layers, NaN or numbers too large for the file type, the
            file type is another, or the file exists and overwrite is not given.
        TokenizerError: If the tokenizer has more tokens than the model has rows, or llama.cpp has no equivalent.
        CheckpointError: If the file cannot be written.
        MissingDependencyError: If gguf is not installed.
    """
    where = os.fspath(path)
    if file_type not in _FILE_TYPES:
        raise ConversionError(
            f"{where}: expected a file type of {list(_FILE_TYPES)}, got {file_type!r}; give one of them"
        )
    check_file(Path(path), overwrite)
    writer = _make_writer(where, model.config, file_type)
    tensors = gather_checked_tensors(model, path, tokenizer)
    typed = _choose_types(where, model.config, tensors, file_type)
    suppressed = make_generation_config(model, tokenizer).suppress_tokens or []
    lost = add_vocabulary(writer, tokenizer, model.config.vocab_size, suppressed)
    lost += [*_list_limits(model, file_type), *_compare_gelus(model, tensors)]
    with open_atomically(path) as file:
        _write(writer, file, typed)
    return tuple(lost)


def _make_writer(where: str, config: NanoGPTConfig, file_type: str) -> "gguf.GGUFWriter":
    """Makes a writer with all metadata of the model, except its tensors and its tokens."""
    gguf = _import_gguf()
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(where).stem)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[file_type][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    return writer


def _import_gguf() -> Any:
    require("export_gguf", "gguf")
    import gguf

    return gguf


def _choose_types(
    where: str, config: NanoGPTConfig, tensors: Mapping[str, torch.Tensor], file_type: str
) -> "_TypedTensors":
    """Returns each tensor and the type to write it in, by llama.cpp's name."""
    gguf = _import_gguf()
    selected = select_tensors(tensors, {**get_model_args(config), "bias": True}, config.tie_word_embeddings)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    typed, beyond = {}, []
    for name, tensor in selected.items():
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        kind = "f32" if tensor.ndim == 1 or new_name == _ALWAYS_F32 else file_type
        if kind == "q8_0" and tensor.shape[-1] % _Q8_0_BLOCK:
            kind = "f16"
        largest, limit = max(map(abs, torch.aminmax(tensor))).item(), _FILE_TYPES[kind][1]
        if largest > limit:
            beyond.append(f"{name}: expected at most {limit:g} for {kind}, got {largest:g}")
        typed[new_name] = (tensor, gguf.GGMLQuantizationType[kind.upper()])
    if beyond:
        raise ConversionError(f"{where}: numbers are too large: {join_some(beyond)}; give another --file-type")
    return typed


def _write(writer: "gguf.GGUFWriter", file: BinaryIO, typed: "_TypedTensors") -> None:
    gguf = _import_gguf()
    for name, (tensor, kind) in typed.items():
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size_bytes = tensor.numel() // block_size * block_bytes
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size_bytes, raw_dtype=kind)
    # The writer would open a path of its own; the file that is open here gets its name only when it is complete.
    writer.fout = [file]  # type: ignore[list-item]
    writer.state = gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in typed.values():
        writer.write_tensor_data(gguf.quantize(tensor.float().numpy(), kind))


def _list_limits(model: NanoGPTLMHeadModel, file_type: str) -> Iterator[str]:
    if file_type == "q8_0":
        yield "weights are rounded to 8 bits, with a scale for every 32; LayerNorms, biases and positions are not"
        if model.config.n_embd % _Q8_0_BLOCK:
            yield (
                f"weights whose rows are not a multiple of {_Q8_0_BLOCK} are float16 and not q8_0: n_embd is "
                f"{model.config.n_embd}"
            )
    elif file_type == "f16" and model.dtype != torch.float16:
        yield "weights are rounded to float16; LayerNorms, biases and positions are not"
    elif model.dtype == torch.float64:
        yield "weights are rounded to float32"
    block_size = model.config.block_size
    if block_size % _CONTEXT_STEP:
        yield (
            f"llama.cpp rounds its context up to a multiple of {_CONTEXT_STEP} tokens, but aborts after {block_size} "
            f"of this model: ask for no more tokens than that, with the prompt"
        )


@torch.no_grad()
def _compare_gelus(model: NanoGPTLMHeadModel, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Measures what the tanh GELU instead of the exact one changes, on text that the model itself generates."""
    if model.config.activation_function != "gelu":
        return
    exact, tanh = _make_pair(model.config, tensors)
    config = model.generation_config
    length = min(_N_PROBED, model.config.block_size)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # and not the GPUs
        tokens = exact.generate(
            torch.tensor([[config.bos_token_id or 0]]),
            max_new_tokens=length,
            do_sample=True,
            top_k=0,
            eos_token_id=None,
            suppress_tokens=config.suppress_tokens,
        )
    idx, targets = tokens[:, :-1], tokens[0, 1:]  # (1, T), (T,)
    logits = [each(idx).logits[0] for each in (exact, tanh)]  # (T, V) each
    difference = (logits[0] - logits[1]).abs().max().item()
    perplexities = [cross_entropy(each, targets).exp().item() for each in logits]
    yield (
        f"exact GELU becomes the tanh one, as llama.cpp computes no other for gpt2: on {length} tokens generated by "
        f"this model, logits differ by up to {difference:.1e}, and the perplexity is {perplexities[1]:.6g} instead of "
        f"{perplexities[0]:.6g}"
    )


def _make_pair(config: NanoGPTConfig, tensors: Mapping[str, torch.Tensor]) -> list[NanoGPTLMHeadModel]:
    """Makes a float32 model of each GELU, in eval mode. They share tensors, also with their source where possible."""
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        floats["lm_head.weight"] = floats["transformer.wte.weight"]
    models = []
    for activation in ("gelu", "gelu_new"):
        with torch.device("meta"):
            model = NanoGPTLMHeadModel(NanoGPTConfig(**{**config.to_dict(), "activation_function": activation}))
        model.load_state_dict(floats, assign=True)
        models.append(model.eval())
    return models
